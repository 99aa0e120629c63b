"""From what a caller has to a Storage."""

from __future__ import annotations

import os
from typing import BinaryIO

from qcow2bm.storage.base import Storage
from qcow2bm.storage.file import FileStorage
from qcow2bm.storage.memory import MemoryStorage, StreamStorage

Source = str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO | Storage


def open_source(source: Source) -> Storage:
    """A Storage for ``source``: a path, bytes-like, a seekable binary file, or a Storage.

    Closing what it returns closes only what was opened here.

    Raises:
        StorageError: it cannot be opened, or is no regular file or block device.
        TypeError: ``source`` is none of these.
    """
    if isinstance(source, str | os.PathLike):
        return FileStorage(source)
    if isinstance(source, bytes | bytearray | memoryview):
        return MemoryStorage(source)
    if isinstance(source, Storage):
        return source
    if hasattr(source, "seek") and hasattr(source, "read"):
        return StreamStorage(source)
    raise TypeError(
        f"cannot open {type(source).__name__}: need a path, bytes, a binary file or a Storage"
    )
