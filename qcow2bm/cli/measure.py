"""The command ``measure``: how much room bitmaps take, and would take.

*Spec*: spec/measure.md.
"""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Callable, Sequence

from qcow2bm import Bitmap, BitmapSpace, build_empty_image, open
from qcow2bm.cli import output
from qcow2bm.cli.arguments import (
    NAME_NOTE,
    SIZE_NOTE,
    OutputArguments,
    ReadingArguments,
    add_output,
    add_reading,
    size,
)
from qcow2bm.cli.images import find
from qcow2bm.cli.measure_output import (
    Measured,
    Space,
    Subject,
    print_addition,
    print_addition_as_json,
    print_bitmaps,
    print_bitmaps_as_json,
)
from qcow2bm.cli.messages import about
from qcow2bm.cli.output import Document
from qcow2bm.cli.parser import Parser, UsageError
from qcow2bm.units import align_up, escape

_SECTOR_SIZE = 512  # QEMU makes disks of whole sectors
_NAME_SIZE = 36  # the length of a UUID
_REFCOUNT_BITS = 16

_EPILOG = """\
With IMAGE alone: what the bitmaps take now, the most they can take, and what the next backup by
each of them saves. The same dirty granules are counted at coarser granularities, too: so much
would be saved if the bitmap had that granularity. What a finer granularity would have saved
cannot be known.

With --add, or without IMAGE: what bitmaps take that are to be added. Without IMAGE the image is new
and has no data.

exit status: 0 fine; 1 the command failed; 2 done, but the image has problems (of severity refused,
unusable or leak); 64 wrong usage
"""


class Arguments(OutputArguments, ReadingArguments):
    """The values of the arguments of ``measure``."""

    words: list[str]
    add: bool
    count: int | None
    granularity: int | None
    name_size: int | None
    resize: int | None
    size: int | None
    cluster_size: int | None
    refcount_bits: int | None


def define(parser: Parser) -> None:
    """Adds the arguments."""
    parser.namespace = Arguments
    parser.examples = (
        "qcow2bm measure vm.qcow2",
        "qcow2bm measure vm.qcow2 --add -g 4k --count 7",
        "qcow2bm measure --size 16T --granularity 64K --cluster-size 64K",
    )
    parser.notes = (NAME_NOTE, SIZE_NOTE)
    parser.epilog = _EPILOG
    parser.usage = (
        "%(prog)s [--resize SIZE] [--output {human,json}] [-U] [-q] IMAGE [NAME ...]\n"
        "       %(prog)s --add [--count N] [-g SIZE] [--name-size BYTES] [--resize SIZE] IMAGE\n"
        "       %(prog)s --size SIZE [--cluster-size SIZE] [--refcount-bits BITS] [--count N]\n"
        "               [-g SIZE] [--name-size BYTES]"
    )
    parser.add_word(
        "words", "IMAGE NAME", "the image, and the bitmaps (default: those that record)", "*"
    )
    add_output(parser)
    add_reading(parser)
    parser.add_argument(
        "--add", action="store_true", help="measure bitmaps that are to be added to IMAGE"
    )
    add = parser.add_argument
    add("--count", metavar="N", type=_count, help="add so many bitmaps (default: 1)")
    _add_size(add, "-g", "--granularity", text="their granularity (default: as add has it)")
    _add_size(add, "--name-size", text="the length of each name in bytes (default: 36)")
    _add_size(add, "--resize", text="measure for the disk after it is resized to SIZE")
    _add_size(add, "--size", text="instead of IMAGE: a new image with a disk of this size")
    _add_size(add, "--cluster-size", text="its cluster size (default: 64k, or 2M for a huge disk)")
    _add_size(add, "--refcount-bits", text="the width of its refcounts (default: 16)")


def _add_size(add: Callable[..., object], *names: str, text: str) -> None:
    """Adds an option whose value is a number of bytes, or of bits; a size can be written short."""
    metavar = _METAVARS.get(names[-1], "SIZE")
    add(*names, metavar=metavar, type=size, help=text)


_METAVARS = {"--name-size": "BYTES", "--refcount-bits": "BITS"}


def _count(text: str) -> int:
    """A number of bitmaps."""
    if not text.isascii() or not text.isdigit() or not 0 < len(text) <= 9 or not int(text):
        raise ArgumentTypeError(f'"{escape(text)}" is no number of bitmaps')
    return int(text)


# Measuring


def run(arguments: Arguments) -> int:
    """Measures; returns the exit status."""
    _require_sense(arguments)
    if arguments.size is not None:
        _run_new(arguments, arguments.size)
        return 0
    path, *names = arguments.words
    with (
        about(path, ValueError),
        open(path, force_share=arguments.force_share) as image,
    ):
        problems = image.problems
        resized = arguments.resize
        resized = None if resized is None else align_up(resized, _SECTOR_SIZE)
        subject = Subject(image, is_new=False, resized=resized)
        if arguments.add:
            _show_addition(arguments, output.head(path), subject)
        else:
            _show_bitmaps(arguments, output.head(path), subject, names)
    if not arguments.quiet:
        output.warn_of(image.name, problems)
    return output.status_of(problems)


def _require_sense(arguments: Arguments) -> None:
    """Raises `UsageError` if the arguments do not go together."""
    of_new = (arguments.size, arguments.cluster_size, arguments.refcount_bits)
    of_added = (arguments.count, arguments.granularity, arguments.name_size)
    if not arguments.words:
        if arguments.size is None:
            raise UsageError("give IMAGE, or --size")
        if arguments.resize is not None:
            raise UsageError("--resize is for an IMAGE")
        return
    if any(value is not None for value in of_new):
        raise UsageError(
            "IMAGE has its own size, clusters and refcounts; for another size of its disk give "
            "--resize"
        )
    if arguments.add and len(arguments.words) > 1:
        raise UsageError("with --add, NAME is not known yet")
    if not arguments.add and any(value is not None for value in of_added):
        raise UsageError("--count, --granularity and --name-size need --add")


# Bitmaps that are there


def _show_bitmaps(
    arguments: Arguments, document: Document, subject: Subject, names: Sequence[str]
) -> None:
    image = subject.image
    everything = [image.bitmap(entry.index) for entry in image.directory]
    chosen = [find(image, name) for name in names]
    spaces = [_space(bitmap, subject.resized) for bitmap in everything]
    together = _together(image.bitmap_space, spaces, is_resized=subject.resized is not None)
    measured = (
        _measure(bitmap, spaces[bitmap.index], is_chosen=bool(chosen))
        for bitmap in chosen or everything
    )
    if arguments.output == "json":
        print_bitmaps_as_json(document, subject, together, measured)
    else:
        print_bitmaps(subject, together, measured)


def _space(bitmap: Bitmap, resized: int | None) -> Space:
    after = None if resized is None else bitmap.space_after_resize(resized)
    return Space(bitmap.space, after, bitmap.full_space(resized))


def _together(now: BitmapSpace | None, spaces: Sequence[Space], *, is_resized: bool) -> Space:
    """The space of all bitmaps together, with the clusters of the directory."""
    resized = _sum(now, [space.resized for space in spaces]) if is_resized else None
    return Space(now, resized, _sum(now, [space.full for space in spaces]))


def _sum(now: BitmapSpace | None, spaces: Sequence[BitmapSpace | None]) -> BitmapSpace | None:
    known = [space for space in spaces if space]
    if not now or len(known) < len(spaces):
        return None
    return now._replace(
        tables=sum(space.tables for space in known), data=sum(space.data for space in known)
    )


def _measure(bitmap: Bitmap, space: Space, *, is_chosen: bool) -> Measured:
    """Measures one bitmap; its next backup only if it is chosen, or records for a backup."""
    status = bitmap.status
    is_counted = status == "valid" and (is_chosen or (bitmap.auto and not bitmap.is_auxiliary))
    return Measured(bitmap, status, space, bitmap.coarser_totals() if is_counted else ())


# Bitmaps to be added


def _run_new(arguments: Arguments, disk_size: int) -> None:
    """Measures for a new image, which is made in memory."""
    with about("a new image", ValueError):
        new = build_empty_image(
            align_up(disk_size, _SECTOR_SIZE),
            arguments.cluster_size,
            _REFCOUNT_BITS if arguments.refcount_bits is None else arguments.refcount_bits,
        )
        with open(new.head.ljust(new.length, b"\0")) as image:
            document = {**output.head(""), "filename": None}
            _show_addition(arguments, document, Subject(image, is_new=True, resized=None))


def _show_addition(arguments: Arguments, document: Document, subject: Subject) -> None:
    count = arguments.count or 1
    addition = subject.image.measure_addition(
        count,
        granularity=arguments.granularity,
        name_size=_NAME_SIZE if arguments.name_size is None else arguments.name_size,
        virtual_size=subject.virtual_size,
    )
    if arguments.output == "json":
        print_addition_as_json(document, subject, addition, count)
    else:
        print_addition(subject, addition, count)
