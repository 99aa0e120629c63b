"""Opening what a caller gives as an image: choosing the storage for it."""

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
    """Returns a Storage for a path, a bytes-like object, a seekable binary file, or a Storage.

    Closing the result closes only what this function opened. For a path, ``lock_timeout`` is the
    number of seconds that `Storage.read_lock` waits.

    Raises:
        StorageError: the path cannot be opened, or is neither a regular file nor a block device.
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
    """Returns a WritableStorage for a path, a bytearray, or a WritableStorage.

    If ``locking`` is false, a path is used without QEMU's locks.

    Raises:
        StorageError: the path cannot be opened for writing, or is neither a regular file nor a
            block device.
        UnsupportedError: ``source`` can only be read, or the system is not Linux.
        TypeError: ``source`` cannot be opened as an image.
        ValueError: ``locking`` is false, and ``source`` is not a path.
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
