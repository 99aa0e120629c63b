"""What a backup is to do, found out before anything is written.

*Spec*: spec/backup.md.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from qcow2bm.bitmaps.backup_verdict import MISSING, BackupReason
from qcow2bm.bitmaps.status import BROKEN, INCONSISTENT, STALE
from qcow2bm.compare import Identity, identity
from qcow2bm.errors import (
    BitmapBrokenError,
    BitmapError,
    BitmapInconsistentError,
    BitmapNotFoundError,
    BitmapStaleError,
    StorageError,
)
from qcow2bm.storage.new_file import require_absent
from qcow2bm.units import escape

if TYPE_CHECKING:
    from qcow2bm.api import Bitmap, Edit, Image
    from qcow2bm.clusters.plan import Plan

Then = Literal["clear", "rotate", "keep"]
"""What is done with the bitmap once the backup is complete."""

_ERRORS: dict[BackupReason, type[BitmapError]] = {
    INCONSISTENT: BitmapInconsistentError,
    STALE: BitmapStaleError,
    BROKEN: BitmapBrokenError,
    MISSING: BitmapNotFoundError,
}


@dataclass(frozen=True)
class PlannedBackup:
    """A backup that is possible; `plan_backup` makes it, and `back_up` does it.

    Attributes:
        image: the image; `back_up` needs it open for editing.
        name: the bitmap.
        target: the path of the new image.
        base: the path of the backup on which the new image lies; None for a full backup.
        dirty: the bitmap, whose dirty part is copied; None for a full backup.
        then: what is done with the bitmap afterwards.
        new: the bitmap that records from then on, if ``then`` is "rotate".
        total_bytes: how many guest bytes are dirty; of a full backup, the size of the disk.
        edit: what the change of the bitmap writes to the image as it is now.
    """

    image: Image
    name: str
    target: str
    base: str | None
    dirty: Bitmap | None
    then: Then
    new: str | None
    total_bytes: int
    edit: Plan

    def advance(self, edit: Edit) -> None:
        """Does to the bitmap what ``then`` says; raises as the operations of an edit do."""
        _advance(self.image, edit, self.name, self.then, self.new)


def plan_backup(
    image: Image,
    name: str,
    target: str,
    *,
    base: str | None = None,
    then: Then = "clear",
    new: str | None = None,
) -> PlannedBackup:
    """Finds out whether a backup is possible. Nothing is written.

    Args:
        image: the image, open for reading or for editing. Its machine is off.
        name: the bitmap that has what was written since the backup ``base`` was taken.
        target: the path of the image that is to be made.
        base: the path of the last backup, a qcow2 image, for an incremental backup; None for a full
            backup, for which the state of the bitmap does not matter.
        then: what is to be done with the bitmap once the backup is complete. "clear": the bitmap
            becomes clean and records; after a full backup also if it was inconsistent, stale,
            disabled or missing. "rotate": the bitmap is disabled, and the new bitmap ``new``, of
            the same granularity, records. "keep": nothing, so that the next backup on ``base`` has
            everything again.
        new: the name of the new bitmap, with "rotate" only.

    Raises:
        BitmapError: an incremental backup cannot use the bitmap; or an edit cannot do what ``then``
            says.
        StorageError: ``target`` exists, or an incomplete one is left from earlier; or ``base`` is
            the image itself, or missing.
        Qcow2BmError: the image cannot be read, or not be edited.
        ValueError: ``new`` is missing with "rotate", or given without it.
    """
    if (then == "rotate") != (new is not None):
        raise ValueError('a name for the new bitmap goes together with then="rotate"')
    require_absent(target)
    total, dirty = image.virtual_size, None
    if base is not None:
        _require_other_file(image, base)
        total, dirty = _usable_bytes(image, name), image.bitmaps[name]
    with image.edit(dry_run=True) as edit:
        _advance(image, edit, name, then, new)
        plan = edit.plan()
    return PlannedBackup(image, name, target, base, dirty, then, new, total, plan)


def _require_other_file(image: Image, base: str) -> None:
    if _identity(image.name) == _identity(base):
        raise StorageError(base, 0, 0, "is the disk itself: give the last backup of the disk")


def _identity(path: str) -> Identity:
    try:
        return identity(os.stat(path))
    except OSError as error:
        raise StorageError.from_os(error, path, 0, 0) from error


def _usable_bytes(image: Image, name: str) -> int:
    """Returns how much is dirty; raises what keeps an incremental backup from using the bitmap."""
    verdict = image.verdict(name)
    if verdict.dirty_bytes is None or not verdict.usable:
        error = _ERRORS.get(verdict.reason, BitmapError)
        reason = verdict.message.removeprefix(f'bitmap "{escape(name)}" ')
        raise error(name, reason, "full-backup")
    return verdict.dirty_bytes


def _advance(image: Image, edit: Edit, name: str, then: Then, new: str | None) -> None:
    if then == "clear":
        if name not in image.bitmaps:
            edit.add(name)
        elif image.bitmaps[name].status in (INCONSISTENT, STALE):
            edit.salvage(name)  # valid, and all dirty for the moment
        edit.clear(name)
        edit.enable(name)
    elif new is not None:
        granularity = image.bitmaps[name].granularity
        edit.disable(name)
        edit.add(new, granularity)
