"""Bitmaps that are in_use by us: their bits are in memory, and are written in place.

As long as in_use is set nobody goes by what is stored, so data and table entries need no new
clusters. What must hold at any time is that everything a table leads to is counted.

*Spec*: spec/tracking.md, "Flushing".
"""

from __future__ import annotations

import errno
from array import array
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from qcow2bm.bitmaps.commit import allocator_of, plan_commit
from qcow2bm.bitmaps.draft import Draft
from qcow2bm.bitmaps.draft_bits import ONES, ZEROES
from qcow2bm.bitmaps.editable import require_editable
from qcow2bm.bitmaps.metadata import Metadata
from qcow2bm.bitmaps.tables import read_words, table_runs
from qcow2bm.bits import pure_python
from qcow2bm.bits.runs import ALL_ONES, ALLOCATED
from qcow2bm.clusters.file import ClusterFile
from qcow2bm.clusters.header_draft import HeaderDraft
from qcow2bm.clusters.plan import SECTOR_SIZE, Barrier, Plan, Step, Write, coalesce, execute
from qcow2bm.errors import CommitError, LimitError, StorageError, UnsupportedError
from qcow2bm.format.bitmap_table import ENTRY_LENGTH, build_bitmap_table
from qcow2bm.format.directory import (
    FIELD_OFFSETS,
    FLAG_AUTO,
    FLAG_IN_USE,
    TYPE_DIRTY_TRACKING,
    DirectoryEntry,
)
from qcow2bm.storage.interface import WritableStorage
from qcow2bm.units import ceil_div, encode_name

if TYPE_CHECKING:
    from typing_extensions import Buffer

PIECE_BYTES = 4096
"""How many bytes of bits are flushed together or not at all: far less than a cluster."""

Changes = Mapping[int, "Buffer"]
"""Pieces of a bitmap's bits by their number, as they are to be stored."""


class TrackedBitmap:
    """A bitmap of an image whose bits are changed in memory.

    Attributes:
        entry: its directory entry as it is stored now.
        words: its table as it is stored now, uint64[n].
        octets: its bits, in whole clusters, clear past the disk.
    """

    def __init__(self, entry: DirectoryEntry, words: array[int], octets: bytearray) -> None:
        self.entry = entry
        self.words = words
        self.octets = octets

    @property
    def name(self) -> str:
        """The name; bytes that are not UTF-8 are kept as surrogates."""
        return self.entry.name or ""

    @classmethod
    def unplaced(cls, name: str, granularity: int, octets: bytearray) -> TrackedBitmap:
        """One that `TrackedStore.recommit` will find on disk; it cannot be stored before."""
        key = encode_name(name)
        bits = granularity.bit_length() - 1
        flags = FLAG_AUTO | FLAG_IN_USE
        size = len(key), 0, b"", key, bytes(-len(key) % 8)
        entry = DirectoryEntry(0, 0, 0, 0, flags, TYPE_DIRTY_TRACKING, bits, *size)
        return cls(entry, array("Q"), octets)


class TrackedStore:
    """Plans and makes what is written to an image while some of its bitmaps are in_use by us.

    Refcount blocks for all clusters that can still be needed are made at the beginning, and the
    clusters set aside, so that nothing has to be searched or to grow later.

    Attributes:
        metadata: the image as it was read last.
        token: that of the generation which `end` wrote, None where none is recorded.
    """

    def __init__(self, storage: WritableStorage) -> None:
        """Reads the image; the caller holds its locks.

        Raises:
            FormatError, UnsupportedError: the image cannot be edited.
            StorageError: reading failed.
        """
        self._storage = storage
        self._bitmaps: list[TrackedBitmap] = []
        self._reserves = False
        self._records_generation = False
        self.token: bytes | None = None
        self.reload()

    def reload(self) -> None:
        """Reads the image afresh; raises as the constructor does."""
        self._load()
        require_editable(self.metadata)

    def _load(self) -> None:
        self.metadata = Metadata.load(self._storage)
        self.file = self.metadata.file
        self.cluster_size = self.file.cluster_size

    def begin(
        self,
        entries: Iterable[DirectoryEntry],
        others: Iterable[DirectoryEntry],
        *,
        reserve: bool = False,
        generation: bool | None = None,
    ) -> None:
        """Loads bitmaps and sets their in_use, and that of ``others``, for which there is room.

        With ``reserve`` all their clusters are stored from now on, also those that are all zeros.
        ``generation`` says whether it is recorded from now on; None leaves that as it is.

        Raises:
            CommitError: a write or barrier failed.
            LimitError, StorageError: there is no room for what these bitmaps can need.
        """
        entries, others = list(entries), list(others)
        self._bitmaps = [load_live(self.file, entry) for entry in entries]
        header = HeaderDraft(self.file)
        steps: list[Step] = header.clear_unknown_autoclear()
        if generation is not None:
            steps += header.begin_generation() if generation else header.end_generation()
        steps += header.renew_generation()
        steps += self._set_aside()
        begun = len(steps)  # from here on bitmaps may be in_use, whatever fails
        steps += [self.set_in_use(bitmap, is_set=True) for bitmap in self._bitmaps]
        steps += [_flags_write(entry, entry.flags | FLAG_IN_USE) for entry in others]
        plan = Plan((*steps, Barrier("in_use of the tracked bitmaps")), begun)
        execute(plan, self._storage, self.file.file_size)
        if self.file.generation or header.generation:
            self._load()
        self._reserves, self._records_generation = reserve, bool(generation)
        self._reserve()

    def restore_generation(self) -> None:
        """Records the generation again where that was wanted, and others have ended it.

        It stays ended if they left no room for it in the header.

        Raises:
            CommitError: a write or barrier failed.
        """
        if self._records_generation and not self.file.generation:
            header = HeaderDraft(self.file)
            try:
                steps = [*header.clear_unknown_autoclear(), *header.begin_generation()]
            except (LimitError, UnsupportedError):
                return
            execute(Plan(tuple(steps)), self._storage, None)
            self._load()

    def _reserve(self) -> None:
        """Gives every cluster that has none its place, where that is wanted."""
        zeroes = [] if not self._reserves else self._bitmaps
        data: list[Write] = []
        tables: list[Write] = []
        for bitmap in zeroes:
            numbers = {number for number, word in enumerate(bitmap.words) if word == ZEROES}
            numbers = set(sorted(numbers)[: len(self._free)])
            for number in numbers:
                bitmap.words[number] = self._take_cluster()
                start = number * self.cluster_size
                content = bytes(bitmap.octets[start : start + self.cluster_size])
                what = "bitmap data in new clusters"
                data.append(Write(bitmap.words[number], (content,), what))
            tables += _table_writes(bitmap, numbers)
        if data:
            execute(Plan(tuple(self._in_order(data, tables))), self._storage, None)

    def _in_order(self, data: list[Write], tables: list[Write]) -> list[Step]:
        """Data and refcounts before the table entries that lead there."""
        counts = self._allocator.refcounts.take_count_writes("refcounts of new clusters")
        data.sort(key=lambda write: write.offset)
        steps: list[Step] = [*coalesce(data), *coalesce(counts), Barrier("bitmap data")]
        if tables:
            steps += [*coalesce(tables), Barrier("bitmap table entries")]
        return steps

    @property
    def bitmaps(self) -> tuple[TrackedBitmap, ...]:
        """The bitmaps that are in_use by us."""
        return tuple(self._bitmaps)

    def _set_aside(self, *, is_all: bool = True) -> list[Step]:
        """Looks for the clusters that can be needed, in the image as it was loaded last.

        Unless ``is_all``, fewer will do: nobody has to end because a disk may become full some day.
        """
        capacity = self._storage.capacity()
        needed = sum(bitmap.words.count(ZEROES) for bitmap in self._bitmaps)
        while True:
            self._allocator = allocator_of(self.metadata, capacity)
            try:
                self._free, steps = self._allocator.set_aside(needed)
            except (LimitError, StorageError) as error:
                is_full = not isinstance(error, StorageError) or error.errno == errno.ENOSPC
                if is_all or not needed or not is_full:
                    raise
                needed //= 2
            else:
                self._free.reverse()  # the last is used first
                return steps

    def draft(self) -> Draft:
        """The bitmaps as they are on disk, for `recommit`; ours can be used in it as any other."""
        self._load()
        return Draft(self.metadata, {bitmap.name for bitmap in self._bitmaps})

    def plan(self, draft: Draft, token: bytes | None = None) -> Plan:
        """How the directory becomes that of the draft; raises what `plan_commit` does.

        ``token`` is the next one of the generation, where that is recorded; by default a fresh one.
        """
        capacity = self._storage.capacity()
        return plan_commit(self.metadata, draft, capacity, token)

    def recommit(self, draft: Draft, bitmaps: Iterable[TrackedBitmap]) -> None:
        """`commit` of the draft on top of what was stored meanwhile; raises what `plan` does."""
        self._load()
        self.commit(self.plan(draft), bitmaps)

    def commit(self, plan: Plan, bitmaps: Iterable[TrackedBitmap]) -> None:
        """Does what a `plan` says, atomically, while bitmaps are in_use by us.

        ``bitmaps`` are those that are in_use by us afterwards. What is in memory of them need not
        be stored, but what is stored must be in memory.

        Raises:
            CommitError: a write, a barrier or, afterwards, reading failed.
        """
        execute(plan, self._storage, self.file.file_size)
        try:
            self._take_over(bitmaps)
        except (CommitError, StorageError) as error:  # the commit itself is done
            step = error.step if isinstance(error, CommitError) else "reading the new state"
            raise CommitError(self._storage.name, step, "new", error.reason) from error

    def _take_over(self, bitmaps: Iterable[TrackedBitmap]) -> None:
        """Goes on from what a commit has made of the image."""
        self._load()
        entries = {entry.name: entry for entry in self.metadata.directory.entries}
        self._bitmaps = list(bitmaps)
        for bitmap in self._bitmaps:
            bitmap.entry = entries[bitmap.name]
            bitmap.words = read_words(self.file, bitmap.entry)
        steps = self._set_aside(is_all=False)
        if steps:
            plan = Plan((*steps, Barrier("room for the tracked bitmaps")))
            execute(plan, self._storage, self.file.file_size)
        self._reserve()

    def end(self, bitmaps: Iterable[TrackedBitmap]) -> list[Step]:
        """Clears in_use of bitmaps whose bits are stored: each by one write within a sector.

        The generation, where it is recorded, is renewed in the same step. A bitmap that is no
        longer ours is left alone: where its entry was may be anything.
        """
        ours = [bitmap for bitmap in bitmaps if bitmap in self._bitmaps]
        steps: list[Step] = [self.set_in_use(bitmap, is_set=False) for bitmap in ours]
        self.token = None
        if self.file.generation:
            header = HeaderDraft(self.file)
            steps += header.renew_generation()
            self.token = header.generation.token if header.generation else None
        return [*steps, Barrier("valid bitmaps")]

    @staticmethod
    def set_in_use(bitmap: TrackedBitmap, *, is_set: bool) -> Write:
        """One write within one sector; the entry of the bitmap is the new one from now on."""
        flags = bitmap.entry.flags & ~FLAG_IN_USE | (FLAG_IN_USE if is_set else 0)
        bitmap.entry = bitmap.entry._replace(flags=flags)
        return _flags_write(bitmap.entry, flags)

    def store(self, changes: Iterable[tuple[TrackedBitmap, Changes]]) -> list[Step]:
        """Writes pieces of bitmaps where they belong; the last step is a barrier, if any.

        A cluster that had none gets one, and is written whole.
        """
        data: list[Write] = []
        tables: list[Write] = []
        for bitmap, pieces in changes:
            new_entries: set[int] = set()
            for piece, content in pieces.items():
                data += self._piece(bitmap, piece, content, new_entries)
            tables += _table_writes(bitmap, new_entries)
        if not data:
            return []
        return self._in_order(data, tables)

    def _piece(
        self, bitmap: TrackedBitmap, piece: int, content: Buffer, new_entries: set[int]
    ) -> list[Write]:
        size = self.cluster_size
        writes = []
        view = memoryview(content)
        start, stop = piece * PIECE_BYTES, piece * PIECE_BYTES + len(view)
        for number in range(start // size, (stop - 1) // size + 1):
            low, high = max(start, number * size), min(stop, number * size + size)
            part: Buffer = view[low - start : high - start]
            word = bitmap.words[number]
            if word == ONES or (number in new_entries) or (word == ZEROES and _is_zero(part)):
                continue
            what = "bitmap data"
            if word == ZEROES:
                # What stood in a free cluster would otherwise show: all of it is written.
                low, high = number * size, number * size + size
                part, what = bytes(bitmap.octets[low:high]), "bitmap data in new clusters"
                word = bitmap.words[number] = self._take_cluster()
                new_entries.add(number)
            writes.append(Write(word + low - number * size, (part,), what))
        return writes

    def _take_cluster(self) -> int:
        if not self._free:
            reason = "there is no room for a new cluster of a bitmap"
            raise StorageError(self._storage.name, 0, 0, reason, errno.ENOSPC, "writing")
        cluster = self._free.pop()
        self._allocator.refcounts.change(cluster, 1, 0, 1)
        return cluster * self.cluster_size


def _is_zero(part: Buffer) -> bool:
    data = bytes(part)
    return data.count(0) == len(data)


def _flags_write(entry: DirectoryEntry, flags: int) -> Write:
    if not entry.offset:
        raise ValueError("the bitmap has no place on disk yet")
    place = entry.offset + FIELD_OFFSETS["flags"]
    return Write(place, (flags.to_bytes(4, "big"),), "flags of a bitmap")


def _table_writes(bitmap: TrackedBitmap, entries: set[int]) -> list[Write]:
    """The sectors of a table that have these entries."""
    per_sector = SECTOR_SIZE // ENTRY_LENGTH
    offset = bitmap.entry.bitmap_table_offset
    writes = []
    for sector in sorted({number // per_sector for number in entries}):
        first = sector * per_sector
        table: Buffer = build_bitmap_table(bitmap.words[first : first + per_sector])
        place = offset + ENTRY_LENGTH * first
        writes.append(Write(place, (table,), "bitmap table entries"))
    return writes


def load_live(file: ClusterFile, entry: DirectoryEntry) -> TrackedBitmap:
    """A bitmap of the image with all its bits in memory.

    Raises:
        StorageError: reading failed.
    """
    words = read_words(file, entry)
    size = file.cluster_size
    octets = bytearray(len(words) * size)
    view = memoryview(octets)
    for run in table_runs(words, size):
        part = view[run.first * size : (run.first + run.entries) * size]
        if run.kind == ALLOCATED:
            file.read_into(run.offset, part)
        elif run.kind == ALL_ONES:
            pure_python.fill(part, 0, 8 * len(part), is_set=True)
    bits = ceil_div(file.virtual_size, entry.granularity)
    pure_python.fill(octets, bits, 8 * len(octets), is_set=False)  # INV-TAIL
    return TrackedBitmap(entry, words, octets)
