"""Repairing the bitmaps extension, the bitmap directory and its entries.

*Spec*: spec/repair.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from qcow2bm.bitmaps.commit import ordered
from qcow2bm.bitmaps.directory import MAX_BITMAPS
from qcow2bm.bitmaps.entries import MAX_NAME_SIZE
from qcow2bm.checking.findings import Findings
from qcow2bm.clusters.allocator import Allocator
from qcow2bm.clusters.header_draft import HeaderDraft
from qcow2bm.clusters.plan import Plan, Write
from qcow2bm.errors import FormatError
from qcow2bm.format.directory import (
    FLAG_EXTRA_DATA_COMPATIBLE,
    Directory,
    DirectoryEntry,
    build_directory,
)
from qcow2bm.format.extensions import BITMAPS, BitmapsExtension, build_bitmaps_extension
from qcow2bm.format.features import AUTOCLEAR_BITMAPS
from qcow2bm.problem_errors import as_error
from qcow2bm.problem_kinds import EXTENSION_LENGTH
from qcow2bm.problems import REFCOUNT_TABLE, Problem
from qcow2bm.units import ceil_div, decode_name

_MOST_GROWTH_BYTES = 1 << 30  # beside twice the size: every image that was cut off fits in


class LostBitmap(NamedTuple):
    """A bitmap that a repair drops.

    Attributes:
        name: the name; None stands for one or more bitmaps whose names are not known.
        reason: why it is dropped.
    """

    name: str | None
    reason: str


class DirectoryRepair:
    """Plans what becomes of the extension, the directory and its entries.

    Attributes:
        lost: the bitmaps that are dropped.
        renamed: the (old, new) names of the bitmaps that get another name.
    """

    def __init__(
        self,
        stored: Findings,
        readings: Sequence[Findings],
        *,
        lossless: bool,
        capacity: int | None,
    ) -> None:
        """Begins with the stored image and the believable ways to read its directory.

        An entry that is not the same in all ``readings`` is not believed. With ``lossless`` the
        plan is empty if a bitmap would be dropped. ``capacity`` is the length in bytes that the
        storage cannot outgrow.
        """
        self.lost: list[LostBitmap] = []
        self.renamed: list[tuple[str, str]] = []
        self._file = stored.metadata.file
        self._stored_extension = stored.metadata.directory.extension
        self._findings = readings[0]
        self._metadata = readings[0].metadata
        self._agreed = set.intersection(
            *({_essence(entry) for entry in each.metadata.directory.entries} for each in readings)
        )
        self._lossless = lossless
        self._capacity = capacity
        self._by_entry: dict[int, list[Problem]] = {}
        for found in self._findings.problems:
            if found.bitmap_index is not None:
                self._by_entry.setdefault(found.bitmap_index, []).append(found)

    def plan(self, chosen: Collection[str]) -> Plan:
        """Returns the steps of those repairs that are ``chosen``: "directory" and "stale".

        Raises:
            FormatError: the refcounts are too damaged to allocate clusters.
            UnsupportedError, LimitError: the header cannot be changed safely.
            StorageError: reading failed, or there is no room.
        """
        metadata, header = self._metadata, HeaderDraft(self._file)
        directory = metadata.directory
        if directory.extension and not directory.is_consistent:
            # QEMU ignores a stale extension, which is the last trace of its bitmaps.
            if metadata.file.header.version < 3 or "stale" not in chosen:
                return Plan()
            return self._drop_all(header, "was stale", directory.entries)
        if "directory" not in chosen:
            return Plan()
        if not directory.extension:
            return self._plan_without_extension(header)
        overlaps = (found for found in self._findings.check.problems if found.costs_every_bitmap)
        distrust = metadata.distrust or next(overlaps, None)
        if distrust:
            return self._drop_all(header, distrust.message)
        kept = self._keep_entries()
        if self._lossless and self.lost:
            self.lost, self.renamed = [], []
            return Plan()
        if not kept:
            self.lost = self.lost or [
                LostBitmap(None, "the directory has no entry that can be read")
            ]
            return _remove_extension(header)
        return self._write_directory(header, kept)

    def _plan_without_extension(self, header: HeaderDraft) -> Plan:
        file = self._metadata.file
        if file.header.version < 3:  # version 2 has no bitmaps, and no bit for them
            return Plan()
        if file.find(BITMAPS):
            problems = self._metadata.header_problems
            found = next(each for each in problems if each.kind == EXTENSION_LENGTH)
            return self._drop_all(header, found.message)
        is_set = file.header.autoclear_features & AUTOCLEAR_BITMAPS
        if not is_set or not file.has_extension_area or file.area.fault or self._lossless:
            return Plan()
        reason = "the bitmaps extension is gone; what it named is not given back"
        self.lost = [LostBitmap(None, reason)]
        prepared = header.clear_unknown_autoclear()
        return ordered(prepared, header.renew_generation(), header.clear_bitmaps_bit(), ())

    def _drop_all(
        self, header: HeaderDraft, reason: str, entries: Iterable[DirectoryEntry] = ()
    ) -> Plan:
        """Drops all bitmaps; ``entries`` are those of a directory that can be believed."""
        if self._lossless:
            return Plan()
        named = [LostBitmap(entry.name, reason) for entry in entries]
        self.lost = named or [LostBitmap(None, reason)]
        return _remove_extension(header)

    def _keep_entries(self) -> list[DirectoryEntry]:
        """Returns the entries of the new directory, repaired; the others are `lost`."""
        entries = self._metadata.directory.entries
        extension = self._metadata.directory.extension
        assert extension
        sound = []
        for entry in entries:
            reason = self._why_lost(entry)
            if reason:
                self.lost.append(LostBitmap(entry.name, reason))
            else:
                sound.append(entry)
        names = Counter(_seen_by_qemu(_short_name(entry)) for entry in sound)
        taken = dict.fromkeys(names, 0)
        kept = [self._repair_entry(entry, names, taken) for entry in sound]
        missing = min(extension.nb_bitmaps, MAX_BITMAPS) - len(entries)
        if missing > 0:
            reason = f"{missing} of {extension.nb_bitmaps} entries are not in the directory"
            self.lost.append(LostBitmap(None, reason))
        return kept

    def _why_lost(self, entry: DirectoryEntry) -> str:
        """Returns the fault for which a bitmap is dropped; empty if it is kept.

        If two bitmaps use the same clusters, that is a fault of both.
        """
        if _essence(entry) not in self._agreed:
            return "the directory can be read in several ways, and not in all of them it is there"
        for found in self._by_entry.get(entry.index, ()):
            if found.costs_bitmap:
                return found.message
        return ""

    def _repair_entry(
        self, entry: DirectoryEntry, names: Counter[bytes], taken: dict[bytes, int]
    ) -> DirectoryEntry:
        """Returns an entry as it should be.

        If several bitmaps have one name, all of them are renamed: which of them is meant is not
        known. ``names`` counts the bitmaps of each name. ``taken`` are all names that are used,
        and how often each was given another ending.
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

    def _write_directory(self, header: HeaderDraft, kept: Sequence[DirectoryEntry]) -> Plan:
        """Returns the steps that write a directory of these entries, if it differs."""
        extension = self._metadata.directory.extension
        assert extension
        size = sum(entry.size for entry in kept)
        start = extension.bitmap_directory_offset
        payload = BitmapsExtension(len(kept), 0, size, start)
        content = build_directory(Directory(tuple(kept), b""))
        file = self._file
        is_same = file.contains(start, size) and file.read(start, size) == content
        if is_same and payload == self._stored_extension:
            return Plan()
        prepared = [*header.clear_unknown_autoclear(), *header.straighten()]
        renewed = header.renew_generation()
        written: list[Write] = []
        if not is_same:
            allocator = self._allocator()
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
        switch = header.replace(build_bitmaps_extension(payload))
        return ordered(prepared, (*written, *switch.before, *renewed), switch, ())

    def _allocator(self) -> Allocator:
        """Returns an allocator of clusters behind everything that the image refers to."""
        for found in self._findings.check.problems:
            if found.structure == REFCOUNT_TABLE:
                raise as_error(found, ": repair the refcounts first (qemu-img check -r all)")
        taken = [(0, self._end())]
        return Allocator(self._file, taken, 0, self._capacity, None, is_behind=True)

    def _end(self) -> int:
        """The number of the first cluster behind everything that the image refers to."""
        file, check = self._metadata.file, self._findings.check
        end = max(check.end, 0 if self._capacity else ceil_div(file.file_size, file.cluster_size))
        most = _MOST_GROWTH_BYTES + 2 * max(file.file_size, file.virtual_size)
        if end * file.cluster_size > most:
            for found in self._findings.problems:
                if found.kind.is_past_end:
                    what = ", perhaps far behind it: repair that first (qemu-img check)"
                    raise as_error(found, what)
            place = end * file.cluster_size
            raise FormatError("image", "cluster", place, "is used, far behind the end of the file")
        return end


def _remove_extension(header: HeaderDraft) -> Plan:
    prepared = header.clear_unknown_autoclear()
    renewed = header.renew_generation()
    return ordered(prepared, renewed, header.remove(), ())


def _essence(entry: DirectoryEntry) -> tuple[object, ...]:
    """Everything that an entry says, without the place where it stands."""
    return (*entry[2:7], entry.name_bytes)


def _short_name(entry: DirectoryEntry) -> bytes:
    """The name without padding that name_size counts, cut to the length that QEMU takes."""
    return (entry.name_bytes or b"").rstrip(b"\0")[:MAX_NAME_SIZE]


def _seen_by_qemu(name: bytes) -> bytes:
    """The name up to a NUL byte, at which it ends for QEMU."""
    return name.partition(b"\0")[0]
