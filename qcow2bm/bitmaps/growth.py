"""How much an image grows if bitmaps are added to it.

*Spec*: spec/measure.md.
"""

from __future__ import annotations

from typing import NamedTuple

from qcow2bm.bitmaps.commit import allocator_of
from qcow2bm.bitmaps.directory import MAX_BITMAPS, MAX_DIRECTORY_SIZE
from qcow2bm.bitmaps.editable import require_editable
from qcow2bm.bitmaps.entries import MAX_NAME_SIZE, required_table_size
from qcow2bm.bitmaps.metadata import Metadata
from qcow2bm.bitmaps.rules import default_granularity, require_granularity
from qcow2bm.clusters.guest_map import GuestMap
from qcow2bm.clusters.header_draft import HeaderDraft
from qcow2bm.errors import BitmapStaleError, LimitError
from qcow2bm.format.bitmap_table import ENTRY_LENGTH
from qcow2bm.format.directory import HEAD_LENGTH
from qcow2bm.format.extensions import BitmapsExtension, build_bitmaps_extension
from qcow2bm.units import align_up, ceil_div


class Growth(NamedTuple):
    """By how many bytes an image grows.

    Attributes:
        directory: the clusters that the bitmap directory has more than before.
        tables: the clusters of new bitmap tables.
        data: the clusters of new bitmap data.
        refcounts: the clusters that the refcount table and the refcount blocks have more.
        file: how much longer the file becomes. The file grows by less than `total` if it has free
            clusters, and by more if a structure is written anew before its old clusters are freed.
    """

    directory: int
    tables: int
    data: int
    refcounts: int
    file: int

    @property
    def total(self) -> int:
        """The clusters that are in use afterwards and were not before."""
        return self.directory + self.tables + self.data + self.refcounts


class Addition(NamedTuple):
    """What it takes to add bitmaps.

    Attributes:
        granularity: of the bitmaps, in guest bytes.
        empty: the growth if the bitmaps are clean.
        full: the growth if every cluster of their bits is stored.
    """

    granularity: int
    empty: Growth
    full: Growth


def measure_addition(
    metadata: Metadata,
    capacity: int | None,
    *,
    count: int,
    granularity: int | None,
    name_size: int,
    virtual_size: int,
) -> Addition:
    """Returns what it takes to add bitmaps in one edit.

    Args:
        metadata: the image as it is.
        capacity: the length in bytes that the storage cannot exceed; None if there is none.
        count: how many bitmaps.
        granularity: in guest bytes; None for the default.
        name_size: the length of each name in bytes.
        virtual_size: the size of the disk in bytes, when they are added.

    Raises:
        BitmapStaleError: the bitmaps of the image are stale.
        FormatError: the image has a fault that forbids an edit, or its refcounts are damaged.
        LimitError: a structure would grow too large.
        NoRoomError: there are too few free clusters, and the storage cannot grow.
        StorageError: reading failed.
        UnsupportedError: the version of qcow2 is 2, the disk has 0 bytes, or the header is laid out
            in a way that cannot be changed safely.
        ValueError: QEMU could not use such a number of bitmaps, granularity, or length of a name.
    """
    file, directory = metadata.file, metadata.directory
    cluster_size = file.cluster_size
    if count < 1:
        raise ValueError(f"count is {count}, must be at least 1")
    if not 0 < name_size <= MAX_NAME_SIZE:
        raise ValueError(f"a name has 1 to {MAX_NAME_SIZE} bytes, not {name_size}")
    if granularity is None:
        granularity = default_granularity(cluster_size)
    require_granularity(granularity, virtual_size)
    require_editable(metadata)
    if directory.extension and not directory.is_consistent:
        name = next((entry.name for entry in directory.entries if entry.name), "")
        reason = "is stale, and no bitmap can be added beside stale ones"
        raise BitmapStaleError(name, reason, "salvage-or-remove-all")
    bitmaps = len(directory.entries) + count
    if bitmaps > MAX_BITMAPS:
        raise LimitError("the number of bitmaps", bitmaps, MAX_BITMAPS)
    size = directory.size + count * (HEAD_LENGTH + align_up(name_size, 8))
    if size > MAX_DIRECTORY_SIZE:
        raise LimitError("the size of the bitmap directory", size, MAX_DIRECTORY_SIZE)

    extension = BitmapsExtension(bitmaps, 0, size, cluster_size)
    _require_room_in_header(metadata, build_bitmaps_extension(extension))

    entries = required_table_size(granularity, virtual_size, cluster_size)
    table = ceil_div(ENTRY_LENGTH * entries, cluster_size)
    new_directory = ceil_div(size, cluster_size)
    more = new_directory - ceil_div(directory.size, cluster_size)
    runs = [*[table] * count, new_directory]
    allocator = allocator_of(metadata, capacity, GuestMap(file))

    def growth(data: int) -> Growth:
        """Returns the growth with so many clusters of bits."""
        need = allocator.need(runs, data)
        return Growth(
            directory=cluster_size * more,
            tables=cluster_size * table * count,
            data=cluster_size * data,
            refcounts=cluster_size * need.refcount_clusters,
            file=max(0, cluster_size * need.end - file.file_size),
        )

    return Addition(granularity, growth(0), growth(entries * count))


def _require_room_in_header(metadata: Metadata, payload: bytes) -> None:
    """Returns if the header can lead to another bitmap directory.

    Raises:
        LimitError: the header area would be too large.
        UnsupportedError: the header is laid out in a way that cannot be changed safely.
    """
    header = HeaderDraft(metadata.file)
    header.clear_unknown_autoclear()
    if metadata.directory.extension:
        header.straighten()
        header.replace(payload)
    else:
        header.insert(payload)
