"""What the commands share that compare the disk with its last backup.

*Spec*: spec/repair.md, "Comparing".
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from qcow2bm import ComparisonError, Image
from qcow2bm.cli.arguments import EditingArguments
from qcow2bm.cli.messages import CommandError, progress, say
from qcow2bm.cli.parser import Parser, UsageError
from qcow2bm.units import escape

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from qcow2bm import compare

COMPARE_NOTE = """\
OLD must be what the last backup restores to: the full backup with all increments. NEW is what the
disk holds now: IMAGE itself, or its data file. Each is a raw file or block device, or a qcow2
image, which is read with qemu-nbd. IMAGE is locked meanwhile.
"""


class ComparingArguments(EditingArguments):
    """The values of the arguments that `add_compare` adds, in a command that edits."""

    compared: tuple[str, str] | None
    old_format: compare.DiskFormat | None
    new_format: compare.DiskFormat | None
    is_current: bool


def add_compare(parser: Parser, add_option: Callable[..., object]) -> None:
    """Adds --compare with ``add_option``, and to the parser the options that belong to it."""
    add_option(
        "--compare",
        dest="compared",
        metavar=("OLD", "NEW"),
        nargs=2,
        help="make dirty what differs between the last backup and the disk",
    )
    add_format(parser, "--old-format", "OLD")
    add_new(parser)


def add_format(parser: Parser, option: str, metavar: str) -> None:
    """Adds the option that says the format of a disk."""
    parser.add_argument(
        option,
        choices=("raw", "qcow2"),
        help=f"the format of {metavar}; needed if {metavar} begins like a qcow2 image",
    )


def add_new(parser: Parser) -> None:
    """Adds the options about NEW, which is what the disk holds now."""
    add_format(parser, "--new-format", "NEW")
    parser.add_argument(
        "--assert-current",
        dest="is_current",
        action="store_true",
        help="compare with NEW although it is neither IMAGE nor its data file: you know that it is "
        "what the disk holds now",
    )


def require_compare(arguments: ComparingArguments) -> None:
    """Raises `UsageError` if options that belong to --compare are given without it."""
    if not arguments.compared and (
        arguments.old_format or arguments.new_format or arguments.is_current
    ):
        raise UsageError("--old-format, --new-format and --assert-current need --compare")


def differences(
    arguments: ComparingArguments, image: Image, granularities: Collection[int]
) -> dict[int, NDArray[np.uint8]]:
    """Returns for each granularity the bits of what differs between OLD and NEW."""
    from qcow2bm import compare  # which needs numpy

    assert arguments.compared
    old, new = arguments.compared
    say(
        f"note: {escape(old)} must have exactly the content to which the last backup restores, "
        f"with all increments: the next backup will not save what is equal in {escape(new)}"
    )
    with (
        explained("--old-format", old, "--new-format"),
        compare.open_disks(
            image,
            compare.ComparedDisk(old, arguments.old_format),
            compare.ComparedDisk(new, arguments.new_format),
            is_current=arguments.is_current,
            is_image_locked=not arguments.dry_run,
            locking=not arguments.no_lock,
            lock_timeout=arguments.wait,
        ) as disks,
        shown(disks) as show,
    ):
        return compare.find_differences_at(disks.old, disks.new, granularities, progress=show)


@contextmanager
def shown(disks: compare.OpenDisks) -> Iterator[Callable[[int], None] | None]:
    """Shows the progress of a comparison, and warns if the disks differ in size.

    Yields what `qcow2bm.cli.messages.progress` yields.
    """
    old, new = disks
    if old.size != new.size:
        say(
            f"warning: {escape(old.name)} has {old.size} bytes, the disk {new.size}: was it "
            "resized since?"
        )
    with progress(min(old.size, new.size), "compared") as show:
        yield show


@contextmanager
def explained(old_option: str, old: str, new_option: str) -> Iterator[None]:
    """Adds to a `ComparisonError` in the block which option helps.

    Args:
        old_option: the option that says the format of the backup.
        old: the path of the backup, as given.
        new_option: the option that says the format of the disk.

    Raises:
        CommandError: instead of a `ComparisonError`.
    """
    try:
        yield
    except ComparisonError as error:
        option = old_option if error.path == old else new_option
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
