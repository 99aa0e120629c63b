"""From what an edit leaves in memory to a plan of writes and barriers.

*Spec*: spec/edit.md, "Commit order".
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from qcow2bm.clusters.allocator import Allocator, Run
from qcow2bm.clusters.file import ClusterFile
from qcow2bm.clusters.header_draft import HeaderDraft, Switch
from qcow2bm.clusters.plan import Barrier, Plan, Step, Write, coalesce
from qcow2bm.format.directory import (
    TYPE_DIRTY_TRACKING,
    Directory,
    DirectoryEntry,
    build_directory,
)
from qcow2bm.format.extensions import BitmapsExtension, build_bitmaps_extension
from qcow2bm.format.table import ENTRY_LENGTH, MASKS, build_bitmap_table
from qcow2bm.store.directory import BitmapDirectory
from qcow2bm.store.draft import ZEROES, Content, DraftBits
from qcow2bm.store.edit import Draft, DraftBitmap
from qcow2bm.store.tables import Survey, read_words
from qcow2bm.units import ceil_div


def plan_commit(
    file: ClusterFile,
    directory: BitmapDirectory,
    survey: Survey,
    draft: Draft,
    capacity: int | None,
) -> Plan:
    """How the bitmaps of an image become those of the draft; nothing is written.

    *Guarantees*: after a loss of power at any point of it each bitmap is as before or as after,
    all of them alike, and clusters can only leak (INV-ATOMIC, INV-HEADER, INV-REFCOUNT).

    Raises:
        FormatError: a cluster to be freed has not the refcount 1.
        LimitError: the directory, the header area or the refcount table would be too large.
        StorageError: there is no room, or reading failed.
        UnsupportedError: the header is laid out in a way that cannot be changed safely.
    """
    if not _has_changes(directory, draft):
        return Plan()
    for bitmap in draft.bitmaps.values():
        if bitmap.bits and _has_new_table(bitmap):
            bitmap.bits.clear_tail()
    size = file.cluster_size
    taken = [(start // size, end // size) for start, end in survey.ranges]
    extension = directory.extension
    near = extension.bitmap_directory_offset // size if extension else 0
    allocator = Allocator(file, taken, near, capacity)
    header = HeaderDraft(file)
    prepared = header.clear_unknown_autoclear()
    if draft.bitmaps and extension and directory.is_consistent:
        prepared += header.straighten()
    fresh: tuple[Write, ...] = ()
    if draft.bitmaps:
        new = _NewStructures(file, draft)
        fresh = new.place(allocator)
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
    allocator.free(_freed(file, directory, draft))
    lowered = allocator.refcounts.take_count_writes("refcounts of freed clusters")
    return _ordered(prepared, (*fresh, *switch.before, *counted), switch, lowered)


def _has_changes(directory: BitmapDirectory, draft: Draft) -> bool:
    if draft.removed or draft.drops_extension:
        return True
    if len(draft.bitmaps) != len(directory.entries) * directory.is_consistent:
        return bool(draft.bitmaps)
    return any(map(_is_changed, draft.bitmaps.values()))


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


def _ordered(
    prepared: list[Step], written: tuple[Write, ...], switch: Switch, lowered: list[Write]
) -> Plan:
    steps: list[Step] = [*prepared]
    if written:
        steps += [*coalesce(written), Barrier("new bitmap data, tables and directory")]
    steps += [*switch.steps, switch.commit, Barrier("new state")]
    commit_point = len(steps) - 2
    if switch.after or lowered:
        steps += [*switch.after, *coalesce(lowered), Barrier("freeing of old clusters")]
    return Plan(tuple(steps), commit_point)


class _NewStructures:
    """Everything that gets new clusters: data, tables, directory."""

    def __init__(self, file: ClusterFile, draft: Draft) -> None:
        self._cluster_size = file.cluster_size
        self._bitmaps = list(draft.bitmaps.values())
        self._tables = [bitmap.bits for bitmap in self._bitmaps if _has_new_table(bitmap)]
        self.directory_size = draft.directory_size
        self.directory_offset = 0

    def place(self, allocator: Allocator) -> tuple[Write, ...]:
        """Finds clusters, and returns what is written there: always whole clusters."""
        size = self._cluster_size
        tables = [bits for bits in self._tables if bits is not None]
        data = [(bits, number) for bits in tables for number in sorted(bits.changed)]
        stored = [(bits, n) for bits, n in data if not isinstance(bits.changed[n], int)]
        lengths = [ENTRY_LENGTH * bits.clusters for bits in tables]
        runs = [ceil_div(length, size) for length in (*lengths, self.directory_size)]
        places = allocator.allocate(runs, len(stored))
        clusters = (n for first, stop in places.loose for n in range(first, stop))
        words = {id(bits): _table_of(bits) for bits in tables}
        writes = []
        for (bits, number), cluster in zip(stored, clusters, strict=True):
            words[id(bits)][number] = cluster * size
            writes.append(self._write(cluster, bits.changed[number], "new bitmap data"))
        offsets = {}
        for bits, cluster in zip(tables, places.firsts[:-1], strict=True):
            offsets[id(bits)] = cluster * size
            table = build_bitmap_table(words[id(bits)])
            writes.append(self._write(cluster, table, "new bitmap tables"))
        self.directory_offset = places.firsts[-1] * size
        entries = [
            _entry(n, bitmap, offsets.get(id(bitmap.bits)))
            for n, bitmap in enumerate(self._bitmaps)
        ]
        directory = build_directory(Directory(tuple(entries), b""))
        writes.append(self._write(places.firsts[-1], directory, "new bitmap directory"))
        return tuple(sorted(writes, key=lambda write: write.offset))

    def _write(self, cluster: int, content: Content, what: str) -> Write:
        """A Write of whole clusters: what a new one held before must not be there any more."""
        assert not isinstance(content, int)
        rest = -len(content) % self._cluster_size
        parts = (content, bytes(rest)) if rest else (content,)
        return Write(cluster * self._cluster_size, parts, what, is_fresh=True)


def _table_of(bits: DraftBits) -> array[int]:
    """The new table, with 0 where new data are to be placed."""
    words = bits.words[: bits.clusters]
    words.extend([ZEROES] * (bits.clusters - len(words)))
    for number, content in bits.changed.items():
        words[number] = content if isinstance(content, int) else ZEROES
    return words


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


def _freed(file: ClusterFile, directory: BitmapDirectory, draft: Draft) -> Iterator[Run]:
    """The clusters nothing leads to once the draft is the state."""
    if not directory.is_consistent:
        return  # what a stale extension leads to may be anybody's by now
    size = file.cluster_size
    if directory.extension:
        yield _run(directory.extension.bitmap_directory_offset, directory.size, size)
    for entry in draft.removed:
        yield _run(entry.bitmap_table_offset, ENTRY_LENGTH * entry.bitmap_table_size, size)
        yield from _data_runs(read_words(file, entry), size)
    for bitmap in draft.bitmaps.values():
        if not bitmap.entry or not bitmap.bits or not _has_new_table(bitmap):
            continue
        entry, bits = bitmap.entry, bitmap.bits
        yield _run(entry.bitmap_table_offset, ENTRY_LENGTH * entry.bitmap_table_size, size)
        gone = array("Q", (bits.words[n] for n in sorted(bits.changed) if n < len(bits.words)))
        yield from _data_runs(gone + bits.words[bits.clusters :], size)


def _run(offset: int, length: int, cluster_size: int) -> Run:
    first = offset // cluster_size
    return first, first + ceil_div(length, cluster_size)


def _data_runs(words: array[int], cluster_size: int) -> Iterator[Run]:
    for word in words:
        offset = word & MASKS.offset
        if offset:
            yield offset // cluster_size, offset // cluster_size + 1
