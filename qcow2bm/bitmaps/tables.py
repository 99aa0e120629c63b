"""Reading the bitmap tables: the kinds of clusters that bitmaps have, and the host bytes used.

*Spec*: spec/bitmaps.md, "Bitmap table"; the ids are in spec/problems.md.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from functools import partial
from typing import NamedTuple

from qcow2bm.bitmaps.directory import BitmapDirectory
from qcow2bm.bitmaps.entries import GRANULARITY_BITS_LIMIT, MAX_BITMAP_BYTES
from qcow2bm.bitmaps.overlaps import Overlaps
from qcow2bm.bits import pure_python
from qcow2bm.bits.runs import ALL_ONES, ALL_ZEROES, ALLOCATED, INVALID, KINDS, Run, RunRows
from qcow2bm.clusters.file import ClusterFile
from qcow2bm.clusters.layout import parts_and_blocks
from qcow2bm.format.bitmap_table import ENTRY_LENGTH, MASKS, parse_bitmap_table
from qcow2bm.format.directory import TYPE_DIRTY_TRACKING, DirectoryEntry
from qcow2bm.problem_kinds import problem
from qcow2bm.problems import DATA, DIRECTORY, TABLE, UNUSABLE, Problem, Severity
from qcow2bm.units import ceil_div

MAX_FAULTS_LISTED = 16
"""The number of bad entries of a table that are listed; one more Problem stands for the others."""

MAX_TABLES_BYTES = 256 << 20
"""The limit for the bytes of tables that are read in one image: far more than any image needs."""
MAX_RANGES = 4_000_000
"""The limit for the separate ranges of bitmap data that are remembered."""

_BATCH_BYTES = 1 << 20

_NUMPY_PAYS = 1 << 19  # entries: to classify fewer takes less time than to load numpy
_FEW_ENTRIES = 4096  # below this, numpy is no faster even if it is loaded


class Clusters(NamedTuple):
    """The number of table entries of each kind that a bitmap has."""

    all_zeroes: int
    all_ones: int
    allocated: int


class Table(NamedTuple):
    """The counts and a fingerprint of a bitmap table that was read."""

    clusters: Clusters
    fingerprint: int


class Survey(NamedTuple):
    """The findings in all bitmap tables of an image.

    Attributes:
        tables: one Table for each directory entry, None if the table cannot be read.
        problems: the problems of the tables, and those between structures that share clusters.
        distrust: the problem because of which no entry can be believed: the directory shares a
            cluster with something else. None in most images.
        first_shared: the first host byte that two structures share; None if there is none.
        starts: the starts of all host byte ranges known to be used, in whole clusters, in no
            order. Guest data and L2 tables are not among them.
        ends: the ends of the same ranges. There can be millions, so both are bare numbers.
    """

    tables: tuple[Table | None, ...]
    problems: tuple[Problem, ...]
    distrust: Problem | None
    first_shared: int | None
    starts: array[int]
    ends: array[int]


def read_words(file: ClusterFile, entry: DirectoryEntry) -> array[int]:
    """Reads the table of an entry, uint64[bitmap_table_size].

    Raises:
        LimitError: the table lies outside the file.
        StorageError: reading failed.
    """
    size = ENTRY_LENGTH * entry.bitmap_table_size
    return parse_bitmap_table(file.read(entry.bitmap_table_offset, size))


def table_runs(words: array[int], cluster_size: int, *, vectorize: bool = False) -> Iterable[Run]:
    """Returns the entries as runs in order, found by the faster of the two implementations.

    With ``vectorize`` the caller says that it needs numpy anyway, so that the time to load numpy
    does not count.
    """
    if len(words) < (_FEW_ENTRIES if vectorize else _NUMPY_PAYS):
        return pure_python.table_runs(words, MASKS.offset, cluster_size)
    from qcow2bm.bits import table_runs

    return RunRows(table_runs.table_runs(words, MASKS.offset, cluster_size))


def survey(
    file: ClusterFile, directory: BitmapDirectory, header_problems: Iterable[Problem]
) -> Survey:
    """Reads all tables that can be read, and finds the problems in them and between them.

    The locks of a reader are taken for a few tables at a time. The caller has to verify afterwards
    that the directory is still the same.

    Raises:
        ImageLockedError: another process writes to the image.
        StorageError: reading failed.
    """
    tables: list[Table | None] = [None] * len(directory.entries)
    overlaps = Overlaps(file.cluster_size)
    is_sound = directory.is_consistent and not directory.distrust
    if is_sound and directory.extension:
        start = directory.extension.bitmap_directory_offset
        overlaps.add(overlaps.use(DIRECTORY), start, directory.size)
    with file.lock():
        parts, blocks = parts_and_blocks(file, header_problems)
    for part in parts:
        overlaps.add(overlaps.use(part.name), part.offset, part.length)
    ends = array("Q", (place + file.cluster_size for place in blocks))
    overlaps.add_all(overlaps.use("refcount blocks"), blocks, ends)
    if not is_sound:
        return Survey(tuple(tables), (), None, overlaps.first_shared(), *overlaps.ranges())
    distrust = next(overlaps.problems(), None)  # so far only of the directory
    readable = [entry for entry in directory.entries if has_readable_table(entry, file)]
    for entry in readable:
        use = overlaps.use(f"table of entry {entry.index}", entry.index, is_table=True)
        overlaps.add(use, entry.bitmap_table_offset, ENTRY_LENGTH * entry.bitmap_table_size)
    overlapping = {found.bitmap_index for found in overlaps.problems()}
    entries = sum(entry.bitmap_table_size for entry in readable)
    find_runs = partial(table_runs, vectorize=True) if entries >= _NUMPY_PAYS else table_runs
    problems: list[Problem] = []
    for batch in _batches(readable, overlaps, problems):
        with file.lock():
            read = [(entry, read_words(file, entry)) for entry in batch]
        for entry, words in read:
            runs = find_runs(words, file.cluster_size)
            runs = runs if isinstance(runs, RunRows) else list(runs)
            # A table that was overwritten is no reason to distrust other bitmaps.
            if entry.index not in overlapping:
                use = overlaps.use(f"data of entry {entry.index}", entry.index)
                overlaps.add_all(use, *_allocated_ranges(runs, file.cluster_size))
            counts = _count_entries(runs)
            problems += _entry_faults(file, entry, words, counts[INVALID])
            clusters = Clusters(counts[ALL_ZEROES], counts[ALL_ONES], counts[ALLOCATED])
            tables[entry.index] = Table(clusters, fingerprint(words))
    found = (*overlaps.problems(), *problems)
    return Survey(tuple(tables), found, distrust, overlaps.first_shared(), *overlaps.ranges())


def _count_entries(runs: Iterable[Run]) -> list[int]:
    """Returns the number of entries of each kind."""
    if isinstance(runs, RunRows):
        return runs.counts()
    counts = [0] * KINDS
    for run in runs:
        counts[run.kind] += run.entries
    return counts


def _allocated_ranges(runs: Iterable[Run], cluster_size: int) -> tuple[array[int], array[int]]:
    """Returns the starts and the ends of the host byte ranges of allocated clusters."""
    starts, ends = array("Q"), array("Q")
    if isinstance(runs, RunRows):
        offsets, entries = runs.allocated()
        starts.frombytes(offsets.tobytes())
        ends.frombytes((offsets + entries * cluster_size).tobytes())
        return starts, ends
    for run in runs:
        if run.kind == ALLOCATED:
            starts.append(run.offset)
            ends.append(run.offset + run.entries * cluster_size)
    return starts, ends


def _batches(
    entries: Iterable[DirectoryEntry], overlaps: Overlaps, problems: list[Problem]
) -> Iterator[list[DirectoryEntry]]:
    """Yields the entries whose tables are to be read, in batches with about 1 MiB of tables."""
    batch: list[DirectoryEntry] = []
    used = total = 0
    for entry in entries:
        size = ENTRY_LENGTH * entry.bitmap_table_size
        total += size
        if total > MAX_TABLES_BYTES or len(overlaps) > MAX_RANGES:
            reason = (
                f"is not read: the tables before it have {MAX_TABLES_BYTES >> 20} MiB together"
                if total > MAX_TABLES_BYTES
                else f"is not read: the data before it are in {MAX_RANGES} pieces"
            )
            place = entry.bitmap_table_offset
            problems.append(problem("bitmap-table.limit", place, reason, entry.index))
            continue
        if batch and used + size > _BATCH_BYTES:
            yield batch
            batch, used = [], 0
        batch.append(entry)
        used += size
    if batch:
        yield batch


def fingerprint(words: array[int]) -> int:
    """Returns a number that tells a table from other tables, within this process."""
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


class UsedRange(NamedTuple):
    """Host bytes that a bitmap uses, or that the directory uses: then ``bitmap_index`` is None."""

    structure: str
    offset: int
    length: int
    bitmap_index: int | None

    def clusters(self, cluster_size: int) -> tuple[int, int]:
        """The numbers of the clusters in which the bytes lie: the first, and behind the last."""
        return self.offset // cluster_size, ceil_div(self.offset + self.length, cluster_size)


def readable_entries(file: ClusterFile, directory: BitmapDirectory) -> Iterator[DirectoryEntry]:
    """Yields the entries whose tables can be read, up to the limit."""
    left = MAX_TABLES_BYTES
    for entry in () if directory.distrust else directory.entries:
        length = ENTRY_LENGTH * entry.bitmap_table_size
        if length <= left and has_readable_table(entry, file):
            left -= length
            yield entry


def used_by_tables(file: ClusterFile, directory: BitmapDirectory) -> Iterator[UsedRange]:
    """Yields the ranges within the file of the bitmap directory and of all bitmap tables."""
    if not directory.extension or directory.distrust:
        return
    size = file.cluster_size
    yield UsedRange(DIRECTORY, directory.extension.bitmap_directory_offset, directory.size, None)
    for entry in directory.entries:
        start, length = entry.bitmap_table_offset, ENTRY_LENGTH * entry.bitmap_table_size
        is_cut = (
            0 < start + length - file.file_size < size
        )  # the file ends in the last cluster of the table
        is_possible = entry.bitmap_table_size * size <= MAX_BITMAP_BYTES
        if (is_cut and is_possible) or has_readable_table(entry, file):
            yield UsedRange(TABLE, start, length, entry.index)


def used_by_bitmaps(file: ClusterFile, directory: BitmapDirectory) -> Iterator[UsedRange]:
    """Yields every range within the file that a bitmap uses, also a broken, used or stale one.

    Raises:
        StorageError: reading failed.
    """
    yield from used_by_tables(file, directory)
    size = file.cluster_size
    for entry in readable_entries(file, directory):
        for run in table_runs(read_words(file, entry), size):
            inside = min(run.entries, ceil_div(file.file_size - run.offset, size))
            if run.kind == ALLOCATED and inside > 0:
                yield UsedRange(DATA, run.offset, inside * size, entry.index)


def _entry_faults(
    file: ClusterFile, entry: DirectoryEntry, words: array[int], invalid: int
) -> list[Problem]:
    """Returns the faults of single table entries, of which ``invalid`` are invalid."""
    coverage = ceil_div(ceil_div(file.virtual_size, entry.granularity), 8)
    limit = file.file_size - file.cluster_size
    found: list[Problem] = []
    for index in _suspects(words, invalid, limit, file.cluster_size):
        word = words[index]
        place = entry.bitmap_table_offset + ENTRY_LENGTH * index
        offset = word & MASKS.offset
        # QEMU does not read the table of a bitmap that is in_use.
        severity: Severity | None = UNUSABLE if entry.in_use else None
        if word & MASKS.reserved or (offset and word & MASKS.all_ones):
            id, reason = "bitmap-table.entry.reserved", "with reserved bits set"
        elif offset % file.cluster_size:
            id, reason = "bitmap-table.entry.unaligned", "not at the start of a cluster"
        elif offset > limit and offset + _used(index, coverage, file) > file.file_size:
            id = "bitmap-table.entry.past-eof"
            reason = "a cluster that reaches past the end of the file"
            severity = None
        else:
            continue
        if len(found) == MAX_FAULTS_LISTED:
            reason = "is not the last one at fault; no more of this table are listed"
            found.append(
                problem("bitmap-table.entry.more", place, reason, entry.index, None, index)
            )
            break
        reason = f"is {word:#x}, {reason}"
        found.append(problem(id, place, reason, entry.index, severity, index))
    return found


def _suspects(words: array[int], invalid: int, limit: int, cluster_size: int) -> Iterable[int]:
    """Returns the numbers of all entries that may be at fault, of which ``invalid`` are invalid.

    No entry should lead to a host offset above ``limit``.
    """
    if len(words) < _NUMPY_PAYS:
        is_sound = not invalid and max(words) & MASKS.offset <= limit
        return range(0 if is_sound else len(words))
    import numpy as np

    table = np.frombuffer(words, np.uint64)
    is_stray = table & np.uint64(~(MASKS.offset & -cluster_size) & (1 << 64) - 1) != 0
    is_far = table & np.uint64(MASKS.offset) > limit
    numbers: list[int] = np.flatnonzero((table > 1) & (is_stray | is_far)).tolist()
    return numbers


def _used(index: int, coverage: int, file: ClusterFile) -> int:
    """Number of bytes of a cluster that must exist: in the last one only those with bits."""
    used = coverage - index * file.cluster_size
    return used if 0 < used < file.cluster_size else file.cluster_size
