"""Whether a new qcow2 image is whole, and has everything that was to be copied into it.

*Spec*: spec/backup.md, BACKUP-11.
"""

from __future__ import annotations

from qcow2bm.api import open as open_image
from qcow2bm.api.dirty_set import DirtySet
from qcow2bm.errors import StorageError
from qcow2bm.guest.kinds import DataKind


def require_sound(path: str) -> None:
    """Checks the tables and refcounts of a new image.

    An image that was not written to its end has at least leaks, since what is allocated is counted
    before anything leads to it.

    Raises:
        StorageError: there is any fault, or reading failed.
    """
    with open_image(path) as image:
        for found in (*image.problems, *image.check().problems):
            if found.is_serious:
                raise StorageError(path, 0, 0, f"the copy is not whole: {found.message}")


def require_allocated(path: str, dirty: DirtySet) -> None:
    """Checks that a new image has all that is dirty itself, as data or as zeros.

    Raises:
        StorageError: a part of it is missing, or reading failed.
        Qcow2BmError: as ``dirty.extents`` does.
    """
    with open_image(path) as image:
        for part in image.dirty_data_extents(dirty):
            starts, _, is_dirty, kinds = part.T
            missing = starts[(is_dirty == 1) & (kinds == DataKind.UNALLOCATED)]
            if len(missing):
                reason = f"the copy lacks the guest bytes from {int(missing[0]):#x}"
                raise StorageError(path, 0, 0, reason)
