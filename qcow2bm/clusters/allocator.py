"""Finding free clusters, and making room for their refcounts.

A cluster is free if its refcount is 0 and no L1 or L2 table leads to it. If a cluster with the
refcount 0 belongs to a structure that this library knows, the refcounts are wrong, and nothing is
allocated. How refcounts are stored is the business of ``refcounts``.

*Spec*: spec/refcounts.md, "Allocation".
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from qcow2bm.clusters.cluster_runs import JoinedRuns, Run, place_runs, subtract_runs
from qcow2bm.clusters.file import ClusterFile
from qcow2bm.clusters.guest_map import GuestMap
from qcow2bm.clusters.plan import Barrier, Step, Write
from qcow2bm.clusters.problems import MAX_REFCOUNT_TABLE_BYTES
from qcow2bm.clusters.refcounts import Refcounts
from qcow2bm.errors import LimitError, NoRoomError
from qcow2bm.format.header import FIELD_OFFSETS
from qcow2bm.format.refcounts import ENTRY_LENGTH
from qcow2bm.units import ceil_div

_WINDOW_BYTES = 256 << 10, 4 << 20
"""The bytes of refcount blocks that the first and the second search read before the image grows."""

_MAX_CLUSTER_END = 1 << 56  # bytes: the end of what a bitmap table entry can lead to


class Allocation(NamedTuple):
    """Clusters whose refcounts are now planned to be 1.

    Attributes:
        firsts: the first cluster of each requested run.
        loose: the requested clusters that may lie anywhere, as runs.
    """

    firsts: tuple[int, ...]
    loose: tuple[Run, ...]


class _Growth(NamedTuple):
    """New clusters behind all clusters in use, with room for their refcounts.

    In the file, a larger refcount table comes first, then the new refcount blocks, and then the
    new clusters.

    Attributes:
        start: the number of the first cluster of it all.
        table_clusters: the size of a larger refcount table; 0 if none is needed.
        blocks: the numbers of the new refcount blocks.
        clusters: how many new clusters there are.
    """

    start: int
    table_clusters: int
    blocks: list[int]
    clusters: int

    @property
    def first(self) -> int:
        """The number of the first new cluster."""
        return self.start + self.table_clusters + len(self.blocks)

    @property
    def stop(self) -> int:
        """The number of the cluster behind the last new cluster."""
        return self.first + self.clusters


class _Search(NamedTuple):
    """Places that were found.

    Attributes:
        placed: the place of each run, None for those that come into the growth.
        pieces: the places of loose clusters, but those that come into the growth.
        growth: the new clusters behind all others, if any are needed.
    """

    placed: list[Run | None]
    pieces: list[Run]
    growth: _Growth | None

    @property
    def places(self) -> list[Run]:
        """All places, those of new refcount structures among them."""
        grown = [(self.growth.start, self.growth.stop)] if self.growth else []
        return [run for run in (*self.placed, *self.pieces, *grown) if run]


class Need(NamedTuple):
    """What an allocation takes beside the clusters themselves.

    Attributes:
        refcount_clusters: by how many clusters the refcount table and the refcount blocks grow.
        end: the number of the cluster behind the last one that is allocated.
    """

    refcount_clusters: int
    end: int


class Allocator:
    """Plans the allocation and the freeing of clusters in an image.

    Attributes:
        refcounts: the refcounts with all planned changes.
    """

    def __init__(
        self,
        file: ClusterFile,
        taken: JoinedRuns | Iterable[Run],
        near: int,
        capacity: int | None,
        guest: GuestMap | None,
        *,
        is_behind: bool = False,
    ) -> None:
        """Reads the refcount table.

        Args:
            file: the image.
            taken: runs of clusters that are known to be in use.
            near: the cluster at whose refcount block the search begins.
            capacity: the length in bytes that the storage cannot exceed, if there is one.
            guest: the clusters that tables lead to; None if ``taken`` has them.
            is_behind: whether to allocate only behind all clusters that are in use.

        Raises:
            FormatError: the refcount table is damaged.
            StorageError: reading failed.
        """
        self._cluster_size = file.cluster_size
        self._name = file.storage.name
        self.refcounts = Refcounts(file)
        self._taken = taken if isinstance(taken, JoinedRuns) else JoinedRuns.of(taken)
        self._near = near // self.refcounts.per_block
        self._limit = (capacity or _MAX_CLUSTER_END) // file.cluster_size
        self._can_grow = capacity is None
        self._file_end = ceil_div(file.file_size, file.cluster_size)
        self._guest = guest
        self._guest_runs: list[Run] = []  # all of them, once one was seen to count as free
        self._fresh: list[Run] = []
        self._old_table: Run | None = None
        self._has_structures = False
        self._is_behind = is_behind

    def allocate(self, runs: Sequence[int], loose: int) -> Allocation:
        """Allocates runs of these lengths, and ``loose`` more clusters anywhere.

        The caller must make one call for all clusters that it needs, because an `Allocator` can
        make room for new refcounts only once.

        Raises:
            FormatError: the refcounts are damaged.
            LimitError: the refcount table would become too large.
            NoRoomError: the storage has no room and cannot grow.
            StorageError: reading failed.
        """
        placed, pieces, growth = self._search_untaken(runs, loose)
        if growth:
            self._grow(growth)
            start = growth.first
            for number, length in enumerate(runs):
                if placed[number] is None:
                    placed[number] = start, start + length
                    start += length
            if start < growth.stop:
                pieces.append((start, growth.stop))
        whole = [run for run in placed if run]
        self._fresh = [*whole, *pieces]
        self._count(self._fresh, 0, 1)
        return Allocation(tuple(first for first, _ in whole), tuple(pieces))

    def need(self, runs: Sequence[int], loose: int) -> Need:
        """Returns what `allocate` would take, and allocates nothing; raises as `allocate` does."""
        search = self._search_untaken(runs, loose)
        clusters = 0
        if growth := search.growth:
            clusters = len(growth.blocks)
            if growth.table_clusters:
                clusters += growth.table_clusters - self.refcounts.table_clusters
        return Need(clusters, max((stop for _, stop in search.places), default=0))

    def _search_untaken(self, runs: Sequence[int], loose: int) -> _Search:
        """Searches for clusters to which no L1 or L2 table leads."""
        found = self._search(runs, loose)
        if self._guest:
            is_exhaustive = not self._can_grow  # a file that grows needs no cluster of the disk
            if wrong := self._guest.leads_to(found.places, is_exhaustive=is_exhaustive):
                if not self._guest.is_small:
                    raise self.refcounts.wrong(wrong[0][0], 0, 1)
                self._guest_runs = self._guest.clusters()
                found = self._search(runs, loose)
        return found

    def _search(self, runs: Sequence[int], loose: int) -> _Search:
        """Searches more and more blocks; what is missing comes behind all clusters in use."""
        wanted = sum(runs) + loose
        blocks = self.refcounts.blocks()
        near = bisect_left(blocks, self._near)
        blocks = blocks[near:] + blocks[:near]
        windows = *_WINDOW_BYTES, self._cluster_size * len(blocks)
        is_unread = self._guest and not self._guest.is_small
        if self._is_behind or (is_unread and self._can_grow):
            if not self._is_behind:
                self._free(blocks[: windows[0] // self._cluster_size or 1])  # is a refcount wrong?
            behind = self._extend(wanted, (), self._file_end if self._can_grow else 0)
            if behind.stop > self._limit:
                raise self._no_room(wanted, behind)
            return _Search([None] * len(runs), [], behind)
        for number, window in enumerate(windows):
            free = self._free(blocks[: window // self._cluster_size or 1])
            placed, pieces, left = place_runs(free, runs, loose)
            if not left:
                return _Search(placed, pieces, None)
            growth = self._extend(left, (*placed, *pieces), 0) if number else None
            if growth and growth.stop <= self._limit:
                return _Search(placed, pieces, growth)
        raise self._no_room(wanted, self._extend(left, (*placed, *pieces), 0))

    def _count(self, runs: Iterable[Run], before: int, after: int) -> None:
        for first, stop in runs:
            self.refcounts.change(first, stop - first, before, after)

    def _free(self, blocks: Iterable[int]) -> list[Run]:
        """The free clusters that these blocks count, in the order of the blocks, as long runs."""
        found: list[Run] = []
        for first, stop in self.refcounts.free_runs(blocks):
            self._require_untaken(first, stop)
            stop = min(stop, self._limit)
            if found and found[-1][1] == first:
                found[-1] = found[-1][0], stop
            elif first < stop:
                found.append((first, stop))
        return subtract_runs(found, self._guest_runs)

    def _require_untaken(self, first: int, stop: int) -> None:
        """Raises `FormatError` if a structure covers a free cluster.

        If one refcount is wrong, the others cannot be trusted either.
        """
        for wrong, _ in self._taken.within(first, stop):
            raise self.refcounts.wrong(wrong, 0, 1)

    def _extend(self, count: int, placed: Iterable[Run | None], least: int) -> _Growth:
        """Returns where ``count`` clusters lie behind all clusters in use, from ``least`` on.

        ``placed`` are runs that are to be allocated, too. The storage may end before these clusters
        do.
        """
        refcounts = self.refcounts
        ends = [run[1] for run in (*self._guest_runs[-1:], *placed) if run]
        start = max([least, refcounts.end(), self._taken.end, *ends])
        growth = _Growth(start, 0, [], count)
        while True:
            last_block = (growth.stop - 1) // refcounts.per_block
            blocks = range(start // refcounts.per_block, last_block + 1)
            needed = [block for block in blocks if not refcounts.has_block(block)]
            table_clusters = self._table_growth(growth.stop) if needed else 0
            if (needed, table_clusters) == (growth.blocks, growth.table_clusters):
                return growth
            growth = _Growth(start, table_clusters, needed, count)

    def _grow(self, growth: _Growth) -> None:
        """Plans the new refcount structures."""
        refcounts = self.refcounts
        if growth.table_clusters:
            old = refcounts.table_offset // self._cluster_size
            self._old_table = old, old + refcounts.table_clusters
            refcounts.move_table(growth.start, growth.table_clusters)
        for number, block in enumerate(growth.blocks, growth.start + growth.table_clusters):
            refcounts.add_block(block, number)
        if growth.blocks:
            refcounts.change(growth.start, growth.first - growth.start, 0, 1)
            self._has_structures = True

    def _table_growth(self, stop: int) -> int:
        """The clusters of a larger refcount table for the clusters before ``stop``; 0 if it fits.

        Raises:
            LimitError: the refcount table would become too large.
        """
        refcounts = self.refcounts
        blocks = ceil_div(stop, refcounts.per_block)
        if blocks <= refcounts.capacity:
            return 0
        limit = MAX_REFCOUNT_TABLE_BYTES // ENTRY_LENGTH
        if blocks > limit:
            missing = (stop - limit * refcounts.per_block) * self._cluster_size
            raise LimitError("the number of refcount blocks", blocks, limit, missing)
        wanted = max(blocks, refcounts.capacity * 3 // 2)  # so that the table seldom has to grow
        return ceil_div(ENTRY_LENGTH * min(wanted, limit), self._cluster_size)

    def _no_room(self, clusters: int, growth: _Growth) -> NoRoomError:
        """Returns the error for an edit whose clusters would end behind the end of the storage."""
        size, missing = self._cluster_size, growth.stop - self._limit
        return NoRoomError(self._name, clusters * size, missing * size, self._limit * size)

    def free(self, runs: Iterable[Run]) -> None:
        """Frees clusters, and the old refcount table if it was replaced.

        The caller calls it last, when everything else is planned.

        Raises:
            FormatError: a cluster has another refcount than 1.
            StorageError: reading failed.
        """
        self._count(runs, 1, 0)
        if self._old_table:
            self._count([self._old_table], 1, 0)

    def set_aside(self, count: int) -> tuple[list[int], list[Step]]:
        """Finds ``count`` free clusters for later use, without counting them as used.

        No other writer may allocate clusters until these are used or given up. The caller calls
        either this method or `allocate`, which raise the same errors.

        Returns:
            The numbers of the clusters, and the steps that make room for their refcounts.
        """
        if not count:
            return [], []
        loose = self.allocate((), count).loose
        steps = self.preparation()
        self._count(self._fresh, 1, 0)
        self._fresh = []
        self.free(())
        what = "refcounts of the old refcount table"
        steps += self.refcounts.take_count_writes(what) if self._old_table else []
        self.refcounts.take_count_writes("unchanged refcounts")
        return [number for first, stop in loose for number in range(first, stop)], steps

    def preparation(self) -> list[Step]:
        """The steps that make room for the refcounts of new clusters.

        The steps end with a barrier and must be done before the new clusters are used. If nothing
        follows them, the image is as sound as before, and only the clusters of the new refcount
        structures are in use.
        """
        if not self._has_structures:
            return []
        self._count(self._fresh, 1, 0)
        blocks = self.refcounts.take_block_writes()
        table = self.refcounts.take_table_writes()
        counts = self.refcounts.take_count_writes("refcounts of new refcount structures")
        self._count(self._fresh, 0, 1)
        if not self._old_table:
            use = Barrier("use of the new refcount blocks")
            return [*blocks, *counts, Barrier("new refcount blocks"), *table, use]
        offset = self.refcounts.table_offset.to_bytes(8, "big")
        place = offset + self.refcounts.table_clusters.to_bytes(4, "big")
        switch = Write(
            FIELD_OFFSETS["refcount_table_offset"], (place,), "place of the refcount table"
        )
        return [
            *blocks,
            *table,
            *counts,
            Barrier("larger refcount table"),
            switch,
            Barrier("use of the larger refcount table"),
        ]
