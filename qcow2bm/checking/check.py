"""Checking an image: following every reference, and comparing with every refcount.

*Spec*: spec/check.md.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from qcow2bm.bitmaps.entries import required_table_size
from qcow2bm.bitmaps.metadata import Metadata
from qcow2bm.bitmaps.tables import UsedRange, readable_tables, used_by_bitmaps
from qcow2bm.checking.guest import GuestWalk, L1Table
from qcow2bm.checking.listing import Listing
from qcow2bm.checking.references import CHUNK, References, runs
from qcow2bm.checking.stored_refcounts import StoredRefcounts
from qcow2bm.clusters.layout import snapshot_entries
from qcow2bm.clusters.problems import MAX_L1_BYTES
from qcow2bm.format import extensions
from qcow2bm.format.directory import DirectoryEntry
from qcow2bm.format.header import MAX_SNAPSHOTS
from qcow2bm.problems import DATA, DIRECTORY, TABLE, Problem
from qcow2bm.units import ceil_div

_OVERLAPS = {
    DIRECTORY: "bitmap-directory.overlap",
    TABLE: "bitmap-table.overlap",
    DATA: "bitmap-data.overlap",
}


class Check(NamedTuple):
    """The result of a check.

    Attributes:
        problems: the problems, those of one id together. At most 16 of an id are listed, but all
            that concern bitmaps. `Image.check` leaves out the problems in `Image.problems`;
            `qcow2bm.check` begins with them.
        leaked_clusters: how many clusters have a refcount higher than the number of references.
        is_complete: whether every reference could be followed. If not, what looks like a leak
            may be none.
        end: the number of the cluster behind the last one that has a reference or a refcount,
            even if that cluster is wrongly behind the end of the file.
    """

    problems: tuple[Problem, ...]
    leaked_clusters: int
    is_complete: bool
    end: int


def check(metadata: Metadata) -> Check:
    """Follows every reference in an image, and compares the references with the refcounts.

    Raises:
        ImageLockedError: another process writes to the image.
        ChangedWhileReadingError: the image changed since its metadata were loaded.
        StorageError: reading failed.
    """
    with metadata.file.lock():
        found = Checker(metadata).check
        metadata.verify()
    return found


class Checker:
    """Counts all references of an image, and finds the problems on the way.

    Attributes:
        disk: the references of the disk: from L1 and L2 tables, also those of snapshots. They
            are counted apart, to find the bitmaps that share clusters with the disk.
        others: all other references.
        stored: the refcounts as they are stored.
        check: what was found.
    """

    def __init__(self, metadata: Metadata) -> None:
        """Reads and counts everything; the caller holds the lock of ``metadata.file``.

        Raises:
            StorageError: reading failed.
        """
        file = metadata.file
        self._file = file
        self._directory = metadata.directory
        self._listing = Listing()
        self._overlapping: set[tuple[str, int | None]] = set()
        self.disk = References(file)
        self.others = References(file)
        self.others.add(0, file.cluster_size)
        self.stored = StoredRefcounts(file, self.others, self._listing)
        self._walk_disk()
        # Bitmaps come after this: a wrong reference of a bitmap is a fault of the bitmap.
        self.stored.report_shared_blocks(self.disk, self.others)
        self._walk_bitmaps()
        is_complete = not self._listing.has_unusable
        leaked = self._compare()
        end = max(self.disk.reach, self.others.reach, self.stored.end)
        self.check = Check(tuple(self._listing), leaked, is_complete, end)

    def _walk_disk(self) -> None:
        header = self._file.header
        walk = GuestWalk(self._file, self.disk, self.stored.of, self._listing.add)
        tables = [L1Table(header.l1_table_offset, header.l1_size, True)]
        if header.nb_snapshots:
            tables += self._snapshots()
        for table in tables:
            is_small = 8 * table.entries <= MAX_L1_BYTES
            if is_small and not table.offset % self._file.cluster_size:
                walk.walk(table)
            elif not table.is_active:  # a fault of the active one is a problem of the header
                self._listing.add("l1-table.invalid", table.offset, "of a snapshot cannot be one")
        crypto = self._file.find(extensions.CRYPTO)
        if crypto and len(crypto.data) == extensions.CRYPTO_LENGTH:
            place = extensions.parse_crypto_header(crypto.data)
            self.others.add(place.offset, place.length)

    def _snapshots(self) -> list[L1Table]:
        """Returns the L1 tables of all snapshots, and checks that the snapshot table is whole."""
        from qcow2bm.format import snapshots  # few images have any

        header, tables, length = self._file.header, [], 0
        for number, entry in enumerate(snapshot_entries(self._file)):
            tables.append(L1Table(entry.l1_table_offset, entry.l1_size, False))
            length += entry.size
            if header.version > 2 and entry.extra_data_size < snapshots.MIN_EXTRA_DATA_SIZE:
                reason = f"has {entry.extra_data_size} bytes of extra data, too few"
                self._listing.add("snapshot-table.entry.incomplete", entry.offset, reason, number)
        start = header.snapshots_offset
        missing = max(0, min(header.nb_snapshots, MAX_SNAPSHOTS) - len(tables))
        self.others.add(start, length)
        if missing or start + length > self._file.file_size:
            self.others.note(start + length + missing * snapshots.HEAD_LENGTH)
            reason = "reaches past the end of the file"
            self._listing.add("snapshot-table.past-eof", start, reason)
        return tables

    def _walk_bitmaps(self) -> None:
        if self._directory.is_consistent:
            for part in used_by_bitmaps(self._file, self._directory):
                self._count_part(part)
            for entry, words in readable_tables(self._file, self._directory):
                self._check_tail(entry, words[-1])

    def _count_part(self, part: UsedRange) -> None:
        """Counts a range that bitmaps use, and reports it if the disk uses it, too.

        Only the first overlap of each structure is reported: it makes the bitmap unusable.
        """
        self.others.add(part.offset, part.length)
        first, stop = part.clusters(self._file.cluster_size)
        shared = np.flatnonzero(self.disk.counts(first, stop))
        key = part.structure, part.bitmap_index
        if len(shared) and key not in self._overlapping:
            self._overlapping.add(key)
            place = (first + int(shared[0])) * self._file.cluster_size
            reason = "is also used by the disk itself"
            id = _OVERLAPS[part.structure]
            self._listing.add(id, place, reason, None, part.bitmap_index)

    def _check_tail(self, entry: DirectoryEntry, word: int) -> None:
        """Reports set bits that stand for nothing, since they lie behind the end of the disk.

        ``word`` is the last table entry. QEMU leaves such bits within the last 64 bits of which
        one counts; no program leaves any behind these 64.
        """
        file = self._file
        size, granularity = file.cluster_size, entry.granularity
        if entry.bitmap_table_size != required_table_size(granularity, file.virtual_size, size):
            return
        if not word or word % size or not file.contains(word, size):
            return
        used = ceil_div(file.virtual_size, granularity) - 8 * size * (entry.bitmap_table_size - 1)
        place = word + used // 8
        data = file.read(word, size)
        rest = data[used // 8 :]
        if any(data[8 * ceil_div(used, 64) :]):
            reason = "has bits set far behind the disk: size or granularity are not what they were"
            self._listing.add("bitmap-data.beyond", place, reason, None, entry.index)
        elif any(rest[1:]) or (rest and rest[0] >> used % 8):
            reason = "has bits set behind the disk"
            self._listing.add("bitmap-data.tail", place, reason, None, entry.index)

    def _compare(self) -> int:
        """Reports where refcounts and references differ; returns the number of leaked clusters."""
        end = max(self.disk.clusters, self.others.clusters)
        leaked = 0
        per_block = self.stored.per_block
        nothing = np.zeros(per_block, np.uint64)
        for number in self._block_numbers():
            first = number * per_block
            stop = min(first + per_block, end)
            if first >= stop:
                continue
            stored = self.stored.blocks.get(number, nothing)[: stop - first]
            used = self.disk.counts(first, stop) + self.others.counts(first, stop)
            leaked += int(np.count_nonzero(stored > used))
            for id, where in (
                ("cluster.refcount.too-low", stored < used),
                ("cluster.refcount.leak", stored > used),
            ):
                for start, behind in runs(where):
                    self._report_run(id, first + start, behind - start, stored, used, start)
        return leaked

    def _block_numbers(self) -> list[int]:
        """The numbers of all refcount blocks that exist or should exist, ascending."""
        per_block = self.stored.per_block
        numbers = set(self.stored.blocks)
        for references in (self.disk, self.others):
            for chunk in references.chunks():
                low, high = chunk * CHUNK, (chunk + 1) * CHUNK
                numbers.update(range(low // per_block, ceil_div(high, per_block)))
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
        """Reports ``count`` clusters in a row; message and place are those of the first."""
        more = (
            f", and so {'does' if count == 2 else 'do'} the next {count - 1}" if count > 1 else ""
        )
        refcount, references = int(stored[start]), int(used[start])
        what = f"has refcount {refcount}, and {references} references{more}"
        self._listing.add(id, cluster * self._file.cluster_size, what)
