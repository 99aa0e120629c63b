"""The layout of an image file: the ranges of the structures that the header leads to.

The ranges of bitmap structures are found in ``bitmaps/``.

*Spec*: spec/header.md and spec/refcounts.md.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from qcow2bm.clusters.file import ClusterFile
from qcow2bm.errors import FormatError, LimitError
from qcow2bm.format import extensions
from qcow2bm.format.header import MAX_SNAPSHOTS
from qcow2bm.problems import SNAPSHOT_TABLE, Problem
from qcow2bm.units import align_up, decode_name

_WINDOW_BYTES = 4096
"""The bytes of the snapshot table that are read at once."""


class Part(NamedTuple):
    """A range of host bytes that belongs to a structure; ``name`` is the structure in messages."""

    name: str
    offset: int
    length: int


class SnapshotEntry(NamedTuple):
    """A snapshot table entry: its host offset and sizes in bytes, and the place of its L1 table."""

    offset: int
    size: int
    padding_size: int
    extra_data_size: int
    l1_table_offset: int
    l1_size: int


def snapshot_entries(file: ClusterFile) -> Iterator[SnapshotEntry]:
    """Yields the entries of the snapshot table, up to the end of the file.

    Raises:
        StorageError: reading failed.
    """
    if not file.header.nb_snapshots:
        return
    from qcow2bm.format import snapshots  # loaded here, because few images have snapshots

    place = file.header.snapshots_offset
    window, start = b"", place
    for _ in range(min(file.header.nb_snapshots, MAX_SNAPSHOTS)):
        if not file.contains(place, snapshots.HEAD_LENGTH):
            return
        if place + snapshots.HEAD_LENGTH > start + len(window):
            left = align_up(file.file_size, file.cluster_size) - place
            window, start = file.read(place, min(left, _WINDOW_BYTES)), place
        head = window[place - start : place - start + snapshots.HEAD_LENGTH]
        measure = snapshots.measure_entry(head)
        yield SnapshotEntry(place, *measure)
        place += measure.size


class Snapshot(NamedTuple):
    """An internal snapshot, as its entry in the snapshot table says.

    Attributes:
        offset: the host offset of the entry.
        size: the length of the entry in bytes.
        id: the id, which QEMU gives; bytes that are not UTF-8 are surrogates (PEP 383).
        name: the name, likewise.
        l1_table_offset: the host offset of the L1 table.
        l1_size: the number of entries of the L1 table.
        date_sec: when the snapshot was taken, in seconds since 1970.
        date_nsec: the nanoseconds of that.
        vm_clock_nsec: how long the guest had been running, in nanoseconds.
        vm_state_size: the size of the VM state in bytes; 0 if the snapshot has none.
        disk_size: the size of the disk in bytes; None if the entry does not have it.
        icount: how many instructions the guest had executed; None if they were not counted.
    """

    offset: int
    size: int
    id: str
    name: str
    l1_table_offset: int
    l1_size: int
    date_sec: int
    date_nsec: int
    vm_clock_nsec: int
    vm_state_size: int
    disk_size: int | None
    icount: int | None


def read_snapshots(file: ClusterFile) -> tuple[Snapshot, ...]:
    """Returns the entries of the snapshot table; the caller holds the locks of ``file``.

    Raises:
        FormatError: the table is not whole, or an entry has more extra data than it can have.
        LimitError: the table is larger than 64 MiB, or reaches past the end of the file.
        StorageError: reading failed.
    """
    if not file.header.nb_snapshots:
        return ()
    from qcow2bm.format import snapshots

    start, count = file.header.snapshots_offset, file.header.nb_snapshots
    places = list(snapshot_entries(file))
    length = sum(place.size for place in places)
    if length > snapshots.MAX_TABLE_SIZE:
        raise LimitError("the size of the snapshot table", length, snapshots.MAX_TABLE_SIZE)
    entries = snapshots.parse_snapshot_table(file.read(start, length), count, start)
    if start + length - len(entries[-1].padding) > file.file_size:
        raise FormatError(SNAPSHOT_TABLE, "", start, "reaches past the end of the file")
    found = []
    for place, entry in zip(places, entries, strict=True):
        extra = entry.extra_fields
        icount = extra.get("icount", snapshots.NO_ICOUNT)
        found.append(
            Snapshot(
                place.offset,
                place.size,
                decode_name(entry.id_str),
                decode_name(entry.name),
                entry.l1_table_offset,
                entry.l1_size,
                entry.date_sec,
                entry.date_nsec,
                entry.vm_clock_nsec,
                extra.get("vm_state_size", entry.vm_state_size),
                extra.get("disk_size"),
                None if icount == snapshots.NO_ICOUNT else icount,
            )
        )
    return tuple(found)


def fixed_parts(file: ClusterFile, header_problems: Iterable[Problem]) -> Iterator[Part]:
    """Yields header, L1 table, refcount table and blocks, snapshot table and encryption header.

    If ``header_problems`` has a problem with the size of a structure, only its first cluster is
    yielded. If the offset of a structure cannot be right, the structure is left out.

    Raises:
        StorageError: reading failed.
    """
    wrong = _wrong(header_problems)
    yield from _first_parts(file, wrong)
    for place in _refcount_blocks(file, wrong):
        yield Part("refcount blocks", place, file.cluster_size)
    yield from _last_parts(file, wrong)


def parts_and_blocks(
    file: ClusterFile, header_problems: Iterable[Problem]
) -> tuple[list[Part], array[int]]:
    """Returns what `fixed_parts` yields, and the refcount blocks apart, by their host offsets.

    There can be a million blocks, uint64[n]; they are in the order of the refcount table.

    Raises:
        StorageError: reading failed.
    """
    wrong = _wrong(header_problems)
    parts = [*_first_parts(file, wrong), *_last_parts(file, wrong)]
    return parts, _refcount_blocks(file, wrong)


def _wrong(header_problems: Iterable[Problem]) -> set[str]:
    """Returns the names of the header fields and structures that have a problem."""
    return {name for problem in header_problems for name in (problem.field, problem.structure)}


def _first_parts(file: ClusterFile, wrong: set[str]) -> Iterator[Part]:
    header, cluster_size = file.header, file.cluster_size
    yield Part("header", 0, cluster_size)
    if _is_place(file, header.l1_table_offset):
        is_sized = not wrong & {"l1_size", "l1_table_offset"}
        length = 8 * header.l1_size if is_sized else cluster_size
        yield Part("L1 table", header.l1_table_offset, length)
    if length := _refcount_table_length(file, wrong):
        yield Part("refcount table", header.refcount_table_offset, length)


def _last_parts(file: ClusterFile, wrong: set[str]) -> Iterator[Part]:
    header, cluster_size = file.header, file.cluster_size
    if header.nb_snapshots and _is_place(file, header.snapshots_offset):
        sizes = [entry.size for entry in snapshot_entries(file)]
        is_sized = len(sizes) == header.nb_snapshots and SNAPSHOT_TABLE not in wrong
        yield Part(
            "snapshot table", header.snapshots_offset, sum(sizes) if is_sized else cluster_size
        )
    crypto = file.find(extensions.CRYPTO)
    if crypto and not wrong & {"crypto header", "crypto header length"}:
        place = extensions.parse_crypto_header(crypto.data)
        yield Part("encryption header", place.offset, place.length)


def _refcount_blocks(file: ClusterFile, wrong: set[str]) -> array[int]:
    """Returns the host offsets of the refcount blocks that lie in the file, uint64[n]."""
    length = _refcount_table_length(file, wrong)
    data = file.read(file.header.refcount_table_offset, length) if length else b""
    if not data.strip(b"\0"):
        return array("Q")
    from qcow2bm.format import refcounts

    unaligned = file.cluster_size - 1
    end = align_up(file.file_size, file.cluster_size)
    words = refcounts.parse_refcount_table(data)
    return array("Q", (word for word in words if word and not word & unaligned and word < end))


def _refcount_table_length(file: ClusterFile, wrong: set[str]) -> int:
    """Returns the length of the refcount table in bytes, as far as it counts; 0 if it does not."""
    header = file.header
    if not _is_place(file, header.refcount_table_offset):
        return 0
    is_sized = not wrong & {"refcount_table_clusters", "refcount_table_offset"}
    return file.cluster_size * (header.refcount_table_clusters if is_sized else 1)


def _is_place(file: ClusterFile, offset: int) -> bool:
    return offset > 0 and offset % file.cluster_size == 0 and offset < file.file_size
