"""Whether a new qcow2 image is whole, and has everything that was to be copied into it.

*Spec*: spec/backup.md.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from qcow2bm.api import open as open_image
from qcow2bm.clusters.file import ClusterFile
from qcow2bm.errors import StorageError
from qcow2bm.format.l1_l2 import L1_ENTRY_LENGTH, L1_MASKS, L2_ENTRY_LENGTH
from qcow2bm.storage.file import FileStorage


def require_sound(path: str) -> None:
    """Checks the tables and refcounts of a new image.

    An image that was not written to its end has at least leaks, since what is allocated is counted
    before anything leads to it.

    Raises:
        StorageError: there is any fault, or reading failed.
    """
    with open_image(path) as image:
        for found in (*image.problems, *image.check().problems):
            if found.is_serious:
                raise StorageError(path, 0, 0, f"the copy is not whole: {found.message}")


def require_allocated(path: str, extents: Iterable[NDArray[np.int64]]) -> int:
    """Checks that a new image has every extent itself, in allocated clusters or clusters of zeros.

    Args:
        path: of an image whose L2 entries are not extended.
        extents: int64[n, 2] of (start, length) in guest bytes, ascending over all arrays.

    Returns:
        The number of extents.

    Raises:
        StorageError: a part of an extent is missing, or reading failed.
    """
    storage = FileStorage(path)
    try:
        tables = _Tables(ClusterFile(storage, force_share=False))
        number = 0
        for block in extents:
            number += len(block)
            missing = tables.first_missing(block)
            if missing is not None:
                raise StorageError(path, 0, 0, f"the copy lacks the guest bytes from {missing:#x}")
        return number
    finally:
        storage.close()


class _Tables:
    """The L2 tables of an image, of which one is kept in memory."""

    def __init__(self, file: ClusterFile) -> None:
        self._file = file
        self._bits = file.header.cluster_bits
        self._entries = file.cluster_size // L2_ENTRY_LENGTH
        self._kept: tuple[int, NDArray[np.int64]] | None = None

    def first_missing(self, extents: NDArray[np.int64]) -> int | None:
        """Returns the start of the first extent, at least one, of which a cluster is missing."""
        firsts = extents[:, 0] >> self._bits
        stops = (extents.sum(1) - 1 >> self._bits) + 1
        table, last = int(firsts[0]) // self._entries, int(stops[-1] - 1) // self._entries
        while table <= last:
            start = table * self._entries
            some = slice(
                np.searchsorted(stops, start, "right"),
                np.searchsorted(firsts, start + self._entries),
            )
            if some.start == some.stop:
                table = int(firsts[some.stop]) // self._entries
                continue
            allocated = self._allocated_before(table)
            lows = np.maximum(firsts[some] - start, 0)
            highs = np.minimum(stops[some] - start, self._entries)
            is_missing = allocated[highs] - allocated[lows] != highs - lows
            if is_missing.any():
                return int(extents[some.start + np.argmax(is_missing), 0])
            table += 1
        return None

    def _allocated_before(self, table: int) -> NDArray[np.int64]:
        """How many clusters before each of an L2 table are allocated, and how many in all of it."""
        if not self._kept or self._kept[0] != table:
            counts = np.zeros(self._entries + 1, np.int64)
            np.cumsum(self._l2_table(table) != 0, out=counts[1:])
            self._kept = table, counts
        return self._kept[1]

    def _l2_table(self, table: int) -> NDArray[np.uint64]:
        """The entries of an L2 table; zeros if there is no such table."""
        place = self._file.header.l1_table_offset + L1_ENTRY_LENGTH * table
        word = int.from_bytes(self._file.read(place, L1_ENTRY_LENGTH), "big")
        offset = word & L1_MASKS["offset"]
        if not offset:
            return np.zeros(self._entries, np.uint64)
        return np.frombuffer(self._file.read(offset, self._file.cluster_size), ">u8")
