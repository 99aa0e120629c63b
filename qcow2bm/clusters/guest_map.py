"""The clusters that L1 and L2 tables lead to, so that no edit writes there.

If all refcounts are right, no free cluster belongs to the disk. But refcounts can be wrong: some
versions of QEMU leave the refcount 0 for a cluster that an L2 table leads to.

*Spec*: spec/refcounts.md, REF-8 to REF-10.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

from qcow2bm.clusters.cluster_runs import JoinedRuns, Run, join_runs, subtract_runs
from qcow2bm.clusters.file import ClusterFile
from qcow2bm.clusters.layout import snapshot_entries
from qcow2bm.errors import FormatError
from qcow2bm.format.features import INCOMPATIBLE_DATA_FILE, INCOMPATIBLE_EXTENDED_L2
from qcow2bm.format.l1_l2 import (
    L1_ENTRY_LENGTH,
    L1_MASKS,
    L2_ENTRY_LENGTH,
    L2_MASKS,
    compressed_extent,
)
from qcow2bm.format.words import parse_words
from qcow2bm.units import align_up

MAX_BYTES = 1 << 20
"""The limit for the bytes of L1 tables, and for those of L2 tables, read for an edit of a file.

One L2 table is read however large it is: with clusters of 2 MiB it is larger than this.
"""

MAX_L2_TABLES = 1024
"""The limit for the L2 tables read for an edit of a file: each costs a call, even a small one."""


_WINDOW_BYTES = 1 << 20
"""The bytes of an L1 table that are read at once."""

_FEW_CLUSTERS = 1 << 16
"""The clusters that are looked up in a set; more would take too much memory."""


class _Table(NamedTuple):
    """The places to which the entries of an L2 table lead.

    Attributes:
        offsets: host offsets, uint64[n], each 0 or the start of a cluster.
        odd: the numbers of the clusters that entries of another form lead to.
    """

    offsets: array[int]
    odd: set[int]


class GuestMap:
    """The clusters of the active disk and of all snapshots, by their L1 and L2 tables.

    The L1 tables of snapshots themselves are among these clusters.

    Attributes:
        is_small: whether the tables are within `MAX_BYTES` and `MAX_L2_TABLES`. If they are, each
            is read at most once.
    """

    def __init__(self, file: ClusterFile) -> None:
        """Reads the L1 tables; the caller holds the locks of ``file``.

        Raises:
            StorageError: reading failed.
        """
        self._file = file
        self._bits = file.header.cluster_bits
        features = file.header.incompatible_features
        self._entry_length = L2_ENTRY_LENGTH * (2 if features & INCOMPATIBLE_EXTENDED_L2 else 1)
        self._has_guest_data = not features & INCOMPATIBLE_DATA_FILE
        places = {(file.header.l1_table_offset, file.header.l1_size)}
        places.update((entry.l1_table_offset, entry.l1_size) for entry in snapshot_entries(file))
        # QEMU reads zeros behind the end of the file, so what is in the file counts.
        end = align_up(file.file_size, file.cluster_size)
        self._l1_tables = {
            offset: min(L1_ENTRY_LENGTH * entries, (end - offset) & -L1_ENTRY_LENGTH)
            for offset, entries in sorted(places)
            if entries and offset < end
        }
        # The active table is among the metadata that are known to everyone; those of snapshots are
        # known here only.
        active = file.header.l1_table_offset
        runs = {offset: self._run(offset, length) for offset, length in self._l1_tables.items()}
        own = [runs.pop(active)] if active in runs else []
        self._l1_runs = subtract_runs(join_runs(runs.values()), own)
        self.is_small = sum(self._l1_tables.values()) <= MAX_BYTES
        self._leads = self._l1_leads() if self.is_small else set()
        count = len(self._l2_tables(self._leads))
        self.is_small &= count <= MAX_L2_TABLES
        self.is_small &= count <= 1 or count * file.cluster_size <= MAX_BYTES
        self._read: list[_Table] | None = None

    def _l1_leads(self) -> set[int]:
        """The host offsets to which the entries of all L1 tables lead.

        Where tables overlap, each entry is read once.
        """
        found: set[int] = set()
        for rest in {offset % L1_ENTRY_LENGTH for offset in self._l1_tables}:
            tables = (
                (offset, offset + length)
                for offset, length in self._l1_tables.items()
                if offset % L1_ENTRY_LENGTH == rest
            )
            for start, end in join_runs(tables):
                for place in range(start, end, _WINDOW_BYTES):
                    words = parse_words(self._file.read(place, min(_WINDOW_BYTES, end - place)))
                    found.update(word & L1_MASKS["offset"] for word in words if word)
        return found - {0}

    def _l2_tables(self, leads: Iterable[int]) -> list[int]:
        """The host offsets of those L2 tables that can be read and lead to clusters of this file.

        If the image has a data file, L2 tables lead into that file.
        """
        file, size = self._file, self._file.cluster_size
        if not self._has_guest_data:
            return []
        return [offset for offset in leads if not offset % size and file.contains(offset, size)]

    def _run(self, offset: int, length: int) -> Run:
        """The clusters in which these bytes lie."""
        return offset >> self._bits, (offset + length - 1 >> self._bits) + 1

    def _covered(self, offset: int) -> range:
        """The numbers of the clusters in which as many bytes lie as a cluster has."""
        return range(*self._run(offset, self._file.cluster_size))

    def _tables(self) -> list[_Table]:
        """The L2 tables of a small map, which are kept in memory."""
        if self._read is None:
            self._read = [self._parse(offset) for offset in self._l2_tables(self._leads)]
        return self._read

    def _parse(self, l2_table: int) -> _Table:
        data = self._file.read(l2_table, self._file.cluster_size)
        step = self._entry_length
        if self._is_plain(data):
            offsets = bytearray(data)
            offsets[::step] = offsets[7::step] = bytes(len(data) // step)  # takes away the flags
            return _Table(parse_words(bytes(offsets))[:: step // L2_ENTRY_LENGTH], set())
        odd: set[int] = set()
        for word in parse_words(data)[:: step // L2_ENTRY_LENGTH]:
            if word & L2_MASKS["compressed"]:
                start, end = compressed_extent(word, self._bits)
                odd.update(range(start >> self._bits, (end - 1 >> self._bits) + 1))
            elif offset := word & L2_MASKS["offset"]:
                odd.update(self._covered(offset))
        return _Table(array("Q"), odd)

    def _is_plain(self, data: bytes) -> bool:
        """Whether every entry leads to the start of a cluster, and has no bits but copied and zero.

        Looks at the same byte of all entries at once: a table has up to 2^18 entries.
        """
        allowed = L2_MASKS["offset"] & -self._file.cluster_size
        allowed |= L2_MASKS["copied"] | L2_MASKS["zero"]
        return not any(
            data[place :: self._entry_length].translate(None, _subsets(mask))
            for place, mask in enumerate(allowed.to_bytes(L2_ENTRY_LENGTH, "big"))
            if mask != 0xFF
        )

    def leads_to(
        self, runs: JoinedRuns | Iterable[Run], *, is_exhaustive: bool = False
    ) -> list[Run]:
        """Returns those clusters of ``runs`` to which a table leads.

        Of a map that is not small, L2 tables are read only if ``is_exhaustive``, and L1 tables of
        more than `MAX_BYTES` neither.

        Raises:
            StorageError: reading failed.
        """
        leads: Iterable[int] = self._leads
        tables: Iterable[_Table] = ()
        if self.is_small:
            tables = self._tables()
        elif is_exhaustive:
            leads = self._l1_leads()
            tables = map(self._parse, self._l2_tables(leads))
        wanted = runs if isinstance(runs, JoinedRuns) else JoinedRuns.of(runs)
        found = _Matches(wanted, self._bits)
        for offset in leads:
            found.add_numbers(self._covered(offset))
        for table in tables:
            found.add_numbers(table.odd)
            found.add_offsets(table.offsets)
        shared = (run for first, stop in self._l1_runs for run in wanted.within(first, stop))
        return join_runs((*((number, number + 1) for number in found.numbers), *shared))

    def clusters(self) -> list[Run]:
        """Returns all clusters to which the tables of a small map lead.

        Raises:
            StorageError: reading failed.
        """
        found = {number for offset in self._leads for number in self._covered(offset)}
        for table in self._tables():
            found |= table.odd
            found.update(offset >> self._bits for offset in table.offsets if offset)
        return join_runs((*((number, number + 1) for number in found), *self._l1_runs))

    def require_apart(self, metadata: JoinedRuns) -> None:
        """Returns if no table leads to the clusters of metadata.

        If the map is not small, the tables are looked at as by `leads_to`.

        Raises:
            FormatError: a table leads to metadata.
            StorageError: reading failed.
        """
        shared = self.leads_to(metadata)
        if shared:
            reason = (
                "holds metadata of the image, but an L1 or L2 table leads to it, too; an image "
                "with such a fault is not edited; check names what shares the cluster"
            )
            raise FormatError("image", "cluster", shared[0][0] << self._bits, reason)


class _Matches:
    """Collects those of many clusters that are wanted.

    Attributes:
        numbers: the numbers of these clusters.
    """

    def __init__(self, wanted: JoinedRuns, cluster_bits: int) -> None:
        self.numbers: set[int] = set()
        self._bits = cluster_bits
        self._wanted: set[int] | JoinedRuns = wanted
        self._offsets: set[int] | None = None
        if wanted.clusters <= _FEW_CLUSTERS:
            self._wanted = {number for first, stop in wanted for number in range(first, stop)}
            self._offsets = {number << cluster_bits for number in self._wanted} - {0}

    def add_numbers(self, numbers: Iterable[int]) -> None:
        """Takes those of these clusters that are wanted."""
        self.numbers.update(number for number in numbers if number in self._wanted)

    def add_offsets(self, offsets: array[int]) -> None:
        """Takes those of these clusters that are wanted, by their host offsets; 0 is none."""
        if self._offsets is None:
            self.add_numbers(offset >> self._bits for offset in set(offsets) - {0})
        else:
            self.numbers.update(o >> self._bits for o in self._offsets.intersection(offsets))


@cache
def _subsets(mask: int) -> bytes:
    """The values of a byte that have no bits but those of ``mask``."""
    return bytes(value for value in range(256) if not value & ~mask)
