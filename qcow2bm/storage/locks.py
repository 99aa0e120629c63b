"""QEMU's image locks, as a reader and as a writer takes them.

QEMU locks single bytes of the image file, always shared: byte 100 + i says "I hold permission
i", byte 200 + i says "I do not share permission i". A conflict is found by asking whether a
write lock could be had there. The locks are open file description locks, which exist on Linux
only; elsewhere there is no QEMU to exclude and nothing is locked.

*Spec*: spec/locking.md.
"""

from __future__ import annotations

import errno
import io
import os
import random
import struct
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import NamedTuple

from qcow2bm.errors import Hint, ImageLockedError, StorageError

if sys.platform == "linux":
    import fcntl

HELD = 100
NOT_SHARED = 200

CONSISTENT_READ, WRITE, WRITE_UNCHANGED, RESIZE = range(4)


class Role(NamedTuple):
    """A way to use an image: the bytes it holds, and those that others must not hold.

    ``action`` is what it is called in messages, and ``probes`` says for each byte what somebody
    does who holds it.
    """

    action: str
    locks: tuple[int, ...]
    probes: Mapping[int, str]
    unlocked: Hint


_WRITES = {
    HELD + WRITE: "is writing to it (lock byte 101)",
    HELD + RESIZE: "may resize it (lock byte 103)",
}

READER = Role(
    "reading",
    (HELD + CONSISTENT_READ, NOT_SHARED + WRITE, NOT_SHARED + RESIZE),
    {NOT_SHARED + CONSISTENT_READ: "forbids others to read it (lock byte 200)", **_WRITES},
    "unlocked",
)
"""Reads consistently, and shares neither writing nor resizing."""

WRITER = Role(
    "writing",
    (*(HELD + n for n in (CONSISTENT_READ, WRITE, RESIZE)), *READER.locks[1:]),
    {
        NOT_SHARED + CONSISTENT_READ: "forbids others to read it (lock byte 200)",
        **_WRITES,
        NOT_SHARED + WRITE: "reads it and lets nobody write meanwhile (lock byte 201)",
        NOT_SHARED + RESIZE: "uses it and lets nobody resize it meanwhile (lock byte 203)",
    },
    "unlocked-write",
)
"""Reads, writes and resizes, and shares none but reading, as QEMU opening an image to write."""

_RETRY_SECONDS = 0.005, 0.03  # at random between: two that wait must not meet for ever

_FLOCK = struct.Struct("@hhqqi0q")  # struct flock64: type, whence, start, length, pid


@contextmanager
def held_locks(file: io.FileIO, path: str, role: Role, timeout: float = 0) -> Iterator[None]:
    """Holds the locks of a role on an open file, after waiting at most ``timeout`` seconds.

    They go when the file is closed, too. A process that was forked meanwhile leaves them alone.

    Raises:
        ImageLockedError: somebody uses the image in a way that excludes this one.
        StorageError: the file system has no such locks.
    """
    if sys.platform != "linux":
        yield
        return
    owner = os.getpid()
    deadline = time.monotonic() + timeout
    try:
        while not _try(file.fileno(), path, role, is_last=not time.monotonic() < deadline):
            time.sleep(random.uniform(*_RETRY_SECONDS))
        yield
    finally:
        # Once it is closed, its number may be that of another file.
        if not file.closed and os.getpid() == owner:
            _unlock(file.fileno(), role)


def _try(descriptor: int, path: str, role: Role, *, is_last: bool) -> bool:
    try:
        for byte in role.locks:
            _lock(descriptor, path, byte, role)
        for byte, reason in role.probes.items():
            if _is_held_by_others(descriptor, path, byte, role):
                raise ImageLockedError(path, reason, role.action, byte)
    except ImageLockedError:
        if is_last:
            raise
        _unlock(descriptor, role)
        return False
    return True


def _lock(descriptor: int, path: str, byte: int, role: Role) -> None:
    request = _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0)
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, request)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            held = f"locks it exclusively (lock byte {byte})"
            raise ImageLockedError(path, held, role.action, byte) from error
        raise _no_locks(path, error, role) from error


def _unlock(descriptor: int, role: Role) -> None:
    for byte in role.locks:
        # What cannot be unlocked goes with the descriptor; another error matters more.
        with suppress(OSError):
            request = _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, byte, 1, 0)
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, request)


def _is_held_by_others(descriptor: int, path: str, byte: int, role: Role) -> bool:
    request = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    try:
        answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, request)
    except OSError as error:
        raise _no_locks(path, error, role) from error
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def _no_locks(path: str, error: OSError, role: Role) -> StorageError:
    reason = f"cannot be locked ({error.strerror})"
    return StorageError(path, 0, 0, reason, error.errno, role.action, role.unlocked)
