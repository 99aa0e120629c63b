"""Finding where a qcow2 file holds the data of its disk as they are.

*Spec*: spec/repair.md, SALVAGE-7.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qcow2bm.clusters.file import ClusterFile
from qcow2bm.format.features import (
    INCOMPATIBLE_COMPRESSION,
    INCOMPATIBLE_CORRUPT,
    INCOMPATIBLE_DIRTY,
)
from qcow2bm.format.l1_l2 import L1_ENTRY_LENGTH, L1_MASKS, L2_ENTRY_LENGTH, L2_MASKS

_WORD = ">u8"
_L1_RESERVED = L1_MASKS["reserved_high"] | L1_MASKS["reserved_low"]
_NOT_PLAIN = np.uint64(~(L2_MASKS["copied"] | L2_MASKS["offset"]) & (1 << 64) - 1)
_OFFSET = np.uint64(L2_MASKS["offset"])

_KNOWN = INCOMPATIBLE_DIRTY | INCOMPATIBLE_CORRUPT | INCOMPATIBLE_COMPRESSION
"""The incompatible features with which data lie in the file, by L2 entries of one word."""

_MOST_RUNS = 16
"""One request to a server takes less time than reading more runs than that."""


class PlainClusters:
    """The clusters of the active disk that a file holds as they are: allocated, not compressed.

    One L2 table is kept in memory. An instance belongs to one thread.
    """

    def __init__(self, file: ClusterFile) -> None:
        """Takes a file that no program writes to meanwhile."""
        header = file.header
        self._file = file
        self._is_known = not header.incompatible_features & ~_KNOWN and not header.crypt_method
        self._entries = file.cluster_size // L2_ENTRY_LENGTH
        self._number = -1
        self._table: NDArray[np.uint64] | None = None

    def runs(self, start: int, length: int) -> list[tuple[int, int]] | None:
        """Returns where a range of the disk lies in the file, as (host offset, length).

        Returns None if the file does not hold all of the range as it is, or in too many places.

        Raises:
            StorageError: reading failed.
        """
        size = self._file.cluster_size
        first, last = start // size, (start + length - 1) // size
        number = first // self._entries
        table = self._l2_table(number) if self._is_known else None
        if table is None or last // self._entries != number:
            return None
        words = table[first - number * self._entries :][: last - first + 1]
        offsets = words & _OFFSET
        if (words & _NOT_PLAIN).any() or not offsets.all() or (offsets % np.uint64(size)).any():
            return None
        hosts = offsets.astype(np.int64)
        begins = np.flatnonzero(np.diff(hosts, prepend=-1) != size)
        if len(begins) > _MOST_RUNS:
            return None
        found = []
        for begin, end in zip(begins.tolist(), [*begins[1:].tolist(), len(hosts)], strict=True):
            skip = max(0, start - (first + begin) * size)
            stop = min(start + length, (first + end) * size) - (first + begin) * size
            found.append((int(hosts[begin]) + skip, stop - skip))
        return found if all(self._file.contains(*run) for run in found) else None

    def _l2_table(self, number: int) -> NDArray[np.uint64] | None:
        """Returns an L2 table, uint64[n]; None if there is none that can be read."""
        if number != self._number:
            self._table = self._read_table(number)
            self._number = number
        return self._table

    def _read_table(self, number: int) -> NDArray[np.uint64] | None:
        file, size = self._file, self._file.cluster_size
        place = file.header.l1_table_offset + number * L1_ENTRY_LENGTH
        if number >= file.header.l1_size or not file.contains(place, L1_ENTRY_LENGTH):
            return None
        word = int.from_bytes(file.read(place, L1_ENTRY_LENGTH), "big")
        offset = word & L1_MASKS["offset"]
        if not offset or word & _L1_RESERVED or offset % size or not file.contains(offset, size):
            return None
        return np.frombuffer(file.read(offset, size), _WORD).astype(np.uint64)
