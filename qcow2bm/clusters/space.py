"""Where the used part of an image file ends, and how much before that end is free.

*Spec*: spec/refcounts.md, "Space".
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import NamedTuple

from qcow2bm.clusters.file import ClusterFile
from qcow2bm.clusters.refcounts import Refcounts
from qcow2bm.errors import FormatError, LimitError
from qcow2bm.problems import Problem
from qcow2bm.units import ceil_div

_END_BYTES = 4 << 20
"""The limit for the refcount blocks that are read to find the end. In most images one will do."""

_FIELDS = {"refcount_order", "refcount_table_offset", "refcount_table_clusters"}


class FileSpace(NamedTuple):
    """The used part of an image file, as far as its refcounts say.

    Attributes:
        end: the host offset behind the last cluster of the file whose refcount is not 0. `qemu-img
            check` calls it the image end offset. None if the refcounts are damaged, or if the last
            4 MiB of refcount blocks have nothing but zeros and free clusters were not counted.
        free: how many bytes of clusters before ``end`` have the refcount 0; None if they were not
            counted, or if the refcounts are damaged.
    """

    end: int | None
    free: int | None


def file_space(
    file: ClusterFile, header_problems: Iterable[Problem], *, count_free: bool
) -> FileSpace:
    """Returns the used part of a file; the caller holds the locks of ``file``.

    With ``count_free`` all refcount blocks are read that are no holes, and numpy is loaded.

    Raises:
        StorageError: reading failed.
    """
    if any(found.field in _FIELDS for found in header_problems):
        return FileSpace(None, None)
    try:
        refcounts = Refcounts(file)
        blocks = _Blocks(refcounts, file, skip_holes=count_free)
        end = blocks.end(None if count_free else _END_BYTES)
        used = blocks.count_used() if count_free else None
    except (FormatError, LimitError):
        return FileSpace(None, None)
    free = None if end is None or used is None else end - used
    size = file.cluster_size
    return FileSpace(end and end * size, free and free * size)


class _Blocks:
    """The refcount blocks that count clusters of the file.

    Several entries of the refcount table may lead to one block, by mistake. What is known of it is
    not found out again.
    """

    def __init__(self, refcounts: Refcounts, file: ClusterFile, *, skip_holes: bool) -> None:
        """With ``skip_holes``, blocks that are holes of the file are left out."""
        self._refcounts = refcounts
        self._clusters = ceil_div(file.file_size, file.cluster_size)
        self._block_bytes = file.cluster_size
        blocks = refcounts.stored_blocks() if skip_holes else refcounts.blocks()
        self._indexes = [n for n in blocks if n * refcounts.per_block < self._clusters]

    def _read(self, index: int) -> array[int]:
        """Returns the refcounts that a block has of clusters of the file."""
        return self._refcounts.read_block(index)[: self._clusters - self._first(index)]

    def _first(self, index: int) -> int:
        return index * self._refcounts.per_block

    def _is_whole(self, index: int) -> bool:
        """Whether all clusters that a block counts are in the file."""
        return self._first(index + 1) <= self._clusters

    def end(self, limit_bytes: int | None) -> int | None:
        """Returns the number of the cluster behind the last one in use.

        None if ``limit_bytes`` of refcount blocks have been read, and have nothing but zeros.
        """
        zeroes: set[int] = set()  # the host offsets of blocks
        for index in reversed(self._indexes):
            place = self._refcounts.place(index)
            if place in zeroes:
                continue
            block = self._read(index)
            if data := block.tobytes().rstrip(b"\0"):
                return self._first(index) + ceil_div(len(data), block.itemsize)
            if self._is_whole(index):
                zeroes.add(place)
            if limit_bytes is not None and self._block_bytes * len(zeroes) >= limit_bytes:
                return None
        return 0

    def count_used(self) -> int:
        """Returns how many clusters are in use."""
        import numpy as np

        counts: dict[int, int] = {}  # of whole blocks, by host offset
        total = 0
        for index in self._indexes:
            place = self._refcounts.place(index)
            if place not in counts or not self._is_whole(index):
                counts[place] = int(np.count_nonzero(self._read(index)))
            total += counts[place]
        return total
