"""From what a caller has to a Storage."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, BinaryIO, cast

from qcow2bm.errors import UnsupportedError
from qcow2bm.storage.file import FileStorage
from qcow2bm.storage.file_object import FileObjectStorage
from qcow2bm.storage.interface import Storage, WritableStorage
from qcow2bm.storage.memory import MemoryStorage

if TYPE_CHECKING:
    from typing_extensions import Buffer

    Source = str | os.PathLike[str] | Buffer | BinaryIO | Storage


def open_source(source: Source, lock_timeout: float = 0) -> Storage:
    """A Storage for ``source``: a path, bytes-like, a seekable binary file, or a Storage.

    Closing what it returns closes only what was opened here. ``lock_timeout`` is for paths.

    Raises:
        StorageError: it cannot be opened, or is no regular file or block device.
        TypeError: ``source`` is none of these.
    """
    if isinstance(source, str | os.PathLike):
        return FileStorage(source, lock_timeout=lock_timeout)
    if isinstance(source, Storage):
        return source
    if all(hasattr(source, name) for name in ("seek", "read", "seekable")):
        return FileObjectStorage(cast("BinaryIO", source))
    try:
        return MemoryStorage(cast("Buffer", source))
    except TypeError:
        kind = type(source).__name__
        raise TypeError(
            f"cannot open {kind}: need a path, the bytes of an image, a binary file or a Storage"
        ) from None


def open_writable(source: Source, *, locking: bool = True) -> WritableStorage:
    """A WritableStorage for ``source``: a path, a bytearray, or a WritableStorage.

    Without ``locking`` a path is opened for use without QEMU's locks.

    Raises:
        StorageError: it cannot be opened for writing, or is no regular file or block device.
        UnsupportedError: ``source`` can only be read, or the system is not Linux.
        TypeError: ``source`` is nothing that can be opened.
    """
    if isinstance(source, str | os.PathLike):
        return FileStorage(source, writable=True, locking=locking)
    if isinstance(source, bytearray):
        return MemoryStorage(source)
    if not locking:
        raise ValueError("locking=False is for a path; a storage has locks of its own, or none")
    if isinstance(source, WritableStorage) and getattr(source, "is_writable", True):
        return source
    open_source(source)
    raise UnsupportedError(f"editing {type(source).__name__}: only paths, bytearrays and storages")
