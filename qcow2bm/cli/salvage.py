"""The command ``salvage``: makes bitmaps that are in_use or stale valid again.

*Spec*: spec/repair.md, "Salvage".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from qcow2bm import ComparisonError, Image, Plan
from qcow2bm.cli import output
from qcow2bm.cli.advice import advise_anew
from qcow2bm.cli.arguments import NAME_NOTE, EditingArguments, add_editing, add_image
from qcow2bm.cli.images import find, open_to_edit, outdated
from qcow2bm.cli.messages import CommandError, about, progress, say
from qcow2bm.cli.next_command import Advice, print_advice
from qcow2bm.cli.output import Document, json_text, quoted, size
from qcow2bm.cli.parser import Parser, UsageError
from qcow2bm.cli.terminal import print_text
from qcow2bm.units import escape

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from qcow2bm import compare

_EPILOG = """\
With --compare the bitmap gets exactly what differs between OLD and NEW. OLD must be what the last
backup restores to: the full backup with all increments. NEW is what the disk holds now: IMAGE
itself, or its data file. Each is a raw file or block device, or a qcow2 image, which is read with
qemu-nbd. IMAGE is locked meanwhile.

With --trust-stale every write since the bitmap was last stored is missing from it: use it only if
you know that there was none.

There is no undo. The change is atomic, as that of every edit. If the bitmaps are stale, the others
become inconsistent: salvage them next, or all at once with --all, or remove them.

exit status: 0 done; 1 the command failed, and all is as before unless the message says otherwise;
64 wrong usage
"""


class Arguments(EditingArguments):
    """The values of the arguments of ``salvage``."""

    image: str
    names: list[str]
    all: bool
    all_dirty: bool
    compared: tuple[str, str] | None
    trust_stale: bool
    old_format: compare.DiskFormat | None
    new_format: compare.DiskFormat | None
    is_current: bool


def define(parser: Parser) -> None:
    """Adds the arguments."""
    parser.namespace = Arguments
    parser.examples = (
        "qcow2bm salvage vm.qcow2 daily --all-dirty",
        "qcow2bm salvage vm.qcow2 --all --all-dirty",
        "qcow2bm salvage vm.qcow2 daily --compare last-backup.raw vm.qcow2",
    )
    parser.notes = (NAME_NOTE,)
    parser.epilog = _EPILOG
    add_image(parser, "a qcow2 file or block device that no other process uses")
    parser.add_word("names", "NAME", "the bitmaps; none with --all", "*")
    parser.add_argument(
        "--all", action="store_true", help="salvage every bitmap that is inconsistent or stale"
    )
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument(
        "--all-dirty", action="store_true", help="make all of it dirty: the next backup saves all"
    )
    way.add_argument(
        "--compare",
        dest="compared",
        metavar=("OLD", "NEW"),
        nargs=2,
        help="make dirty what differs between the last backup and the disk",
    )
    way.add_argument(
        "--trust-stale",
        action="store_true",
        help="keep the bits that are stored, though writes may be missing from them",
    )
    for which, metavar in (("old", "OLD"), ("new", "NEW")):
        parser.add_argument(
            f"--{which}-format",
            choices=("raw", "qcow2"),
            help=f"the format of {metavar}; needed if {metavar} begins like a qcow2 image",
        )
    parser.add_argument(
        "--assert-current",
        dest="is_current",
        action="store_true",
        help="compare with NEW although it is neither IMAGE nor its data file: you know that it is "
        "what the disk holds now",
    )
    add_editing(parser, has_result=True)


def run(arguments: Arguments) -> int:
    """Salvages bitmaps; returns the exit status."""
    if arguments.all == bool(arguments.names):
        raise UsageError(
            "give names or --all, not both" if arguments.all else "give names, or --all"
        )
    if arguments.compared and len(arguments.names) != 1:
        raise UsageError("--compare needs one NAME: each bitmap stands for a backup of its own")
    if not arguments.compared and (
        arguments.old_format or arguments.new_format or arguments.is_current
    ):
        raise UsageError("--old-format, --new-format and --assert-current need --compare")
    with about(arguments.image), open_to_edit(arguments.image, arguments) as image:
        names = _chosen(arguments, image)
        plan = _salvage(arguments, image, names)
        document = _document(arguments, image, names, plan)
        if arguments.output != "json":
            _print(image, names, plan)
    advice = Advice() if arguments.dry_run else advise_anew(arguments.image)
    if arguments.output == "json":
        output.print_json({**document, "next": advice.as_json})
    else:
        print_advice(advice)
    return 0


def _chosen(arguments: Arguments, image: Image) -> list[str]:
    """The names of the bitmaps that are meant."""
    if arguments.all:
        return outdated(image)
    return [find(image, name).name for name in arguments.names]


def _salvage(arguments: Arguments, image: Image, names: Sequence[str]) -> Plan | None:
    """Salvages the bitmaps; in a dry run, returns what would be written instead."""
    if arguments.trust_stale and names:
        were, them = ("was", "it") if len(names) == 1 else ("were", "them")
        say(
            f"warning: writes since {output.listed(names)} {were} last stored are missing from "
            f"{them}, and so from all backups that rely on {them}"
        )
    _require_salvageable(image, names)
    changed = _changed(arguments, image, names[0]) if arguments.compared else None
    with image.edit(dry_run=arguments.dry_run) as edit:
        for name in names:
            edit.salvage(name, changed, trust_stored=arguments.trust_stale)
        return edit.plan() if arguments.dry_run else None


def _require_salvageable(image: Image, names: Iterable[str]) -> None:
    """Raises what salvage would raise, before two disks are compared in vain."""
    with image.edit(dry_run=True) as edit:
        for name in names:
            edit.salvage(name)


def _changed(arguments: Arguments, image: Image, name: str) -> NDArray[np.uint8]:
    """The bits of all granules in which the disk differs from the last backup."""
    from qcow2bm import compare  # which needs numpy

    assert arguments.compared
    old, new = arguments.compared
    say(
        f"note: {escape(old)} must have exactly the content to which the last backup restores, "
        f"with all increments: the next backup will not save what is equal in {escape(new)}"
    )
    try:
        with compare.open_disks(
            image,
            compare.ComparedDisk(old, arguments.old_format),
            compare.ComparedDisk(new, arguments.new_format),
            is_current=arguments.is_current,
            is_image_locked=not arguments.dry_run,
            locking=not arguments.no_lock,
            lock_timeout=arguments.wait,
        ) as disks:
            if disks.old.size != disks.new.size:
                say(
                    f"warning: {escape(old)} has {disks.old.size} bytes, the disk "
                    f"{disks.new.size}: was it resized since?"
                )
            with progress(min(disks.old.size, disks.new.size), "compared") as show:
                granularity = image.bitmaps[name].granularity
                return compare.find_differences(disks.old, disks.new, granularity, progress=show)
    except ComparisonError as error:
        option = "--old-format" if error.path == old else "--new-format"
        raise CommandError(error.path, f"{error.reason}{_advice(error, option)}") from error


def _advice(error: ComparisonError, option: str) -> str:
    if error.fault == "not-current":
        return ": if you know that it is what the disk holds now, --assert-current"
    if error.fault == "container":
        cure = "make it raw or qcow2 if it is one"
        if error.container == "qcow2":
            cure = f"say {option} qcow2 if it is one"
        return f": {cure}; if it is a disk on which a guest wrote that, {option} raw"
    return ""


def _print(image: Image, names: Sequence[str], plan: Plan | None) -> None:
    if plan is not None:
        output.print_plan(plan)
        return
    for name in names:
        dirty = size(image.bitmaps[name].count())
        print_text(f"{quoted(name)} is valid: {dirty} of {size(image.virtual_size)} dirty")
    if not names:
        print("nothing to salvage: no bitmap is inconsistent or stale")


def _inconsistent(image: Image) -> Iterator[str]:
    return (
        name
        for name, bitmap in image.bitmaps.items()
        if bitmap.status == "inconsistent" and not bitmap.is_auxiliary
    )


def _document(
    arguments: Arguments,
    image: Image,
    names: Sequence[str],
    plan: Plan | None,
) -> Document:
    is_done = plan is None
    return {
        **output.head(arguments.image),
        "dry-run": arguments.dry_run,
        "salvaged": [
            {
                "name": json_text(name),
                "dirty-bytes": image.bitmaps[name].count() if is_done else None,
            }
            for name in names
        ],
        "inconsistent": [json_text(other) for other in _inconsistent(image)] if is_done else None,
        "plan": None if plan is None else output.plan_as_json(plan),
    }
