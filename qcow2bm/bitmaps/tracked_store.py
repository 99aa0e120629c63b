"""Writing an image while some of its bitmaps are in_use by this process.

The bits of these bitmaps are in memory, and are written in place: while in_use is set, no reader
believes what is stored, so bitmap data and table entries need no new clusters. What must hold at
any time is that every cluster a bitmap table leads to is counted (INV-REFCOUNT).

*Spec*: spec/tracking.md, "Flushing" and "Rotation and edits".
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from qcow2bm.bitmaps.commit import allocator_of, plan_commit
from qcow2bm.bitmaps.draft import Draft
from qcow2bm.bitmaps.draft_bits import ONES, ZEROES
from qcow2bm.bitmaps.editable import require_editable
from qcow2bm.bitmaps.metadata import Metadata
from qcow2bm.bitmaps.tables import read_words
from qcow2bm.bitmaps.tracked_bitmap import PIECE_BYTES, Changes, TrackedBitmap
from qcow2bm.clusters.guest_map import GuestMap
from qcow2bm.clusters.header_draft import HeaderDraft
from qcow2bm.clusters.plan import SECTOR_SIZE, Barrier, Plan, Step, Write, coalesce, execute
from qcow2bm.errors import CommitError, LimitError, StorageError, UnsupportedError
from qcow2bm.format.bitmap_table import ENTRY_LENGTH, build_bitmap_table
from qcow2bm.format.directory import FIELD_OFFSETS, FLAG_IN_USE, DirectoryEntry
from qcow2bm.storage.interface import WritableStorage
from qcow2bm.storage.read_once import ReadOnceStorage

if TYPE_CHECKING:
    from typing_extensions import Buffer


class TrackedStore:
    """Plans and makes what is written to an image while some of its bitmaps are in_use by us.

    Refcount blocks for all clusters that can still be needed are made at the beginning, and the
    clusters set aside, so that later no cluster has to be searched and no structure to grow.

    An operation that changes the set of bitmaps begins with `load_draft` (or `reload`) and ends
    with `forget`. In between, the metadata is read from the storage once; what the operation
    itself writes is known, so the state after its commit is parsed from memory.

    Attributes:
        metadata: the image as it was loaded last, or as the last commit left it. Flushes, and
            setting and clearing in_use, change the image without changing this value.
        file: that of `metadata`.
        cluster_size: in bytes.
        token: the token of the generation that `end` wrote, None where none is recorded.
    """

    def __init__(self, storage: WritableStorage, *, is_shared: bool = False) -> None:
        """Reads the image; the caller holds its locks.

        Args:
            storage: of the image.
            is_shared: whether another thread writes to the image as well: then it proves nothing
                that the image changes while it is read.

        Raises:
            FormatError, UnsupportedError: the image cannot be edited.
            StorageError: reading failed.
        """
        self._storage = ReadOnceStorage(storage, is_watched=not is_shared)
        self._bitmaps: list[TrackedBitmap] = []
        self._reserves = False
        self._records_generation = False
        self.token: bytes | None = None
        self.reload()
        self.forget()

    def reload(self) -> None:
        """Reads the image afresh, which begins an operation; raises as the constructor does."""
        self.forget()
        self._load()
        with self._storage.remembering():
            require_editable(self.metadata)

    def forget(self) -> None:
        """Ends an operation: what is needed from now on is read from the storage again."""
        self._storage.forget()

    def _load(self) -> None:
        """Parses the metadata; what the present operation has read or written is not read again."""
        with self._storage.remembering():
            self.metadata = Metadata.load(self._storage)
        self.file = self.metadata.file
        self.cluster_size = self.file.cluster_size
        self._is_outdated = False

    def begin(
        self,
        entries: Iterable[DirectoryEntry],
        others: Iterable[DirectoryEntry],
        *,
        reserve: bool = False,
        generation: bool | None = None,
    ) -> None:
        """Loads bitmaps with all their bits, and sets in_use of these and of ``others``.

        *Guarantees*: in_use is durable when `begin` returns (INV-INUSE).

        Args:
            entries: the bitmaps to be loaded.
            others: more bitmaps that become in_use, and are not loaded.
            reserve: whether every cluster of these bitmaps is stored from now on, also one that is
                all zeros.
            generation: whether the generation is recorded from now on; None changes nothing.

        Raises:
            CommitError: a write or barrier failed.
            LimitError, StorageError: there is no room for what these bitmaps can need.
        """
        entries, others = list(entries), list(others)
        self._bitmaps = [TrackedBitmap.load(self.file, entry) for entry in entries]
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
            self.forget()
        self._reserves, self._records_generation = reserve, bool(generation)
        self._reserve()

    def restore_generation(self) -> bool:
        """Records the generation again, if `begin` was asked to and another writer has ended it.

        It stays ended if there is no room for it in the header any more.

        Returns:
            Whether the header was changed, so that plans made before do not fit any more.

        Raises:
            CommitError: a write or barrier failed.
        """
        if not self._records_generation or self.file.generation:
            return False
        header = HeaderDraft(self.file)
        try:
            steps = [*header.clear_unknown_autoclear(), *header.begin_generation()]
        except (LimitError, UnsupportedError):
            return False
        self.execute(Plan(tuple(steps)))
        self._load()
        return True

    def execute(self, plan: Plan, watch: Callable[[Step], None] = lambda step: None) -> None:
        """Does what a plan says; ``watch`` is called with every step once it is done.

        Raises:
            CommitError: a write or barrier failed.
        """
        execute(plan, self._storage, None, watch)

    def _reserve(self) -> None:
        """Stores every cluster that has no place on disk yet, if `begin` was asked to."""
        zeroes = [] if not self._reserves else self._bitmaps
        data: list[Write] = []
        tables: list[Write] = []
        for bitmap in zeroes:
            numbers = {number for number, word in enumerate(bitmap.words) if word == ZEROES}
            numbers = set(sorted(numbers)[: len(self._free)])
            for number in numbers:
                bitmap.words[number] = self._take_cluster()
                start = number * self.cluster_size
                content = bytes(bitmap.bits.octets[start : start + self.cluster_size])
                what = "bitmap data in new clusters"
                data.append(Write(bitmap.words[number], (content,), what))
            tables += _table_writes(bitmap, numbers)
        if data:
            self.execute(Plan(tuple(self._in_order(data, tables))))

    def _in_order(self, data: list[Write], tables: list[Write]) -> list[Step]:
        """Orders data and refcounts before the table entries that lead to the data."""
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
        """Looks for the clusters that can be needed, in the image as `metadata` has it.

        Unless ``is_all``, fewer clusters will do: tracking that has begun does not end because
        the storage may become full one day.
        """
        capacity = self._storage.capacity()
        needed = sum(bitmap.words.count(ZEROES) for bitmap in self._bitmaps)
        guest = GuestMap(self.file)
        while True:
            self._allocator = allocator_of(self.metadata, capacity, guest)
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

    def first_cluster(self, name: str) -> tuple[int, bytes]:
        """Returns where the first cluster of a bitmap is, in host bytes, and what it has on disk.

        Raises:
            StorageError: reading failed.
        """
        (entry,) = [entry for entry in self.metadata.directory.entries if entry.name == name]
        offset = read_words(self.file, entry)[0]
        if offset in (ZEROES, ONES):
            raise ValueError(f"the bitmap {name!r} has no cluster")
        content = bytearray(self.cluster_size)
        self.file.read_into(offset, memoryview(content))
        return offset, bytes(content)

    def distrust(self, is_chosen: Callable[[str | None], bool]) -> None:
        """Sets in_use of bitmaps that are not ours, by their names; no barrier follows.

        After a commit that failed, their entries are where they were, or where they were to be.

        Raises:
            Qcow2BmError: writing, or reading the image afresh, failed.
        """
        self._distrust(self.metadata, is_chosen)  # first: reading may fail
        self.distrust_anew(is_chosen)

    def distrust_anew(self, is_chosen: Callable[[str | None], bool]) -> None:
        """`distrust` once others may have changed the image; raises as `distrust` does."""
        self.forget()
        self._distrust(Metadata.load(self._storage), is_chosen)

    def _distrust(self, metadata: Metadata, is_chosen: Callable[[str | None], bool]) -> None:
        for entry in metadata.directory.entries:
            if is_chosen(entry.name):
                write = _flags_write(entry, entry.flags | FLAG_IN_USE)
                self._storage.write(write.offset, write.parts)

    def load_draft(self) -> Draft:
        """`draft` of the image read afresh, which begins an operation.

        Raises:
            FormatError, UnsupportedError, StorageError: the image cannot be read.
        """
        self.forget()
        self._load()
        with self._storage.remembering():
            self.metadata.survey  # noqa: B018  # reads the bitmap tables
        return self.draft()

    def draft(self) -> Draft:
        """The bitmaps of `metadata`, to be changed; ours can be used like any other."""
        return Draft(self.metadata, {bitmap.name for bitmap in self._bitmaps})

    def plan(self, draft: Draft, token: bytes | None = None) -> Plan:
        """Returns the plan that makes the bitmaps those of the draft; raises as `plan_commit` does.

        The plan is right until something else is written to the image.

        Args:
            draft: made since the operation began.
            token: the next token of the generation, where that is recorded; by default a fresh one.
        """
        if self._is_outdated:
            self._load()
        return plan_commit(self.metadata, draft, self._storage.capacity(), token)

    def commit(self, plan: Plan, bitmaps: Iterable[TrackedBitmap]) -> None:
        """Does what a `plan` says, atomically, while bitmaps are in_use by us.

        Args:
            plan: made since anything was written last.
            bitmaps: those that are in_use by us afterwards. What is in memory of them need not be
                stored, but what is stored must be in memory.

        Raises:
            CommitError: a write, a barrier or, afterwards, reading failed.
        """
        with self._storage.remembering():  # the new state is parsed from what is written here
            execute(plan, self._storage, self.file.file_size)
        try:
            self._take_over(bitmaps)
        except (CommitError, StorageError) as error:  # but the commit itself is done
            step = error.step if isinstance(error, CommitError) else "reading the new state"
            raise CommitError(self._storage.name, step, "new", error.reason) from error

    def _take_over(self, bitmaps: Iterable[TrackedBitmap]) -> None:
        """Takes the places of bitmaps, and the free clusters, from the state after a commit."""
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
        """Steps that clear in_use of bitmaps whose bits are stored; the last one is a barrier.

        Each flag is one write within a sector. The generation, where it is recorded, is renewed
        before the same barrier. A bitmap that is no longer ours is left out: other data may stand
        where its entry was.
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
        """The write, within one sector, of a flag that the bitmap's entry has from now on."""
        flags = bitmap.entry.flags & ~FLAG_IN_USE | (FLAG_IN_USE if is_set else 0)
        bitmap.entry = bitmap.entry._replace(flags=flags)
        return _flags_write(bitmap.entry, flags)

    def store(self, changes: Iterable[tuple[TrackedBitmap, Changes]]) -> list[Step]:
        """Steps that write pieces of bitmaps; the last one is a barrier, if there are any.

        A cluster of a bitmap that has no place on disk gets one, and is written whole.
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
        self._is_outdated = True
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
                # All of it is written: old content of the free cluster would show otherwise.
                low, high = number * size, number * size + size
                part, what = bytes(bitmap.bits.octets[low:high]), "bitmap data in new clusters"
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
    """Writes of those sectors of a bitmap table that have these entries."""
    per_sector = SECTOR_SIZE // ENTRY_LENGTH
    offset = bitmap.entry.bitmap_table_offset
    writes = []
    for sector in sorted({number // per_sector for number in entries}):
        first = sector * per_sector
        table: Buffer = build_bitmap_table(bitmap.words[first : first + per_sector])
        place = offset + ENTRY_LENGTH * first
        writes.append(Write(place, (table,), "bitmap table entries"))
    return writes
