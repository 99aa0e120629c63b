"""How much of the image file bitmaps take, and how much they can take.

*Spec*: spec/bitmaps.md, "Space".
"""

from __future__ import annotations

from array import array
from typing import NamedTuple

from qcow2bm.bitmaps.entries import (
    MAX_GRANULARITY_BITS,
    MIN_GRANULARITY_BITS,
    required_table_size,
)
from qcow2bm.bitmaps.metadata import Metadata
from qcow2bm.bitmaps.rules import require_granularity
from qcow2bm.format.bitmap_table import ENTRY_LENGTH, MASKS
from qcow2bm.format.directory import DirectoryEntry
from qcow2bm.units import align_up


class BitmapSpace(NamedTuple):
    """How many bytes of the image file one bitmap takes, or all bitmaps together.

    Attributes:
        directory: of one bitmap, the length of its directory entry; of all bitmaps, the clusters of
            the directory.
        tables: the clusters of bitmap tables.
        data: the clusters of bitmap data.
    """

    directory: int
    tables: int
    data: int

    @property
    def total(self) -> int:
        """The sum."""
        return sum(self)


def space_of(metadata: Metadata, entry: DirectoryEntry) -> BitmapSpace | None:
    """Returns the space of one bitmap; None if its table was not read.

    Raises:
        StorageError: reading failed; and as `Metadata.survey` does.
    """
    table = metadata.survey.tables[entry.index]
    if not table:
        return None
    size = metadata.file.cluster_size
    tables = align_up(ENTRY_LENGTH * entry.bitmap_table_size, size)
    return BitmapSpace(entry.size, tables, size * table.clusters.allocated)


def space_of_all(metadata: Metadata) -> BitmapSpace | None:
    """Returns the space of all bitmaps together; None if that of one bitmap is not known.

    Raises:
        StorageError: reading failed; and as `Metadata.survey` does.
    """
    directory = metadata.directory
    found = [space_of(metadata, entry) for entry in directory.entries]
    known = [space for space in found if space]
    if len(known) < len(found) or (directory.extension and not found):
        return None
    clusters = align_up(directory.size, metadata.file.cluster_size)
    return BitmapSpace(clusters, sum(s.tables for s in known), sum(s.data for s in known))


def full_space(entry: DirectoryEntry, virtual_size: int, cluster_size: int) -> BitmapSpace | None:
    """Returns the space of a bitmap of which every cluster of bits is stored.

    None if QEMU could not use the granularity of the bitmap. Sizes are in bytes.

    Raises:
        LimitError: the bitmap would have more bits than QEMU allows.
        UnsupportedError: the disk has 0 bytes.
    """
    if not MIN_GRANULARITY_BITS <= entry.granularity_bits <= MAX_GRANULARITY_BITS:
        return None
    require_granularity(entry.granularity, virtual_size)
    entries = required_table_size(entry.granularity, virtual_size, cluster_size)
    tables = align_up(ENTRY_LENGTH * entries, cluster_size)
    return BitmapSpace(entry.size, tables, entries * cluster_size)


def kept_space(full: BitmapSpace, words: array[int], cluster_size: int) -> BitmapSpace:
    """Returns the space of a bitmap that keeps those clusters of its bits that lie on the disk.

    Args:
        full: the space if all clusters of the bits that lie on the disk were stored.
        words: the bitmap table as it is, uint64[n].
        cluster_size: in bytes.
    """
    on_disk = words[: full.data // cluster_size]
    return full._replace(data=cluster_size * sum(1 for word in on_disk if word & MASKS.offset))
