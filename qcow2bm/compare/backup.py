"""Opening the two disks that are compared: the last backup, and what the disk holds now.

A comparison with the wrong disk makes backups miss writes without a sign, so everything that can
be known about the two is checked before they are read.

*Spec*: spec/repair.md, "Comparing".
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Literal, NamedTuple

from qcow2bm.compare.content import Content, Identity, RawContent, identity
from qcow2bm.compare.pieces import WORKERS
from qcow2bm.compare.qemu_nbd import ServedContent, served
from qcow2bm.errors import ComparisonError, StorageError
from qcow2bm.storage.file import FileStorage
from qcow2bm.storage.interface import Storage

if TYPE_CHECKING:
    from qcow2bm.api import Image

DiskFormat = Literal["raw", "qcow2"]

_CONTAINERS = {
    b"QFI\xfb": "qcow2",
    b"KDMV": "VMDK",
    b"# Disk DescriptorFile": "VMDK",
    b"vhdxfile": "VHDX",
    b"conectix": "VHD",
    b"<<< ": "VDI",
    b"QED\0": "QED",
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ\0": "xz",
    b"WithoutFreeSpace": "Parallels",
    b"WithouFreSpacExt": "Parallels",
}


class ComparedDisk(NamedTuple):
    """One of two disks that are to be compared.

    Attributes:
        path: a regular file or block device.
        format: "raw" or "qcow2"; None means raw, and that the file must not begin like a file of
            another format.
    """

    path: str
    format: DiskFormat | None = None


class OpenDisks(NamedTuple):
    """The two disks, open: what `qcow2bm.compare.find_differences` takes."""

    old: Content
    new: Content


@contextmanager
def open_disks(
    image: Image,
    old: ComparedDisk,
    new: ComparedDisk,
    *,
    is_current: bool = False,
    is_image_locked: bool = True,
    locking: bool = True,
    lock_timeout: float = 0,
) -> Iterator[OpenDisks]:
    """Opens the last backup of a disk and what the disk holds now, and locks both in the block.

    Args:
        image: the image of the disk.
        old: what the last backup restores to, with all its increments.
        new: what the disk holds now: the image itself, or its raw data file; its format is only
            used for another file.
        is_current: True if the caller asserts that ``new`` is what the disk holds now, although it
            is neither the image nor its data file.
        is_image_locked: whether this process holds the locks of a writer on the image, as it does
            if the image is open for editing.
        locking: False where the file system has no locks.
        lock_timeout: how many seconds to wait while another process uses one of the files.

    Raises:
        ComparisonError: one of the two cannot be the disk that is meant.
        UnsupportedError: qemu-nbd is needed, and missing.
        ImageLockedError: another process writes to one of the files.
        StorageError: reading failed.
    """
    ours, before, now = map(_identity, (image.name, old.path, new.path))
    with ExitStack() as opened:

        def open_disk(disk: ComparedDisk) -> Content:
            return _open(opened, disk, locking=locking, lock_timeout=lock_timeout)

        shown = None
        if now == ours or image.has_data_file:
            shown = opened.enter_context(
                served(
                    image.name,
                    WORKERS,
                    is_locked=is_image_locked,
                    locking=locking,
                    wait=lock_timeout,
                )
            )
        files = shown.identities if shown and image.has_data_file else set()  # has the data file
        is_data_file = image.has_raw_data_file and now in files  # it has no backing file
        if now != ours and not is_current and not is_data_file:
            raise ComparisonError(new.path, "is neither the image nor its data file", "not-current")
        current = {ours, now, *files}
        if before in current:
            raise _same(old)
        backup = open_disk(old)
        if isinstance(backup, ServedContent) and not current.isdisjoint(backup.identities):
            raise _same(old)  # an overlay on the disk, for one
        disk: Content = shown if shown and now == ours else open_disk(new)
        if disk.size != image.virtual_size:
            reason = f"has {disk.size} bytes, but the disk has {image.virtual_size}"
            raise ComparisonError(new.path, reason, "wrong-size")
        yield OpenDisks(backup, disk)


def _same(old: ComparedDisk) -> ComparisonError:
    reason = "is not the last backup, but the disk that is compared with it, or on top of it"
    return ComparisonError(old.path, reason, "same-disk")


def _identity(path: str) -> Identity:
    try:
        return identity(os.stat(path))
    except OSError as error:
        raise StorageError.from_os(error, path, 0, 0) from error
    except ValueError as error:  # the path has a null character
        raise StorageError(path, 0, 0, str(error)) from error


def _open(opened: ExitStack, disk: ComparedDisk, *, locking: bool, lock_timeout: float) -> Content:
    """Opens a file or block device, and locks it until ``opened`` is closed."""
    storage = FileStorage(disk.path, locking=locking, lock_timeout=lock_timeout)
    opened.callback(storage.close)
    opened.enter_context(storage.read_lock())
    if disk.format is None:
        _require_raw(storage)
    if disk.format == "qcow2":
        return opened.enter_context(served(disk.path, WORKERS, locking=locking, wait=lock_timeout))
    return RawContent(storage)


def _require_raw(storage: Storage) -> None:
    """Raises `ComparisonError` if the file begins like one that is not raw."""
    head = bytearray(max(map(len, _CONTAINERS)))
    storage.read_into(0, memoryview(head))
    for magic, name in _CONTAINERS.items():
        if head.startswith(magic):
            raise ComparisonError(storage.name, f"begins like a file of {name}", "container", name)
