"""Counting how many references each cluster of a file has.

*Spec*: spec/check.md, "References".
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from qcow2bm.clusters.file import ClusterFile
from qcow2bm.units import ceil_div

_CHUNK_BITS = 15
CHUNK = 1 << _CHUNK_BITS
"""The clusters that are counted in one array; an array without references does not exist."""


class References:
    """Counts references to clusters, as QEMU does when it checks an image.

    Attributes:
        clusters: how many clusters are counted: those of the file, of which the last may be a
            part, and one more if a reference reaches there.
        reach: the number of the cluster behind the last one that has a reference, even behind the
            end of the file.
    """

    def __init__(self, file: ClusterFile) -> None:
        """Begins without any reference."""
        self._bits = file.header.cluster_bits
        self._file_size = file.file_size
        self._chunks: dict[int, NDArray[np.uint32]] = {}
        self.clusters = ceil_div(file.file_size, file.cluster_size)
        self.reach = 0

    def add(self, offset: int, length: int) -> bool:
        """Counts a range of bytes, in whole clusters; returns whether it was counted.

        A range that ends a cluster or more behind the end of the file is not counted.
        """
        if not length:
            return True
        self.note(offset + length)
        if offset + length - self._file_size >= 1 << self._bits:
            return False
        first, last = offset >> self._bits, (offset + length - 1) >> self._bits
        for number in range(first >> _CHUNK_BITS, (last >> _CHUNK_BITS) + 1):
            start = number << _CHUNK_BITS
            part = slice(max(first - start, 0), min(last - start + 1, CHUNK))
            self._chunk(number)[part] += np.uint32(1)
        self.clusters = max(self.clusters, last + 1)
        return True

    def note(self, end: int) -> None:
        """Extends `reach` to the cluster before host byte ``end``, without counting anything."""
        self.reach = max(self.reach, (end - 1 >> self._bits) + 1)

    def add_clusters(self, numbers: NDArray[np.int64]) -> None:
        """Counts clusters of the file by their numbers, int64[n]; each time a number occurs."""
        if not len(numbers):
            return
        self.reach = max(self.reach, int(numbers.max()) + 1)
        chunks = numbers >> _CHUNK_BITS
        first, last = int(chunks.min()), int(chunks.max())
        for number in [first] if first == last else np.unique(chunks).tolist():
            here = numbers if first == last else numbers[chunks == number]
            counts = np.bincount(here & (CHUNK - 1), minlength=CHUNK)
            self._chunk(number)[:] += counts.astype(np.uint32)

    def _chunk(self, number: int) -> NDArray[np.uint32]:
        if number not in self._chunks:
            self._chunks[number] = np.zeros(CHUNK, np.uint32)
        return self._chunks[number]

    def chunks(self) -> list[int]:
        """Returns the numbers of the arrays that exist, ascending; each has `CHUNK` clusters."""
        return sorted(self._chunks)

    def counts(self, first: int, stop: int) -> NDArray[np.uint32]:
        """Returns the numbers of references to clusters, uint32[stop - first]."""
        found = np.zeros(stop - first, np.uint32)
        for number in range(first >> _CHUNK_BITS, ((stop - 1) >> _CHUNK_BITS) + 1):
            if number in self._chunks:
                start = number << _CHUNK_BITS
                low, high = max(first, start), min(stop, start + CHUNK)
                found[low - first : high - first] = self._chunks[number][low - start : high - start]
        return found


def runs(where: NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """Yields the stretches in which an array is true, as (first, stop)."""
    edges = np.flatnonzero(np.diff(where.astype(np.int8), prepend=0, append=0)).tolist()
    return zip(edges[::2], edges[1::2], strict=True)
