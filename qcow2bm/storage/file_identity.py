"""What tells that a file was not written to: who it is, how long, and when it was changed."""

from __future__ import annotations

import os
import stat
from typing import NamedTuple

from qcow2bm.errors import StorageError

FilePath = str | os.PathLike[str]


class FileIdentity(NamedTuple):
    """Facts of a file that cannot all stay the same when somebody writes to it.

    Within the resolution of the file system's times, and as long as nobody turns back the clock.
    """

    device: int
    inode: int
    size: int
    modified_ns: int
    changed_ns: int


def identify(path: FilePath) -> FileIdentity | None:
    """The identity of a regular file now; None for a block device, which has no such facts.

    Raises:
        StorageError: it cannot be looked at, or is neither.
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
        raise StorageError(os.fsdecode(path), 0, 0, "is no regular file and no block device")
    return FileIdentity(now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns)
