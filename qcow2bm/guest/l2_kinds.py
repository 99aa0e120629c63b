"""Entries of L2 tables: which kind of range each of them stands for, and what is wrong with them.

*Spec*: spec/data.md, "Entries".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from qcow2bm.clusters.file import ClusterFile
from qcow2bm.format.features import INCOMPATIBLE_DATA_FILE, INCOMPATIBLE_EXTENDED_L2
from qcow2bm.format.l1_l2 import (
    L2_ENTRY_LENGTH,
    L2_MASKS,
    SUBCLUSTER_MASKS,
    SUBCLUSTERS_PER_CLUSTER,
    compressed_extent,
)
from qcow2bm.guest.kinds import DataKind

Words = NDArray[np.uint64]
Flags = NDArray[np.bool_]
Numbers = NDArray[np.int64]
Kinds = NDArray[np.uint8]
"""Values of `DataKind`."""

_MASKS = {name: np.uint64(mask) for name, mask in L2_MASKS.items()}
_ALLOCATED = np.uint64(SUBCLUSTER_MASKS["allocated"])
_BITMAP_OF_ZEROS = np.uint64(SUBCLUSTERS_PER_CLUSTER)  # the shift to it


class EntryFault(NamedTuple):
    """What is wrong with an entry, by its number among those that were read."""

    entry: int
    reason: str


class L2Kinds:
    """The kinds of the entries of the L2 tables of an image.

    Attributes:
        entry_length: the length of an entry in bytes.
        units: how many ranges of the disk an entry stands for: one, or its subclusters.
        unit_size: the length of such a range in guest bytes.
    """

    def __init__(self, file: ClusterFile) -> None:
        """Takes from the header how entries are to be read."""
        features = file.header.incompatible_features
        self._is_extended = bool(features & INCOMPATIBLE_EXTENDED_L2)
        self._has_data_file = bool(features & INCOMPATIBLE_DATA_FILE)
        self._bits = file.header.cluster_bits
        self._file_size = file.file_size
        self.entry_length = L2_ENTRY_LENGTH * (2 if self._is_extended else 1)
        self.units = SUBCLUSTERS_PER_CLUSTER if self._is_extended else 1
        self.unit_size = file.cluster_size // self.units
        self._reserved = _MASKS["reserved_high"] | _MASKS["reserved_low"]
        if self._is_extended or file.header.version == 2:
            self._reserved |= _MASKS["zero"]

    def used(self, data: bytearray) -> Numbers:
        """Returns which entries are not all zeros, int64[n]; all others are unallocated."""
        words = np.frombuffer(data, np.uint64)  # in whatever order of bytes
        if not self._is_extended:
            return np.flatnonzero(words)
        return np.flatnonzero(words[::2] | words[1::2])

    def of(
        self, data: bytearray, used: Numbers, clusters: Numbers
    ) -> tuple[Kinds, EntryFault | None]:
        """Returns the kinds of the units of some entries, uint8[n * units].

        Also returns what is wrong with the first of these entries that has a fault, or None.

        Args:
            data: entries as they are stored.
            used: the numbers of the entries in question among them, int64[n].
            clusters: the number of the cluster of the disk of each, int64[n].
        """
        words = np.frombuffer(data, ">u8").reshape(-1, self.entry_length // L2_ENTRY_LENGTH)
        words = words[used].astype(np.uint64)
        entries = words[:, 0]
        is_compressed = entries & _MASKS["compressed"] != 0
        is_zero = entries & _MASKS["zero"] != 0
        # Of a compressed cluster, the bits that are the offset and reserved have other meanings.
        plain = np.where(is_compressed, np.uint64(0), entries)
        offsets = (plain & _MASKS["offset"]).astype(np.int64)
        has_cluster = offsets != 0
        if self._has_data_file:
            has_cluster |= (plain & _MASKS["copied"] != 0) & ~is_zero
        starts = clusters << self._bits
        faults = list(self._faults(entries, is_compressed, plain, offsets, has_cluster, starts))
        if self._is_extended:
            impossible = impossible_subclusters(words[:, 1], is_compressed, has_cluster)
            faults += _first(impossible, "has subclusters that cannot be")
            kinds = self._subclusters(words[:, 1], is_compressed)
        else:
            kinds = np.where(has_cluster, np.uint8(DataKind.DATA), np.uint8(DataKind.UNALLOCATED))
            kinds[is_zero] = DataKind.ZERO
            kinds[is_compressed] = DataKind.COMPRESSED
        first = min(faults, default=None, key=lambda fault: fault.entry)
        return kinds, first and first._replace(entry=int(used[first.entry]))

    def _subclusters(self, bitmaps: Words, is_compressed: Flags) -> Kinds:
        """The kinds of the subclusters of extended entries without faults."""
        octets = bitmaps.astype("<u8").view(np.uint8).reshape(-1, 8)
        bits = np.unpackbits(octets, axis=1, bitorder="little")
        allocated, zero = np.split(bits, 2, axis=1)
        kinds: Kinds = allocated * np.uint8(DataKind.DATA) + zero * np.uint8(DataKind.ZERO)
        kinds[is_compressed] = DataKind.COMPRESSED
        return kinds.ravel()

    def _faults(
        self,
        entries: Words,
        is_compressed: Flags,
        plain: Words,
        offsets: Numbers,
        has_cluster: Flags,
        starts: Numbers,
    ) -> Iterator[EntryFault]:
        """Yields the first entry that has each fault."""
        yield from _first(plain & self._reserved != 0, "has reserved bits set")
        is_unaligned = offsets & ((1 << self._bits) - 1) != 0
        yield from _first(is_unaligned, "leads to no start of a cluster")
        if self._has_data_file:
            yield from _first(is_compressed, "is compressed, beside a data file")
            reason = "leads to another offset of the data file than that of the disk"
            yield from _first(has_cluster & (offsets != starts), reason)
            return
        is_outside = offsets >= max(self._file_size, 1)
        if is_compressed.any():
            _, ends = compressed_extent(entries, self._bits)
            reach = ends.astype(np.int64) - self._file_size
            is_outside |= is_compressed & (reach >= 1 << self._bits)
        yield from _first(is_outside, "leads past the end of the file")


def impossible_subclusters(bitmaps: Words, is_compressed: Flags, has_cluster: Flags) -> Flags:
    """Returns which extended entries have subclusters that cannot be, bool[n].

    Subclusters cannot be both allocated and zero, or allocated without a cluster. A compressed
    cluster has none.

    Args:
        bitmaps: the second words of the entries, uint64[n].
        is_compressed: which entries are of compressed clusters, bool[n].
        has_cluster: which of the other entries lead to a cluster, bool[n].
    """
    allocated = bitmaps & _ALLOCATED
    is_both = allocated & (bitmaps >> _BITMAP_OF_ZEROS) != 0
    is_impossible: Flags = np.where(
        is_compressed, bitmaps != 0, is_both | (~has_cluster & (allocated != 0))
    )
    return is_impossible


def _first(is_wrong: Flags, reason: str) -> list[EntryFault]:
    """The first entry that is wrong, if one is."""
    return [EntryFault(int(is_wrong.argmax()), reason)] if is_wrong.any() else []
