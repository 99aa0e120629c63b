"""Mending the metadata of bitmaps, as a plan: what can be proved is mended, the rest is dropped.

*Spec*: spec/repair.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

from qcow2bm.bitmaps.commit import ordered
from qcow2bm.bitmaps.directory import (
    MAX_BITMAPS,
    MAX_DIRECTORY_SIZE,
)
from qcow2bm.bitmaps.entries import MAX_NAME_SIZE
from qcow2bm.bitmaps.status import as_error
from qcow2bm.checking.check import refcount_mends
from qcow2bm.checking.view import View
from qcow2bm.clusters.allocator import Allocator
from qcow2bm.clusters.file import ClusterFile
from qcow2bm.clusters.header_draft import HeaderDraft, Switch
from qcow2bm.clusters.plan import SECTOR_SIZE, Barrier, Plan, Step, Write, coalesce
from qcow2bm.errors import FormatError, UnsupportedError
from qcow2bm.format.directory import (
    FIELD_OFFSETS,
    FLAG_EXTRA_DATA_COMPATIBLE,
    TYPE_DIRTY_TRACKING,
    Directory,
    DirectoryEntry,
    build_directory,
    parse_directory,
)
from qcow2bm.format.directory import HEAD_LENGTH as ENTRY_LENGTH
from qcow2bm.format.extensions import (
    BITMAPS,
    BITMAPS_LENGTH,
    HEAD_LENGTH,
    BitmapsExtension,
    build_bitmaps_extension,
)
from qcow2bm.format.features import AUTOCLEAR_BITMAPS
from qcow2bm.problem_kinds import BITMAPS_GONE, EXTENSION_LENGTH, UNKNOWN_FEATURE
from qcow2bm.problems import DIRECTORY, REFCOUNT_TABLE, REFUSED, UNUSABLE, Problem, RepairName
from qcow2bm.storage.dry_run import DryRunStorage
from qcow2bm.storage.interface import Storage
from qcow2bm.units import ceil_div, decode_name

_MOST_GROWTH_BYTES = 1 << 30  # and twice what is there: where an image was cut off, all fits in
_MAX_RESYNCHRONISED = 100  # entries: it takes the square of that
_MAX_ENTRY = ENTRY_LENGTH + MAX_NAME_SIZE + 1

REPAIRS: dict[RepairName, str] = {
    "directory": "extension, directory, entries and tables of bitmaps",
    "tails": "bits behind the end of the disk",
    "refcounts": "leaked clusters, and refcounts that are too low",
    "stale": "a stale bitmaps extension, which is removed; not done unless it is asked for",
}
"""What can be repaired, by what it is called."""

_Patch = tuple[int, bytes]


class Lost(NamedTuple):
    """A bitmap that is dropped, or several whose names are not known (None), and why."""

    name: str | None
    reason: str


class Repair(NamedTuple):
    """What a repair does.

    Attributes:
        plan: all writes and barriers; none if there is nothing to do.
        lost: the bitmaps that are dropped.
        renamed: (old, new) names of bitmaps.
        mended: the serious problems there were, and are no more; not those of bitmaps that are
            dropped.
        problems: all there are before.
        left: the serious ones there will be afterwards.
        leaked_clusters: how many clusters will leak then.
    """

    plan: Plan
    lost: tuple[Lost, ...]
    renamed: tuple[tuple[str, str], ...]
    mended: tuple[Problem, ...]
    problems: tuple[Problem, ...]
    left: tuple[Problem, ...]
    leaked_clusters: int


def plan_repair(
    storage: Storage,
    *,
    lossless: bool = False,
    only: Collection[str] | None = None,
    capacity: int | None = None,
) -> Repair:
    """How an image is repaired; nothing is written.

    Args:
        storage: the image; the caller holds its locks.
        lossless: do only what loses no bitmap.
        only: which of `REPAIRS` to do; by default all but "stale".
        capacity: the length in bytes that the storage cannot outgrow, if there is one.

    Raises:
        FormatError: it is no image, or its refcounts are too damaged to put anything anywhere.
        UnsupportedError: it has incompatible features that are unknown here.
        StorageError: reading failed, or there is no room.
    """
    overlay = DryRunStorage(storage)
    before = view = View.of(overlay)
    for found in view.header:
        if found.kind == UNKNOWN_FEATURE:
            raise UnsupportedError(f"repairing an image that {found.reason}")
    chosen = [id for id in REPAIRS if id != "stale"] if only is None else only
    first = _right_length(view) if "directory" in chosen else []
    if first:
        _apply(overlay, first)
        view = View.of(overlay)
    first_view = view
    # As long as QEMU refuses the header, nothing is gained by giving up bitmaps; and what the
    # header says wrongly of the disk may be all that is wrong with them.
    is_header_refused = any(
        p.severity == REFUSED and p.kind != EXTENSION_LENGTH for p in view.header
    )
    believed = _believed(view) if "directory" in chosen else [view]
    work = _Directory(view, believed, lossless=lossless or is_header_refused, capacity=capacity)
    plan = work.plan(chosen)
    steps = [*first, *plan.steps]
    commit_point = 0 if first else None
    if plan.commit_point is not None:
        commit_point = len(first) + plan.commit_point
    _apply(overlay, plan.steps)
    view = View.of(overlay) if plan.steps else view
    mends = [*_tails(view)] if "tails" in chosen else []
    if "refcounts" in chosen and _can_be_counted((before, first_view, *believed), view):
        mends += refcount_mends(view.file, view.directory)
    if mends:
        more: list[Step] = [*coalesce(mends), Barrier("refcounts and tails")]
        if not steps and view.file.header.version > 2:  # unknown features are told before
            more = [*HeaderDraft(view.file).clear_unknown_autoclear(), *more]
        steps += more
        _apply(overlay, more)
        view = View.of(overlay)
    left = tuple(p for p in view.problems if p.is_fault)
    _require_no_worse((before, first_view), view)
    return Repair(
        Plan(tuple(steps), commit_point),
        tuple(work.lost),
        tuple(work.renamed),
        tuple(_mended(before, view, work.lost)),
        before.problems,
        left,
        view.check.leaked_clusters,
    )


def _mended(before: View, after: View, lost: Iterable[Lost]) -> Iterator[Problem]:
    """The serious problems that are gone, but those that went with their bitmaps."""
    left = {(p.id, p.offset) for p in after.problems}
    names = {one.name for one in lost}
    for found in before.problems:
        index = found.bitmap_index
        is_lost = index is not None and not names.isdisjoint(
            (None, before.directory.entries[index].name)
        )
        if found.is_fault and (found.id, found.offset) not in left and not is_lost:
            yield found


def _require_no_worse(earlier: Iterable[View], after: View) -> None:
    """What is shared with the disk afterwards must have been so before; nothing is written else."""
    known = {(p.id, p.offset) for before in earlier for p in before.problems}
    for found in after.problems:
        if found.kind.is_overlap and (found.id, found.offset) not in known:
            raise as_error(found, ": the outcome would not be sound, so nothing is written")


def _can_be_counted(earlier: Sequence[View], view: View) -> bool:
    """Whether refcounts can be set to what is referred to.

    Clusters of bitmaps that cannot be read, or found, look like leaks. And where there are leaks
    and refcounts that are too low at once, in whatever way the image was read before, bitmaps
    that are still there may lead to what was given back long ago.
    """
    is_ambiguous = any(before.check.leaked_clusters and _is_low(before) for before in earlier)
    is_gone = any(found.kind == BITMAPS_GONE for before in earlier for found in before.header)
    is_readable = not any(p.is_fault for p in view.read_problems)
    if not view.directory.is_consistent:  # where faults are remarks, but name clusters no less
        severities = {found.kind.severity for found in view.directory.problems}
        is_readable &= severities.isdisjoint((REFUSED, UNUSABLE))
    return is_readable and not is_gone and not (is_ambiguous and _is_low(view))


def _is_low(view: View) -> bool:
    return any(found.kind.is_undercount for found in view.check.problems)


def _right_length(view: View) -> list[Step]:
    """Gives the bitmaps extension the length it must have, if that makes the header right."""
    faults = [found for found in view.header if found.kind == EXTENSION_LENGTH]
    if len(faults) != 1:
        return []
    overlay = DryRunStorage(view.file.storage)
    write = Write(faults[0].offset, (BITMAPS_LENGTH.to_bytes(4, "big"),), "length of the extension")
    overlay.write(write.offset, write.parts)
    if any(found.severity == REFUSED for found in View.of(overlay).header):
        return []
    return [write, Barrier(write.what)]


def _believed(view: View) -> list[View]:
    """The image with a directory that all but one of the facts about it agree to, if any.

    The facts are the count, the size, and the length of each entry, and the refcounts of what it
    leads to. Each of the first is doubted in turn. What leaves the fewest faults is believed; if
    there are several such, they are all returned.
    """
    is_disjointed = any(
        found.kind.breaks_directory_end or (found.kind.concerns_table_place and found.is_serious)
        for found in view.directory.problems
    )
    if not view.directory.extension or view.directory.distrust or not is_disjointed:
        return [view]
    best, fewest = [view], _score(view)
    for patches in (*_other_payloads(view), *_other_lengths(view)):
        overlay = DryRunStorage(view.file.storage)
        for offset, data in patches:
            overlay.write(offset, (data,))
        other = View.of(overlay)
        found = other.directory
        is_whole = not any(
            p.kind.breaks_directory_end or p.kind.suggests_misreading for p in found.problems
        )
        score = _score(other)
        if not is_whole or score > fewest or (score == fewest and best[0] is view):
            continue
        if score < fewest:
            best, fewest = [], score
        if all(found.entries != known.directory.entries for known in best):
            best.append(other)
    return best


def _score(view: View) -> tuple[int, int]:
    """How much speaks against a directory: faults of its own, and refcounts that do not fit."""
    low = sum(found.kind.is_undercount for found in view.check.problems)
    return _faults(view), low + view.check.leaked_clusters


def _faults(view: View) -> int:
    """How many faults of the directory and its entries keep QEMU from opening the image."""
    found = view.directory.problems
    return sum(p.severity == REFUSED or p.kind.breaks_directory_end for p in found)


def _other_payloads(view: View) -> Iterator[list[_Patch]]:
    """The extension with another count, and with another size."""
    file, extension = view.file, view.directory.extension
    assert extension
    area = zip(file.area.extensions, file.area.offsets(file.extensions_offset), strict=True)
    place = [at + HEAD_LENGTH for found, at in area if found.type == BITMAPS][-1]
    entries, count = view.directory.entries, extension.nb_bitmaps
    if entries and 0 < extension.bitmap_directory_size <= MAX_DIRECTORY_SIZE:
        other = extension._replace(nb_bitmaps=len(entries))
        yield [(place, build_bitmaps_extension(other))]
    if 0 < count <= MAX_BITMAPS:
        start = extension.bitmap_directory_offset
        length = min(MAX_DIRECTORY_SIZE, file.file_size - start)
        found = parse_directory(file.read(start, length), start, count).entries
        size = sum(entry.size for entry in found)
        if len(found) == count and size <= length:
            other = extension._replace(bitmap_directory_size=size)
            yield [(place, build_bitmaps_extension(other))]


def _other_lengths(view: View) -> Iterator[list[_Patch]]:
    """One entry of another length, so that count and size are right.

    Behind it so many entries must follow as are missing, up to the end; and its own name, without
    extra data, must end there, up to padding of zeros.
    """
    file, extension = view.file, view.directory.extension
    assert extension
    start, count = extension.bitmap_directory_offset, extension.nb_bitmaps
    size = min(extension.bitmap_directory_size, MAX_DIRECTORY_SIZE, file.file_size - start)
    if not 0 < count <= _MAX_RESYNCHRONISED or size != extension.bitmap_directory_size:
        return
    data = file.read(start, size)
    begin = 0
    for index in range(count):
        left = count - index - 1
        ends = range(begin + ENTRY_LENGTH + 8, min(size, begin + _MAX_ENTRY) + 1, 8)
        known = parse_directory(data[begin:], start + begin, 1).entries
        stored = known[0].size if known and known[0].name_bytes is not None else 0
        for end in ends:
            if end - begin == stored:  # so that its length is not what is wrong
                continue
            if (end == size) == (left == 0) and _parses(data[end:], left, file):
                name = data[begin + ENTRY_LENGTH : end].rstrip(b"\0")
                if name and b"\0" not in name and end - begin - ENTRY_LENGTH - len(name) < 8:
                    place = start + begin
                    yield [
                        (place + FIELD_OFFSETS["name_size"], len(name).to_bytes(2, "big")),
                        (place + FIELD_OFFSETS["extra_data_size"], bytes(4)),
                    ]
        if not stored:
            return
        begin += stored


def _parses(data: bytes, count: int, file: ClusterFile) -> bool:
    """Whether so many entries, and nothing else, stand there, none of them impossible."""
    entries, rest = parse_directory(data, 0, count + 1)
    return (
        len(entries) == count
        and not rest
        and all(
            entry.name_bytes
            and not any(entry.padding)
            and entry.type == TYPE_DIRTY_TRACKING
            and entry.bitmap_table_offset % (1 << 56) > 0
            and not entry.bitmap_table_offset % file.cluster_size
            for entry in entries
        )
    )


def _apply(storage: DryRunStorage, steps: Iterable[Step]) -> None:
    for step in steps:
        if isinstance(step, Write):
            storage.write(step.offset, step.parts)


def _tails(view: View) -> Iterator[Write]:
    """Clears bits behind the end of the disk, sector by sector, where nothing else is at fault."""
    broken = {p.bitmap_index for p in view.problems if p.is_fault}
    if view.directory.distrust or view.survey.distrust or view.is_disk_in_doubt:
        return
    for found in view.check.problems:
        index = found.bitmap_index
        if found.kind.repair != "tails" or index is None or index in broken:
            continue
        entry, file = view.directory.entries[index], view.file
        bits = ceil_div(file.virtual_size, entry.granularity) % (8 * file.cluster_size)
        start = found.offset // file.cluster_size * file.cluster_size
        data = bytearray(file.read(start, file.cluster_size))
        used = bits // 8
        clean = bytearray(data)
        clean[used + 1 :] = bytes(len(clean) - used - 1)
        clean[used] &= (1 << bits % 8) - 1
        for place in range(0, len(data), SECTOR_SIZE):
            sector = bytes(clean[place : place + SECTOR_SIZE])
            if sector != data[place : place + SECTOR_SIZE]:
                yield Write(start + place, (sector,), "bits behind the end of the disk")


def _essence(entry: DirectoryEntry) -> tuple[object, ...]:
    """What an entry says, wherever it stands."""
    return (*entry[2:7], entry.name_bytes)


def _short_name(entry: DirectoryEntry) -> bytes:
    """A name without padding that was counted, and no longer than QEMU takes."""
    return (entry.name_bytes or b"").rstrip(b"\0")[:MAX_NAME_SIZE]


def _seen_by_qemu(name: bytes) -> bytes:
    return name.partition(b"\0")[0]


class _Directory:
    """What becomes of extension, directory and entries.

    Attributes:
        lost: the bitmaps that are dropped.
        renamed: those that get another name.
    """

    def __init__(
        self,
        stored: View,
        believed: Sequence[View],
        *,
        lossless: bool,
        capacity: int | None,
    ) -> None:
        """``believed`` is the image as its directory can be read, perhaps in several ways."""
        self.lost: list[Lost] = []
        self.renamed: list[tuple[str, str]] = []
        self._stored = stored
        self._view = view = believed[0]
        self._agreed = set.intersection(
            *({_essence(entry) for entry in other.directory.entries} for other in believed)
        )
        self._lossless = lossless
        self._capacity = capacity
        self._by_entry: dict[int, list[Problem]] = {}
        for found in view.problems:
            if found.bitmap_index is not None:
                self._by_entry.setdefault(found.bitmap_index, []).append(found)

    def plan(self, chosen: Collection[str]) -> Plan:
        """The steps that mend them, as far as that is among the repairs that are chosen."""
        view, header = self._view, HeaderDraft(self._stored.file)
        directory = view.directory
        if directory.extension and not directory.is_consistent:
            # QEMU does not look at it, and it is the last trace of what it names.
            if view.file.header.version < 3 or "stale" not in chosen:
                return Plan()
            return self._give_up(header, "was stale", directory.entries)
        if "directory" not in chosen:
            return Plan()
        if not directory.extension:
            return self._without_extension(header)
        distrust = directory.distrust or view.survey.distrust
        overlaps = [
            p for p in view.check.problems if p.kind.is_overlap and p.structure == DIRECTORY
        ]
        if distrust or overlaps:
            reason = (distrust or overlaps[0]).message
            return self._give_up(header, reason)
        kept = self._kept()
        if self._lossless and self.lost:
            self.lost, self.renamed = [], []
            return Plan()
        if not kept:
            self.lost = self.lost or [Lost(None, "the directory has no entry that can be read")]
            return self._removed(header)
        return self._replaced(header, kept)

    def _without_extension(self, header: HeaderDraft) -> Plan:
        file = self._view.file
        if file.header.version < 3:  # which has no bitmaps, and no bit for them
            return Plan()
        if file.find(BITMAPS):
            found = next(p for p in self._view.header if p.kind == EXTENSION_LENGTH)
            return self._give_up(header, found.message)
        is_set = file.header.autoclear_features & AUTOCLEAR_BITMAPS
        if not is_set or not file.has_extension_area or file.area.fault or self._lossless:
            return Plan()
        self.lost = [Lost(None, "the bitmaps extension is gone; what it named is not given back")]
        prepared = header.clear_unknown_autoclear()
        return ordered(prepared, header.renew_generation(), header.clear_bitmaps_bit(), ())

    def _give_up(
        self, header: HeaderDraft, reason: str, entries: Iterable[DirectoryEntry] = ()
    ) -> Plan:
        """Drops all bitmaps; ``entries`` are those of a directory that can be believed."""
        if self._lossless:
            return Plan()
        self.lost = [Lost(entry.name, reason) for entry in entries] or [Lost(None, reason)]
        return self._removed(header)

    def _removed(self, header: HeaderDraft) -> Plan:
        prepared = header.clear_unknown_autoclear()
        renewed = header.renew_generation()
        return ordered(prepared, renewed, header.remove(), ())

    def _kept(self) -> list[DirectoryEntry]:
        """The entries there are to be, mended; the others are lost."""
        entries = self._view.directory.entries
        extension = self._view.directory.extension
        assert extension
        sound = []
        for entry in entries:
            reason = self._why_lost(entry)
            if reason:
                self.lost.append(Lost(entry.name, reason))
            else:
                sound.append(entry)
        names = Counter(_seen_by_qemu(_short_name(entry)) for entry in sound)
        taken = dict.fromkeys(names, 0)
        kept = [self._mended(entry, names, taken) for entry in sound]
        missing = min(extension.nb_bitmaps, MAX_BITMAPS) - len(entries)
        if missing > 0:
            reason = f"{missing} of {extension.nb_bitmaps} entries are not in the directory"
            self.lost.append(Lost(None, reason))
        return kept

    def _why_lost(self, entry: DirectoryEntry) -> str:
        """What is wrong with it and cannot be mended; what two of one name share is such, too."""
        if _essence(entry) not in self._agreed:
            return "the directory can be read in several ways, and not in all of them it is there"
        for found in self._by_entry.get(entry.index, ()):
            if found.is_fault and not found.kind.costs_no_bitmap:
                return found.message
        return ""

    def _mended(
        self, entry: DirectoryEntry, names: Counter[bytes], taken: dict[bytes, int]
    ) -> DirectoryEntry:
        """An entry as it should be. Of a name that several have, nobody knows who it belongs to.

        ``taken`` are all names, and how often each was made another.
        """
        name = _short_name(entry)
        stem = _seen_by_qemu(name)
        while names[stem] > 1 and _seen_by_qemu(name) in taken:
            taken[stem] += 1
            ending = f"-{taken[stem]}".encode()
            name = stem[: MAX_NAME_SIZE - len(ending)] + ending
        taken.setdefault(name, 0)
        if name != entry.name_bytes:
            self.renamed.append((entry.name or "", decode_name(name)))
        return entry._replace(
            flags=entry.flags & ~FLAG_EXTRA_DATA_COMPATIBLE,
            name_size=len(name),
            extra_data_size=0,
            extra_data=b"",
            name_bytes=name,
            padding=bytes(-len(name) % 8),
        )

    def _end(self) -> int:
        """The number of the first cluster behind all that anything leads to."""
        file, check = self._view.file, self._view.check
        end = max(check.end, 0 if self._capacity else ceil_div(file.file_size, file.cluster_size))
        most = _MOST_GROWTH_BYTES + 2 * max(file.file_size, file.virtual_size)
        if end * file.cluster_size > most:
            past = (p for p in self._view.problems if p.kind.is_past_end)
            if found := next(past, None):
                raise as_error(found, ", perhaps far behind it: mend that first (qemu-img check)")
            place = end * file.cluster_size
            raise FormatError("image", "cluster", place, "is used, far behind the end of the file")
        return end

    def _replaced(self, header: HeaderDraft, kept: Sequence[DirectoryEntry]) -> Plan:
        directory, file = self._view.directory, self._stored.file
        extension = directory.extension
        assert extension
        size = sum(entry.size for entry in kept)
        payload = BitmapsExtension(len(kept), 0, size, extension.bitmap_directory_offset)
        content = build_directory(Directory(tuple(kept), b""))
        start = extension.bitmap_directory_offset
        is_same = file.contains(start, size) and file.read(start, size) == content
        if is_same and payload == self._stored.directory.extension:
            return Plan()
        prepared = [*header.clear_unknown_autoclear(), *header.straighten()]
        renewed = header.renew_generation()
        written: list[Write] = []
        if not is_same:
            damage = (p for p in self._view.check.problems if p.structure == REFCOUNT_TABLE)
            if found := next(damage, None):
                raise as_error(found, ": mend the refcounts first (qemu-img check -r all)")
            capacity, end = self._capacity, self._end()
            allocator = Allocator(file, [(0, end)], 0, capacity, is_behind=True)
            length = ceil_div(size, file.cluster_size)
            (first,) = allocator.allocate([length], 0).firsts
            preparation = allocator.preparation()
            header.apply(preparation)
            prepared += preparation
            content = content.ljust(length * file.cluster_size, b"\0")
            place = first * file.cluster_size
            written.append(Write(place, (content,), "new bitmap directory", is_fresh=True))
            payload = payload._replace(bitmap_directory_offset=place)
            written += allocator.refcounts.take_count_writes("refcounts of new clusters")
        switch: Switch = header.replace(build_bitmaps_extension(payload))
        return ordered(prepared, (*written, *switch.before, *renewed), switch, ())
