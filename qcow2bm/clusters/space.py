"""Where the used part of an image file ends, and how much before that end is free.

*Spec*: spec/refcounts.md, "Space".
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
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

    With ``count_free`` all refcount blocks are read, and numpy is loaded.

    Raises:
        StorageError: reading failed.
    """
    if any(found.field in _FIELDS for found in header_problems):
        return FileSpace(None, None)
    try:
        refcounts = Refcounts(file)
        end = _end(refcounts, file, None if count_free else _END_BYTES)
        used = _used(refcounts, file) if count_free else None
    except (FormatError, LimitError):
        return FileSpace(None, None)
    free = None if end is None or used is None else end - used
    size = file.cluster_size
    return FileSpace(end and end * size, free and free * size)


def _blocks(refcounts: Refcounts, file: ClusterFile) -> Iterator[tuple[int, array[int]]]:
    """Yields the refcounts of the file's clusters by blocks, the last block first.

    With each block comes the number of its first cluster.
    """
    clusters = ceil_div(file.file_size, file.cluster_size)
    for index in reversed(refcounts.blocks()):
        first = index * refcounts.per_block
        if first < clusters:
            yield first, refcounts.read_block(index)[: clusters - first]


def _end(refcounts: Refcounts, file: ClusterFile, limit_bytes: int | None) -> int | None:
    """Returns the number of the cluster behind the last one in use.

    None if ``limit_bytes`` of refcount blocks have been read, and have nothing but zeros.
    """
    done = 0
    for first, block in _blocks(refcounts, file):
        if data := block.tobytes().rstrip(b"\0"):
            return first + ceil_div(len(data), block.itemsize)
        done += file.cluster_size
        if limit_bytes is not None and done >= limit_bytes:
            return None
    return 0


def _used(refcounts: Refcounts, file: ClusterFile) -> int:
    """Returns how many clusters are in use."""
    import numpy as np

    return sum(int(np.count_nonzero(block)) for _, block in _blocks(refcounts, file))
