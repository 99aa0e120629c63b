"""From what a caller has to a Storage."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, BinaryIO, cast

from qcow2bm.storage.base import Storage
from qcow2bm.storage.file import FileStorage
from qcow2bm.storage.memory import MemoryStorage, StreamStorage

if TYPE_CHECKING:
    from typing_extensions import Buffer

    Source = str | os.PathLike[str] | Buffer | BinaryIO | Storage


def open_source(source: Source) -> Storage:
    """A Storage for ``source``: a path, bytes-like, a seekable binary file, or a Storage.

    Closing what it returns closes only what was opened here.

    Raises:
        StorageError: it cannot be opened, or is no regular file or block device.
        TypeError: ``source`` is none of these.
    """
    if isinstance(source, str | os.PathLike):
        return FileStorage(source)
    if isinstance(source, Storage):
        return source
    if all(hasattr(source, name) for name in ("seek", "read", "seekable")):
        return StreamStorage(cast("BinaryIO", source))
    try:
        return MemoryStorage(cast("Buffer", source))
    except TypeError:
        kind = type(source).__name__
        raise TypeError(
            f"cannot open {kind}: need a path, the bytes of an image, a binary file or a Storage"
        ) from None
