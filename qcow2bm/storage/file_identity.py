"""Identities of files, which show whether a file was replaced or written to."""

from __future__ import annotations

import os
import stat
from typing import NamedTuple

from qcow2bm.errors import StorageError

FilePath = str | os.PathLike[str]


class FileIdentity(NamedTuple):
    """Facts about a file. At least one of them changes when the file is replaced or written to.

    Two exceptions: a write in the same tick of the file system's clock as the write before, and a
    write after the clock was set back.
    """

    device: int
    inode: int
    size: int
    modified_ns: int
    changed_ns: int


def identify(path: FilePath) -> FileIdentity | None:
    """Returns the present identity of a regular file; None for a block device, which has none.

    Raises:
        StorageError: ``path`` is neither a regular file nor a block device, or cannot be read.
    """
    try:
        now = os.stat(path)
    except OSError as error:
        raise StorageError.from_os(error, os.fsdecode(path), 0, 0) from error
    except ValueError as error:  # a NUL byte in the path
        raise StorageError(os.fsdecode(path), 0, 0, str(error)) from error
    if stat.S_ISBLK(now.st_mode):
        return None
    if not stat.S_ISREG(now.st_mode):
        raise StorageError(os.fsdecode(path), 0, 0, "is neither a regular file nor a block device")
    return FileIdentity(now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns)
