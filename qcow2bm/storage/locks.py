"""QEMU's image locks, as a reader takes them.

QEMU locks single bytes of the image file, always shared: byte 100 + i says "I hold permission
i", byte 200 + i says "I do not share permission i". A conflict is found by asking whether a
write lock could be had there. The locks are open file description locks, which exist on Linux
only; elsewhere there is no QEMU to exclude and nothing is locked.

*Spec*: spec/locking.md.
"""

from __future__ import annotations

import errno
import os
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from qcow2bm.errors import ImageLockedError, StorageError

HELD = 100
NOT_SHARED = 200

CONSISTENT_READ, WRITE, WRITE_UNCHANGED, RESIZE = range(4)

READER_LOCKS = (HELD + CONSISTENT_READ, NOT_SHARED + WRITE, NOT_SHARED + RESIZE)
"""A reader reads consistently, and shares neither writing nor resizing."""

READER_PROBES = {
    NOT_SHARED + CONSISTENT_READ: "forbids others to read it (lock byte 200)",
    HELD + WRITE: "is writing to it (lock byte 101)",
    HELD + RESIZE: "may resize it (lock byte 103)",
}
"""Who holds one of these bytes conflicts with a reader, and why."""

_FLOCK = struct.Struct("@hhqqi0q")  # struct flock64: type, whence, start, length, pid


@contextmanager
def reader_locks(descriptor: int, path: str) -> Iterator[None]:
    """Holds the locks of a reader on an open file.

    Raises:
        ImageLockedError: somebody writes to the image.
        StorageError: the file system has no such locks.
    """
    if sys.platform != "linux":
        yield
        return
    try:
        for byte in READER_LOCKS:
            _lock(descriptor, path, byte, shared=True)
        for byte, reason in READER_PROBES.items():
            if _is_held_by_others(descriptor, path, byte):
                raise ImageLockedError(path, reason)
        yield
    finally:
        for byte in READER_LOCKS:
            # What cannot be unlocked goes with the descriptor; the body's error matters more.
            with suppress(StorageError):
                _lock(descriptor, path, byte, shared=False)


def _lock(descriptor: int, path: str, byte: int, *, shared: bool) -> None:
    import fcntl

    kind = fcntl.F_RDLCK if shared else fcntl.F_UNLCK
    request = _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0)
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, request)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise ImageLockedError(path, f"locks it exclusively (lock byte {byte})") from error
        raise _no_locks(path, error) from error


def _is_held_by_others(descriptor: int, path: str, byte: int) -> bool:
    import fcntl

    request = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    try:
        answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, request)
    except OSError as error:
        raise _no_locks(path, error) from error
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def _no_locks(path: str, error: OSError) -> StorageError:
    reason = f"cannot be locked ({error.strerror}); read it without a lock: -U (force_share=True)"
    return StorageError(path, 0, 0, reason, error.errno)
