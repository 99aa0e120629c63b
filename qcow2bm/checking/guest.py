"""The clusters of the disk itself: L1 and L2 tables of the active disk and of snapshots.

*Spec*: spec/check.md, "References".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from qcow2bm.checking.references import References
from qcow2bm.clusters.file import ClusterFile
from qcow2bm.errors import LimitError
from qcow2bm.format.features import INCOMPATIBLE_DATA_FILE, INCOMPATIBLE_EXTENDED_L2
from qcow2bm.format.l1_l2 import (
    L1_ENTRY_LENGTH,
    L1_MASKS,
    L2_ENTRY_LENGTH,
    L2_MASKS,
    SUBCLUSTER_MASKS,
    SUBCLUSTERS_PER_CLUSTER,
    compressed_extent,
)

_L1_RESERVED = L1_MASKS["reserved_high"] | L1_MASKS["reserved_low"]
_L2_RESERVED = L2_MASKS["reserved_high"] | L2_MASKS["reserved_low"]

Report = Callable[[str, int, str, int | None], None]
"""A function of the id of a problem, the host offset, the reason, and the entry's number."""
RefcountsOf = Callable[[NDArray[np.int64]], NDArray[np.uint64]]
"""A function that returns the stored refcounts of clusters, int64[n] to uint64[n]."""


class L1Table(NamedTuple):
    """The place of an L1 table, its number of entries, and whether it is that of the disk."""

    offset: int
    entries: int
    is_active: bool


class GuestWalk:
    """Counts the references of L1 tables."""

    def __init__(
        self, file: ClusterFile, references: References, refcounts: RefcountsOf, report: Report
    ) -> None:
        """``refcounts`` returns stored refcounts, with which copied bits are compared."""
        header = file.header
        self._file = file
        self._references = references
        self._refcounts = refcounts
        self._report = report
        self._bits = header.cluster_bits
        self._has_data_file = bool(header.incompatible_features & INCOMPATIBLE_DATA_FILE)
        is_extended = bool(header.incompatible_features & INCOMPATIBLE_EXTENDED_L2)
        self._words = 2 if is_extended else 1

    def walk(self, table: L1Table) -> None:
        """Counts an L1 table and all it leads to.

        Raises:
            StorageError: reading failed.
        """
        length = L1_ENTRY_LENGTH * table.entries
        try:
            data = self._file.read(table.offset, length)
        except LimitError:
            self._report("l1-table.past-eof", table.offset, "lies outside the file", None)
            self._references.note(table.offset + length)
            return
        self._references.add(table.offset, length)
        words = np.frombuffer(data, ">u8").astype(np.uint64)
        used = np.flatnonzero(words)
        for number in used[(words[used] & np.uint64(_L1_RESERVED)) != 0].tolist():
            self._entry(table.offset, number, "l1-table.entry.reserved", "has reserved bits set")
        for number in used.tolist():
            self._l2(table, number, int(words[number]))

    def _entry(self, table: int, number: int, id: str, reason: str) -> None:
        self._report(id, table + L1_ENTRY_LENGTH * number, reason, number)

    def _l2(self, l1: L1Table, number: int, word: int) -> None:
        offset = word & L1_MASKS["offset"]
        if not self._references.add(offset, self._file.cluster_size):
            reason = f"leads to {offset:#x}, past the end of the file"
            self._entry(l1.offset, number, "l1-table.entry.past-eof", reason)
            return
        if offset & (self._file.cluster_size - 1):
            reason = f"leads to {offset:#x}, not the start of a cluster"
            self._entry(l1.offset, number, "l1-table.entry.unaligned", reason)
            return
        if l1.is_active:
            clusters = np.array([offset >> self._bits], np.int64)
            is_copied = bool(word & L1_MASKS["copied"])
            if (int(self._refcounts(clusters)[0]) == 1) != is_copied:
                reason = f"has its copied bit {_set(is_copied)}, against the refcount"
                self._entry(l1.offset, number, "l1-table.entry.copied", reason)
        data = self._file.read(offset, self._file.cluster_size)
        table = np.frombuffer(data, ">u8").astype(np.uint64).reshape(-1, self._words)
        if self._words > 1:
            self._subclusters(offset, table[:, 0], table[:, 1])
        self._entries(offset, table[:, 0], l1.is_active)

    def _subclusters(
        self, table: int, words: NDArray[np.uint64], bitmaps: NDArray[np.uint64]
    ) -> None:
        """Reports subclusters both allocated and zero, or allocated without a cluster."""
        allocated = bitmaps & np.uint64(SUBCLUSTER_MASKS["allocated"])
        zero = bitmaps >> np.uint64(SUBCLUSTERS_PER_CLUSTER)
        has_offset = (words & np.uint64(L2_MASKS["offset"])) != 0
        is_compressed = (words & np.uint64(L2_MASKS["compressed"])) != 0
        is_wrong = np.where(
            is_compressed,
            bitmaps != 0,
            (allocated & zero != 0) | (~has_offset & (allocated != 0)),
        )
        reason = "has subclusters that cannot be"
        self._each("l2-table.entry.subclusters", table, is_wrong, reason)

    def _entries(self, table: int, words: NDArray[np.uint64], is_active: bool) -> None:
        is_compressed = (words & np.uint64(L2_MASKS["compressed"])) != 0
        if is_compressed.any():
            self._compressed(table, words, is_compressed)
            words = np.where(is_compressed, np.uint64(0), words)
        self._each(
            "l2-table.entry.reserved",
            table,
            (words & np.uint64(_L2_RESERVED)) != 0,
            "has reserved bits set",
        )
        offsets = (words & np.uint64(L2_MASKS["offset"])).astype(np.int64)
        is_used = offsets != 0
        is_unaligned = (offsets & (self._file.cluster_size - 1)) != 0
        self._each(
            "l2-table.entry.unaligned", table, is_unaligned, "leads to no start of a cluster"
        )
        if self._has_data_file:
            has_one = np.ones(len(words), bool)
        else:
            is_outside = is_used & (offsets >= self._file.file_size)
            self._each(
                "l2-table.entry.past-eof", table, is_outside, "leads past the end of the file"
            )
            if is_outside.any():
                self._references.note(int(offsets[is_outside].max()) + 2 * self._file.cluster_size)
            self._references.add_clusters(
                offsets[is_used & ~is_outside & ~is_unaligned] >> self._bits
            )
            for offset in offsets[is_unaligned & ~is_outside].tolist():
                self._references.add(offset, self._file.cluster_size)
            has_one = np.zeros(len(words), bool)
            if is_active and is_used.any():
                has_one[is_used] = self._refcounts(offsets[is_used] >> self._bits) == 1
        if is_active:
            is_copied = (words & np.uint64(L2_MASKS["copied"])) != 0
            is_wrong = is_used & (is_copied != has_one)
            self._each(
                "l2-table.entry.copied", table, is_wrong, "has a copied bit against the refcount"
            )

    def _compressed(
        self, table: int, words: NDArray[np.uint64], is_compressed: NDArray[np.bool_]
    ) -> None:
        """Counts compressed clusters, which may begin anywhere and share clusters of the file."""
        copied = np.uint64(L2_MASKS["copied"])
        is_wrong = is_compressed & ((words & copied) != 0)
        self._each("l2-table.entry.compressed", table, is_wrong, "is compressed, and copied")
        if self._has_data_file:
            reason = "is compressed, beside a data file"
            self._each("l2-table.entry.compressed", table, is_compressed, reason)
            return
        extents = compressed_extent(words[is_compressed], self._bits)
        start, end = (places.astype(np.int64) for places in extents)
        is_outside = end - self._file.file_size >= self._file.cluster_size
        outside = np.zeros(len(words), bool)
        outside[np.flatnonzero(is_compressed)[is_outside]] = True
        self._each("l2-table.entry.past-eof", table, outside, "leads past the end of the file")
        if is_outside.any():
            self._references.note(int(end[is_outside].max()))
        first = start[~is_outside] >> self._bits
        last = (end[~is_outside] - 1) >> self._bits
        if len(last):
            self._references.clusters = max(self._references.clusters, int(last.max()) + 1)
        while len(first):
            self._references.add_clusters(first)
            first, last = first[first < last] + 1, last[first < last]

    def _each(self, id: str, table: int, where: NDArray[np.bool_], reason: str) -> None:
        for number in np.flatnonzero(where).tolist() if where.any() else ():
            place = table + L2_ENTRY_LENGTH * self._words * number
            self._report(id, place, reason, number)


def _set(is_set: bool) -> str:
    return "set" if is_set else "clear"
