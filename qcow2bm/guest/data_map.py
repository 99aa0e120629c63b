"""Reading for each range of the disk what one image has there, from its L1 and L2 tables.

*Spec*: spec/data.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from qcow2bm.bits.partitions import Piece, Ranges, partition
from qcow2bm.clusters.file import ClusterFile
from qcow2bm.clusters.parts import Holes, Numbers, stored_parts
from qcow2bm.errors import ChangedWhileReadingError, FormatError, Qcow2BmError
from qcow2bm.format.l1_l2 import L1_ENTRY_LENGTH, L1_MASKS
from qcow2bm.guest.l2_kinds import Kinds, L2Kinds
from qcow2bm.problem_errors import as_error
from qcow2bm.problems import L1_TABLE, L2_TABLE, Problem
from qcow2bm.units import ceil_div

_RESERVED = np.uint64(L1_MASKS["reserved_high"] | L1_MASKS["reserved_low"])
_OFFSET = np.uint64(L1_MASKS["offset"])

_WINDOW_BYTES = 1 << 20
"""The bytes of an L1 table that are read at once."""

_BATCH_BYTES = 1 << 19
"""About as much of the L2 tables is read at once: most entries of most tables are 0."""

_TABLES_AT_ONCE = 1 << 12
"""The number of L2 tables for which holes are looked for at once."""

_ADVICE = "; what the image has for the disk is not known: run check on the image"

_FATAL = {
    "header.incompatible_features.unknown",
    "header.incompatible_features.extended-l2",
    "header.size.too-large",
    "header.l1_size.too-large",
    "header.l1_table_offset.invalid",
    "header.l1_table_offset.unreadable",
    "header.l1_table_offset.past-eof",
}
"""The problems of the header with which its L1 table cannot be read."""


class _L1Entries(NamedTuple):
    """The entries of an L1 table that are not 0: their numbers, and the entries; int64[n] each."""

    numbers: Numbers
    words: Numbers


class DataMap:
    """What one image has for the ranges of its disk.

    The active L1 table says so; those of snapshots are never read. A chain of images is a list of
    such maps: what is unallocated in one of them is as the next one says.
    """

    def __init__(self, file: ClusterFile, header_problems: Iterable[Problem]) -> None:
        """Reads nothing.

        Raises:
            FormatError: a problem of the header makes the L1 table unreadable.
        """
        for found in header_problems:
            if found.id in _FATAL:
                raise as_error(found)
        self._file = file
        self._kinds = L2Kinds(file)
        self._entries_of_table = file.cluster_size // self._kinds.entry_length
        self._clusters = ceil_div(file.virtual_size, file.cluster_size)

    def pieces(self) -> Iterator[Piece]:
        """Yields the partition of the disk whose labels are values of `DataKind`.

        Every read holds the locks of a reader, and is followed by a look whether the image has
        changed.

        Raises:
            FormatError: an entry of a table is one that cannot be.
            ImageLockedError: another process writes to the image.
            ChangedWhileReadingError: the image changed since it was opened.
            StorageError: reading failed.
        """
        yield from partition(self._found(), self._file.virtual_size)

    def _found(self) -> Iterator[Ranges]:
        """The ranges that are not unallocated, in order."""
        file = self._file
        with file.lock():
            entries = self._read_l1_table()
            self._verify()
        tables = self._l2_tables(entries)
        numbers = entries.numbers
        for start in range(0, len(tables), _TABLES_AT_ONCE):
            here = slice(start, start + _TABLES_AT_ONCE)
            yield from self._found_by(numbers[here], tables[here])
        if not file.is_watched:
            with file.lock():
                again = self._read_l1_table()
            if not all(map(np.array_equal, entries, again)):
                raise ChangedWhileReadingError(file.storage.name, L1_TABLE)

    def _verify(self) -> None:
        self._file.verify()
        self._file.verify_untouched()

    def _read_l1_table(self) -> _L1Entries:
        """Reads the entries that the disk needs; those that the table lacks are 0."""
        header = self._file.header
        needed = ceil_div(self._clusters, self._entries_of_table)
        length = L1_ENTRY_LENGTH * min(needed, header.l1_size)
        none = np.zeros(0, np.int64)
        parts = [_L1Entries(none, none)]
        for place in range(0, length, _WINDOW_BYTES):
            size = min(_WINDOW_BYTES, length - place)
            words = np.frombuffer(self._file.read(header.l1_table_offset + place, size), ">i8")
            used = np.flatnonzero(words)
            parts.append(_L1Entries(used + place // L1_ENTRY_LENGTH, words[used].astype(np.int64)))
        return _L1Entries(*map(np.concatenate, zip(*parts, strict=True)))

    def _l2_tables(self, entries: _L1Entries) -> Numbers:
        """The host offsets of the L2 tables to which entries lead, int64[n].

        No two are the same: a few bytes of a hostile image cannot claim the tables of a large disk.
        """
        file, header = self._file, self._file.header
        words = entries.words.view(np.uint64)
        tables = (words & _OFFSET).astype(np.int64)
        own = header.l1_table_offset, header.l1_table_offset + L1_ENTRY_LENGTH * header.l1_size
        is_repeated = _is_repeated(tables) & (tables != 0)
        faults = (
            (words & _RESERVED != 0, "has reserved bits set"),
            (tables >= file.file_size, "leads to {lead:#x}, past the end of the file"),
            (tables % file.cluster_size != 0, "leads to {lead:#x}, not the start of a cluster"),
            ((tables >= own[0]) & (tables < own[1]), "leads to {lead:#x}, in the L1 table itself"),
            (is_repeated, "leads to {lead:#x}, as does another entry"),
        )
        for is_wrong, reason in faults:
            if is_wrong.any():
                first = int(is_wrong.argmax())
                number = int(entries.numbers[first])
                offset = header.l1_table_offset + L1_ENTRY_LENGTH * number
                reason = reason.format(lead=int(tables[first]))
                raise self._error(L1_TABLE, number, offset, reason)
        return tables

    def _found_by(self, numbers: Numbers, tables: Numbers) -> Iterator[Ranges]:
        """The ranges of which some L2 tables say that they are not unallocated.

        ``numbers`` are those of the L1 entries that lead to the tables, ``tables`` the host
        offsets, int64[n] each; 0 is no table.
        """
        file, length = self._file, self._kinds.entry_length
        numbers, tables = numbers[tables != 0], tables[tables != 0]
        firsts = numbers * self._entries_of_table
        entries = np.minimum(self._entries_of_table, self._clusters - firsts)
        with file.lock():
            parts = stored_parts(file, tables, tables + length * entries, Holes())
        for batch in parts.batches(_BATCH_BYTES):
            with file.lock():
                data = batch.read(file)
                self._verify()
            used = self._kinds.used(data)
            # The first cluster of the disk of each part, then that of each entry in use.
            begins = firsts[batch.ranges] + (batch.starts - tables[batch.ranges]) // length
            counts = batch.lengths // length
            behind = np.cumsum(counts)
            part = np.searchsorted(behind, used, "right")
            clusters = used + (begins - (behind - counts))[part]
            kinds, fault = self._kinds.of(data, used, clusters)
            if fault:
                _, places = batch.places(np.array([fault.entry * length]))
                place = int(places[0])
                number = place % file.cluster_size // length
                raise self._error(L2_TABLE, number, place, fault.reason)
            yield self._ranges(clusters, kinds)

    def _error(self, table: str, number: int, offset: int, reason: str) -> Qcow2BmError:
        """The error for an entry that cannot be: of an image that has grown, no fault is known."""
        file = self._file
        if file.storage.size() != file.file_size:
            return ChangedWhileReadingError(file.storage.name, "image")
        return FormatError(table, f"entry {number}", offset, reason + _ADVICE)

    def _ranges(self, clusters: Numbers, kinds: Kinds) -> Ranges:
        """Clusters of the disk, whose units have these kinds, as ranges without the unallocated."""
        units, size = self._kinds.units, self._kinds.unit_size
        is_first = np.append(True, kinds[1:] != kinds[:-1])[: len(kinds)]
        is_first[units::units] |= np.diff(clusters) != 1
        firsts = np.flatnonzero(is_first)
        stops = np.append(firsts[1:], len(kinds))
        is_some = kinds[firsts] != 0
        firsts, lasts = firsts[is_some], stops[is_some] - 1
        starts = (clusters[firsts // units] * units + firsts % units) * size
        ends = (clusters[lasts // units] * units + lasts % units + 1) * size
        limit = self._file.virtual_size  # the last cluster may reach beyond the disk
        is_inside = starts < limit
        found = Ranges(starts, np.minimum(ends, limit), kinds[firsts].astype(np.int64))
        return Ranges(*(column[is_inside] for column in found))


def _is_repeated(values: Numbers) -> NDArray[np.bool_]:
    """Returns which values are there more than once, bool[n]."""
    in_order = np.sort(values)
    again = in_order[1:][in_order[1:] == in_order[:-1]]
    if not len(again):  # as in a sound image, which may have millions of values
        return np.zeros(len(values), bool)
    places = np.searchsorted(again, values)
    is_repeated: NDArray[np.bool_] = np.append(again, -1)[places] == values
    return is_repeated
