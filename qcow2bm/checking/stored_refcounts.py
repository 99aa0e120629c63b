"""The refcounts of an image as they are stored.

*Spec*: spec/check.md and spec/refcounts.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qcow2bm.checking.listing import Faults, Listing
from qcow2bm.checking.references import References
from qcow2bm.checking.runs import Numbers, groups
from qcow2bm.clusters.file import ClusterFile
from qcow2bm.clusters.parts import Holes, Parts, stored_parts
from qcow2bm.clusters.problems import MAX_REFCOUNT_TABLE_BYTES
from qcow2bm.errors import LimitError
from qcow2bm.format.header import MAX_REFCOUNT_ORDER
from qcow2bm.format.refcounts import ENTRY_LENGTH, TABLE_OFFSET_MASK, parse_refcount_block

Counts = NDArray[np.unsignedinteger[Any]]

MAX_SHARED_REFCOUNTS = 1 << 24
"""The limit for the refcounts that are taken a second time from a block that entries share."""

_WINDOW = 1 << 18
"""The most refcounts that are looked at at once."""


class StoredRefcounts:
    """The refcount table of an image, and all refcounts that are not 0.

    Attributes:
        order: the base-2 logarithm of the width of a refcount in bits.
        per_block: how many refcounts a block has.
        numbers: the numbers of the blocks in the refcount table, int64[n], ascending.
        places: the host offset of each of these blocks, int64[n].
    """

    def __init__(self, file: ClusterFile, references: References, listing: Listing) -> None:
        """Reads the refcount table and all blocks, and counts them among ``references``.

        Faulty entries of the refcount table are added to ``listing``. A refcount table whose
        place or size is wrong is not read: its fault is a problem of the header.

        Raises:
            StorageError: reading failed.
        """
        self._file = file
        self._listing = listing
        self._table_offset = file.header.refcount_table_offset
        self.order = min(file.header.refcount_order, MAX_REFCOUNT_ORDER)
        self.per_block = 8 * file.cluster_size >> self.order
        words = self._read_table(references)
        self.numbers = self._valid_entries(words)
        self.places = words[self.numbers].astype(np.int64)
        clusters = self.places // file.cluster_size
        references.add_clusters(clusters)
        self._read_blocks()

    def _read_table(self, references: References) -> NDArray[np.uint64]:
        """Returns the entries of the refcount table; none if its place or size is wrong."""
        header, size = self._file.header, self._file.cluster_size
        length = header.refcount_table_clusters * size
        offset = header.refcount_table_offset
        if not length or length > MAX_REFCOUNT_TABLE_BYTES or offset % size:
            return np.zeros(0, np.uint64)
        try:
            data = self._file.read(offset, length)
        except LimitError:
            return np.zeros(0, np.uint64)
        references.add(offset, length)
        return np.frombuffer(data, ">u8").astype(np.uint64)

    def _valid_entries(self, words: NDArray[np.uint64]) -> Numbers:
        """Returns the numbers of the entries that lead to blocks, and reports the other ones."""
        is_invalid = (words & np.uint64(~TABLE_OFFSET_MASK & (1 << 64) - 1)) != 0
        is_invalid |= words % np.uint64(self._file.cluster_size) != 0
        is_outside = ~is_invalid & (words >= self._file.file_size)

        def describe(reason: str, number: int) -> tuple[int, str, int]:
            return self._place(number), reason.format(int(words[number])), number

        reasons = "is {:#x}", "leads to {:#x}, past the end of the file"
        invalid, past_eof = (partial(describe, reason) for reason in reasons)
        self._listing.add_faults(
            (
                Faults("refcount-table.entry.invalid", is_invalid, invalid),
                Faults("refcount-table.entry.past-eof", is_outside, past_eof),
            )
        )
        return np.flatnonzero((words != 0) & ~is_invalid & ~is_outside)

    def _place(self, number: int) -> int:
        """The host offset of an entry of the refcount table."""
        return self._table_offset + ENTRY_LENGTH * number

    def _read_blocks(self) -> None:
        """Reads what the blocks have outside of holes, and keeps what is not all zeros.

        That makes rows: runs of clusters whose refcounts lie one behind the other in `_refcounts`.
        The refcounts of all other clusters are 0.
        """
        starts, first_entries, blocks = np.unique(
            self.places, return_index=True, return_inverse=True
        )
        parts, self._refcounts = self._read_parts(starts)
        lengths = parts.lengths * 8 >> self.order  # in refcounts, as all that follows
        # The parts of one block follow one another.
        edges = np.searchsorted(parts.ranges, np.arange(len(starts) + 1))
        is_again = np.ones(len(blocks), bool)
        is_again[first_entries] = False
        sizes = np.diff(np.append(0, np.cumsum(lengths))[edges])[blocks]
        is_left_out = is_again & (np.cumsum(sizes * is_again) > MAX_SHARED_REFCOUNTS)
        rows = np.where(is_left_out, 0, np.diff(edges)[blocks])  # of each entry
        entries = np.repeat(np.arange(len(blocks)), rows)
        number = np.arange(len(entries)) - np.repeat(np.cumsum(rows) - rows, rows)
        part = edges[blocks[entries]] + number
        within = (parts.starts - starts[parts.ranges]) * 8 >> self.order
        firsts = self.numbers[entries] * self.per_block + within[part]
        self._set_rows(firsts, lengths[part], (np.cumsum(lengths) - lengths)[part])

    def _read_parts(self, starts: Numbers) -> tuple[Parts, Counts]:
        """Reads the blocks at some host offsets, int64[n], as far as they are not zeros.

        Returns the parts of the blocks that are not, and their refcounts one behind the other.
        """
        ends = starts + self._file.cluster_size
        stored = stored_parts(self._file, starts, ends, Holes())
        parts = [Parts(*np.zeros((3, 0), np.int64))]
        found: list[Counts] = [np.zeros(0, f"u{max(8, 1 << self.order) // 8}")]
        for batch in stored.batches():
            data = parse_refcount_block(bytes(batch.read(self._file)), self.order)
            refcounts: Counts = np.asarray(data)
            lengths = batch.lengths * 8 >> self.order
            is_used = np.maximum.reduceat(refcounts, np.cumsum(lengths) - lengths) > 0
            parts.append(Parts(*(column[is_used] for column in batch)))
            found.append(refcounts[np.repeat(is_used, lengths)])
        columns = (np.concatenate(column) for column in zip(*parts, strict=True))
        return Parts(*columns), np.concatenate(found)

    def _set_rows(self, firsts: Numbers, lengths: Numbers, begins: Numbers) -> None:
        """Sets the rows: first clusters, lengths, and places in `_refcounts`, int64[n] each.

        Rows that follow one another become one.
        """
        goes_on = (firsts[1:] == firsts[:-1] + lengths[:-1]) & (
            begins[1:] == begins[:-1] + lengths[:-1]
        )
        starts, lasts = groups(np.append(True, ~goes_on)[: len(firsts)])
        self._firsts = firsts[starts]
        self._stops = firsts[lasts] + lengths[lasts]
        self._begins = begins[starts]

    def report_shared_blocks(self, *references: References) -> None:
        """Adds a problem for each block whose cluster is referred to more than once.

        The refcounts in such a block cannot be believed.
        """
        clusters = self.places // self._file.cluster_size
        used = np.sum([each.counted.of(clusters) for each in references], axis=0)

        def describe(entry: int) -> tuple[int, str, int]:
            reason = f"leads to {int(self.places[entry]):#x}, which something else uses as well"
            return self._place(int(self.numbers[entry])), reason, int(self.numbers[entry])

        self._listing.add_faults([Faults("refcount-table.entry.shared", used > 1, describe)])

    def of(self, clusters: Numbers) -> NDArray[np.uint64]:
        """Returns the refcounts of clusters, int64[n] to uint64[n]; 0 where no block has one."""
        if len(clusters):
            only = int(np.searchsorted(self._firsts, clusters.min(), "right")) - 1
            if only >= 0 and clusters.max() < self._stops[only]:  # one row has all
                place = self._begins[only] - self._firsts[only]
                same: NDArray[np.uint64] = self._refcounts[clusters + place].astype(np.uint64)
                return same
        found = np.zeros(len(clusters), np.uint64)
        row = np.searchsorted(self._firsts, clusters, "right") - 1
        is_stored = row >= 0
        is_stored[is_stored] = clusters[is_stored] < self._stops[row[is_stored]]
        row, inside = row[is_stored], clusters[is_stored]
        found[is_stored] = self._refcounts[self._begins[row] + inside - self._firsts[row]]
        return found

    def windows(self, stop: int) -> Iterator[tuple[int, Counts]]:
        """Yields the refcounts before the cluster ``stop`` that are in no hole, in order.

        Each time, the number of a cluster comes with the refcounts of this cluster and of those
        that follow.
        """
        parts: list[Counts] = []
        window = done = 0  # where the parts begin, and where they end
        for first, end, begin in self._rows():
            for start in range(first, min(end, stop), _WINDOW):
                if parts and (start != done or done - window >= _WINDOW):
                    yield window, np.concatenate(parts)
                    parts = []
                window = window if parts else start
                place, done = begin + start - first, min(start + _WINDOW, end, stop)
                parts.append(self._refcounts[place : place + done - start])
        if parts:
            yield window, np.concatenate(parts)

    def _rows(self) -> list[tuple[int, int, int]]:
        columns = self._firsts.tolist(), self._stops.tolist(), self._begins.tolist()
        return list(zip(*columns, strict=True))

    @property
    def end(self) -> int:
        """The number of the cluster behind the last one with a refcount above 0; 0 if none."""
        for first, stop, begin in reversed(self._rows()):
            for end in range(stop, first, -_WINDOW):
                start = max(first, end - _WINDOW)
                here = slice(begin + start - first, begin + end - first)
                used = np.flatnonzero(self._refcounts[here])
                if len(used):
                    return start + int(used[-1]) + 1
        return 0

    def read_block(self, entry: int) -> Counts:
        """Reads a whole block, also what seems to lie in holes; ``entry`` is its place in `places`.

        Raises:
            StorageError: reading failed.
        """
        data = self._file.read(int(self.places[entry]), self._file.cluster_size)
        return np.array(parse_refcount_block(data, self.order))
