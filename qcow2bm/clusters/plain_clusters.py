"""Finding where a qcow2 file holds the data of its disk as they are.

*Spec*: spec/repair.md, SALVAGE-7.
"""

from __future__ import annotations

from typing import NamedTuple

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


class _Table(NamedTuple):
    """An L2 table.

    Attributes:
        hosts: the host offset of each cluster, int64[n].
        ends: for each cluster the number behind the last one that follows it without a gap,
            int64[n]; 0 if the file does not hold the cluster as it is.
    """

    hosts: NDArray[np.int64]
    ends: NDArray[np.int64]


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
        self._table: _Table | None = None

    def runs(self, start: int, length: int) -> list[tuple[int, int]] | None:
        """Returns where a range of the disk lies in the file, as (host offset, length).

        Returns None if the file does not hold all of the range as it is, or in too many places.

        Raises:
            StorageError: reading failed.
        """
        size = self._file.cluster_size
        number, place = divmod(start, self._entries * size)
        table = self._l2_table(number) if self._is_known else None
        if table is None or place + length > self._entries * size:
            return None
        found: list[tuple[int, int]] = []
        while length:
            cluster, skip = divmod(place, size)
            count = min(int(table.ends[cluster]) * size - place, length)
            if count <= 0 or len(found) == _MOST_RUNS:
                return None
            found.append((int(table.hosts[cluster]) + skip, count))
            place += count
            length -= count
        return found

    def _l2_table(self, number: int) -> _Table | None:
        """Returns an L2 table; None if there is none that can be read."""
        if number != self._number:
            words = self._read_table(number)
            self._table = None if words is None else self._parse(words)
            self._number = number
        return self._table

    def _parse(self, words: NDArray[np.uint64]) -> _Table:
        size = self._file.cluster_size
        hosts = (words & _OFFSET).astype(np.int64)
        is_plain = (words & _NOT_PLAIN == 0) & (hosts > 0) & (hosts % size == 0)
        is_plain &= hosts < self._file.file_size
        is_last = np.ones(len(hosts), np.bool_)
        is_last[:-1] = (np.diff(hosts) != size) | ~is_plain[1:]
        stops = np.flatnonzero(is_last) + 1
        ends = np.repeat(stops, np.diff(stops, prepend=0))
        return _Table(hosts, np.where(is_plain, ends, 0))

    def _read_table(self, number: int) -> NDArray[np.uint64] | None:
        """Returns the entries of an L2 table, uint64[n]; None if there is none to be read."""
        file, size = self._file, self._file.cluster_size
        place = file.header.l1_table_offset + number * L1_ENTRY_LENGTH
        if number >= file.header.l1_size or not file.contains(place, L1_ENTRY_LENGTH):
            return None
        word = int.from_bytes(file.read(place, L1_ENTRY_LENGTH), "big")
        offset = word & L1_MASKS["offset"]
        if not offset or word & _L1_RESERVED or offset % size or not file.contains(offset, size):
            return None
        return np.frombuffer(file.read(offset, size), _WORD).astype(np.uint64)
