"""Checking that L1 and L2 tables map every guest offset to the same offset in the data file.

QEMU reads every cluster through its L2 entry, also if the data file is raw. If an entry is missing
or says that the cluster reads as zeros, QEMU ignores what another program writes to the data file
there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from qcow2bm.clusters.file import ClusterFile
from qcow2bm.errors import FormatError, UnsupportedError
from qcow2bm.format.features import INCOMPATIBLE_EXTENDED_L2
from qcow2bm.format.l1_l2 import (
    L1_ENTRY_LENGTH,
    L1_MASKS,
    L2_ENTRY_LENGTH,
    L2_MASKS,
    SUBCLUSTERS_PER_CLUSTER,
)
from qcow2bm.units import ceil_div

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_WORD = ">u8"
_L1_RESERVED = L1_MASKS["reserved_high"] | L1_MASKS["reserved_low"]


def require_identity_map(file: ClusterFile) -> None:
    """Checks that every cluster is plainly allocated, at the host offset that is its guest offset.

    Plainly allocated means: neither compressed nor reading as zeros, with all its subclusters. The
    function reads the L1 table and all L2 tables, one at a time. The caller holds the read lock of
    ``file``.

    Raises:
        UnsupportedError: a cluster is not plainly allocated, or lies at another host offset.
        FormatError: the L1 table is too short, or an entry leads out of the file.
        LimitError: the L1 table lies beyond the end of the file.
        StorageError: reading failed.
    """
    import numpy as np

    size = file.cluster_size
    is_extended = bool(file.header.incompatible_features & INCOMPATIBLE_EXTENDED_L2)
    words = 2 if is_extended else 1
    entries = size // (words * L2_ENTRY_LENGTH)
    clusters = ceil_div(file.virtual_size, size)
    plain = L2_MASKS["copied"] + size * np.arange(entries, dtype=np.uint64)
    for number, offset in enumerate(_l2_tables(file, ceil_div(clusters, entries))):
        first = number * entries
        table = np.frombuffer(file.read(offset, size), _WORD).reshape(entries, words)
        table = table[: clusters - first]
        is_plain = table[:, 0] == plain[: len(table)] + np.uint64(first * size)
        if is_extended:
            is_plain &= _has_all_subclusters(table[:, 1], file.virtual_size - first * size, size)
        if not is_plain.all():
            index = int(is_plain.argmin())
            guest = (first + index) * size
            what = _what_is_wrong(int(table[index, 0]), guest)
            raise _not_plain(f"that at guest offset {guest:#x} {what}")


def _l2_tables(file: ClusterFile, count: int) -> Iterator[int]:
    """Yields the host offsets of the first ``count`` L2 tables."""
    import numpy as np

    header, size = file.header, file.cluster_size
    if header.l1_size < count:
        reason = f"has {header.l1_size} entries, and the disk needs {count}"
        raise FormatError("L1 table", "", header.l1_table_offset, reason)
    data = file.read(header.l1_table_offset, count * L1_ENTRY_LENGTH)
    for number, word in enumerate(np.frombuffer(data, _WORD).tolist()):
        offset = word & L1_MASKS["offset"]
        if not offset:
            raise _not_plain(f"entry {number} of the L1 table is {word:#x}")
        if word & _L1_RESERVED or offset % size or not file.contains(offset, size):
            place = header.l1_table_offset + number * L1_ENTRY_LENGTH
            raise FormatError(
                "L1 table", f"entry {number}", place, f"is {word:#x}, which leads to no L2 table"
            )
        yield offset


def _has_all_subclusters(
    words: NDArray[np.uint64], length: int, cluster_size: int
) -> NDArray[np.bool_]:
    """Whether all subclusters of each cluster are allocated, as far as the disk reaches: bool[n].

    ``words`` are the subcluster words of ``n`` clusters, and the disk has ``length`` bytes from the
    first of these clusters on.
    """
    import numpy as np

    needed = np.full(len(words), (1 << SUBCLUSTERS_PER_CLUSTER) - 1, np.uint64)
    if length < len(words) * cluster_size:  # the disk ends inside the last cluster
        rest = length % cluster_size
        needed[-1] = (1 << ceil_div(rest * SUBCLUSTERS_PER_CLUSTER, cluster_size)) - 1
    mask = needed | needed << np.uint64(SUBCLUSTERS_PER_CLUSTER)
    return np.asarray(words & mask == needed)


def _not_plain(what: str) -> UnsupportedError:
    return UnsupportedError(f"a disk with a cluster that is not plainly allocated: {what}")


def _what_is_wrong(word: int, guest: int) -> str:
    if word & L2_MASKS["compressed"]:
        return "is compressed"
    if word & L2_MASKS["zero"]:
        return "reads as zeros"
    if not word:
        return "is not allocated"
    offset = word & L2_MASKS["offset"]
    if offset != guest:
        return f"is at host offset {offset:#x}"
    if word == L2_MASKS["copied"] + offset:
        return "has subclusters that are not"
    return f"has the L2 entry {word:#x}"
