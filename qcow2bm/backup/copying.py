"""Takes a backup: QEMU copies, the copy is checked, and only then the bitmap changes.

*Spec*: spec/backup.md.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

from qcow2bm import compare
from qcow2bm.api import Image
from qcow2bm.backup.allocation import require_allocated, require_sound
from qcow2bm.backup.daemon import StorageDaemon, file_node, storage_daemon
from qcow2bm.backup.planning import PlannedBackup
from qcow2bm.bitmaps.backup_verdict import USABLE
from qcow2bm.errors import StorageError
from qcow2bm.storage.new_file import incomplete_file

Progress = Callable[[int], None]
"""Is called with each further number of bytes that were copied."""


class Backup(NamedTuple):
    """What a backup did.

    Attributes:
        copied_bytes: how many guest bytes QEMU went through: what was dirty, or the whole disk,
            widened to clusters of the new image. What is zero there takes no room.
        extents: how many dirty extents the backup has; None for a full backup.
        seconds: how long the copying and the checking took.
        recording: the bitmap that has all writes from now on; None if there is none, after "keep".
    """

    copied_bytes: int
    extents: int | None
    seconds: float
    recording: str | None


def back_up(
    planned: PlannedBackup, *, verify: bool = False, progress: Progress | None = None
) -> Backup:
    """Takes a backup.

    *Guarantees*: the target has its name only when it is complete and durable, and the bitmap
    changes after that, in one edit. If anything fails before, or this process is killed, the image
    is as before, and there is no file with the name of the target. The locks of the image are held
    all the time, so no other process writes to the disk meanwhile.

    A coroutine calls this by `asyncio.to_thread`: the thread must not have a running event loop.

    Args:
        planned: what `plan_backup` returned for an image that is open for editing.
        verify: compare the whole content of the disk with what the target restores to.
        progress: is called now and then.

    Raises:
        CommitError: the target is complete, but the bitmap could not be changed.
        ReadOnlyImageError: the image is open for reading only.
        StateError: the image was edited since the backup was planned.
        UnsupportedError: a program of QEMU, or the package qemu.qmp, is not installed.
        QmpError: qemu-storage-daemon failed.
        StorageError: a file cannot be opened, read or written; or the target is not a true copy.
        Qcow2BmError: as an edit raises.
    """
    image = planned.image
    image.edit()  # raises if the image is open for reading only, before anything is made
    dirty = planned.dirty  # which raises if the bitmap has changed
    extents = None if dirty is None else dirty.totals().extents
    started = time.monotonic()
    with incomplete_file(planned.target) as part:
        with storage_daemon() as daemon:
            copied = _copy(daemon, planned, part, progress)
        require_sound(part)
        if dirty is not None:
            require_allocated(part, dirty)
        if verify:
            _verify(image, part)
    seconds = time.monotonic() - started
    with image.edit() as edit:
        planned.advance(edit)
    return Backup(copied, extents, seconds, _recording(planned))


def _copy(
    daemon: StorageDaemon, planned: PlannedBackup, part: str, progress: Progress | None
) -> int:
    """Has QEMU make the target and copy into it; returns how many bytes QEMU went through."""
    reported = 0

    def report(done: int) -> None:
        nonlocal reported
        if progress and done > reported:
            progress(done - reported)
            reported = done

    image, base = planned.image, planned.base
    file = {**file_node(image.name), "locking": "off"}  # this process holds the locks of a writer
    daemon.add_node("disk", image.name, {"driver": "qcow2", "read-only": True, "file": file})
    new: dict[str, Any] = {"driver": "qcow2", "file": "file", "size": image.virtual_size}
    if base is not None:
        options = {"driver": "qcow2", "read-only": True, "file": file_node(base)}
        before = daemon.files()
        daemon.add_node("base", base, options)
        if image.has_data_file:  # whose name may be that of a file of the base
            _require_other_files(before, daemon.files(), base)
        new |= {"backing-file": _backing_name(base, part), "backing-fmt": "qcow2"}
    daemon.add_node("file", part, file_node(part))
    daemon.run_job("blockdev-create", {"options": new}, part)
    backing = None if base is None else "base"
    daemon.add_node("target", part, {"driver": "qcow2", "file": "file", "backing": backing})
    what: dict[str, Any] = {"sync": "full"}
    if base is not None:
        what = {"sync": "bitmap", "bitmap": planned.name, "bitmap-mode": "never"}
    nodes = {"device": "disk", "target": "target", "auto-dismiss": False}
    copied = daemon.run_job("blockdev-backup", {**nodes, **what}, part, report)
    daemon.execute("blockdev-del", {"node-name": "target"})
    daemon.quit()
    return copied


def _require_other_files(
    of_disk: dict[int, compare.Identity], opened: dict[int, compare.Identity], base: str
) -> None:
    """Raises `StorageError` if the base has a file of the disk, and so changes with the disk.

    ``of_disk`` are the open files before the base was opened, by their descriptors, and ``opened``
    those afterwards.
    """
    of_base = {opened[number] for number in opened.keys() - of_disk.keys()}
    if not of_base.isdisjoint(of_disk.values()):
        reason = "has the data file of the disk itself: give the last backup of the disk"
        raise StorageError(base, 0, 0, reason)


def _backing_name(base: str, part: str) -> str:
    """The name by which the target finds its backing file.

    In one folder, the name has no folder, so that the folder can be moved. QEMU would take a colon
    in such a name for the end of a protocol.
    """
    folder, name = os.path.split(os.path.abspath(base))
    if folder != os.path.dirname(os.path.abspath(part)):
        return os.path.join(folder, name)
    return f"./{name}" if ":" in name else name


def _verify(image: Image, part: str) -> None:
    """Compares the content of the disk with that of the copy; raises `StorageError`."""
    with ExitStack() as opened:
        disk = opened.enter_context(compare.served(image.name, compare.WORKERS, is_locked=True))
        copy = opened.enter_context(compare.served(part, compare.WORKERS))
        differences = compare.find_differences(copy, disk, image.cluster_size)
    if differences.any():
        reason = "the copy differs from the disk: the base is not the backup that the bitmap "
        raise StorageError(part, 0, 0, f"{reason}began with, or a write missed the bitmap")


def _recording(planned: PlannedBackup) -> str | None:
    """The bitmap that the next incremental backup can use."""
    name = planned.name if planned.new is None else planned.new
    bitmaps = planned.image.bitmaps
    return name if name in bitmaps and bitmaps[name].backup_reason == USABLE else None
