"""Checking an image: following every reference, and comparing with every refcount.

*Spec*: spec/check.md.
"""

from __future__ import annotations

from typing import NamedTuple

from qcow2bm.bitmaps.entries import required_table_size
from qcow2bm.bitmaps.metadata import Metadata
from qcow2bm.bitmaps.tables import readable_entries
from qcow2bm.checking.bitmap_clusters import BitmapClusters
from qcow2bm.checking.differences import Differences
from qcow2bm.checking.guest import GuestWalk, L1Table
from qcow2bm.checking.listing import Listing
from qcow2bm.checking.references import References
from qcow2bm.checking.runs import Runs
from qcow2bm.checking.stored_refcounts import StoredRefcounts
from qcow2bm.clusters.file import ClusterFile
from qcow2bm.clusters.layout import snapshot_entries
from qcow2bm.clusters.parts import Holes
from qcow2bm.clusters.problems import MAX_L1_BYTES
from qcow2bm.clusters.stored_extents import stored_extents
from qcow2bm.format import extensions
from qcow2bm.format.bitmap_table import ENTRY_LENGTH, parse_bitmap_table
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

    def fault_of(self, index: int) -> str:
        """Returns the fault for which `repair` drops a bitmap; "" if there is none.

        ``index`` is that of the bitmap in the directory.
        """
        for found in self.problems:
            is_of_bitmap = found.bitmap_index == index
            if found.costs_every_bitmap or (is_of_bitmap and found.costs_bitmap):
                return found.message
        return ""


def check(metadata: Metadata) -> Check:
    """Follows every reference in an image, and compares the references with the refcounts.

    Raises:
        ImageLockedError: another process writes to the image.
        ChangedWhileReadingError: the image changed since its metadata were loaded.
        StorageError: reading failed.
    """
    with metadata.file.lock():
        found = Checker(metadata, Holes()).check
        metadata.verify()
    return found


class Checker:
    """Counts all references of an image, and finds the problems on the way.

    Attributes:
        disk: the references of the disk: from L1 and L2 tables, also those of snapshots. They
            are counted apart, to find the bitmaps that share clusters with the disk.
        others: all other references.
        stored: the refcounts as they are stored.
        differences: where the refcounts differ from the numbers of references.
        check: what was found.
    """

    def __init__(self, metadata: Metadata, holes: Holes) -> None:
        """Reads and counts everything; the caller holds the lock of ``metadata.file``.

        ``holes`` says what is done with L1 tables, L2 tables and bitmap tables in holes.

        Raises:
            StorageError: reading failed.
        """
        file = metadata.file
        self._file = file
        self._holes = holes
        self._directory = metadata.directory
        self._listing = Listing()
        self._tails: dict[tuple[int, int], _Tail] = {}  # by place and length of what counts
        self.disk = References(file)
        self.others = References(file)
        self.others.add(0, file.cluster_size)
        self.stored = StoredRefcounts(file, self.others, self._listing)
        self._walk_disk()
        # Bitmaps come after this: a wrong reference of a bitmap is a fault of the bitmap.
        self.stored.report_shared_blocks(self.disk, self.others)
        self._walk_bitmaps()
        is_complete = not self._listing.has_unusable
        self.differences = Differences(self.disk, self.others, self.stored)
        self.differences.report(self._listing, file.cluster_size)
        end = max(self.disk.reach, self.others.reach, self.stored.end)
        leaked = self.differences.leaked_clusters
        self.check = Check(tuple(self._listing), leaked, is_complete, end)

    def _walk_disk(self) -> None:
        header = self._file.header
        walked = []
        tables = [L1Table(header.l1_table_offset, header.l1_size, True)]
        if header.nb_snapshots:
            tables += self._snapshots()
        for table in tables:
            is_small = 8 * table.entries <= MAX_L1_BYTES
            if is_small and not table.offset % self._file.cluster_size:
                walked.append(table)
            elif not table.is_active:  # a fault of the active one is a problem of the header
                self._listing.add("l1-table.invalid", table.offset, "of a snapshot cannot be one")
        GuestWalk(self._file, self.disk, self.stored.of, self._listing, self._holes).walk(walked)
        crypto = self._file.find(extensions.CRYPTO)
        if crypto and len(crypto.data) == extensions.CRYPTO_LENGTH:
            place = extensions.parse_crypto_header(crypto.data)
            self.others.add(place.offset, place.length)

    def _snapshots(self) -> list[L1Table]:
        """Returns the L1 tables of all snapshots, and checks that the snapshot table is whole."""
        from qcow2bm.format import snapshots  # few images have any

        header, tables, length, padding = self._file.header, [], 0, 0
        for number, entry in enumerate(snapshot_entries(self._file)):
            tables.append(L1Table(entry.l1_table_offset, entry.l1_size, False))
            length += entry.size
            padding = entry.padding_size
            if header.version > 2 and entry.extra_data_size < snapshots.MIN_EXTRA_DATA_SIZE:
                reason = f"has {entry.extra_data_size} bytes of extra data, too few"
                self._listing.add("snapshot-table.entry.incomplete", entry.offset, reason, number)
        start = header.snapshots_offset
        missing = max(0, min(header.nb_snapshots, MAX_SNAPSHOTS) - len(tables))
        self.others.add(start, length)
        if missing or start + length - padding > self._file.file_size:
            self.others.note(start + length + missing * snapshots.HEAD_LENGTH)
            reason = "reaches past the end of the file"
            self._listing.add("snapshot-table.past-eof", start, reason)
        return tables

    def _walk_bitmaps(self) -> None:
        if self._directory.is_consistent:
            clusters = BitmapClusters(self._file, self._directory, self._holes)
            clusters.count(self.others)
            self._report_overlaps(clusters)
            for entry in readable_entries(self._file, self._directory):
                self._check_tail(entry)

    def _report_overlaps(self, clusters: BitmapClusters) -> None:
        """Reports the bitmaps that share clusters with the disk.

        Only the first overlap of each structure is reported: it makes the bitmap unusable.
        """
        end = self.disk.clusters
        others = Runs.joined(runs for runs, _ in self.others.counted.runs(0, end))
        disk = (runs for runs, _ in self.disk.counted.runs(0, end))
        for found in clusters.shared_with(Runs.joined(runs.overlaps(others) for runs in disk)):
            place = found.cluster * self._file.cluster_size
            reason = "is also used by the disk itself"
            id = _OVERLAPS[found.structure]
            self._listing.add(id, place, reason, None, found.bitmap_index)

    def _check_tail(self, entry: DirectoryEntry) -> None:
        """Reports set bits that stand for nothing, since they lie behind the end of the disk.

        QEMU leaves such bits within the last 64 bits of which one counts; no program leaves any
        behind these 64.
        """
        file = self._file
        size, granularity = file.cluster_size, entry.granularity
        if entry.bitmap_table_size != required_table_size(granularity, file.virtual_size, size):
            return
        end = entry.bitmap_table_offset + ENTRY_LENGTH * entry.bitmap_table_size
        (word,) = parse_bitmap_table(file.read(end - ENTRY_LENGTH, ENTRY_LENGTH))
        if not word or word % size or not file.contains(word, size):
            return
        used = ceil_div(file.virtual_size, granularity) - 8 * size * (entry.bitmap_table_size - 1)
        tail = self._tails.get((word, used))
        if tail is None:  # bitmaps may share a cluster
            tail = self._tails[word, used] = _Tail.read(file, word, used)
        place = word + used // 8
        if tail.is_far:
            reason = "has bits set far behind the disk: size or granularity are not what they were"
            self._listing.add("bitmap-data.beyond", place, reason, None, entry.index)
        elif tail.is_set:
            reason = "has bits set behind the disk"
            self._listing.add("bitmap-data.tail", place, reason, None, entry.index)


class _Tail(NamedTuple):
    """Whether bits are set behind the last one that counts, and behind the 64 bits around it."""

    is_set: bool
    is_far: bool

    @classmethod
    def read(cls, file: ClusterFile, start: int, bits: int) -> _Tail:
        """Reads the cluster at ``start`` of which ``bits`` bits count, without what is a hole."""
        is_set = is_far = False
        first, far, end = bits // 8, 8 * ceil_div(bits, 64), file.cluster_size
        for extent in stored_extents(file, [start + first], [start + end]):
            place = max(extent.start, start + first)
            data = file.read(place, min(extent.end, start + end) - place)
            place -= start
            if place == first:
                data = bytes([data[0] >> bits % 8]) + data[1:]
            is_set |= bool(data.strip(b"\0"))
            is_far |= bool(data[max(0, far - place) :].strip(b"\0"))
        return cls(is_set, is_far)
