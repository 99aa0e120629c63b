"""The locks of readers and writers against those of other open file descriptions, as in QEMU."""

from __future__ import annotations

import errno
import io
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from support.images import small_image

import qcow2bm
from qcow2bm.errors import ImageLockedError, StateError, StorageError
from qcow2bm.storage import locks
from qcow2bm.storage.file import FileStorage
from qcow2bm.storage.interface import read_bytes, use_by_another_process
from qcow2bm.storage.locks import held_locks
from qcow2bm.storage.memory import MemoryStorage
from qcow2bm.storage.write_guard import WriteGuard

if sys.platform != "linux":
    pytest.skip("open file description locks are Linux's", allow_module_level=True)

import fcntl

FLOCK = "=hh4xqqi4x"  # type, whence, start, length, pid
BYTES = (*range(100, 104), *range(200, 204))
READER = {100, 201, 203}
WRITER = {100, 101, 103, 201, 203}


class Other:
    """Another open file description of the image."""

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
    path.write_bytes(bytes(512))  # locked bytes need not exist
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


@pytest.fixture
def writable(path: Path) -> Iterator[FileStorage]:
    storage = FileStorage(path, writable=True)
    yield storage
    storage.close()


def test_a_reader_holds_three_shared_locks_and_releases_them(
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
        (200, "does not let others read it (lock byte 200)"),
    ],
)
def test_a_reader_is_refused(storage: FileStorage, other: Other, byte: int, reason: str) -> None:
    other.lock(byte)
    with pytest.raises(ImageLockedError) as caught, storage.read_lock():
        pytest.fail("was let in")
    assert caught.value.held == reason
    assert (caught.value.path, caught.value.errno) == (storage.name, errno.EAGAIN)
    assert f"{storage.name}: in use by another process, which {reason}" in str(caught.value)
    assert "force_share=True" in str(caught.value)
    assert other.sees() == set()


@pytest.mark.parametrize("byte", [100, 102, 201, 202, 203])
def test_locks_of_other_readers_are_no_conflict(
    storage: FileStorage, other: Other, byte: int
) -> None:
    other.lock(byte)
    with storage.read_lock():
        assert other.sees() == READER  # a description does not see its own locks
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


def test_a_reader_and_a_running_writer_exclude_each_other(
    storage: FileStorage, other: Other
) -> None:
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
        assert other.sees() == READER  # the locks of the first reader are still held
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
def test_a_reader_is_refused_if_the_file_system_has_no_locks(
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
        "read it without locks with force_share=True"
    )
    assert isinstance(caught.value.__cause__, OSError)
    assert other.sees() == set()


def test_the_first_failure_is_reported_even_if_unlocking_fails_too(
    storage: FileStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    failure = KeyError("whatever")
    lock = storage.read_lock()
    lock.__enter__()
    monkeypatch.setattr(fcntl, "fcntl", failing({fcntl.F_OFD_SETLK}, errno.EIO))
    assert not lock.__exit__(KeyError, failure, None)  # or raises something else instead


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EACCES])
def test_both_error_numbers_for_a_held_lock_are_understood(
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


@pytest.mark.parametrize("role", [locks.READER, locks.WRITER], ids=["reader", "writer"])
def test_nothing_is_locked_on_other_systems(
    other: Other, monkeypatch: pytest.MonkeyPatch, role: locks.Role
) -> None:
    other.lock(101)
    monkeypatch.setattr(sys, "platform", "darwin")
    with io.FileIO(os.devnull) as file, held_locks(file, os.devnull, role):
        pass


# --- writers ------------------------------------------------------------------------------------


def test_a_writer_holds_five_shared_locks_and_releases_them(
    writable: FileStorage, other: Other
) -> None:
    for _ in range(2):
        with writable.write_lock(0):
            assert other.sees() == WRITER
            assert other.sees(fcntl.F_RDLCK) == set()
        assert other.sees() == set()


@pytest.mark.parametrize(
    ("byte", "reason"),
    [
        (101, "is writing to it (lock byte 101)"),
        (103, "may resize it (lock byte 103)"),
        (200, "does not let others read it (lock byte 200)"),
        (201, "reads it and does not let others write (lock byte 201)"),
        (203, "uses it and does not let others resize it (lock byte 203)"),
    ],
)
def test_a_writer_is_refused(writable: FileStorage, other: Other, byte: int, reason: str) -> None:
    other.lock(byte)
    with pytest.raises(ImageLockedError) as caught, writable.write_lock(0):
        pytest.fail("was let in")
    error = caught.value
    assert (error.held, error.action, error.errno) == (reason, "writing", errno.EAGAIN)
    assert f"{writable.name}: in use by another process, which {reason}" in str(error)
    assert (error.hint, error.lock_byte) == ("lock-timeout", byte)
    assert "wait for it with lock_timeout" in str(error)
    assert "force_share" not in str(error)
    assert other.sees() == set()


@pytest.mark.parametrize("byte", [100, 102, 202])
def test_a_lock_that_lets_others_write_is_no_conflict(
    writable: FileStorage, other: Other, byte: int
) -> None:
    other.lock(byte)
    with writable.write_lock(0):
        assert other.sees() == WRITER


@pytest.mark.parametrize("byte", BYTES)
def test_an_exclusive_lock_is_named_to_a_writer(
    writable: FileStorage, other: Other, byte: int
) -> None:
    other.lock(byte, exclusive=True)
    if byte in (102, 202):  # WRITE_UNCHANGED is no concern of a writer either
        with writable.write_lock(0):
            return
    with pytest.raises(ImageLockedError, match=rf"\(lock byte {byte}\)"), writable.write_lock(0):
        pytest.fail("was let in")
    assert other.sees() == set()


def test_a_writer_and_every_other_user_exclude_each_other(
    path: Path, storage: FileStorage, writable: FileStorage, other: Other
) -> None:
    second = FileStorage(path, writable=True)
    with writable.write_lock(0):
        with pytest.raises(ImageLockedError, match="lock byte 101"), second.write_lock(0):
            pytest.fail("a second writer was let in")
        with pytest.raises(ImageLockedError, match="lock byte 101"), storage.read_lock():
            pytest.fail("a reader was let in")
        assert other.sees() == WRITER  # a refused lock does not change the held ones
    with storage.read_lock():
        with pytest.raises(ImageLockedError, match="lock byte 201"), second.write_lock(0):
            pytest.fail("was let in beside a reader")
        assert other.sees() == READER
    with second.write_lock(0):
        assert other.sees() == WRITER
    second.close()


def test_a_writer_reads_under_its_own_locks(writable: FileStorage, other: Other) -> None:
    with writable.write_lock(0):
        for _ in range(2):
            with writable.read_lock():
                assert other.sees() == WRITER
            assert other.sees() == WRITER
    with writable.read_lock():
        assert other.sees() == READER  # after writing, it reads like any other reader
    assert other.sees() == set()


def test_one_storage_has_one_writer(writable: FileStorage, other: Other) -> None:
    """Two writers on one descriptor would not conflict, and the first to end would unlock both."""
    with writable.write_lock(0):
        with pytest.raises(StateError), writable.write_lock(0):
            pytest.fail("was let in twice")
        assert other.sees() == WRITER
    assert other.sees() == set()


def test_a_failure_while_writing_leaves_nothing_locked(writable: FileStorage, other: Other) -> None:
    failure = KeyError("whatever")
    with pytest.raises(KeyError) as caught, writable.write_lock(0):
        raise failure
    assert caught.value is failure
    assert other.sees() == set()
    with writable.write_lock(0), writable.read_lock():
        assert other.sees() == WRITER


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EINVAL, errno.EOPNOTSUPP, errno.EIO])
@pytest.mark.parametrize(
    "commands",
    [{fcntl.F_OFD_SETLK}, {fcntl.F_OFD_GETLK}, {fcntl.F_OFD_SETLK, fcntl.F_OFD_GETLK}],
    ids=["set", "get", "both"],
)
def test_a_writer_is_refused_if_the_file_system_has_no_locks(
    writable: FileStorage,
    other: Other,
    monkeypatch: pytest.MonkeyPatch,
    commands: set[int],
    number: int,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "fcntl", failing(commands, number))
        # No wait helps: the file system has no locks.
        with pytest.raises(StorageError) as caught, writable.write_lock(1e9):
            pytest.fail("was let in")
    assert type(caught.value) is StorageError
    assert (caught.value.errno, caught.value.path) == (number, writable.name)
    assert caught.value.action == "writing"
    assert str(caught.value) == (
        f"{writable.name}: cannot be locked ({os.strerror(number)}); "
        "if no other process uses it, write without locks with locking=False"
    )
    assert other.sees() == set()


def test_without_locking_no_lock_is_taken_or_probed(
    path: Path, other: Other, monkeypatch: pytest.MonkeyPatch
) -> None:
    for byte in BYTES:
        other.lock(byte)
    monkeypatch.setattr(fcntl, "fcntl", failing({fcntl.F_OFD_SETLK, fcntl.F_OFD_GETLK}, 1))
    storage = FileStorage(path, writable=True, locking=False)
    with storage.write_lock(0), storage.read_lock():
        pass
    with storage.read_lock():
        pass
    storage.close()


REPLACED = "was replaced by another file while it was being opened; open it again"


@pytest.mark.parametrize("locking", [True, False])
@pytest.mark.parametrize(
    ("replace", "reason"),
    [
        (lambda path, moved: path.write_bytes(moved.read_bytes()), REPLACED),
        (lambda path, moved: path.mkdir(), REPLACED),
        (lambda path, moved: None, os.strerror(errno.ENOENT)),
    ],
    ids=["another file", "something else", "nothing"],
)
def test_a_file_replaced_before_it_is_locked_is_refused(
    path: Path,
    tmp_path: Path,
    locking: bool,
    replace: Callable[[Path, Path], object],
    reason: str,
) -> None:
    storage = FileStorage(path, writable=True, locking=locking)
    moved = path.rename(tmp_path / "moved")
    replace(path, moved)
    with pytest.raises(StorageError) as caught, storage.write_lock(0):
        pytest.fail("was let in")
    assert type(caught.value) is StorageError
    assert (caught.value.path, caught.value.reason) == (str(path), reason)
    observer = Other(moved)
    assert observer.sees() == set()
    os.close(observer.descriptor)
    storage.close()


def test_a_file_that_moved_behind_a_symbolic_link_is_the_same_file(
    path: Path, tmp_path: Path, writable: FileStorage
) -> None:
    path.symlink_to(path.rename(tmp_path / "moved"))
    with writable.write_lock(0):
        pass


class Clock:
    """Replaces the module time: `sleep` advances the time and triggers the next event."""

    def __init__(self, *events: Callable[[], object]) -> None:
        self.now = 1000.0
        self.sleeps: list[float] = []
        self._events = list(events)

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.now += seconds
        if self._events:
            self._events.pop(0)()


def test_a_writer_waits_until_no_other_process_uses_the_image(
    path: Path,
    storage: FileStorage,
    writable: FileStorage,
    other: Other,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reader = storage.read_lock()
    reader.__enter__()
    seen = []
    clock = Clock(
        lambda: seen.append(other.sees()),
        lambda: reader.__exit__(None, None, None),
        lambda: pytest.fail("went on waiting"),
    )
    monkeypatch.setattr(locks, "time", clock)
    with writable.write_lock(1):
        assert other.sees() == WRITER
    assert seen == [
        READER
    ]  # it holds no lock while it sleeps: otherwise two waiting writers would deadlock
    assert len(clock.sleeps) == 2


def test_a_wait_is_logged_once(
    path: Path,
    writable: FileStorage,
    other: Other,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    other.lock(101)
    caplog.set_level("INFO", "qcow2bm")
    monkeypatch.setattr(locks, "time", Clock())
    with pytest.raises(ImageLockedError), writable.write_lock(1.5):
        pass
    assert caplog.messages == [
        f"{path}: waiting up to 1.5 s for the lock for writing: another process is writing to it "
        "(lock byte 101)"
    ]


def test_a_lock_without_a_wait_is_not_logged(
    writable: FileStorage, other: Other, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "qcow2bm")
    with writable.write_lock(1):
        pass
    other.lock(101)
    with pytest.raises(ImageLockedError), writable.write_lock(0):
        pass
    assert caplog.messages == []


@pytest.mark.parametrize("number", range(len(WRITER)))
def test_an_interrupt_while_locks_are_released_leaves_none(
    writable: FileStorage, other: Other, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    real, unlocked = fcntl.fcntl, 0

    def interrupt(descriptor: int, command: int, request: bytes) -> Any:
        nonlocal unlocked
        if struct.unpack(FLOCK, request)[0] == fcntl.F_UNLCK:
            unlocked += 1
            if unlocked == number + 1:
                raise KeyboardInterrupt
        return real(descriptor, command, request)

    lock = writable.write_lock(0)
    lock.__enter__()
    assert other.sees() == WRITER
    monkeypatch.setattr(fcntl, "fcntl", interrupt)
    with pytest.raises(KeyboardInterrupt):
        lock.__exit__(None, None, None)
    monkeypatch.undo()
    assert other.sees() == set()


@pytest.mark.parametrize("timeout", [0, -1, 0.001, 1])
def test_after_the_timeout_the_error_names_the_lock(
    writable: FileStorage, other: Other, monkeypatch: pytest.MonkeyPatch, timeout: float
) -> None:
    other.lock(101)
    clock = Clock()
    monkeypatch.setattr(locks, "time", clock)
    with pytest.raises(ImageLockedError, match="lock byte 101"), writable.write_lock(timeout):
        pytest.fail("was let in")
    assert bool(clock.sleeps) == (timeout > 0)
    assert max(0, timeout) <= sum(clock.sleeps) <= max(0, timeout) + 0.03
    assert other.sees() == set()


def test_an_interrupted_wait_leaves_nothing_locked(
    writable: FileStorage, other: Other, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    other.lock(101)
    monkeypatch.setattr(locks, "time", Clock(interrupt))
    with pytest.raises(KeyboardInterrupt), writable.write_lock(1):
        pytest.fail("was let in")
    assert other.sees() == set()


def test_writers_that_wait_for_each_other_all_get_their_turn(path: Path) -> None:
    """Each writer increments a number in the file, in two steps that must not interleave."""
    path.write_bytes(bytes(8))

    def add(times: int) -> None:
        for _ in range(times):
            storage = FileStorage(path, writable=True)
            with storage.write_lock(60):
                number = int.from_bytes(read_bytes(storage, 0, 8), "big")
                storage.write(0, [(number + 1).to_bytes(8, "big")])
            storage.close()

    with ThreadPoolExecutor(3) as threads:
        for done in [threads.submit(add, 4) for _ in range(3)]:
            done.result()
    assert int.from_bytes(path.read_bytes(), "big") == 12


# --- whether another process uses an image ------------------------------------------------------


@pytest.mark.spec("LOCK-11")
@pytest.mark.parametrize("byte", BYTES)
def test_another_process_is_a_writer_if_a_reader_would_be_refused(
    storage: FileStorage, other: Other, byte: int
) -> None:
    assert storage.use_by_another_process() == "no"
    other.lock(byte)
    expected = "writer" if byte in (101, 103, 200) else "reader"
    assert storage.use_by_another_process() == expected
    assert other.sees() == set()  # it locked nothing itself


@pytest.mark.spec("LOCK-11")
def test_own_locks_are_not_those_of_another_process(
    storage: FileStorage, writable: FileStorage
) -> None:
    with storage.read_lock():
        assert storage.use_by_another_process() == "no"
        assert writable.use_by_another_process() == "reader"
    with writable.write_lock(0):
        assert writable.use_by_another_process() == "no"
        assert storage.use_by_another_process() == "writer"


@pytest.mark.spec("LOCK-11")
def test_where_there_are_no_locks_it_is_not_known(
    storage: FileStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    assert storage.use_by_another_process() is None
    monkeypatch.setattr(sys, "platform", "darwin")
    assert storage.use_by_another_process() is None


@pytest.mark.spec("LOCK-11")
def test_a_storage_that_is_no_file_cannot_tell() -> None:
    assert use_by_another_process(MemoryStorage(b"")) is None
    assert use_by_another_process(WriteGuard(MemoryStorage(bytearray()))) is None


@pytest.mark.spec("LOCK-11")
def test_a_guard_asks_its_storage(writable: FileStorage, other: Other) -> None:
    guard = WriteGuard(writable)
    other.lock(100)
    assert use_by_another_process(guard) == "reader"


@pytest.mark.spec("LOCK-11")
def test_an_image_is_asked_at_any_time(path: Path, other: Other) -> None:
    path.write_bytes(small_image().data)
    with qcow2bm.open(path, force_share=True) as image:
        answers = [image.use_by_another_process()]
        other.lock(101)
        answers.append(image.use_by_another_process())
        assert image.bitmaps["daily"].status == "valid"
    assert answers == ["no", "writer"]
    with pytest.raises(StateError):
        image.use_by_another_process()


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_a_second_image_of_this_process_is_told_from_a_running_machine(
    path: Path, other: Other, mode: str
) -> None:
    path.write_bytes(small_image().data)
    with qcow2bm.open(path, "r+"):
        with pytest.raises(ImageLockedError, match="in use by this process itself") as caught:
            qcow2bm.open(path, mode)
        assert caught.value.is_own
        assert pickle.loads(pickle.dumps(caught.value)).is_own
    other.lock(101)
    with pytest.raises(ImageLockedError, match="is a VM running on it") as caught:
        qcow2bm.open(path, mode)
    assert not caught.value.is_own


def test_a_forked_process_does_not_take_the_locks_of_its_parent_for_its_own(path: Path) -> None:
    path.write_bytes(small_image().data)
    with qcow2bm.open(path, "r+"):
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            try:
                qcow2bm.open(path)
            except ImageLockedError as error:
                os.write(writing, b"own" if error.is_own else b"of another process")
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        os.close(writing)
        with open(reading, "rb") as pipe:
            assert pipe.read() == b"of another process"
