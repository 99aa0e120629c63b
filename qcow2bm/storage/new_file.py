"""Files that are written once, and whole: what a crash leaves of them is none, or all."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable

from qcow2bm.errors import StorageError


def write_new(path: str, pieces: Iterable[bytes]) -> None:
    """Writes a file that was not there before, or into a pipe; what fails leaves no file.

    A new file and its name are on the disk when this returns.

    Raises:
        StorageError: there is such a file, or writing failed.
    """
    try:
        descriptor, is_new = _open_new(path)
        try:
            with open(descriptor, "wb") as file:
                file.writelines(pieces)
                if is_new:
                    file.flush()
                    os.fsync(descriptor)
            if is_new:
                _sync_folder(path)
        except BaseException:
            if is_new:
                os.unlink(path)
            raise
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError.from_os(error, path, 0, 0, "writing") from error


def _open_new(path: str) -> tuple[int, bool]:
    """A descriptor to write to, and whether the file was made for it."""
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), True
    except FileExistsError:
        mode = os.stat(path).st_mode
        if not (stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)):
            reason = "is there already, and not overwritten: remove it, or choose another name"
            raise StorageError(path, 0, 0, reason) from None
    descriptor = os.open(path, os.O_WRONLY)
    if os.isatty(descriptor):
        os.close(descriptor)
        raise StorageError(path, 0, 0, "is a terminal, and this is no text")
    return descriptor, False


def _sync_folder(path: str) -> None:
    descriptor = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
