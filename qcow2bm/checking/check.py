"""Checking an image: the reader's problems, and what needs every reference and refcount.

*Spec*: spec/check.md.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from qcow2bm.bitmaps.directory import BitmapDirectory
from qcow2bm.bitmaps.entries import required_table_size
from qcow2bm.bitmaps.tables import Used, readable_tables, used_by_bitmaps
from qcow2bm.checking.guest import GuestWalk, L1Table
from qcow2bm.checking.references import CHUNK, References, runs
from qcow2bm.clusters.file import ClusterFile
from qcow2bm.clusters.layout import snapshot_entries
from qcow2bm.clusters.plan import SECTOR_SIZE, Write
from qcow2bm.clusters.problems import MAX_L1_BYTES, MAX_REFCOUNT_TABLE_BYTES
from qcow2bm.errors import LimitError
from qcow2bm.format import extensions
from qcow2bm.format.directory import DirectoryEntry
from qcow2bm.format.header import MAX_REFCOUNT_ORDER, MAX_SNAPSHOTS
from qcow2bm.format.refcounts import (
    ENTRY_LENGTH,
    TABLE_OFFSET_MASK,
    build_refcount_block,
    parse_refcount_block,
    parse_refcount_table,
)
from qcow2bm.problem_kinds import KINDS, problem, summary_of
from qcow2bm.problems import DATA, DIRECTORY, TABLE, UNUSABLE, Problem
from qcow2bm.units import ceil_div

MAX_LISTED = 16
"""So many problems of one id that is not a bitmap's are listed; then one stands for the others."""

_OVERLAPS = {
    DIRECTORY: "bitmap-directory.overlap",
    TABLE: "bitmap-table.overlap",
    DATA: "bitmap-data.overlap",
}


class Check(NamedTuple):
    """What checking found, beyond what a reader finds.

    Attributes:
        problems: those of one id together; not more than `MAX_LISTED` of them, but of bitmaps all.
        leaked_clusters: how many clusters are counted more often than they are referred to.
        is_complete: whether every reference could be followed. If not, what looks like a leak may
            be none.
        end: the number of the cluster behind the last one that something refers to, or that is
            counted, also where that is wrongly behind the end of the file.
    """

    problems: tuple[Problem, ...]
    leaked_clusters: int
    is_complete: bool
    end: int


def check(file: ClusterFile, directory: BitmapDirectory) -> Check:
    """Follows every reference in an image, and compares with the refcounts.

    The caller holds the lock of ``file``, and verifies afterwards that nothing has changed.

    Raises:
        StorageError: reading failed.
    """
    return _Checker(file, directory).run()


def refcount_mends(file: ClusterFile, directory: BitmapDirectory) -> list[Write]:
    """What makes refcounts right: the sectors of refcount blocks, in order.

    Leaked clusters are given back, but those that a stale bitmaps extension names, which are the
    last trace of its bitmaps. What the disk does not use is counted as often as it is used.
    Nothing if not every reference could be followed. Raises as `check` does.
    """
    return _Checker(file, directory).mends()


def undercounted_bitmaps(file: ClusterFile, directory: BitmapDirectory) -> frozenset[int]:
    """The bitmaps, by the indexes of their entries, with a cluster that is counted too low.

    Whoever looks for a free cluster may take it, or has done so. Raises as `check` does.
    """
    return _Checker(file, directory).undercounted()


class _Checker:
    def __init__(self, file: ClusterFile, directory: BitmapDirectory) -> None:
        self._file = file
        self._directory = directory
        self._disk = References(file)  # apart, to find bitmaps that share clusters with it
        self._others = References(file)
        self._found: dict[str, list[Problem]] = {}
        self._counts: Counter[str] = Counter()
        self._shared: set[tuple[str, int | None]] = set()
        self._blocks: dict[int, NDArray[np.unsignedinteger[Any]]] = {}
        self._by_offset: dict[int, NDArray[np.unsignedinteger[Any]]] = {}
        self._places: dict[int, int] = {}
        self._order = min(file.header.refcount_order, MAX_REFCOUNT_ORDER)
        self._per_block = 8 * file.cluster_size >> self._order

    def run(self) -> Check:
        self._others.add(0, self._file.cluster_size)
        self._read_refcounts()
        self._walk_disk()
        self._look_at_blocks()  # before bitmaps: what they claim wrongly is their fault
        self._walk_bitmaps()
        is_complete = not any(KINDS[id].severity == UNUSABLE for id in self._counts)
        leaked = self._compare()
        return Check(tuple(self._problems()), leaked, is_complete, self._end())

    def _end(self) -> int:
        """See `Check`."""
        counted = [
            number * self._per_block + int(used[-1]) + 1
            for number, counts in self._blocks.items()
            if len(used := np.flatnonzero(counts))
        ]
        return max([self._disk.reach, self._others.reach, *counted])

    def mends(self) -> list[Write]:
        """See `refcount_mends`."""
        if not self.run().is_complete:
            return []
        references, stale = self._others, References(self._file)
        if self._directory.extension and not self._directory.is_consistent:
            self._others = stale
            self._use_bitmaps()
        end = max(self._disk.clusters, references.clusters)
        limit = (1 << (1 << self._order)) - 1
        writes: list[Write] = []
        for number, stored in sorted(self._blocks.items()):
            first = number * self._per_block
            stop = min(first + self._per_block, end)
            if first >= stop:
                continue
            disk, named = self._disk.counts(first, stop), stale.counts(first, stop)
            used = (disk + references.counts(first, stop)).astype(np.uint64)
            wanted = stored.copy()
            part = wanted[: stop - first]
            # Where the disk is concerned, its tables may have to change as well: that is QEMU's.
            is_leak = (part > used) & (named == 0) & (disk == 0)
            is_low = (part < used) & (disk == 0) & (used <= limit)
            part[is_leak | is_low] = used[is_leak | is_low]
            writes += self._sectors(number, np.flatnonzero(wanted != stored), wanted)
        return writes

    def undercounted(self) -> frozenset[int]:
        """See `undercounted_bitmaps`."""
        self.run()
        found: set[int] = set()
        for part in used_by_bitmaps(self._file, self._directory):
            first, stop = self._clusters(part)
            used = self._disk.counts(first, stop) + self._others.counts(first, stop)
            is_low = self._refcounts(np.arange(first, stop)) < used
            if is_low.any() and part.bitmap_index is not None:
                found.add(part.bitmap_index)
        return frozenset(found)

    def _sectors(
        self, number: int, changed: NDArray[np.intp], counts: NDArray[np.uint64]
    ) -> Iterator[Write]:
        """The sectors of a block with the counts that change."""
        per_sector = 8 * SECTOR_SIZE >> self._order
        code = "B" if self._order <= 3 else "HIQ"[self._order - 4]
        for sector in np.unique(changed // per_sector).tolist():
            start = sector * per_sector
            part = array(code, counts[start : start + per_sector].tolist())
            place = self._places[number] + sector * SECTOR_SIZE
            yield Write(place, (build_refcount_block(part, self._order),), "refcounts")

    def _report(
        self,
        id: str,
        offset: int,
        reason: str,
        element: int | None = None,
        bitmap_index: int | None = None,
    ) -> None:
        """A problem. Those of bitmaps are few, at most one of an id each, and all are needed."""
        self._counts[id] += 1
        if bitmap_index is None and self._counts[id] > MAX_LISTED:
            return
        self._found.setdefault(id, []).append(
            problem(id, offset, reason, bitmap_index, None, element)
        )

    def _problems(self) -> Iterator[Problem]:
        for id, found in self._found.items():
            yield from found
            more = self._counts[id] - len(found)
            if more:
                last = summary_of(KINDS[id].structure).id
                yield problem(last, found[-1].offset, f"is not the last: {more} more are like it")

    # Refcounts as they are stored

    def _read_refcounts(self) -> None:
        header, size = self._file.header, self._file.cluster_size
        length = header.refcount_table_clusters * size
        offset = header.refcount_table_offset
        if not length or length > MAX_REFCOUNT_TABLE_BYTES or offset % size:
            return  # which is a problem of the header
        try:
            data = self._file.read(offset, length)
        except LimitError:
            return
        self._others.add(offset, length)
        words = parse_refcount_table(data)
        for number, word in enumerate(words) if any(data) else ():
            if word:
                self._read_block(offset + ENTRY_LENGTH * number, number, word)

    def _read_block(self, place: int, number: int, word: int) -> None:
        size = self._file.cluster_size
        offset = word & TABLE_OFFSET_MASK
        if word != offset or offset % size:
            self._report("refcount-table.entry.invalid", place, f"is {word:#x}", number)
        elif offset >= self._file.file_size:
            reason = f"leads to {offset:#x}, past the end of the file"
            self._report("refcount-table.entry.past-eof", place, reason, number)
        elif offset:
            self._others.add(offset, size)
            self._blocks[number] = self._block(offset)
            self._places[number] = offset

    def _block(self, offset: int) -> NDArray[np.unsignedinteger[Any]]:
        """A refcount block; several entries of the table may lead to one, wrongly."""
        if offset not in self._by_offset:
            data = self._file.read(offset, self._file.cluster_size)
            self._by_offset[offset] = np.asarray(parse_refcount_block(data, self._order))
        return self._by_offset[offset]

    def _look_at_blocks(self) -> None:
        """A block that something else uses as well counts nothing that can be believed."""
        for number, offset in self._places.items():
            cluster = offset // self._file.cluster_size
            used = (r.counts(cluster, cluster + 1) for r in (self._disk, self._others))
            if sum(int(count[0]) for count in used) > 1:
                place = self._file.header.refcount_table_offset + ENTRY_LENGTH * number
                reason = f"leads to {offset:#x}, which something else uses as well"
                self._report("refcount-table.entry.shared", place, reason, number)

    def _refcounts(self, clusters: NDArray[np.int64]) -> NDArray[np.uint64]:
        found = np.zeros(len(clusters), np.uint64)
        blocks = clusters // self._per_block
        for number in np.unique(blocks).tolist():
            if number in self._blocks:
                here = blocks == number
                found[here] = self._blocks[number][clusters[here] - number * self._per_block]
        return found

    # References

    def _walk_disk(self) -> None:
        header = self._file.header
        walk = GuestWalk(self._file, self._disk, self._refcounts, self._report)
        tables = [L1Table(header.l1_table_offset, header.l1_size, True)]
        if header.nb_snapshots:
            tables += self._snapshots()
        for table in tables:
            is_small = 8 * table.entries <= MAX_L1_BYTES
            if is_small and not table.offset % self._file.cluster_size:
                walk.walk(table)
            elif not table.is_active:  # of the active one the header's problems speak
                self._report("l1-table.invalid", table.offset, "of a snapshot cannot be one")
        crypto = self._file.find(extensions.CRYPTO)
        if crypto and len(crypto.data) == extensions.CRYPTO_LENGTH:
            place = extensions.parse_crypto_header(crypto.data)
            self._others.add(place.offset, place.length)

    def _snapshots(self) -> list[L1Table]:
        """The L1 tables of snapshots; the table that has them must be there with all entries."""
        from qcow2bm.format import snapshots  # few images have any

        header, tables, length = self._file.header, [], 0
        for number, entry in enumerate(snapshot_entries(self._file)):
            tables.append(L1Table(entry.l1_table_offset, entry.l1_size, False))
            length += entry.size
            if header.version > 2 and entry.extra_data_size < snapshots.MIN_EXTRA_DATA_SIZE:
                reason = f"has {entry.extra_data_size} bytes of extra data, too few"
                self._report("snapshot-table.entry.incomplete", entry.offset, reason, number)
        start = header.snapshots_offset
        missing = max(0, min(header.nb_snapshots, MAX_SNAPSHOTS) - len(tables))
        self._others.add(start, length)
        if missing or start + length > self._file.file_size:
            self._others.note(start + length + missing * snapshots.HEAD_LENGTH)
            reason = "reaches past the end of the file"
            self._report("snapshot-table.past-eof", start, reason)
        return tables

    def _walk_bitmaps(self) -> None:
        if self._directory.is_consistent:
            self._use_bitmaps()
            for entry, words in readable_tables(self._file, self._directory):
                self._look_at_tail(entry, words[-1])

    def _use_bitmaps(self) -> None:
        for used in used_by_bitmaps(self._file, self._directory):
            self._use(used)

    def _use(self, part: Used) -> None:
        """Counts what a bitmap uses, and finds out whether the disk uses it, too.

        The first place where it does is enough: the bitmap is worth nothing then.
        """
        first, stop = self._clusters(part)
        self._others.add(part.offset, part.length)
        shared = np.flatnonzero(self._disk.counts(first, stop))
        id = _OVERLAPS[part.structure]
        if len(shared) and (id, part.bitmap_index) not in self._shared:
            self._shared.add((id, part.bitmap_index))
            place = (first + int(shared[0])) * self._file.cluster_size
            self._report(id, place, "is also used by the disk itself", None, part.bitmap_index)

    def _clusters(self, part: Used) -> tuple[int, int]:
        size = self._file.cluster_size
        return part.offset // size, ceil_div(part.offset + part.length, size)

    def _look_at_tail(self, entry: DirectoryEntry, word: int) -> None:
        """Bits behind the last that stands for a part of the disk should be clear."""
        file = self._file
        size, granularity = file.cluster_size, entry.granularity
        if entry.bitmap_table_size != required_table_size(granularity, file.virtual_size, size):
            return
        if not word or word % size or not file.contains(word, size):
            return
        used = ceil_div(file.virtual_size, granularity) - 8 * size * (entry.bitmap_table_size - 1)
        data = file.read(word, size)
        rest = data[used // 8 :]
        if any(data[8 * ceil_div(used, 64) :]):  # which no program leaves there
            reason = "has bits set far behind the disk: size or granularity are not what they were"
            self._report("bitmap-data.beyond", word + used // 8, reason, None, entry.index)
        elif any(rest[1:]) or (rest and rest[0] >> used % 8):
            place = word + used // 8
            self._report(
                "bitmap-data.tail", place, "has bits set behind the disk", None, entry.index
            )

    # Both together

    def _compare(self) -> int:
        """Reports where refcounts and references differ; the number of leaked clusters."""
        end = max(self._disk.clusters, self._others.clusters)
        leaked = 0
        for number in self._numbers():
            first = number * self._per_block
            stop = min(first + self._per_block, end)
            if first >= stop:
                continue
            stored = self._blocks.get(number, np.zeros(self._per_block, np.uint64))[: stop - first]
            used = self._disk.counts(first, stop) + self._others.counts(first, stop)
            leaked += int(np.count_nonzero(stored > used))
            for id, where in (
                ("cluster.refcount.too-low", stored < used),
                ("cluster.refcount.leak", stored > used),
            ):
                for start, behind in runs(where):
                    self._report_run(id, first + start, behind - start, stored, used, start)
        return leaked

    def _numbers(self) -> list[int]:
        """The numbers of all refcount blocks there are, or should be."""
        numbers = set(self._blocks)
        for references in (self._disk, self._others):
            for chunk in references.chunks():
                low, high = chunk * CHUNK, (chunk + 1) * CHUNK
                numbers.update(range(low // self._per_block, ceil_div(high, self._per_block)))
        return sorted(numbers)

    def _report_run(
        self,
        id: str,
        cluster: int,
        count: int,
        stored: NDArray[np.uint64],
        used: NDArray[np.uint32],
        start: int,
    ) -> None:
        more = (
            f", and so {'does' if count == 2 else 'do'} the next {count - 1}" if count > 1 else ""
        )
        refcount, references = int(stored[start]), int(used[start])
        what = f"has refcount {refcount}, and {references} references{more}"
        self._report(id, cluster * self._file.cluster_size, what)
