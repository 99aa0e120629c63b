"""The entries of L2 tables: what they refer to, and what is wrong with them.

*Spec*: spec/check.md, "References".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from qcow2bm.checking.listing import Listing
from qcow2bm.checking.references import References
from qcow2bm.checking.runs import Flags, Numbers, Runs
from qcow2bm.clusters.file import ClusterFile
from qcow2bm.clusters.parts import Parts
from qcow2bm.format.features import INCOMPATIBLE_DATA_FILE, INCOMPATIBLE_EXTENDED_L2
from qcow2bm.format.l1_l2 import (
    L2_ENTRY_LENGTH,
    L2_MASKS,
    compressed_extent,
)
from qcow2bm.guest.l2_kinds import impossible_subclusters

_RESERVED = np.uint64(L2_MASKS["reserved_high"] | L2_MASKS["reserved_low"])
_OFFSET = np.uint64(L2_MASKS["offset"])
_COPIED = np.uint64(L2_MASKS["copied"])
_COMPRESSED = np.uint64(L2_MASKS["compressed"])

Words = NDArray[np.uint64]

RefcountsOf = Callable[[Numbers], Words]
"""A function that returns the stored refcounts of clusters, int64[n] to uint64[n]."""


Times = int | Numbers
"""How often entries count: one number for all of them, or one for each."""


class _Note(NamedTuple):
    """What is wrong with entries of a batch: the numbers of the entries are int64[n]."""

    id: str
    reason: str
    entries: Numbers


class L2Entries:
    """Counts the references of entries of L2 tables."""

    def __init__(
        self, file: ClusterFile, references: References, refcounts: RefcountsOf, listing: Listing
    ) -> None:
        """``refcounts`` returns stored refcounts, with which copied bits are compared."""
        self._file = file
        self._references = references
        self._refcounts = refcounts
        self._listing = listing
        self._bits = file.header.cluster_bits
        features = file.header.incompatible_features
        self._has_data_file = bool(features & INCOMPATIBLE_DATA_FILE)
        self._words = 2 if features & INCOMPATIBLE_EXTENDED_L2 else 1
        self._notes: list[_Note] = []  # of one batch

    def count(self, batch: Parts, tables: Numbers, times: Numbers, *, is_active: bool) -> None:
        """Counts the references of some entries.

        Args:
            batch: the parts of L2 tables in which the entries lie.
            tables: the host offsets of the tables, int64[n], by the ranges of ``batch``.
            times: how often the references of each table count, int64[n].
            is_active: whether the tables are those of the disk.

        Raises:
            StorageError: reading failed.
        """
        data = np.frombuffer(batch.read(self._file), ">u8")
        words = data.astype(np.uint64).reshape(-1, self._words)
        length = L2_ENTRY_LENGTH * self._words
        of_parts = times[batch.ranges]
        each_times: Times = int(of_parts[0])
        if (of_parts != each_times).any():
            each_times = np.repeat(of_parts, batch.lengths // length)
        if self._words > 1:
            self._judge_subclusters(words[:, 0], words[:, 1])
        self._count(words[:, 0], each_times, is_active=is_active)
        self._report(batch, tables, length)

    def _report(self, batch: Parts, tables: Numbers, length: int) -> None:
        """Reports what is wrong, table by table; ``length`` is that of an entry in bytes."""
        notes, self._notes = self._notes, []
        if not notes:
            return
        note_of = np.repeat(np.arange(len(notes)), [len(note.entries) for note in notes])
        ranges, places = batch.places(length * np.concatenate([note.entries for note in notes]))
        elements = (places - tables[ranges]) // length
        order = np.lexsort((note_of, ranges))
        numbers, first = np.unique(note_of[order], return_index=True)
        for id in dict.fromkeys(notes[number].id for number in numbers[np.argsort(first)]):
            same = [number for number, note in enumerate(notes) if note.id == id]
            rows = order[np.isin(note_of[order], same)]
            found = (
                (int(places[row]), notes[note_of[row]].reason, int(elements[row])) for row in rows
            )
            self._listing.add_many(id, len(rows), found)

    def _note(self, id: str, is_wrong: Flags, reason: str) -> None:
        """Remembers what is wrong with entries of a batch."""
        if is_wrong.any():
            self._notes.append(_Note(id, reason, np.flatnonzero(is_wrong)))

    def _judge_subclusters(self, words: Words, bitmaps: Words) -> None:
        """Notes subclusters both allocated and zero, or allocated without a cluster."""
        has_cluster = (words & _OFFSET) != 0
        if self._has_data_file:
            has_cluster |= (words & _COPIED) != 0  # the first cluster of the data file
        is_wrong = impossible_subclusters(bitmaps, (words & _COMPRESSED) != 0, has_cluster)
        self._note("l2-table.entry.subclusters", is_wrong, "has subclusters that cannot be")

    def _count(self, words: Words, times: Times, *, is_active: bool) -> None:
        is_compressed = (words & _COMPRESSED) != 0
        if is_compressed.any():
            self._count_compressed(words, times, is_compressed)
            words = np.where(is_compressed, np.uint64(0), words)
        is_reserved = (words & _RESERVED) != 0
        self._note("l2-table.entry.reserved", is_reserved, "has reserved bits set")
        offsets = (words & _OFFSET).astype(np.int64)
        is_used = offsets != 0
        is_unaligned = (offsets & (self._file.cluster_size - 1)) != 0
        reason = "leads to no start of a cluster"
        self._note("l2-table.entry.unaligned", is_unaligned, reason)
        if self._has_data_file:
            has_one = np.ones(len(words), bool)
        else:
            self._count_data(offsets, times, is_used, is_unaligned)
            has_one = np.zeros(len(words), bool)
            if is_active and is_used.any():
                has_one[is_used] = self._refcounts(offsets[is_used] >> self._bits) == 1
        if is_active:
            is_wrong = is_used & (((words & _COPIED) != 0) != has_one)
            reason = "has a copied bit against the refcount"
            self._note("l2-table.entry.copied", is_wrong, reason)

    def _count_data(
        self, offsets: Numbers, times: Times, is_used: Flags, is_unaligned: Flags
    ) -> None:
        """Counts clusters that are not compressed, by the host offsets to which entries lead."""
        is_outside = is_used & (offsets >= self._file.file_size)
        self._note("l2-table.entry.past-eof", is_outside, "leads past the end of the file")
        if is_outside.any():
            self._references.note(int(offsets[is_outside].max()) + 2 * self._file.cluster_size)
        is_plain = is_used & ~is_outside & ~is_unaligned
        self._references.add_clusters(offsets[is_plain] >> self._bits, _of(times, is_plain))
        is_odd = is_unaligned & ~is_outside
        first = offsets[is_odd] >> self._bits
        self._references.add_runs(Runs(first, first + 2), _of(times, is_odd))

    def _count_compressed(self, words: Words, times: Times, is_compressed: Flags) -> None:
        """Counts compressed clusters, which may begin anywhere and share clusters of the file."""
        is_wrong = is_compressed & ((words & _COPIED) != 0)
        self._note("l2-table.entry.compressed", is_wrong, "is compressed, and copied")
        if self._has_data_file:
            reason = "is compressed, beside a data file"
            self._note("l2-table.entry.compressed", is_compressed, reason)
            return
        extents = compressed_extent(words[is_compressed], self._bits)
        start, end = (places.astype(np.int64) for places in extents)
        is_outside = end - self._file.file_size >= self._file.cluster_size
        outside = np.zeros(len(words), bool)
        outside[np.flatnonzero(is_compressed)[is_outside]] = True
        self._note("l2-table.entry.past-eof", outside, "leads past the end of the file")
        if is_outside.any():
            self._references.note(int(end[is_outside].max()))
        is_inside = ~is_outside
        first = start[is_inside] >> self._bits
        stop = ((end[is_inside] - 1) >> self._bits) + 1
        self._references.add_runs(Runs(first, stop), _of(_of(times, is_compressed), is_inside))


def _of(times: Times, where: Flags) -> Times:
    """Returns how often some of the entries count."""
    return times if isinstance(times, int) else times[where]
