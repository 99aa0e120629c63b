from __future__ import annotations

import errno
import os
import signal
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from qcow2bm.errors import ShortReadError, StateError, StorageError
from qcow2bm.storage.file import FileStorage
from qcow2bm.storage.interface import read_bytes, read_exactly

CONTENT = bytes(range(256)) * 4


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def storage(path: Path) -> Iterator[FileStorage]:
    storage = FileStorage(path)
    yield storage
    storage.close()


@pytest.fixture(autouse=True)
def _no_descriptor_is_left_open() -> Iterator[None]:
    before = os.listdir("/proc/self/fd")
    yield
    assert os.listdir("/proc/self/fd") == before


@pytest.fixture
def _no_waiting() -> Iterator[None]:
    """Makes a test fail if it blocks, as opening a FIFO does without a writer."""

    def interrupt(number: int, frame: object) -> None:
        raise AssertionError("it waits")

    previous = signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


def refusal(path: str | Path) -> StorageError:
    with pytest.raises(StorageError) as caught:
        FileStorage(path)
    assert (caught.value.path, caught.value.offset, caught.value.length) == (str(path), 0, 0)
    assert str(caught.value).isprintable()
    return caught.value


@pytest.mark.usefixtures("_no_waiting")
@pytest.mark.parametrize("kind", ["FIFO", "socket", "directory", "character device"])
def test_only_a_regular_file_or_block_device_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)  # the name of a socket must be short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        os.mkfifo("FIFO")
        os.mkdir("directory")
        path = os.devnull if kind == "character device" else kind
        error = refusal(path)
    assert str(error) == (f"{path}: is a {kind}; an image is a regular file or a block device")
    assert error.errno is None


@pytest.mark.usefixtures("_no_waiting")
def test_a_file_replaced_by_a_fifo_while_it_is_opened_is_refused(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "fifo")
    seen = os.stat(path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", lambda path: seen)
        error = refusal(tmp_path / "fifo")
    assert "is a FIFO" in str(error)


def test_an_unknown_kind_of_file_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", lambda path: SimpleNamespace(st_mode=0o170000))
        error = refusal(path)
    assert "is something else" in str(error)


def test_a_block_device_is_opened(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = SimpleNamespace(st_mode=stat.S_IFBLK | 0o660, st_size=0)
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", lambda path: device)
        patch.setattr(os, "fstat", lambda descriptor: device)
        storage = FileStorage(path)
    assert storage.size() == len(CONTENT)  # its stat says 0
    storage.close()


def test_a_missing_file(tmp_path: Path) -> None:
    error = refusal(tmp_path / "missing")
    assert error.errno == errno.ENOENT
    assert isinstance(error.__cause__, FileNotFoundError)
    assert str(error) == f"{tmp_path}/missing: {os.strerror(errno.ENOENT)}"


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "a\n\x1b[31mb", "x" * 5000])
def test_a_path_with_a_nul_byte_is_refused(name: str) -> None:
    assert refusal(name)


@pytest.mark.parametrize("call", ["open", "fstat"])
@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.EMFILE])
def test_a_failure_to_open(
    path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        error = refusal(path)
    assert (error.errno, error.reason) == (number, os.strerror(number))


def test_a_symbolic_link_leads_to_the_image(path: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(path)
    storage = FileStorage(tmp_path / "link")
    assert read_bytes(storage, 0, 4) == CONTENT[:4]
    storage.close()


def test_it_is_opened_for_reading_only_and_not_inherited(storage: FileStorage) -> None:
    descriptor = storage._open_descriptor()
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        os.pwrite(descriptor, b"x", 0)
    assert not os.get_inheritable(descriptor)


def test_the_size_is_the_present_one(storage: FileStorage, path: Path) -> None:
    assert storage.size() == 1024
    os.truncate(path, 5000)
    assert storage.size() == 5000


def test_short_reads_of_the_system_are_joined(
    storage: FileStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: real(fd, [buffers[0][:7]], at))
    assert read_bytes(storage, 3, 100) == CONTENT[3:103]


@pytest.mark.parametrize("with_preadv", [True, False])
@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, 0), (0, 1024), (5, 17), (1000, 24), (1000, 100), (1024, 1), (1 << 40, 8)],
)
def test_reading_ends_where_the_file_does(
    storage: FileStorage,
    monkeypatch: pytest.MonkeyPatch,
    offset: int,
    length: int,
    with_preadv: bool,
) -> None:
    if not with_preadv:
        monkeypatch.delattr(os, "preadv")
    buffer = bytearray(b"?" * (length + 1))
    expected = CONTENT[offset : offset + length]
    assert storage.read_into(offset, memoryview(buffer)[:length]) == len(expected)
    assert buffer == expected + b"?" * (length + 1 - len(expected))


def test_too_few_bytes_are_a_short_read(storage: FileStorage) -> None:
    with pytest.raises(ShortReadError) as caught:
        read_exactly(storage, 1000, memoryview(bytearray(25)))
    error = caught.value
    assert (error.path, error.offset, error.length) == (storage.name, 1000, 25)
    assert (error.errno, error.reason) == (errno.EIO, "the file ended too early")
    assert str(error).endswith("the file ended too early (reading 25 bytes at 0x3e8)")


@pytest.mark.parametrize("with_preadv", [True, False])
def test_a_failing_read_says_where(
    storage: FileStorage, monkeypatch: pytest.MonkeyPatch, with_preadv: bool
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    if not with_preadv:
        monkeypatch.delattr(os, "preadv")
    monkeypatch.setattr(os, "preadv" if with_preadv else "read", fail)
    with pytest.raises(StorageError) as caught:
        read_bytes(storage, 512, 64)
    error = caught.value
    assert type(error) is StorageError
    assert (error.errno, error.path) == (errno.EIO, storage.name)
    assert (error.offset, error.length) == (512, 64)
    assert error.__cause__
    assert str(error).endswith(f"{os.strerror(errno.EIO)} (reading 64 bytes at 0x200)")


def test_a_forgotten_file_is_closed_with_a_warning(path: Path) -> None:
    with pytest.warns(ResourceWarning, match="unclosed file"):
        FileStorage(path)  # not kept, so its descriptor must be closed


def test_the_change_token_stays_the_same_without_a_write(storage: FileStorage, path: Path) -> None:
    token = storage.change_token()
    assert token is not None
    path.read_bytes()
    assert read_bytes(storage, 0, 8) == CONTENT[:8]
    assert storage.change_token() == token


@pytest.mark.parametrize("change", ["length", "time"])
def test_the_change_token_changes_with(storage: FileStorage, path: Path, change: str) -> None:
    token, before = storage.change_token(), path.stat()
    if change == "length":
        os.truncate(path, 1023)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    else:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert storage.change_token() != token


def test_the_change_token_changes_with_a_write_whose_time_was_set_back(
    storage: FileStorage, path: Path
) -> None:
    token, before = storage.change_token(), path.stat()
    while path.stat().st_ctime_ns == before.st_ctime_ns:  # within one tick of the clock
        path.write_bytes(CONTENT[::-1])
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_mtime_ns, after.st_size) == (before.st_mtime_ns, before.st_size)
    assert storage.change_token() != token


def test_a_block_device_has_no_change_token(
    storage: FileStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = SimpleNamespace(st_mode=stat.S_IFBLK | 0o660, st_mtime_ns=1, st_ctime_ns=1, st_size=0)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", lambda descriptor: device)
        assert storage.change_token() is None


def test_a_closed_file_raises_a_state_error(storage: FileStorage) -> None:
    storage.close()
    storage.close()
    for use in (
        storage.size,
        storage.change_token,
        storage.read_lock,
        lambda: read_bytes(storage, 0, 1),
    ):
        with pytest.raises(StateError) as caught:
            use()
        assert caught.value.required == "open"
