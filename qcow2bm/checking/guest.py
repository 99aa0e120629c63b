"""The clusters of the disk itself: L1 and L2 tables of the active disk and of snapshots.

*Spec*: spec/check.md, "References".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from qcow2bm.checking.cluster_counts import ClusterCounts
from qcow2bm.checking.l2_entries import L2Entries, RefcountsOf, Words
from qcow2bm.checking.listing import Faults, Listing
from qcow2bm.checking.references import References
from qcow2bm.checking.runs import Flags, Numbers, Runs
from qcow2bm.clusters.file import ClusterFile
from qcow2bm.clusters.parts import Holes, disjoint_pieces, stored_parts
from qcow2bm.format.l1_l2 import L1_ENTRY_LENGTH, L1_MASKS

_RESERVED = np.uint64(L1_MASKS["reserved_high"] | L1_MASKS["reserved_low"])
_OFFSET = np.uint64(L1_MASKS["offset"])
_COPIED = np.uint64(L1_MASKS["copied"])

_TABLES_AT_ONCE = 1 << 16
"""The number of L2 tables for which holes are looked for at once."""


class L1Table(NamedTuple):
    """The place of an L1 table, its number of entries, and whether it is that of the disk."""

    offset: int
    entries: int
    is_active: bool

    @property
    def end(self) -> int:
        """The host byte behind the table."""
        return self.offset + L1_ENTRY_LENGTH * self.entries


class GuestWalk:
    """Counts the references of L1 tables, and those of the L2 tables to which they lead.

    What several tables share is read once, and its problems are reported once; but its references
    count for each of the tables.
    """

    def __init__(
        self,
        file: ClusterFile,
        references: References,
        refcounts: RefcountsOf,
        listing: Listing,
        holes: Holes,
    ) -> None:
        """``refcounts`` returns stored refcounts, with which copied bits are compared."""
        self._file = file
        self._holes = holes
        self._references = references
        self._refcounts = refcounts
        self._listing = listing
        self._bits = file.header.cluster_bits
        self._l2_entries = L2Entries(file, references, refcounts, listing)

    def walk(self, tables: Sequence[L1Table]) -> None:
        """Counts L1 tables and all they lead to.

        Raises:
            StorageError: reading failed.
        """
        inside = [table for table in tables if self._is_inside(table)]
        active = [table for table in inside if table.is_active]
        snapshots = [table for table in inside if not table.is_active]
        self._count_tables(inside)
        of_disk = [clusters for clusters, _ in self._leads(active)]
        clusters, places, times = np.unique(
            np.concatenate([np.zeros(0, np.int64), *of_disk]), return_index=True, return_counts=True
        )
        of_snapshots = ClusterCounts()
        for found, often in self._leads(snapshots):
            of_snapshots.add(found, often)
        in_order = np.argsort(places)
        for start in range(0, len(in_order), _TABLES_AT_ONCE):
            here = in_order[start : start + _TABLES_AT_ONCE]
            all_times = times[here] + of_snapshots.of(clusters[here])
            self._walk_l2_tables(clusters[here], all_times, is_active=True)
        for found, often in of_snapshots.each(0, self._references.clusters):
            is_new = ~_is_among(found, clusters)
            self._walk_l2_tables(found[is_new], often[is_new], is_active=False)

    def _is_inside(self, table: L1Table) -> bool:
        """Returns whether an L1 table lies in the file, and reports if it does not."""
        if self._file.contains(table.offset, table.end - table.offset):
            return True
        self._listing.add("l1-table.past-eof", table.offset, "lies outside the file")
        self._references.note(table.end)
        return False

    def _count_tables(self, tables: Sequence[L1Table]) -> None:
        """Counts the clusters of L1 tables, which lie in the file."""
        used = [(table.offset, table.end - 1) for table in tables if table.entries]
        if used:
            firsts, lasts = np.array(used, np.int64).T >> self._bits
            self._references.add_runs(Runs(firsts, lasts + 1))

    def _leads(self, tables: Sequence[L1Table]) -> Iterator[tuple[Numbers, Numbers]]:
        """Counts the L2 tables to which L1 tables lead.

        Yields the clusters of those that can be read, in the order of the entries that lead to
        them, and for each of these entries in how many L1 tables it lies.
        """
        starts = np.array([table.offset for table in tables], np.int64)
        ends = np.array([table.end for table in tables], np.int64)
        starts, ends, shared = disjoint_pieces(starts, ends)
        for batch in stored_parts(self._file, starts, ends, self._holes).batches():
            words = np.frombuffer(batch.read(self._file), ">u8").astype(np.uint64)
            used = np.flatnonzero(words)
            pieces, places = batch.places(L1_ENTRY_LENGTH * used)
            yield self._judge(words[used], places, shared[pieces], tables)

    def _judge(
        self, words: Words, places: Numbers, times: Numbers, tables: Sequence[L1Table]
    ) -> tuple[Numbers, Numbers]:
        """Counts the L2 tables to which entries lead, and reports what is wrong with the entries.

        ``words`` are the entries, ``places`` their host offsets, and ``times`` says in how many L1
        tables each lies. Returns the clusters of L2 tables that can be read, and their ``times``.
        """
        file, references = self._file, self._references
        offsets = (words & _OFFSET).astype(np.int64)
        clusters = offsets >> self._bits
        is_outside = offsets >= file.file_size
        is_unaligned = (offsets & (file.cluster_size - 1) != 0) & ~is_outside
        is_table = ~is_outside & ~is_unaligned
        is_copied = words & _COPIED != 0
        is_wrong = np.zeros(len(words), bool)
        if tables[0].is_active:
            is_wrong[is_table] = is_copied[is_table] != (self._refcounts(clusters[is_table]) == 1)
        if is_outside.any():
            references.note(int(offsets.max()) + file.cluster_size)
        first = clusters[is_unaligned]
        references.add_runs(Runs(first, first + 2), times[is_unaligned])
        references.add_clusters(clusters[is_table], times[is_table])

        def describe(reason: str, entry: int) -> tuple[int, str, int]:
            place, lead = int(places[entry]), int(offsets[entry])
            start = next(table.offset for table in tables if table.offset <= place < table.end)
            bit = "set" if is_copied[entry] else "clear"
            return place, reason.format(lead=lead, bit=bit), (place - start) // L1_ENTRY_LENGTH

        def faults(id: str, where: Flags, reason: str) -> Faults:
            return Faults(f"l1-table.entry.{id}", where, partial(describe, reason))

        is_reserved = words & _RESERVED != 0
        self._listing.add_faults([faults("reserved", is_reserved, "has reserved bits set")])
        self._listing.add_faults(
            (
                faults("past-eof", is_outside, "leads to {lead:#x}, past the end of the file"),
                faults("unaligned", is_unaligned, "leads to {lead:#x}, not the start of a cluster"),
                faults("copied", is_wrong, "has its copied bit {bit}, against the refcount"),
            )
        )
        return clusters[is_table], times[is_table]

    def _walk_l2_tables(self, clusters: Numbers, times: Numbers, *, is_active: bool) -> None:
        """Counts the references of the L2 tables in some clusters, each ``times`` times."""
        starts = clusters << self._bits
        ends = starts + self._file.cluster_size
        parts = stored_parts(self._file, starts, ends, self._holes)
        for batch in parts.batches():
            self._l2_entries.count(batch, starts, times, is_active=is_active)


def _is_among(clusters: Numbers, known: Numbers) -> Flags:
    """Returns which clusters are among ``known``, which is sorted: int64[n] to bool[n]."""
    places = np.searchsorted(known, clusters)
    is_known: Flags = np.append(known, -1)[places] == clusters
    return is_known
