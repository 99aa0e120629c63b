"""The raw data file of a disk, with what a block server needs beyond reading and writing."""

from __future__ import annotations

import ctypes
import errno
import os
from threading import Lock

from qcow2bm.errors import StorageError, UnsupportedError
from qcow2bm.log import logger
from qcow2bm.storage.file import FileStorage

_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 0x01, 0x02, 0x10
# A block device answers EINVAL for a range that does not consist of whole blocks.
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

        After a barrier has failed, every later barrier fails: the system reports a failure once,
        and then no longer knows which data it lost.

        Raises:
            StorageError: this barrier failed, or an earlier one.
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
                logger.error("%s; writes may be lost, and no later flush will succeed", error)
                raise

    def trim(self, start: int, length: int) -> None:
        """Frees the space of a range, if the file system can."""
        self._allocate(_PUNCH_HOLE, start, length)

    def zero(self, start: int, length: int, *, may_trim: bool, is_fast: bool) -> None:
        """Makes a range read as zeros.

        Args:
            start: the first byte of the range.
            length: the length of the range in bytes.
            may_trim: free the space of the range, if the file system can.
            is_fast: raise an error instead of writing zeros.

        Raises:
            UnsupportedError: ``is_fast`` is set, and the file system can only write zeros.
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
        """Calls fallocate; returns False if the file system does not have the operation."""
        descriptor = self._own_descriptor()
        while length and self._fallocate(descriptor, mode | _KEEP_SIZE, start, length):
            number = ctypes.get_errno()
            if number in _CANNOT:
                return False
            if number != errno.EINTR:
                error = OSError(number, os.strerror(number))
                raise StorageError.from_os(error, self.name, start, length, "writing") from error
        return True
