"""The command ``map``: the dirty and clean ranges of bitmaps, in the shape nbdinfo uses.

*Spec*: spec/json.md, "map"; spec/algebra.md.

What ``--data`` adds is in ``map_with_data``.
"""

from __future__ import annotations

import sys
from typing import get_args

from qcow2bm import Combination, DirtySet, Image, Op, open
from qcow2bm.cli import map_with_data, output
from qcow2bm.cli.arguments import (
    NAME_NOTE,
    OutputArguments,
    ReadingArguments,
    add_image,
    add_output,
    add_reading,
)
from qcow2bm.cli.images import find
from qcow2bm.cli.messages import about
from qcow2bm.cli.parser import Parser


class Arguments(OutputArguments, ReadingArguments):
    """The values of the arguments of ``map``."""

    image: str
    names: list[str]
    op: Op
    totals: bool
    dirty: bool
    data: bool


def define(parser: Parser) -> None:
    """Adds the arguments."""
    parser.namespace = Arguments
    parser.examples = (
        "qcow2bm map vm.qcow2 daily",
        "qcow2bm map --dirty --json vm.qcow2 daily",
        "qcow2bm map --totals vm.qcow2 monday tuesday wednesday",
        "qcow2bm map --data --totals vm.qcow2 daily",
    )
    parser.notes = (NAME_NOTE,)
    add_image(parser)
    parser.add_word("names", "NAME", "the bitmap; of several, what --op says", "+")
    parser.add_argument(
        "--op",
        choices=get_args(Op),
        default="or",
        help="how to combine the first of several bitmaps with each other one",
    )
    add_output(parser)
    add_reading(parser)
    parser.add_argument(
        "--totals", action="store_true", help="print only how much is dirty and how much is clean"
    )
    parser.add_argument("--dirty", action="store_true", help="leave out what is clean")
    parser.add_argument(
        "--data",
        action="store_true",
        help="also say what the image has there: data, zeros, or nothing",
    )


def run(arguments: Arguments) -> int:
    """Prints the map; returns the exit status."""
    with (
        about(arguments.image),
        open(arguments.image, force_share=arguments.force_share) as image,
    ):
        bitmap = _chosen(image, arguments)
        problems = image.problems
        if arguments.totals:
            _print_totals(image, bitmap, arguments)
        elif arguments.data and arguments.output == "json":
            map_with_data.print_json(image, bitmap, dirty_only=arguments.dirty)
        elif arguments.data:
            map_with_data.print_lines(image, bitmap, dirty_only=arguments.dirty)
        elif arguments.output == "json":
            _print_json(bitmap, image.virtual_size, dirty_only=arguments.dirty)
        else:
            _print_lines(bitmap, image.virtual_size, dirty_only=arguments.dirty)
    if not arguments.quiet:
        output.warn_of(image.name, problems)
    return output.status_of(problems)


def _chosen(image: Image, arguments: Arguments) -> DirtySet:
    """Returns the bitmap that is meant, or the combination of several."""
    bitmaps = [find(image, name) for name in arguments.names]
    return bitmaps[0] if len(bitmaps) == 1 else Combination(arguments.op, *bitmaps)


def _print_totals(image: Image, bitmap: DirtySet, arguments: Arguments) -> None:
    dirty, virtual_size = bitmap.count(), image.virtual_size
    by_kind = map_with_data.totals(image, bitmap) if arguments.data else ({}, {})
    lines = []
    for type, size in enumerate((virtual_size - dirty, dirty)):
        description = map_with_data.TYPES[type]
        if arguments.dirty and not type:
            continue
        if arguments.output == "json":
            percent = output.percent(size, virtual_size)
            row = {"size": size, "percent": percent, "type": type, "description": description}
            row |= {f"{description}-{name}-bytes": part for name, part in by_kind[type].items()}
            lines.append(output.as_json(row))
            continue
        for name, part in {"": size, **by_kind[type]}.items():
            percent = output.percent(part, virtual_size)
            lines.append(f"{part:10d} {percent:5.1f}% {type:3d} {description} {name}".rstrip())
    if arguments.output == "json":
        print("[\n" + ",\n".join(lines) + "\n]")
    else:
        print("\n".join(lines))


def _print_lines(bitmap: DirtySet, virtual_size: int, *, dirty_only: bool) -> None:
    line = "%10d  %10d  %3d  %s\n"
    end = 0
    for extents in bitmap.extents():
        parts = []
        for start, length in extents.tolist():
            if start > end and not dirty_only:
                parts.append(line % (end, start - end, 0, "clean"))
            parts.append(line % (start, length, 1, "dirty"))
            end = start + length
        sys.stdout.write("".join(parts))
    if end < virtual_size and not dirty_only:
        sys.stdout.write(line % (end, virtual_size - end, 0, "clean"))


def _print_json(bitmap: DirtySet, virtual_size: int, *, dirty_only: bool) -> None:
    from qcow2bm.cli.rows import RowPrinter

    ends = [b', "type": 0, "description": "clean"}', b', "type": 1, "description": "dirty"}']
    if dirty_only:
        ends.pop(0)
    printer = RowPrinter(b',\n{ "offset": ', b', "length": ', tuple(ends), virtual_size)
    rows = _dirty(bitmap) if dirty_only else _alternating(bitmap, virtual_size)
    output.write_rows(b"[", printer, rows, b"\n]\n")


def _dirty(bitmap: DirtySet) -> output.Rows:
    return ((extents[:, 0], extents[:, 1], 0) for extents in bitmap.extents())


def _alternating(bitmap: DirtySet, virtual_size: int) -> output.Rows:
    """Clean and dirty ranges in turn over the whole disk, as pieces: starts, lengths, phase.

    The phase is 0 if the piece begins with a clean range, 1 if with a dirty one.
    """
    import numpy as np

    end = 0
    for extents in bitmap.extents():
        bounds = np.empty(2 * len(extents) + 1, np.int64)
        bounds[0] = end
        bounds[1::2] = extents[:, 0]
        bounds[2::2] = extents[:, 0] + extents[:, 1]
        end = int(bounds[-1])
        dirty_first = int(bounds[0] == bounds[1])
        yield bounds[dirty_first:-1], np.diff(bounds[dirty_first:]), dirty_first
    if end < virtual_size:
        yield np.array([end]), np.array([virtual_size - end]), 0
