"""Turning a draft into a plan of writes and barriers.

*Spec*: spec/edit.md, "Commit order".
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from qcow2bm.bitmaps.directory import BitmapDirectory
from qcow2bm.bitmaps.draft import Draft, DraftBitmap
from qcow2bm.bitmaps.draft_bits import ZEROES, Content, DraftBits
from qcow2bm.bitmaps.metadata import Metadata
from qcow2bm.bitmaps.tables import read_words, used_by_bitmaps
from qcow2bm.clusters.allocator import Allocator
from qcow2bm.clusters.cluster_runs import JoinedRuns, Run
from qcow2bm.clusters.file import ClusterFile
from qcow2bm.clusters.guest_map import GuestMap
from qcow2bm.clusters.header_draft import HeaderDraft, Switch
from qcow2bm.clusters.plan import Barrier, Plan, Step, Write, coalesce
from qcow2bm.errors import FormatError
from qcow2bm.format.bitmap_table import ENTRY_LENGTH, MASKS, build_bitmap_table
from qcow2bm.format.directory import (
    FLAG_IN_USE,
    TYPE_DIRTY_TRACKING,
    Directory,
    DirectoryEntry,
    build_directory,
)
from qcow2bm.format.extensions import BitmapsExtension, build_bitmaps_extension
from qcow2bm.units import ceil_div

if TYPE_CHECKING:
    from typing_extensions import Buffer


def plan_commit(
    metadata: Metadata, draft: Draft, capacity: int | None, token: bytes | None = None
) -> Plan:
    """Returns the plan that makes the bitmaps of an image those of the draft.

    Nothing is written. ``token`` is the next generation token, if the image records one; by
    default the token is random.

    *Guarantees*: after a loss of power at any point of the plan, either all bitmaps are as before
    or all are as after, and clusters can only leak (INV-ATOMIC, INV-HEADER, INV-REFCOUNT).

    If bitmaps are only marked in_use, wrong refcounts do not matter: the new directory then lies
    behind everything else, and nothing is freed. For the refcounts are wrong if the header was
    restored from an older copy, which is when bitmaps have to be marked.

    Raises:
        FormatError: a cluster to be freed has another refcount than 1.
        LimitError: the directory, the header area or the refcount table would be too large.
        StorageError: there is no room, or reading failed.
        UnsupportedError: the header is laid out in a way that cannot be changed safely.
    """
    if not _has_changes(metadata.directory, draft):
        return Plan()
    try:
        return _plan(metadata, draft, capacity, token)
    except FormatError:
        if not _only_invalidates(metadata.directory, draft):
            raise
        return _plan(metadata, draft, capacity, token, is_sparing=True)


def _plan(
    metadata: Metadata,
    draft: Draft,
    capacity: int | None,
    token: bytes | None,
    *,
    is_sparing: bool = False,
) -> Plan:
    """Does the work of `plan_commit`.

    With ``is_sparing`` no cluster that may be in use is allocated or freed, whatever the refcounts.
    """
    file, directory = metadata.file, metadata.directory
    tables = [
        _NewTable(bitmap, bitmap.bits, bitmap.bits.final())
        for bitmap in draft.in_order
        if bitmap.bits and _has_new_table(bitmap)
    ]
    extension = directory.extension
    is_revived = bool(extension and not directory.is_consistent and not draft.drops_extension)
    guest = GuestMap(file)
    allocator = allocator_of(metadata, capacity, guest)
    if is_revived or is_sparing:  # clusters of bitmaps are not allocated, whatever their refcounts
        uses = used_by_bitmaps(file, directory)
        end = max((used.offset + used.length for used in uses), default=0)
        end = max(end, 0 if capacity else file.file_size, *metadata.survey.ends)
        taken = [(0, ceil_div(end, file.cluster_size))]
        allocator = Allocator(file, taken, 0, capacity, guest, is_behind=True)
    header = HeaderDraft(file)
    prepared = header.clear_unknown_autoclear()
    if draft.bitmaps and extension and (directory.is_consistent or is_revived):
        prepared += header.straighten()
    # The token is written where it is now: nothing moves before.
    renewed = header.renew_generation(token)
    fresh: tuple[Write, ...] = ()
    if draft.bitmaps:
        new = _place(file, draft, tables, allocator)
        fresh = new.writes
        preparation = allocator.preparation()
        header.apply(preparation)
        prepared += preparation
        payload = build_bitmaps_extension(
            BitmapsExtension(len(draft.bitmaps), 0, new.directory_size, new.directory_offset)
        )
        if not extension:
            switch = header.insert(payload)
        elif directory.is_consistent:
            switch = header.replace(payload)
        else:
            switch = header.revive(payload)
    else:
        switch = header.remove()
    counted = allocator.refcounts.take_count_writes("refcounts of new clusters")
    allocator.free(() if is_sparing else _freed(file, directory, draft, tables))
    lowered = allocator.refcounts.take_count_writes("refcounts of freed clusters")
    written = (*fresh, *switch.before, *counted, *renewed)
    return ordered(prepared, written, switch, lowered)


def allocator_of(metadata: Metadata, capacity: int | None, guest: GuestMap) -> Allocator:
    """Returns an allocator that looks near the bitmap directory, and spares all that is used.

    Raises:
        FormatError: the refcount table is damaged, or an L1 or L2 table leads to metadata.
        StorageError: reading failed.
    """
    file, directory = metadata.file, metadata.directory
    survey = metadata.survey
    taken = JoinedRuns.of_ranges(survey.starts, survey.ends, file.cluster_size)
    guest.require_apart(taken)
    start = directory.extension.bitmap_directory_offset if directory.extension else 0
    return Allocator(file, taken, start // file.cluster_size, capacity, guest)


def _has_changes(directory: BitmapDirectory, draft: Draft) -> bool:
    if draft.removed or draft.drops_extension:
        return True
    if len(draft.bitmaps) != len(directory.entries) * directory.is_consistent:
        return bool(draft.bitmaps)
    return any(map(_is_changed, draft.bitmaps.values()))


def _only_invalidates(directory: BitmapDirectory, draft: Draft) -> bool:
    """Whether the draft differs from what is stored only by bitmaps that are in_use."""
    if draft.removed or len(draft.bitmaps) != len(directory.entries) * directory.is_consistent:
        return False
    return all(
        bitmap.entry is not None
        and not _has_new_table(bitmap)
        and bitmap.name_bytes == bitmap.entry.name_bytes
        and bitmap.flags in (bitmap.entry.flags, bitmap.entry.flags | FLAG_IN_USE)
        for bitmap in draft.bitmaps.values()
    )


def _is_changed(bitmap: DraftBitmap) -> bool:
    entry = bitmap.entry
    return (
        entry is None
        or _has_new_table(bitmap)
        or (bitmap.name_bytes, bitmap.flags) != (entry.name_bytes, entry.flags)
    )


def _has_new_table(bitmap: DraftBitmap) -> bool:
    bits = bitmap.bits
    return bits is not None and (bool(bits.changed) or len(bits.words) != bits.clusters)


def ordered(
    prepared: Sequence[Step], written: Sequence[Write], switch: Switch, lowered: Sequence[Write]
) -> Plan:
    """Returns the steps of a commit in order: see spec/edit.md, "Commit order"."""
    steps: list[Step] = [*prepared]
    if written:
        steps += [*coalesce(written), Barrier("new bitmap data, tables and directory")]
    steps += [*switch.steps, switch.commit, Barrier("new state")]
    commit_point = len(steps) - 2
    if switch.after or lowered:
        steps += [*switch.after, *coalesce(lowered), Barrier("freeing of old clusters")]
    return Plan(tuple(steps), commit_point)


class _NewTable(NamedTuple):
    """A bitmap that gets a new table, its bits, and the clusters that differ from the stored."""

    bitmap: DraftBitmap
    bits: DraftBits
    changed: Mapping[int, Content]

    @property
    def words(self) -> array[int]:
        """The new table, uint64[n], with 0 where new data are to be placed."""
        words = self.bits.words[: self.bits.clusters]
        words.extend([ZEROES] * (self.bits.clusters - len(words)))
        for number, content in self.changed.items():
            words[number] = content if isinstance(content, int) else ZEROES
        return words

    @property
    def data(self) -> dict[int, Buffer]:
        """The clusters to be stored, by number."""
        changed = sorted(self.changed.items())
        return {number: data for number, data in changed if not isinstance(data, int)}

    @property
    def gone(self) -> array[int]:
        """The entries of the old table that the new table does not have."""
        words, clusters = self.bits.words, self.bits.clusters
        return array("Q", (words[n] for n in self.changed if n < len(words))) + words[clusters:]


class _Placed(NamedTuple):
    """New structures with their places, and the writes that put them there."""

    writes: tuple[Write, ...]
    directory_size: int
    directory_offset: int


def _place(
    file: ClusterFile, draft: Draft, tables: list[_NewTable], allocator: Allocator
) -> _Placed:
    """Allocates clusters for data, tables and directory; only whole clusters are written."""
    size = file.cluster_size
    zeroes: dict[int, bytes] = {}  # padding by length, shared by up to 65,535 tables

    def write(cluster: int, content: Buffer, what: str) -> Write:
        rest = -memoryview(content).nbytes % size
        padding = zeroes.setdefault(rest, bytes(rest))
        parts = (content, padding) if rest else (content,)
        return Write(cluster * size, parts, what, is_fresh=True)

    directory_size = draft.directory_size
    lengths = [ENTRY_LENGTH * table.bits.clusters for table in tables]
    runs = [ceil_div(length, size) for length in (*lengths, directory_size)]
    data = [table.data for table in tables]
    places = allocator.allocate(runs, sum(map(len, data)))
    clusters = (number for first, stop in places.loose for number in range(first, stop))
    writes = []
    offsets = {}
    for table, stored, first in zip(tables, data, places.firsts, strict=False):
        words = table.words
        for number, content in stored.items():
            cluster = next(clusters)
            words[number] = cluster * size
            writes.append(write(cluster, content, "new bitmap data"))
        writes.append(write(first, build_bitmap_table(words), "new bitmap tables"))
        offsets[table.bitmap.name_bytes] = first * size
    entries = [
        _entry(number, bitmap, offsets.get(bitmap.name_bytes))
        for number, bitmap in enumerate(draft.in_order)
    ]
    directory = build_directory(Directory(tuple(entries), b""))
    writes.append(write(places.firsts[-1], directory, "new bitmap directory"))
    in_order = tuple(sorted(writes, key=lambda write: write.offset))
    return _Placed(in_order, directory_size, places.firsts[-1] * size)


def _entry(number: int, bitmap: DraftBitmap, table_offset: int | None) -> DirectoryEntry:
    old = bitmap.entry
    tail = len(bitmap.extra_data) + len(bitmap.name_bytes)
    padding = bytes(-tail % 8)
    if old and old.name_bytes == bitmap.name_bytes:
        padding = old.padding
    if table_offset is None:
        assert old is not None, "a new bitmap has a new table"
        table_offset, table_size = old.bitmap_table_offset, old.bitmap_table_size
    else:
        assert bitmap.bits is not None
        table_size = bitmap.bits.clusters
    return DirectoryEntry(
        number=number,
        offset=0,
        bitmap_table_offset=table_offset,
        bitmap_table_size=table_size,
        flags=bitmap.flags,
        type=old.type if old else TYPE_DIRTY_TRACKING,
        granularity_bits=bitmap.granularity_bits,
        name_size=len(bitmap.name_bytes),
        extra_data_size=len(bitmap.extra_data),
        extra_data=bitmap.extra_data,
        name_bytes=bitmap.name_bytes,
        padding=padding,
    )


def _freed(
    file: ClusterFile, directory: BitmapDirectory, draft: Draft, tables: list[_NewTable]
) -> Iterator[Run]:
    """Yields the clusters that nothing leads to once the draft is the stored state."""
    if not directory.is_consistent:
        return  # other structures may use the clusters of stale bitmaps by now
    size = file.cluster_size
    if directory.extension:
        yield _run(directory.extension.bitmap_directory_offset, directory.size, size)
    gone = [(entry, read_words(file, entry)) for entry in draft.removed]
    gone += [(table.bitmap.entry, table.gone) for table in tables if table.bitmap.entry]
    for entry, words in gone:
        yield _run(entry.bitmap_table_offset, ENTRY_LENGTH * entry.bitmap_table_size, size)
        for word in words:
            if word & MASKS.offset:
                yield _run(word & MASKS.offset, size, size)


def _run(offset: int, length: int, cluster_size: int) -> Run:
    first = offset // cluster_size
    return first, first + ceil_div(length, cluster_size)
