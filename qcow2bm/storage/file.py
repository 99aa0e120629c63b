"""Images in files and on block devices."""

from __future__ import annotations

import io
import os
import stat
from contextlib import AbstractContextManager

from qcow2bm.errors import StateError, StorageError
from qcow2bm.storage.locks import reader_locks

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a character device",
    stat.S_IFSOCK: "a socket",
}


class FileStorage:
    """A regular file or a block device, opened read-only.

    Everything but `close` raises `StateError` once it is closed.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Opens ``path``; raises `StorageError` if it is neither or cannot be opened."""
        self.name = os.fsdecode(path)
        try:
            # Looked at before it is opened: opening a FIFO or a tape has effects of its own.
            self._require_disk(os.stat(self.name).st_mode)
            # Closes itself, with a warning, if whoever opened the image forgets to.
            self._file = io.FileIO(self.name, opener=_open_without_waiting)
            try:
                self._require_disk(os.fstat(self._file.fileno()).st_mode)
            except BaseException:
                self._file.close()
                raise
        except StorageError:
            raise
        except OSError as error:
            raise StorageError.from_os(error, self.name, 0, 0) from error
        except ValueError as error:  # a NUL byte in the path
            raise StorageError(self.name, 0, 0, str(error)) from error

    def _require_disk(self, mode: int) -> None:
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            kind = _KINDS.get(stat.S_IFMT(mode), "something else")
            reason = f"is {kind}; an image is a regular file or a block device"
            raise StorageError(self.name, 0, 0, reason)

    def _open_descriptor(self) -> int:
        if self._file.closed:
            raise StateError("closed", "open")
        return self._file.fileno()

    def size(self) -> int:
        """The present length in bytes, of a block device too."""
        descriptor = self._open_descriptor()
        try:
            return os.lseek(descriptor, 0, os.SEEK_END)
        except OSError as error:
            raise StorageError.from_os(error, self.name, 0, 0) from error

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Fills ``buffer`` from byte ``offset`` on; returns how many bytes there were."""
        done = 0
        descriptor = self._open_descriptor()
        try:
            while done < len(buffer):
                # One read call returns at most 2 GiB on Linux, and may return less.
                count = _pread_into(descriptor, buffer[done:], offset + done)
                if count == 0:
                    break
                done += count
        except OSError as error:
            raise StorageError.from_os(error, self.name, offset, len(buffer)) from error
        return done

    def change_token(self) -> object:
        """Times of the last write and change, and length; None for a block device, which has none.

        The time of the last change shows even what was written by somebody who then put the
        time of the last write back, as copying programs do.
        """
        descriptor = self._open_descriptor()
        try:
            now = os.fstat(descriptor)
        except OSError as error:
            raise StorageError.from_os(error, self.name, 0, 0) from error
        if not stat.S_ISREG(now.st_mode):
            return None
        changed = now.st_ctime_ns if os.name == "posix" else 0
        return now.st_mtime_ns, changed, now.st_size

    def read_lock(self) -> AbstractContextManager[None]:
        """Holds QEMU's locks of a reader."""
        return reader_locks(self._open_descriptor(), self.name)

    def close(self) -> None:
        """Closes the file. May be called twice."""
        self._file.close()


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _pread_into(descriptor: int, buffer: memoryview, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [buffer], offset)
    os.lseek(descriptor, offset, os.SEEK_SET)
    data = os.read(descriptor, len(buffer))
    buffer[: len(data)] = data
    return len(data)
