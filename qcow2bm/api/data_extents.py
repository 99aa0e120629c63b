"""What an image has for the ranges of its disk, and of a bitmap, as arrays.

*Spec*: spec/data.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from qcow2bm.api.open_image import OpenImage
from qcow2bm.bits.partitions import Ranges, partition, refine
from qcow2bm.guest.data_map import DataMap
from qcow2bm.guest.kinds import DataKind

Numbers = NDArray[np.int64]


class DataTotals(NamedTuple):
    """How many bytes of the disk are of each kind: of what is clean, and of what is dirty."""

    clean: Mapping[DataKind, int]
    dirty: Mapping[DataKind, int]


def data_extents(opened: OpenImage) -> Iterator[Numbers]:
    """Yields arrays int64[n, 3] of (start, length, kind): see `Image.data_extents`."""
    start = 0
    for ends, kinds in _data_map(opened).pieces():
        starts, start = _starts(start, ends), int(ends[-1])
        yield np.column_stack((starts, ends - starts, kinds))


def dirty_data_extents(opened: OpenImage, dirty: Iterable[Numbers]) -> Iterator[Numbers]:
    """Yields arrays int64[n, 4] of (start, length, is_dirty, kind): see `Bitmap.data_extents`.

    ``dirty`` has the dirty extents of the bitmap, int64[n, 2] each.
    """
    found = (Ranges(e[:, 0], e[:, 0] + e[:, 1], np.ones(len(e), np.int64)) for e in dirty)
    size = opened.file.virtual_size
    start = 0
    for ends, is_dirty, kinds in refine(partition(found, size), _data_map(opened).pieces()):
        starts, start = _starts(start, ends), int(ends[-1])
        yield np.column_stack((starts, ends - starts, is_dirty, kinds))


def data_totals(extents: Iterable[Numbers]) -> DataTotals:
    """Adds up what `dirty_data_extents` yields."""
    totals = np.zeros((2, len(DataKind)), np.int64)
    for part in extents:
        _, lengths, is_dirty, kinds = part.T
        np.add.at(totals, (is_dirty, kinds), lengths)
    return DataTotals(*(dict(zip(DataKind, row, strict=True)) for row in totals.tolist()))


def _data_map(opened: OpenImage) -> DataMap:
    return DataMap(opened.file, opened.metadata.header_problems)


def _starts(first: int, ends: Numbers) -> Numbers:
    """The starts of ranges in a row, of which the first begins at ``first``."""
    return np.concatenate(([first], ends[:-1]))
