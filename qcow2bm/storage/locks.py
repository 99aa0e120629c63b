"""QEMU's image locks, for readers and for writers.

QEMU locks single bytes of the image file, always with shared locks. A lock on byte 100 + i means
"I use permission i", and a lock on byte 200 + i means "I do not let others use permission i". To
find a conflict, a program asks the system whether an exclusive lock on a byte would succeed. The
locks are open file description locks, which exist on Linux only. On other systems nothing is
locked.

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
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import NamedTuple

from qcow2bm.errors import Hint, ImageLockedError, StorageError
from qcow2bm.storage.interface import OtherUse
from qcow2bm.units import escape

if sys.platform == "linux":
    import fcntl

HELD = 100
NOT_SHARED = 200

PERMISSIONS = 4
CONSISTENT_READ, WRITE, WRITE_UNCHANGED, RESIZE = range(PERMISSIONS)


class Role(NamedTuple):
    """A way to use an image.

    Attributes:
        action: its name in messages.
        locks: the bytes to hold.
        probes: the bytes that no other process may hold, and for each what its holder does.
        unlocked: the hint for a user if the file system has no locks.
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
    {NOT_SHARED + CONSISTENT_READ: "does not let others read it (lock byte 200)", **_WRITES},
    "unlocked",
)
"""A reader reads consistent data, and lets others neither write nor resize."""

WRITER = Role(
    "writing",
    (*(HELD + n for n in (CONSISTENT_READ, WRITE, RESIZE)), *READER.locks[1:]),
    {
        NOT_SHARED + CONSISTENT_READ: "does not let others read it (lock byte 200)",
        **_WRITES,
        NOT_SHARED + WRITE: "reads it and does not let others write (lock byte 201)",
        NOT_SHARED + RESIZE: "uses it and does not let others resize it (lock byte 203)",
    },
    "unlocked-write",
)
"""A writer reads, writes and resizes, and lets others only read, as QEMU does."""

_RETRY_SECONDS = 0.005, 0.03  # random, so that two waiting programs do not collide for ever

_FLOCK = struct.Struct("@hhqqi0q")  # struct flock64: type, whence, start, length, pid


@contextmanager
def held_locks(file: io.FileIO, path: str, role: Role, timeout: float = 0) -> Iterator[None]:
    """Holds the locks of a role on an open file, after waiting at most ``timeout`` seconds.

    A wait is logged once. Closing the file releases the locks, too. A process that was forked in
    the meantime does not release them.

    Raises:
        ImageLockedError: another process uses the image in a way that excludes ``role``; or this
            process writes to the image through another open file.
        StorageError: the file system has no such locks.
    """
    if sys.platform != "linux":
        yield
        return
    owner = os.getpid()
    try:
        _wait_for_locks(file, path, role, timeout)
        with _noted(file, role):
            yield
    finally:
        try:
            _release(file, role, owner)
        except BaseException:  # an interrupt: no later call would release the rest of the locks
            _release(file, role, owner)
            raise


_Identity = tuple[int, int, int]
_written_here = Counter[_Identity]()
"""The files for which this process holds the locks of a writer; the kernel does not tell."""


@contextmanager
def _noted(file: io.FileIO, role: Role) -> Iterator[None]:
    """Notes for the duration of the block that this process writes to a file, if it does."""
    identity = _identity(file)
    _written_here[identity] += role is WRITER
    try:
        yield
    finally:
        _written_here[identity] -= role is WRITER
        if not _written_here[identity]:
            del _written_here[identity]


def _identity(file: io.FileIO) -> _Identity:
    """The process, so that a fork knows of nothing, and the device and the inode."""
    status = os.fstat(file.fileno())
    return os.getpid(), status.st_dev, status.st_ino


def use_by_another_process(file: io.FileIO) -> OtherUse | None:
    """Returns how another process uses an open file at this moment; no lock is taken.

    None if the file system has no such locks.
    """
    if sys.platform != "linux":
        return None
    descriptor = file.fileno()
    try:
        if any(_probe(descriptor, byte) for byte in READER.probes):
            return "writer"
        is_used = any(_probe(descriptor, first, PERMISSIONS) for first in (HELD, NOT_SHARED))
    except OSError:
        return None
    return "reader" if is_used else "no"


def _wait_for_locks(file: io.FileIO, path: str, role: Role, timeout: float) -> None:
    """Takes the locks; between two attempts it holds none, so that two programs cannot deadlock."""
    descriptor = file.fileno()
    deadline = time.monotonic() + timeout
    is_logged = False
    while True:
        is_last = not time.monotonic() < deadline
        try:
            return _take_locks(descriptor, path, role)
        except ImageLockedError as error:
            if is_last and _identity(file) in _written_here:
                raise error.by_this_process() from error
            if is_last:
                raise
            _unlock(descriptor, role)
            if not is_logged:
                from qcow2bm.log import logger  # waits are rare, and logging takes time to load

                what = escape(path), timeout, role.action, error.held
                logger.info("%s: waiting up to %g s for the lock for %s: another process %s", *what)
                is_logged = True
        time.sleep(random.uniform(*_RETRY_SECONDS))


def _take_locks(descriptor: int, path: str, role: Role) -> None:
    for byte in role.locks:
        _lock(descriptor, path, byte, role)
    for byte, reason in role.probes.items():
        if _is_held_by_others(descriptor, path, byte, role):
            raise ImageLockedError(path, reason, role.action, byte)


def _release(file: io.FileIO, role: Role, owner: int) -> None:
    # The number of a closed file may be that of another file by now.
    if not file.closed and os.getpid() == owner:
        _unlock(file.fileno(), role)


def _lock(descriptor: int, path: str, byte: int, role: Role) -> None:
    request = _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0)
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, request)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            held = f"holds an exclusive lock on it (lock byte {byte})"
            raise ImageLockedError(path, held, role.action, byte) from error
        raise _no_locks(path, error, role) from error


def _unlock(descriptor: int, role: Role) -> None:
    for byte in role.locks:
        # Closing the descriptor releases a lock that cannot be released here.
        with suppress(OSError):
            request = _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, byte, 1, 0)
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, request)


def _is_held_by_others(descriptor: int, path: str, byte: int, role: Role) -> bool:
    try:
        return _probe(descriptor, byte)
    except OSError as error:
        raise _no_locks(path, error, role) from error


def _probe(descriptor: int, byte: int, length: int = 1) -> bool:
    """Returns whether another holds one of ``length`` bytes; raises `OSError` without locks."""
    request = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, length, 0)
    answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, request)
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def _no_locks(path: str, error: OSError, role: Role) -> StorageError:
    reason = f"cannot be locked ({error.strerror})"
    return StorageError(path, 0, 0, reason, error.errno, role.action, role.unlocked)
