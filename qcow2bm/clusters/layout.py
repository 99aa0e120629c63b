"""Which parts of the file the header leads to.

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
    """A range of host bytes, and what it is called in messages."""

    name: str
    offset: int
    length: int


class SnapshotEntry(NamedTuple):
    """Where an entry of the snapshot table is, its size, and that of its extra data."""

    offset: int
    size: int
    extra_data_size: int


def snapshot_entries(file: ClusterFile) -> Iterator[SnapshotEntry]:
    """The entries of the snapshot table, as far as the file has them.

    Raises:
        StorageError: reading failed.
    """
    if not file.header.nb_snapshots:
        return
    from qcow2bm.format import snapshots  # few images have any

    place = file.header.snapshots_offset
    for _ in range(min(file.header.nb_snapshots, MAX_SNAPSHOTS)):
        if not file.contains(place, snapshots.HEAD_LENGTH):
            return
        size, extra = snapshots.measure_entry(file.read(place, snapshots.HEAD_LENGTH))
        yield SnapshotEntry(place, size, extra)
        place += size


def fixed_parts(file: ClusterFile, header_problems: Iterable[Problem]) -> Iterator[Part]:
    """Header, L1 table, refcount table and blocks, snapshot table, encryption header.

    A field that is wrong by itself, by ``header_problems``, says nothing about where anything is.

    Raises:
        StorageError: reading failed.
    """
    header = file.header
    wrong = {name for problem in header_problems for name in (problem.field, problem.structure)}
    yield Part("header", 0, file.cluster_size)
    if not wrong & {"l1_size", "l1_table_offset"}:
        yield Part("L1 table", header.l1_table_offset, 8 * header.l1_size)
    if not wrong & {"refcount_table_clusters", "refcount_table_offset"}:
        length = header.refcount_table_clusters * file.cluster_size
        yield Part("refcount table", header.refcount_table_offset, length)
        yield from _refcount_blocks(file, file.read(header.refcount_table_offset, length))
    if header.snapshots_offset and not wrong & {"nb_snapshots", "snapshots_offset", SNAPSHOT_TABLE}:
        sizes = [entry.size for entry in snapshot_entries(file)]
        if len(sizes) == header.nb_snapshots:
            yield Part("snapshot table", header.snapshots_offset, sum(sizes))
    crypto = file.find(extensions.CRYPTO)
    if crypto and not wrong & {"crypto header", "crypto header length"}:
        place = extensions.parse_crypto_header(crypto.data)
        yield Part("encryption header", place.offset, place.length)


def _refcount_blocks(file: ClusterFile, table: bytes) -> Iterator[Part]:
    if not any(table):
        return
    from qcow2bm.format import refcounts

    for word in refcounts.parse_refcount_table(table):
        if word and word % file.cluster_size == 0 and file.contains(word, file.cluster_size):
            yield Part("refcount blocks", word, file.cluster_size)
