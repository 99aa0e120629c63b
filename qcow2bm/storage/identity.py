"""What tells that a file was not written to: who it is, how long, and when it was changed."""

from __future__ import annotations

import os
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


def identify(path: FilePath) -> FileIdentity:
    """The identity of a file now; raises `StorageError` if it cannot be looked at."""
    try:
        now = os.stat(path)
    except OSError as error:
        raise StorageError.from_os(error, os.fsdecode(path), 0, 0) from error
    except ValueError as error:  # a NUL byte in the path
        raise StorageError(os.fsdecode(path), 0, 0, str(error)) from error
    return FileIdentity(now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns)
