"""Images in regular files and on block devices, the storage for every path that a caller gives."""

from __future__ import annotations

import errno
import io
import os
import stat
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

from qcow2bm.errors import StateError, StorageError, UnsupportedError
from qcow2bm.storage.direct_io import DirectFile
from qcow2bm.storage.interface import OtherUse
from qcow2bm.storage.locks import READER, WRITER, held_locks, use_by_another_process

if TYPE_CHECKING:
    from typing_extensions import Buffer

_MAX_PARTS = 1024  # Linux takes no more in one call
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a character device",
    stat.S_IFSOCK: "a socket",
}


class FileStorage:
    """A regular file or a block device.

    All reads, writes and barriers use one descriptor, because the system reports a failed write
    only to the descriptor that wrote. After `close`, every other method raises `StateError`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        writable: bool = False,
        locking: bool = True,
        lock_timeout: float = 0,
    ) -> None:
        """Opens ``path`` without taking a lock.

        If ``locking`` is false, `read_lock` and `write_lock` take no locks either. `read_lock`
        waits at most ``lock_timeout`` seconds.

        Raises:
            StorageError: ``path`` cannot be opened, or is neither a regular file nor a block
                device.
            UnsupportedError: ``writable`` is true, and the system is not Linux.
        """
        if writable and sys.platform != "linux":
            raise UnsupportedError("writing on a system other than Linux")
        self.name = os.fsdecode(path)
        self.is_writable = writable
        self._locking = locking
        self._lock_timeout = lock_timeout
        self._is_write_locked = False
        self._direct: DirectFile | None = (
            None  # a block device that another host may have written to
        )
        self._owner = os.getpid()
        try:
            # The kind is checked before the file is opened: opening a FIFO or a tape has effects.
            self._require_disk(os.stat(self.name).st_mode)
            # FileIO closes itself, with a warning, if the caller forgets to close the image.
            access = "r+" if writable else "r"
            self._file = io.FileIO(self.name, access, opener=_open_without_waiting)
            try:
                mode = os.fstat(self._file.fileno()).st_mode
                self._require_disk(mode)
                if stat.S_ISBLK(mode) and hasattr(os, "posix_fadvise"):
                    # Another host may have written to the device since this host cached it.
                    os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
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

    def _own_descriptor(self) -> int:
        """The descriptor for writing; a forked process shares the locks, but must not write."""
        if os.getpid() != self._owner:
            raise StateError("opened before this process was forked", "opened in this process")
        return self._open_descriptor()

    def size(self) -> int:
        """The present length in bytes, also of a block device."""
        descriptor = self._open_descriptor()
        try:
            return os.lseek(descriptor, 0, os.SEEK_END)
        except OSError as error:
            raise StorageError.from_os(error, self.name, 0, 0) from error

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Fills ``buffer`` from byte ``offset`` on; returns the number of bytes read."""
        done = 0
        descriptor = self._open_descriptor()
        try:
            if self._direct:
                return self._direct.read_into(offset, buffer)
            while done < len(buffer):
                # One read call returns at most 2 GiB on Linux, and may return less.
                count = _pread_into(descriptor, buffer[done:], offset + done)
                if count == 0:
                    break
                done += count
        except OSError as error:
            raise StorageError.from_os(error, self.name, offset, len(buffer)) from error
        return done

    def next_data(self, offset: int) -> int:
        """The offset of the first data at or after ``offset``; the size if only a hole follows.

        If the system does not report holes, all bytes count as data.
        """
        return self._seek("SEEK_DATA", offset, otherwise=offset)

    def next_hole(self, offset: int) -> int:
        """The offset of the first hole at or after ``offset``; the size if only data follow."""
        return self._seek("SEEK_HOLE", offset, otherwise=self.size())

    def _seek(self, whence: str, offset: int, otherwise: int) -> int:
        """Looks for data or for a hole; returns ``otherwise`` if the system does not tell."""
        descriptor = self._open_descriptor()
        try:
            return os.lseek(descriptor, offset, getattr(os, whence))
        except (OSError, AttributeError) as error:
            is_behind = getattr(error, "errno", None) == errno.ENXIO
            return self.size() if is_behind else min(otherwise, self.size())

    def change_token(self) -> object:
        """The times of the last write and last change, and the length; None for a block device.

        Copying programs set the time of the last write back after they have written. The time of
        the last change then still shows the write.
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
        """Holds the locks of a reader as QEMU does; holds none while `write_lock` is held."""
        self._open_descriptor()
        if self._is_write_locked or not self._locking:
            return nullcontext()
        return held_locks(self._file, self.name, READER, self._lock_timeout)

    def use_by_another_process(self) -> OtherUse | None:
        """How another process uses the file at this moment, as far as locks on this host show."""
        self._open_descriptor()
        return use_by_another_process(self._file)

    @contextmanager
    def write_lock(self, timeout: float) -> Iterator[None]:
        """Holds the locks of a writer as QEMU does.

        Raises:
            ImageLockedError: another process still uses the image after ``timeout`` seconds.
            StorageError: the file system has no such locks, or the path leads to another file now.
            StateError: this storage holds the locks already.
        """
        descriptor = self._open_descriptor()
        if self._is_write_locked:
            raise StateError("open for editing", "closed before it is opened for editing again")
        locks = held_locks(self._file, self.name, WRITER, timeout)
        with locks if self._locking else nullcontext():
            self._require_same_file(descriptor)
            self._is_write_locked = True
            try:
                yield
            finally:
                self._is_write_locked = False

    def _require_same_file(self, descriptor: int) -> None:
        """Raises `StorageError` if the path leads to another file since the file was opened."""
        try:
            is_same = os.path.samestat(os.fstat(descriptor), os.stat(self.name))
        except OSError as error:
            raise StorageError.from_os(error, self.name, 0, 0) from error
        if not is_same:
            reason = "was replaced by another file while it was being opened; open it again"
            raise StorageError(self.name, 0, 0, reason)

    def write(self, offset: int, parts: Sequence[Buffer]) -> None:
        """Writes all ``parts``, one after the other, from byte ``offset`` on."""
        descriptor = self._own_descriptor()
        if self._direct:
            try:
                self._direct.write(offset, parts)
            except OSError as error:
                length = sum(memoryview(part).nbytes for part in parts)
                raise StorageError.from_os(error, self.name, offset, length, "writing") from error
            return
        left = [memoryview(part).cast("B") for part in parts]
        left.reverse()  # the next part is the last in the list
        while left:
            batch = left[: -_MAX_PARTS - 1 : -1]
            length = sum(map(len, batch))
            try:
                done = os.pwritev(descriptor, batch, offset)
            except OSError as error:
                raise StorageError.from_os(error, self.name, offset, length, "writing") from error
            if length and not done:
                reason = "nothing could be written"
                raise StorageError(self.name, offset, length, reason, action="writing")
            offset += done
            while left and done >= len(left[-1]):
                done -= len(left.pop())
            if done:
                left[-1] = left[-1][done:]

    def barrier(self) -> None:
        """Makes all earlier writes durable, and returns when they are."""
        descriptor = self._own_descriptor()
        try:
            if self._direct:
                self._direct.barrier()
            else:
                os.fdatasync(descriptor)
        except OSError as error:
            raise StorageError.from_os(error, self.name, 0, 0, "writing") from error

    @property
    def excludes_other_hosts(self) -> bool:
        """Whether the locks exclude other hosts; other hosts do not see locks of a block device."""
        return self._locking and self.capacity() is None

    def refresh(self) -> None:
        """Drops the pages of the file that this host has cached.

        The system does not say whether it dropped all pages. For a regular file that does no harm:
        the file system keeps the caches of all hosts the same, or locking has updated them. A block
        device is read and written without the cache from now on.
        """
        descriptor = self._own_descriptor()
        try:
            os.fdatasync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            if self.capacity() is not None and not self._direct:
                self._direct = DirectFile(self.name)
        except OSError as error:
            raise StorageError.from_os(error, self.name, 0, 0) from error

    def truncate(self, size: int) -> None:
        """Shortens a regular file; does nothing to a block device."""
        descriptor = self._own_descriptor()
        try:
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                os.ftruncate(descriptor, size)
        except OSError as error:
            raise StorageError.from_os(error, self.name, 0, 0, "writing") from error

    def capacity(self) -> int | None:
        """The length of a block device; None for a regular file, which can grow."""
        descriptor = self._open_descriptor()
        try:
            is_regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
        except OSError as error:
            raise StorageError.from_os(error, self.name, 0, 0) from error
        return None if is_regular else self.size()

    def close(self) -> None:
        """Closes the file. May be called twice."""
        self._file.close()
        if self._direct:
            self._direct.close()


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _pread_into(descriptor: int, buffer: memoryview, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [buffer], offset)
    os.lseek(descriptor, offset, os.SEEK_SET)
    data = os.read(descriptor, len(buffer))
    buffer[: len(data)] = data
    return len(data)
