"""Finding the bitmaps that could be removed to make room for an edit.

*Spec*: spec/edit.md, "Room".
"""

from __future__ import annotations

from typing import NamedTuple

from qcow2bm.bitmaps.commit import allocator_of
from qcow2bm.bitmaps.draft import Draft
from qcow2bm.bitmaps.metadata import Metadata
from qcow2bm.bitmaps.space import space_of
from qcow2bm.clusters.guest_map import GuestMap
from qcow2bm.errors import Hint, LimitError, NoRoomError, Removable
from qcow2bm.units import ceil_div


class Remedy(NamedTuple):
    """What would make room: bitmaps that can be removed one by one, or the hint to remove all."""

    bitmaps: Removable
    hint: Hint | None


NO_REMEDY = Remedy((), None)


def find_remedy(metadata: Metadata, draft: Draft, capacity: int | None) -> Remedy:
    """Returns what would make room for the edit of a draft.

    Only bitmaps count that the draft leaves alone. To remove one of them needs a new directory. If
    there is no room for that, only all bitmaps can be removed.

    In a file whose guest data are too many for an edit to look through, new clusters always lie
    behind the end of the file. So nothing that is removed makes room there.

    Args:
        metadata: the image as it is stored.
        draft: the edit.
        capacity: the length in bytes that the storage cannot exceed; None for a file that cannot
            become longer than it is, because the file system is full, for instance.

    Raises:
        FormatError: the refcounts are damaged.
        StorageError: reading failed.
    """
    file, directory = metadata.file, metadata.directory
    if not directory.entries or not directory.is_consistent:
        return NO_REMEDY
    guest = GuestMap(file)
    if capacity is None and not guest.is_small:
        return NO_REMEDY
    limit = file.file_size if capacity is None else capacity
    try:
        allocator_of(metadata, limit, guest).allocate(
            [ceil_div(directory.size, file.cluster_size)], 0
        )
    except (LimitError, NoRoomError):
        return Remedy((), "remove-all")
    untouched = [bitmap.entry for bitmap in draft.in_order if bitmap.bits is None]
    spaces = [(entry, space_of(metadata, entry)) for entry in untouched if entry]
    found = [(entry.name or "", space.tables + space.data) for entry, space in spaces if space]
    found.sort(key=lambda bitmap: -bitmap[1])
    return Remedy(tuple(found), "remove-bitmap" if found else None)
