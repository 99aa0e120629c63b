"""The command ``verify``: whether an old backup and a bitmap together make up the disk.

*Spec*: spec/verify.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from qcow2bm import open
from qcow2bm.cli import output
from qcow2bm.cli.arguments import NAME_NOTE, OutputArguments, add_image, add_output, add_wait
from qcow2bm.cli.comparing import add_format, add_new, explained, shown
from qcow2bm.cli.images import find
from qcow2bm.cli.messages import about
from qcow2bm.cli.output import count, json_text, quoted, size
from qcow2bm.cli.parser import Parser
from qcow2bm.cli.terminal import print_text
from qcow2bm.units import escape

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from qcow2bm import compare

_MOST_LISTED = 20

_EPILOG = """\
What is clean in the bitmap must be equal in BACKUP and in the disk. BACKUP is what the backup
restores to with which the bitmap began: the last full backup with all increments since. Dirty
ranges are not read.

The disk is what IMAGE shows; if IMAGE has a raw data file, --new FILE reads the data file itself,
which is faster. BACKUP and NEW are raw files or block devices, or qcow2 images, which are read with
qemu-nbd. No process can write to them meanwhile.

exit status: 0 proved; 1 it could not be found out; 2 writes are missing from the bitmap: take a
full backup, or make the bitmap anew with add --compare; 64 wrong usage
"""


class Arguments(OutputArguments):
    """The values of the arguments of ``verify``."""

    image: str
    name: str
    backup: str
    backup_format: compare.DiskFormat | None
    new: str | None
    new_format: compare.DiskFormat | None
    is_current: bool
    stale: bool
    wait: float


def define(parser: Parser) -> None:
    """Adds the arguments."""
    parser.namespace = Arguments
    parser.examples = (
        "qcow2bm verify vm.qcow2 daily last-backup.raw",
        "qcow2bm verify vm.qcow2 daily increment.qcow2 --backup-format qcow2",
        "qcow2bm verify bitmaps.qcow2 daily last-backup.raw --new disk.raw",
    )
    parser.notes = (NAME_NOTE,)
    parser.epilog = _EPILOG
    add_image(parser, "a qcow2 file or block device to which no other process writes")
    parser.add_word("name", "NAME", "the bitmap")
    parser.add_word("backup", "BACKUP", "what the last backup restores to")
    add_format(parser, "--backup-format", "BACKUP")
    parser.add_argument(
        "--new", metavar="NEW", help="read the disk from its data file instead of IMAGE"
    )
    add_new(parser)
    parser.add_argument(
        "--stale",
        action="store_true",
        help="compare also with the stored bits of a bitmap that is inconsistent or stale: if "
        "nothing is missing from them, salvage --trust-stale is right",
    )
    add_wait(parser, "writes to one of the files")
    add_output(parser)


def run(arguments: Arguments) -> int:
    """Compares and prints; returns the exit status."""
    from qcow2bm import compare  # which needs numpy

    path = arguments.image
    new = path if arguments.new is None else arguments.new
    with about(path), open(path, lock_timeout=arguments.wait) as image:
        bitmap = find(image, arguments.name)
        is_outdated = arguments.stale and bitmap.status in ("inconsistent", "stale")
        totals = bitmap.stale_totals() if is_outdated else bitmap.totals(with_extents=False)
        with (
            explained("--backup-format", arguments.backup, "--new-format"),
            compare.open_disks(
                image,
                compare.ComparedDisk(arguments.backup, arguments.backup_format),
                compare.ComparedDisk(new, arguments.new_format),
                is_current=arguments.is_current,
                is_image_locked=False,
                lock_timeout=arguments.wait,
            ) as disks,
            shown(disks) as show,
        ):
            found = compare.find_missing(
                disks.old, disks.new, bitmap, trust_stored=arguments.stale, progress=show
            )
            missing, dirty = _Missing(found), totals.dirty_bytes
            summary = _Summary(missing, dirty, image.virtual_size - dirty)
            if arguments.output == "json":
                _print_json(arguments, image.virtual_size, summary)
            else:
                _print(arguments, summary, is_outdated=is_outdated)
    return output.PROBLEMS_FOUND if missing.length else 0


class _Missing:
    """The ranges in which a write is missing from the bitmap, added up while they are found.

    Attributes:
        count: how many ranges were found so far.
        length: how many bytes these ranges have.
    """

    def __init__(self, found: Iterator[NDArray[np.int64]]) -> None:
        """Takes arrays int64[n, 2] of (start, length)."""
        self.count = 0
        self.length = 0
        self._found = found

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        for ranges in self._found:
            self.count += len(ranges)
            self.length += int(ranges[:, 1].sum())
            yield ranges


class _Summary(NamedTuple):
    """What is found out: the ranges, and how many bytes are dirty and compared."""

    missing: _Missing
    dirty: int
    compared: int


def _print(arguments: Arguments, summary: _Summary, *, is_outdated: bool) -> None:
    missing = summary.missing
    first: list[list[int]] = []
    for ranges in missing:
        first += ranges[: _MOST_LISTED - len(first)].tolist()
    for start, length in first:
        print(f"{start:>14}  {length:>14}  missing")
    if missing.count > len(first):
        print(f"and {count(missing.count - len(first), 'more range')}")
    bits = "the stored bits of bitmap" if is_outdated else "bitmap"
    answer = f"yes: {bits} {quoted(arguments.name)} and the backup together make up the disk"
    if missing.count:
        ranges_ = count(missing.count, "range")
        answer = (
            f"no: writes are missing from {bits} {quoted(arguments.name)}: {size(missing.length)} "
            f"in {ranges_} differ from the backup, and are clean"
        )
    print_text(
        f"{escape(arguments.image)}: {answer}; {size(summary.compared)} compared, "
        f"{size(summary.dirty)} dirty"
    )


def _print_json(arguments: Arguments, virtual_size: int, summary: _Summary) -> None:
    from qcow2bm.cli.rows import RowPrinter

    document = {
        **output.head(arguments.image),
        "bitmap": json_text(arguments.name),
        "backup": json_text(arguments.backup),
    }
    opening = f'{output.as_json(document).removesuffix("}")}, "missing": ['
    printer = RowPrinter(b',\n {"start": ', b', "length": ', (b"}",), virtual_size)
    rows = ((ranges[:, 0], ranges[:, 1], 0) for ranges in summary.missing)
    output.write_rows(opening.encode(), printer, rows, b"],\n")
    following = {
        "proved": not summary.missing.count,
        "missing-bytes": summary.missing.length,
        "dirty-bytes": summary.dirty,
        "compared-bytes": summary.compared,
    }
    print(output.as_json(following).removeprefix("{"))
