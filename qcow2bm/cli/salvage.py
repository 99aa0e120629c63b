"""The command ``salvage``: makes bitmaps that are in_use or stale valid again.

*Spec*: spec/repair.md, "Salvage".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from qcow2bm import Image, Plan
from qcow2bm.cli import output
from qcow2bm.cli.advice import advise_anew
from qcow2bm.cli.arguments import NAME_NOTE, add_editing, add_image
from qcow2bm.cli.comparing import (
    COMPARE_NOTE,
    ComparingArguments,
    add_compare,
    differences,
    require_compare,
)
from qcow2bm.cli.images import find, open_to_edit, outdated
from qcow2bm.cli.messages import about, say
from qcow2bm.cli.next_command import Advice, print_advice
from qcow2bm.cli.output import Document, json_text, quoted, size
from qcow2bm.cli.parser import Parser, UsageError
from qcow2bm.cli.terminal import print_text

_EPILOG = f"""\
With --compare each bitmap gets exactly what differs between OLD and NEW, at its granularity. The
two are read once, however many bitmaps are named. {COMPARE_NOTE.rstrip()}
If several bitmaps are named, OLD must be the last backup of each of them.

With --trust-stale every write since the bitmap was last stored is missing from it: use it only if
you know that there was none.

There is no undo. The change is atomic, as that of every edit. If the bitmaps are stale, the others
become inconsistent: salvage them next, or all at once with --all, or remove them.

exit status: 0 done; 1 the command failed, and all is as before unless the message says otherwise;
64 wrong usage
"""


class Arguments(ComparingArguments):
    """The values of the arguments of ``salvage``."""

    image: str
    names: list[str]
    all: bool
    all_dirty: bool
    trust_stale: bool


def define(parser: Parser) -> None:
    """Adds the arguments."""
    parser.namespace = Arguments
    parser.examples = (
        "qcow2bm salvage vm.qcow2 daily --all-dirty",
        "qcow2bm salvage vm.qcow2 --all --all-dirty",
        "qcow2bm salvage vm.qcow2 daily --compare last-backup.raw vm.qcow2",
        "qcow2bm salvage vm.qcow2 daily fine --compare last-backup.raw vm.qcow2",
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
    add_compare(parser, way.add_argument)
    way.add_argument(
        "--trust-stale",
        action="store_true",
        help="keep the bits that are stored, though writes may be missing from them",
    )
    add_editing(parser, has_result=True)


def run(arguments: Arguments) -> int:
    """Salvages bitmaps; returns the exit status."""
    if arguments.all == bool(arguments.names):
        raise UsageError(
            "give names or --all, not both" if arguments.all else "give names, or --all"
        )
    if arguments.compared and arguments.all:
        raise UsageError("--compare needs names: OLD is not the last backup of just any bitmap")
    require_compare(arguments)
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
    granularities = {name: image.bitmaps[name].granularity for name in names}
    changed = differences(arguments, image, {*granularities.values()}) if arguments.compared else {}
    with image.edit(dry_run=arguments.dry_run) as edit:
        for name in names:
            packed = changed.get(granularities[name])
            edit.salvage(name, packed, trust_stored=arguments.trust_stale)
        return edit.plan() if arguments.dry_run else None


def _require_salvageable(image: Image, names: Iterable[str]) -> None:
    """Raises what salvage would raise, before two disks are compared in vain."""
    with image.edit(dry_run=True) as edit:
        for name in names:
            edit.salvage(name)


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
