"""The raw data file of a disk: what a block server does with it beyond reading and writing."""

from __future__ import annotations

import ctypes
import errno
import os
from threading import Lock

from qcow2bm.errors import StorageError, UnsupportedError
from qcow2bm.storage.file import FileStorage

_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 0x01, 0x02, 0x10
# EINVAL is what a block device says to a range that is not of whole blocks.
_CANNOT = {errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV, errno.EINVAL}
_ZEROES = bytes(1 << 20)


class DataFile(FileStorage):
    """A regular file or a block device that holds a disk as the guest sees it. Thread-safe."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Opens ``path`` for writing, without a lock yet; raises as `FileStorage` does."""
        super().__init__(path, writable=True)
        self._fallocate = ctypes.CDLL(None, use_errno=True).fallocate64
        self._fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
        self._barriers = Lock()
        self._failure: StorageError | None = None

    def barrier(self) -> None:
        """Returns once everything written so far is on the disk.

        Once one has failed all others do: the system reports it once, and then no longer knows
        what it has lost.
        """
        with self._barriers:
            if self._failure:
                reason = "something written before could not be made durable"
                raise StorageError(
                    self.name, 0, 0, reason, self._failure.errno, "writing"
                ) from self._failure
            try:
                super().barrier()
            except StorageError as error:
                self._failure = error
                raise

    def trim(self, start: int, length: int) -> None:
        """Gives back the room of a range, where the file system can."""
        self._allocate(_PUNCH_HOLE, start, length)

    def zero(self, start: int, length: int, *, may_trim: bool, is_fast: bool) -> None:
        """Makes a range read as zeros.

        Args:
            start: in bytes.
            length: in bytes.
            may_trim: give back its room, where the file system can.
            is_fast: do not fall back on writing zeros.

        Raises:
            UnsupportedError: ``is_fast``, and the file system can only have them written.
            StorageError: writing failed.
        """
        if may_trim and self._allocate(_PUNCH_HOLE, start, length):
            return
        if self._allocate(_ZERO_RANGE, start, length):
            return
        if is_fast:
            raise UnsupportedError("zeroing faster than by writing, on this file system")
        end = start + length
        for offset in range(start, end, len(_ZEROES)):
            self.write(offset, [_ZEROES[: end - offset]])

    def _allocate(self, mode: int, start: int, length: int) -> bool:
        """Whether the file system could do it, at once."""
        descriptor = self._own_descriptor()
        while length and self._fallocate(descriptor, mode | _KEEP_SIZE, start, length):
            number = ctypes.get_errno()
            if number in _CANNOT:
                return False
            if number != errno.EINTR:
                error = OSError(number, os.strerror(number))
                raise StorageError.from_os(error, self.name, start, length, "writing") from error
        return True
