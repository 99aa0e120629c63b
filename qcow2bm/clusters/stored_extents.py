"""Finding the parts of structures that do not lie in holes of the file.

A sparse file can claim any number of structures in its holes, which read as zeros. Whoever looks
for anything but zeros needs to read only the rest.

*Spec*: spec/check.md, CHECK-6.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from qcow2bm.clusters.file import ClusterFile
from qcow2bm.units import align_up

_SECTOR = 512


class StoredExtent(NamedTuple):
    """Host bytes in no hole, and the ranges in which some of them lie, as (first, stop)."""

    start: int
    end: int
    first: int
    stop: int


def stored_extents(
    file: ClusterFile, starts: Sequence[int], ends: Sequence[int]
) -> Iterator[StoredExtent]:
    """Yields the extents of a file that are in no hole, as far as any range reaches into them.

    The extents are whole sectors, in ascending order. The storage is asked at most three times for
    each extent of the file, and extents in which no range lies are skipped.

    Args:
        file: the image.
        starts: the first bytes of the ranges, ascending.
        ends: the bytes behind the ranges, of which no two overlap.

    Raises:
        StorageError: the storage could not be asked.
    """
    number = position = 0
    while number < len(starts):
        position = max(position, int(starts[number]))
        data = file.next_data(position)
        if data >= file.file_size:
            return
        start = max(data // _SECTOR * _SECTOR, position)
        number = bisect_right(ends, start, number)
        if number < len(starts) and starts[number] <= start:
            end = align_up(max(file.next_hole(start), start + 1), _SECTOR)
            stop = bisect_left(starts, end, number)
            yield StoredExtent(start, end, number, stop)
            position = end
            number = stop - (ends[stop - 1] > end)
