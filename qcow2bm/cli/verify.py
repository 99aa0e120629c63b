"""The command ``verify``: whether an old backup and a bitmap together make up the disk.

*Spec*: spec/verify.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

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
What is clean in the bitmap must be equal in BACKUP and in the disk. BACKUP is the content of the
disk when the bitmap was added or last cleared: the last full backup with all increments since.
Dirty ranges are not read.

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
        dirty, compared = totals.dirty_bytes, image.virtual_size - totals.dirty_bytes
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
            missing = _Missing(found)
            if arguments.output == "json":
                _print_ranges(arguments, missing, image.virtual_size)
            else:
                missing.find()
    if arguments.output == "json":
        _print_rest(missing, dirty, compared)
    else:
        bits = f"{'the stored bits of ' * is_outdated}bitmap {quoted(arguments.name)}"
        _print(path, missing, bits, f"{size(compared)} compared, {size(dirty)} dirty")
    return output.PROBLEMS_FOUND if missing.count else 0


class _Missing:
    """The ranges that are missing from the bitmap, which are counted while they are found.

    Attributes:
        count: how many ranges were found so far.
        length: how many bytes these ranges have.
        first: the first of these ranges, at most `_MOST_LISTED`, as [start, length].
    """

    def __init__(self, found: Iterator[NDArray[np.int64]]) -> None:
        """Takes arrays int64[n, 2] of (start, length)."""
        self.count = 0
        self.length = 0
        self.first: list[list[int]] = []
        self._found = found

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        for ranges in self._found:
            self.count += len(ranges)
            self.length += int(ranges[:, 1].sum())
            self.first += ranges[: _MOST_LISTED - len(self.first)].tolist()
            yield ranges

    def find(self) -> None:
        """Finds all ranges."""
        for _ in self:
            pass


def _print(path: str, missing: _Missing, bits: str, sizes: str) -> None:
    for start, length in missing.first:
        print(f"{start:>14}  {length:>14}  missing")
    if missing.count > len(missing.first):
        print(f"and {count(missing.count - len(missing.first), 'more range')}")
    answer = f"yes: {bits} and the backup together make up the disk"
    if missing.count:
        answer = (
            f"no: writes are missing from {bits}: {size(missing.length)} in "
            f"{count(missing.count, 'range')} differ from the backup, and are clean"
        )
    print_text(f"{escape(path)}: {answer}; {sizes}")


def _print_ranges(arguments: Arguments, missing: _Missing, virtual_size: int) -> None:
    """Prints the beginning of the document, with all ranges, while they are found."""
    from qcow2bm.cli.rows import RowPrinter

    document = {
        **output.head(arguments.image),
        "bitmap": json_text(arguments.name),
        "backup": json_text(arguments.backup),
    }
    opening = f'{output.as_json(document).removesuffix("}")}, "missing": ['
    printer = RowPrinter(b',\n {"start": ', b', "length": ', (b"}",), virtual_size)
    rows = ((ranges[:, 0], ranges[:, 1], 0) for ranges in missing)
    output.write_rows(opening.encode(), printer, rows, b"],\n")


def _print_rest(missing: _Missing, dirty: int, compared: int) -> None:
    """Prints the rest of the document."""
    document = {
        "proved": not missing.count,
        "missing-bytes": missing.length,
        "dirty-bytes": dirty,
        "compared-bytes": compared,
    }
    print(output.as_json(document).removeprefix("{"))
