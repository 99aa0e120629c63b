"""Printing what ``map --data`` adds: what the image has for each clean and dirty range.

*Spec*: spec/json.md, "map" and "map totals"; spec/data.md.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from qcow2bm import DataKind, DirtySet, Image
from qcow2bm.cli import output

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

TYPES = ("clean", "dirty")


def print_lines(image: Image, dirty: DirtySet, *, dirty_only: bool) -> None:
    """Prints a line for each range, with the kind of what the image has for it."""
    names = [kind.name.lower() for kind in DataKind]
    for extents in _extents(image, dirty, dirty_only=dirty_only):
        sys.stdout.write(
            "".join(
                f"{start:10d}  {length:10d}  {type:3d}  {TYPES[type]}  {names[kind]}\n"
                for start, length, type, kind in extents.tolist()
            )
        )


def print_json(image: Image, dirty: DirtySet, *, dirty_only: bool) -> None:
    """Prints a list of all ranges as JSON."""
    from qcow2bm.cli.rows import RowPrinter

    has_backing_file = image.backing_file is not None
    texts = [_end_of_row(type, kind, has_backing_file) for type in range(2) for kind in DataKind]
    printer = RowPrinter(b',\n{ "offset": ', b', "length": ', tuple(texts), image.virtual_size)
    rows = (
        (extents[:, 0], extents[:, 1], len(DataKind) * extents[:, 2] + extents[:, 3])
        for extents in _extents(image, dirty, dirty_only=dirty_only)
    )
    output.write_rows(b"[", printer, rows, b"\n]\n")


def _extents(image: Image, dirty: DirtySet, *, dirty_only: bool) -> Iterator[NDArray[np.int64]]:
    for extents in image.dirty_data_extents(dirty):
        found = extents[extents[:, 2] == 1] if dirty_only else extents
        if len(found):
            yield found


def _end_of_row(type: int, kind: DataKind, has_backing_file: bool) -> bytes:
    """The end of a row of JSON; all ends are equally long."""
    flags = {
        "data": kind.has_data,
        "zero": kind.reads_as_zeros(has_backing_file=has_backing_file),
        "present": kind.is_present,
        "compressed": kind is DataKind.COMPRESSED,
    }
    words = ", ".join(f'"{key}": {output.as_json(value):>5}' for key, value in flags.items())
    return f', "type": {type}, "description": "{TYPES[type]}", {words}}}'.encode()


def totals(image: Image, dirty: DirtySet) -> tuple[dict[str, int], dict[str, int]]:
    """Returns how many bytes there are of what is clean and of what is dirty, each by a name.

    Compressed data are counted as data, and once more as compressed.
    """
    clean, not_clean = (
        {
            "data": sizes[DataKind.DATA] + sizes[DataKind.COMPRESSED],
            "compressed": sizes[DataKind.COMPRESSED],
            "zero": sizes[DataKind.ZERO],
            "unallocated": sizes[DataKind.UNALLOCATED],
        }
        for sizes in image.dirty_data_totals(dirty)
    )
    return clean, not_clean
