"""Reading the bitmap tables: what kind of clusters each bitmap has, and whose they are.

*Spec*: spec/bitmaps.md, "Bitmap table"; the ids are in spec/problems.md.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from qcow2bm.bits import plain
from qcow2bm.bits.runs import ALL_ONES, ALL_ZEROES, ALLOCATED, INVALID, Run
from qcow2bm.clusters.file import ClusterFile
from qcow2bm.format.directory import TYPE_DIRTY_TRACKING, DirectoryEntry
from qcow2bm.format.table import ENTRY_LENGTH, MASKS, parse_bitmap_table
from qcow2bm.problems import UNUSABLE, Problem, problem
from qcow2bm.store.directory import (
    GRANULARITY_BITS_LIMIT,
    MAX_BITMAP_BYTES,
    BitmapDirectory,
)
from qcow2bm.units import align_up, ceil_div

MAX_FAULTS_LISTED = 16
"""So many bad entries of a table are listed one by one; then one Problem counts the rest."""

BITMAP_DIRECTORY = "bitmap directory"

_NUMPY_PAYS = 4096  # entries


class Clusters(NamedTuple):
    """How many table entries of each kind a bitmap has."""

    all_zeroes: int
    all_ones: int
    allocated: int


class Table(NamedTuple):
    """What is kept of a bitmap table after it was looked at: its counts, and a fingerprint."""

    clusters: Clusters
    fingerprint: int


class Survey(NamedTuple):
    """All tables of an image: one Table for each directory entry, None where none can be read."""

    tables: tuple[Table | None, ...]
    problems: tuple[Problem, ...]


class _Extent(NamedTuple):
    """A range of host bytes and what it is used for; sorts by offset."""

    start: int
    end: int
    owner: int | None  # index of the directory entry, None for what is not a bitmap's
    what: str
    is_table: bool


def read_words(file: ClusterFile, entry: DirectoryEntry) -> array[int]:
    """The table of an entry, uint64[bitmap_table_size].

    Raises:
        LimitError: it lies outside the file.
        StorageError: reading failed.
    """
    size = ENTRY_LENGTH * entry.bitmap_table_size
    return parse_bitmap_table(file.read(entry.bitmap_table_offset, size))


def table_runs(words: array[int], cluster_size: int) -> Iterable[Run]:
    """The entries as runs in order, by the cheaper of the two implementations.

    numpy is used only where the program has loaded it anyway.
    """
    if len(words) < _NUMPY_PAYS or "numpy" not in sys.modules:
        return plain.table_runs(words, MASKS.offset, cluster_size)
    from qcow2bm.bits import tables

    runs = tables.table_runs(words, MASKS.offset, cluster_size)
    return (Run(*row) for row in runs.tolist())


def survey(
    file: ClusterFile, directory: BitmapDirectory, header_problems: Iterable[Problem]
) -> Survey:
    """Reads all tables that can be read, and finds what is wrong with them and between them.

    Tables that overlap another structure are not read, so that the work is bounded by the
    size of the file.

    Raises:
        StorageError: reading failed.
    """
    if not directory.is_consistent or directory.distrust:
        return Survey((None,) * len(directory.entries), ())
    problems: list[Problem] = []
    extents = list(_fixed_extents(file, directory, header_problems))
    readable = []
    for entry in directory.entries:
        if has_readable_table(entry, file):
            start = entry.bitmap_table_offset
            end = start + align_up(ENTRY_LENGTH * entry.bitmap_table_size, file.cluster_size)
            extents.append(_Extent(start, end, entry.index, f"table of entry {entry.index}", True))
            readable.append(entry)
    overlapping = {problem.bitmap_index for problem in _overlaps(extents)}
    tables: list[Table | None] = [None] * len(directory.entries)
    for entry in readable:
        if entry.index in overlapping:
            continue
        words = read_words(file, entry)
        counts = [0, 0, 0, 0]
        what = f"data of entry {entry.index}"
        for run in table_runs(words, file.cluster_size):
            counts[run.kind] += run.entries
            if run.kind == ALLOCATED:
                end = run.offset + run.entries * file.cluster_size
                extents.append(_Extent(run.offset, end, entry.index, what, False))
        tables[entry.index] = Table(
            Clusters(counts[ALL_ZEROES], counts[ALL_ONES], counts[ALLOCATED]),
            fingerprint(words),
        )
        problems += _entry_faults(file, entry, words, counts[INVALID])
    return Survey(tuple(tables), (*_overlaps(extents), *problems))


def fingerprint(words: array[int]) -> int:
    """Tells a table from another one, within this process."""
    return hash(words.tobytes())


def has_readable_table(entry: DirectoryEntry, file: ClusterFile) -> bool:
    """Whether the entry leads to a table of a kind this library knows, within the file."""
    start, size = entry.bitmap_table_offset, ENTRY_LENGTH * entry.bitmap_table_size
    return (
        entry.type == TYPE_DIRTY_TRACKING
        and entry.name_bytes is not None
        and entry.granularity_bits < GRANULARITY_BITS_LIMIT
        and size > 0
        and entry.bitmap_table_size * file.cluster_size <= MAX_BITMAP_BYTES
        and start > 0
        and start % file.cluster_size == 0
        and start + size <= file.file_size
    )


def _fixed_extents(
    file: ClusterFile, directory: BitmapDirectory, header_problems: Iterable[Problem]
) -> Iterator[_Extent]:
    """What the header says is where: nothing of a bitmap may lie there.

    A field that is wrong by itself says nothing about where anything is.
    """
    header, cluster_size = file.header, file.cluster_size
    wrong = {problem.field for problem in header_problems}
    yield _Extent(0, cluster_size, None, "header", False)
    if not wrong & {"l1_size", "l1_table_offset"}:
        yield _fixed(file, header.l1_table_offset, 8 * header.l1_size, "L1 table")
    if not wrong & {"refcount_table_clusters", "refcount_table_offset"}:
        length = header.refcount_table_clusters * cluster_size
        yield _fixed(file, header.refcount_table_offset, length, "refcount table")
    extension = directory.extension
    if extension:
        start, size = extension.bitmap_directory_offset, extension.bitmap_directory_size
        yield _fixed(file, start, min(size, file.file_size - start), BITMAP_DIRECTORY)


def _fixed(file: ClusterFile, start: int, length: int, what: str) -> _Extent:
    return _Extent(start, start + align_up(length, file.cluster_size), None, what, False)


def _overlaps(extents: list[_Extent]) -> Iterator[Problem]:
    """One Problem for each bitmap and each thing it shares bytes with.

    Two overlapping things that are no bitmap's are not this module's business, except the
    bitmap directory.
    """
    seen: set[tuple[str, str]] = set()
    reach: _Extent | None = None  # of the extents before, the one that ends last
    for extent in sorted(extents, key=lambda extent: extent.start):
        if reach and extent.start < reach.end:
            for mine, other in ((extent, reach), (reach, extent)):
                key = mine.what, other.what
                if key not in seen:
                    seen.add(key)
                    yield from _overlap(mine, other, extent.start)
        if not reach or extent.end > reach.end:
            reach = extent


def _overlap(mine: _Extent, other: _Extent, offset: int) -> Iterator[Problem]:
    reason = f"is also used by the {other.what}"
    if mine.owner is not None:
        id = "bitmap-table.overlap" if mine.is_table else "bitmap-data.overlap"
        yield problem(id, offset, reason, mine.owner)
    elif mine.what == BITMAP_DIRECTORY:
        yield problem("bitmap-directory.overlap", offset, reason)


def _entry_faults(
    file: ClusterFile, entry: DirectoryEntry, words: array[int], invalid: int
) -> list[Problem]:
    """Faults of single table entries; none are looked for where the table has none."""
    coverage = ceil_div(ceil_div(file.virtual_size, entry.granularity), 8)
    limit = file.file_size - file.cluster_size
    if not invalid and max(words) & MASKS.offset <= limit:
        return []
    found: list[Problem] = []
    for index, word in enumerate(words):
        place = entry.bitmap_table_offset + ENTRY_LENGTH * index
        offset = word & MASKS.offset
        severity = UNUSABLE if entry.in_use else None  # QEMU does not look at the table then
        if word & MASKS.reserved or (offset and word & MASKS.all_ones):
            fault, reason = "reserved", "with reserved bits set"
        elif offset % file.cluster_size:
            fault, reason = "unaligned", "not at the start of a cluster"
        elif offset > limit and offset + _used(index, coverage, file) > file.file_size:
            fault, reason = "past-eof", "a cluster that reaches past the end of the file"
            severity = None
        else:
            continue
        if len(found) == MAX_FAULTS_LISTED:
            reason = "is not the last one at fault; no more of this table are listed"
            found.append(
                problem("bitmap-table.entry.more", place, reason, entry.index, None, index)
            )
            break
        id, reason = f"bitmap-table.entry.{fault}", f"is {word:#x}, {reason}"
        found.append(problem(id, place, reason, entry.index, severity, index))
    return found


def _used(index: int, coverage: int, file: ClusterFile) -> int:
    """How many bytes of a cluster must be there: of the last one only those that hold bits."""
    used = coverage - index * file.cluster_size
    return used if 0 < used < file.cluster_size else file.cluster_size
