"""The layout of an image file: the ranges of the structures that the header leads to.

The ranges of bitmap structures are found in ``bitmaps/``.

*Spec*: spec/header.md and spec/refcounts.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from qcow2bm.clusters.file import ClusterFile
from qcow2bm.format import extensions
from qcow2bm.format.header import MAX_SNAPSHOTS
from qcow2bm.problems import SNAPSHOT_TABLE, Problem


class Part(NamedTuple):
    """A range of host bytes that belongs to a structure; ``name`` is the structure in messages."""

    name: str
    offset: int
    length: int


class SnapshotEntry(NamedTuple):
    """A snapshot table entry: its host offset and sizes in bytes, and the place of its L1 table."""

    offset: int
    size: int
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
    for _ in range(min(file.header.nb_snapshots, MAX_SNAPSHOTS)):
        if not file.contains(place, snapshots.HEAD_LENGTH):
            return
        measure = snapshots.measure_entry(file.read(place, snapshots.HEAD_LENGTH))
        yield SnapshotEntry(place, *measure)
        place += measure.size


def fixed_parts(file: ClusterFile, header_problems: Iterable[Problem]) -> Iterator[Part]:
    """Yields header, L1 table, refcount table and blocks, snapshot table and encryption header.

    If ``header_problems`` has a problem with the size of a structure, only its first cluster is
    yielded. If the offset of a structure cannot be right, the structure is left out.

    Raises:
        StorageError: reading failed.
    """
    header, cluster_size = file.header, file.cluster_size
    wrong = {name for problem in header_problems for name in (problem.field, problem.structure)}
    yield Part("header", 0, cluster_size)
    if _is_place(file, header.l1_table_offset):
        is_sized = not wrong & {"l1_size", "l1_table_offset"}
        length = 8 * header.l1_size if is_sized else cluster_size
        yield Part("L1 table", header.l1_table_offset, length)
    if _is_place(file, header.refcount_table_offset):
        is_sized = not wrong & {"refcount_table_clusters", "refcount_table_offset"}
        length = cluster_size * (header.refcount_table_clusters if is_sized else 1)
        yield Part("refcount table", header.refcount_table_offset, length)
        yield from _refcount_blocks(file, file.read(header.refcount_table_offset, length))
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


def _is_place(file: ClusterFile, offset: int) -> bool:
    return offset > 0 and offset % file.cluster_size == 0 and offset < file.file_size


def _refcount_blocks(file: ClusterFile, table: bytes) -> Iterator[Part]:
    if not any(table):
        return
    from qcow2bm.format import refcounts

    for word in refcounts.parse_refcount_table(table):
        if word and word % file.cluster_size == 0 and file.contains(word, file.cluster_size):
            yield Part("refcount blocks", word, file.cluster_size)
