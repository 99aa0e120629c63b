"""The locks of a reader against those of other open file descriptions, as QEMU has them."""

from __future__ import annotations

import errno
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from qcow2bm.errors import ImageLockedError, StorageError
from qcow2bm.storage.file import FileStorage
from qcow2bm.storage.locks import reader_locks

if sys.platform != "linux":
    pytest.skip("open file description locks are Linux's", allow_module_level=True)

import fcntl

FLOCK = "=hh4xqqi4x"  # type, whence, start, length, pid
BYTES = (*range(100, 104), *range(200, 204))
READER = {100, 201, 203}


class Other:
    """Somebody else who has the image open."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDWR)

    def lock(self, byte: int, *, exclusive: bool = False) -> None:
        kind = fcntl.F_WRLCK if exclusive else fcntl.F_RDLCK
        request = struct.pack(FLOCK, kind, 0, byte, 1, 0)
        fcntl.fcntl(self.descriptor, fcntl.F_OFD_SETLK, request)

    def sees(self, kind: int = fcntl.F_WRLCK) -> set[int]:
        """The bytes on which a lock of this kind could not be had."""
        return {byte for byte in BYTES if self._answer(kind, byte) != fcntl.F_UNLCK}

    def _answer(self, kind: int, byte: int) -> int:
        request = struct.pack(FLOCK, kind, 0, byte, 1, 0)
        answer = fcntl.fcntl(self.descriptor, fcntl.F_OFD_GETLK, request)
        return int(struct.unpack(FLOCK, answer)[0])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(bytes(512))  # the locks lie where no lock needs bytes, or past the end
    return path


@pytest.fixture
def other(path: Path) -> Iterator[Other]:
    other = Other(path)
    yield other
    os.close(other.descriptor)


@pytest.fixture
def storage(path: Path) -> Iterator[FileStorage]:
    storage = FileStorage(path)
    yield storage
    storage.close()


def test_a_reader_holds_three_shared_locks_and_lets_them_go(
    storage: FileStorage, other: Other
) -> None:
    for _ in range(2):
        with storage.read_lock():
            assert other.sees() == READER
            assert other.sees(fcntl.F_RDLCK) == set()
        assert other.sees() == set()


@pytest.mark.parametrize(
    ("byte", "reason"),
    [
        (101, "is writing to it (lock byte 101)"),
        (103, "may resize it (lock byte 103)"),
        (200, "forbids others to read it (lock byte 200)"),
    ],
)
def test_a_reader_is_refused(storage: FileStorage, other: Other, byte: int, reason: str) -> None:
    other.lock(byte)
    with pytest.raises(ImageLockedError) as caught, storage.read_lock():
        pytest.fail("was let in")
    assert caught.value.held == reason
    assert (caught.value.path, caught.value.errno) == (storage.name, errno.EAGAIN)
    assert f"{storage.name}: in use by another process, which {reason}" in str(caught.value)
    assert "-U" in str(caught.value)
    assert other.sees() == set()


@pytest.mark.parametrize("byte", [100, 102, 201, 202, 203])
def test_other_readers_do_no_harm(storage: FileStorage, other: Other, byte: int) -> None:
    other.lock(byte)
    with storage.read_lock():
        assert other.sees() == READER  # what it holds itself, it does not see
    assert other.sees() == set()


@pytest.mark.parametrize("byte", BYTES)
def test_an_exclusive_lock_is_named(storage: FileStorage, other: Other, byte: int) -> None:
    other.lock(byte, exclusive=True)
    if byte in (102, 202):  # WRITE_UNCHANGED is no concern of a reader
        with storage.read_lock():
            return
    with pytest.raises(ImageLockedError, match=rf"\(lock byte {byte}\)"), storage.read_lock():
        pytest.fail("was let in")
    assert other.sees() == set()


def test_a_running_writer_is_refused_to_and_refuses(storage: FileStorage, other: Other) -> None:
    with storage.read_lock():
        # A QEMU about to write asks for exactly these bytes and gives up.
        assert other.sees() & {201, 203}
    for byte in (100, 101, 103, 201, 203):
        other.lock(byte)
    with pytest.raises(ImageLockedError, match="is writing to it"), storage.read_lock():
        pytest.fail("was let in")


def test_two_readers_coexist(path: Path, storage: FileStorage, other: Other) -> None:
    second = FileStorage(path)
    with storage.read_lock():
        with second.read_lock():
            assert other.sees() == READER
        assert other.sees() == READER  # the first one's are still there
    second.close()
    assert other.sees() == set()


def test_another_process_counts_as_another(path: Path, storage: FileStorage) -> None:
    program = (
        "import fcntl, struct, sys\n"
        "file = open(sys.argv[1], 'rb')\n"
        f"lock = struct.pack({FLOCK!r}, fcntl.F_RDLCK, 0, 101, 1, 0)\n"
        "fcntl.fcntl(file, fcntl.F_OFD_SETLK, lock)\n"
        "print('locked', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as writer:
        assert writer.stdout
        assert writer.stdout.readline() == b"locked\n"
        with pytest.raises(ImageLockedError, match="lock byte 101"), storage.read_lock():
            pytest.fail("was let in")
        writer.communicate()
    with storage.read_lock():
        pass


def test_a_failure_while_locked_leaves_nothing_locked(storage: FileStorage, other: Other) -> None:
    failure = KeyError("whatever")
    with pytest.raises(KeyError) as caught, storage.read_lock():
        raise failure
    assert caught.value is failure
    assert other.sees() == set()


def test_a_file_closed_while_locked_has_no_locks_left(storage: FileStorage, other: Other) -> None:
    with suppress(StorageError), storage.read_lock():
        storage.close()
    assert other.sees() == set()


Control = Callable[[int, int, bytes], Any]


def failing(commands: set[int], number: int) -> Control:
    """fcntl() on a file system that does not know these commands."""
    real = fcntl.fcntl

    def control(descriptor: int, command: int, request: bytes) -> Any:
        if command in commands:
            raise OSError(number, os.strerror(number))
        return real(descriptor, command, request)

    return control


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EINVAL, errno.EOPNOTSUPP, errno.EIO])
@pytest.mark.parametrize(
    "commands",
    [{fcntl.F_OFD_SETLK}, {fcntl.F_OFD_GETLK}, {fcntl.F_OFD_SETLK, fcntl.F_OFD_GETLK}],
    ids=["set", "get", "both"],
)
def test_without_locks_nothing_is_read(
    storage: FileStorage,
    other: Other,
    monkeypatch: pytest.MonkeyPatch,
    commands: set[int],
    number: int,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "fcntl", failing(commands, number))
        with pytest.raises(StorageError) as caught, storage.read_lock():
            pytest.fail("was let in")
    assert type(caught.value) is StorageError
    assert (caught.value.errno, caught.value.path) == (number, storage.name)
    assert str(caught.value) == (
        f"{storage.name}: cannot be locked ({os.strerror(number)}); "
        "read it without a lock: -U (force_share=True)"
    )
    assert isinstance(caught.value.__cause__, OSError)
    assert other.sees() == set()


def test_what_failed_is_reported_even_if_unlocking_fails_too(
    storage: FileStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    failure = KeyError("whatever")
    lock = storage.read_lock()
    lock.__enter__()
    monkeypatch.setattr(fcntl, "fcntl", failing({fcntl.F_OFD_SETLK}, errno.EIO))
    assert not lock.__exit__(KeyError, failure, None)  # or raises something else instead


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EACCES])
def test_both_ways_to_say_locked_are_understood(
    storage: FileStorage, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    real = fcntl.fcntl

    def control(descriptor: int, command: int, request: bytes) -> Any:
        if struct.unpack(FLOCK, request)[0] == fcntl.F_RDLCK:
            raise OSError(number, os.strerror(number))
        return real(descriptor, command, request)

    monkeypatch.setattr(fcntl, "fcntl", control)
    with pytest.raises(ImageLockedError, match="lock byte 100"), storage.read_lock():
        pytest.fail("was let in")


def test_elsewhere_nothing_is_locked(other: Other, monkeypatch: pytest.MonkeyPatch) -> None:
    other.lock(101)
    monkeypatch.setattr(sys, "platform", "darwin")
    with reader_locks(-1, "no file at all"):
        pass
