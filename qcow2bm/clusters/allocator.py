"""Finding free clusters, and making room for their refcounts.

A cluster is free if its refcount is 0. If such a cluster belongs to a structure that this library
knows, the refcounts are wrong, and nothing is allocated. L2 tables are never read. How refcounts
are stored is the business of ``refcounts``.

*Spec*: spec/refcounts.md, "Allocation".
"""

from __future__ import annotations

import errno
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from qcow2bm.clusters.cluster_runs import Run, join_runs, place_runs
from qcow2bm.clusters.file import ClusterFile
from qcow2bm.clusters.plan import Barrier, Step, Write
from qcow2bm.clusters.problems import MAX_REFCOUNT_TABLE_BYTES
from qcow2bm.clusters.refcounts import Refcounts
from qcow2bm.errors import LimitError, StorageError
from qcow2bm.format.header import FIELD_OFFSETS
from qcow2bm.format.refcounts import ENTRY_LENGTH
from qcow2bm.units import ceil_div, format_size

_WINDOW_BYTES = 256 << 10, 4 << 20
"""How many bytes of refcount blocks the first and the second search read before the image grows."""

_MAX_CLUSTER_END = 1 << 56  # bytes: the end of what a bitmap table entry can lead to


class Allocation(NamedTuple):
    """Clusters whose refcounts are now planned to be 1.

    Attributes:
        firsts: the first cluster of each requested run.
        loose: the requested clusters that may lie anywhere, as runs.
    """

    firsts: tuple[int, ...]
    loose: tuple[Run, ...]


class Allocator:
    """Plans the allocation and the freeing of clusters in an image.

    Attributes:
        refcounts: the refcounts with all planned changes.
    """

    def __init__(
        self,
        file: ClusterFile,
        taken: Iterable[Run],
        near: int,
        capacity: int | None,
        *,
        is_behind: bool = False,
    ) -> None:
        """Reads the refcount table.

        Args:
            file: the image.
            taken: runs of clusters that are known to be in use.
            near: the cluster at whose refcount block the search begins.
            capacity: the length in bytes that the storage cannot exceed, if there is one.
            is_behind: whether to allocate only behind all clusters that are in use.

        Raises:
            FormatError: the refcount table is damaged.
            StorageError: reading failed.
        """
        self._cluster_size = file.cluster_size
        self._name = file.storage.name
        self.refcounts = Refcounts(file)
        self._taken = join_runs(taken)
        self._near = near // self.refcounts.per_block
        self._limit = (capacity or _MAX_CLUSTER_END) // file.cluster_size
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
            StorageError: the storage has no room and cannot grow, or reading failed.
        """
        placed, pieces, left, start = self._search(runs, loose)
        for number, length in enumerate(runs):
            if placed[number] is None:
                placed[number] = start, start + length
                start += length
                left -= length
        if left:
            pieces.append((start, start + left))
        whole = [run for run in placed if run]
        self._fresh = [*whole, *pieces]
        self._count(self._fresh, 0, 1)
        return Allocation(tuple(first for first, _ in whole), tuple(pieces))

    def _search(
        self, runs: Sequence[int], loose: int
    ) -> tuple[list[Run | None], list[Run], int, int]:
        """Searches more and more blocks; returns as `place_runs`, and where missing clusters begin.

        The missing clusters lie behind all clusters that are in use.
        """
        if self._is_behind:
            wanted = sum(runs) + loose
            start = self._extend(wanted, ())
            if start is None:
                raise self._no_room(wanted)
            return [None] * len(runs), [], wanted, start
        blocks = self.refcounts.blocks()
        near = bisect_left(blocks, self._near)
        blocks = blocks[near:] + blocks[:near]
        for number, window in enumerate((*_WINDOW_BYTES, self._cluster_size * len(blocks))):
            free = self._free(blocks[: window // self._cluster_size or 1])
            placed, pieces, left = place_runs(free, runs, loose)
            if not left:
                return placed, pieces, 0, 0
            start = self._extend(left, (*placed, *pieces)) if number else None
            if start is not None:
                return placed, pieces, left, start
        raise self._no_room(sum(runs) + loose)

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
        return found

    def _require_untaken(self, first: int, stop: int) -> None:
        """Raises `FormatError` if a structure covers a free cluster.

        If one refcount is wrong, the others cannot be trusted either.
        """
        number = bisect_left(self._taken, (stop, 0)) - 1
        if number >= 0 and self._taken[number][1] > first:
            raise self.refcounts.wrong(max(first, self._taken[number][0]), 0, 1)

    def _extend(self, count: int, placed: Iterable[Run | None]) -> int | None:
        """Plans ``count`` new clusters behind all clusters in use, with room for their refcounts.

        Refcount blocks and a larger refcount table, if they are needed, lie before the new
        clusters. ``placed`` are runs that are allocated already.

        Returns:
            The first new cluster; None if the storage cannot grow that far.
        """
        refcounts = self.refcounts
        ends = [run[1] for run in (*self._taken[-1:], *placed) if run]
        start = max([refcounts.end(), *ends])
        missing: list[int] = []
        table_clusters = 0
        while True:
            first = start + table_clusters + len(missing)
            last_block = (first + count - 1) // refcounts.per_block
            blocks = range(start // refcounts.per_block, last_block + 1)
            needed = [block for block in blocks if not refcounts.has_block(block)]
            growth = self._table_growth(needed[-1] + 1) if needed else 0
            if (needed, growth) == (missing, table_clusters):
                break
            missing, table_clusters = needed, growth
        if first + count > self._limit:
            return None
        if table_clusters:
            old = refcounts.table_offset // self._cluster_size
            self._old_table = old, old + refcounts.table_clusters
            refcounts.move_table(start, table_clusters)
        for number, block in enumerate(missing, start + table_clusters):
            refcounts.add_block(block, number)
        if missing:
            refcounts.change(start, table_clusters + len(missing), 0, 1)
            self._has_structures = True
        return first

    def _table_growth(self, blocks: int) -> int:
        """The clusters of a larger refcount table for ``blocks`` blocks; 0 if none is needed."""
        refcounts = self.refcounts
        if blocks <= refcounts.capacity:
            return 0
        limit = MAX_REFCOUNT_TABLE_BYTES // ENTRY_LENGTH
        if blocks > limit:
            raise LimitError("the number of refcount blocks", blocks, limit)
        wanted = max(blocks, refcounts.capacity * 3 // 2)  # so that the table seldom has to grow
        return ceil_div(ENTRY_LENGTH * min(wanted, limit), self._cluster_size)

    def _no_room(self, clusters: int) -> StorageError:
        size = format_size(self._limit * self._cluster_size)
        reason = (
            f"No space left: the edit needs {format_size(clusters * self._cluster_size)} of free "
            f"clusters, and the storage ends at {size}; nothing was changed"
        )
        return StorageError(self._name, 0, 0, reason, errno.ENOSPC)

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
