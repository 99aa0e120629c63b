"""Writing to files, on real and on failing file systems, and to memory."""

from __future__ import annotations

import errno
import os
import stat
import sys
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import qcow2bm
from qcow2bm.errors import StateError, StorageError, UnsupportedError
from qcow2bm.storage.file import FileStorage
from qcow2bm.storage.interface import WritableStorage, read_bytes
from qcow2bm.storage.memory import MemoryStorage

if sys.platform != "linux":
    pytest.skip("writing is for Linux", allow_module_level=True)

import resource

CONTENT = bytes(range(256)) * 4
MAX_PARTS = os.sysconf("SC_IOV_MAX")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def file(path: Path) -> Iterator[FileStorage]:
    storage = FileStorage(path, writable=True)
    yield storage
    storage.close()


@pytest.fixture(params=["file", "memory"])
def storage(request: pytest.FixtureRequest, path: Path) -> Iterator[WritableStorage]:
    """A file and its twin in memory."""
    in_memory = request.param == "memory"
    opened = MemoryStorage(bytearray(CONTENT)) if in_memory else FileStorage(path, writable=True)
    yield opened
    opened.close()


def content(storage: WritableStorage) -> bytes:
    return read_bytes(storage, 0, storage.size())


def overwritten(old: bytes, offset: int, new: bytes) -> bytes:
    return old[:offset].ljust(offset, b"\0") + new + old[offset + len(new) :]


# --- what both do -------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 5, 1000, 1020, 1024, 5000])
@pytest.mark.parametrize(
    "parts",
    [
        [b"abcdefgh"],
        [b"a", bytearray(b"bcd"), memoryview(b"efgh")],
        [b"", b"abcd", b"", b"efgh", b""],
        [array("I", [0x64636261, 0x68676665])],
        [memoryview(b"abcdefgh").cast("Q")],
    ],
    ids=["one", "several", "empty ones", "words", "a view of words"],
)
def test_parts_are_written_one_after_the_other(
    storage: WritableStorage, offset: int, parts: Sequence[bytes]
) -> None:
    storage.write(offset, parts)
    storage.barrier()
    assert content(storage) == overwritten(CONTENT, offset, b"abcdefgh")
    assert storage.size() == max(len(CONTENT), offset + 8)


@pytest.mark.parametrize("parts", [[], [b""], [b"", b""]])
def test_an_empty_write_writes_nothing(storage: WritableStorage, parts: list[bytes]) -> None:
    storage.write(100, parts)
    assert content(storage) == CONTENT


@pytest.mark.parametrize("count", [MAX_PARTS - 1, MAX_PARTS, MAX_PARTS + 1, 3 * MAX_PARTS + 5])
def test_more_parts_than_the_system_takes_at_once(storage: WritableStorage, count: int) -> None:
    parts = [number.to_bytes(3, "big") for number in range(count)]
    storage.write(10, parts)
    assert content(storage) == overwritten(CONTENT, 10, b"".join(parts))


@pytest.mark.parametrize("size", [0, 1, 1000, 1024])
def test_truncating_shortens_both(storage: WritableStorage, size: int) -> None:
    storage.truncate(size)
    assert content(storage) == CONTENT[:size]
    storage.write(size + 1, [b"x"])
    assert content(storage) == CONTENT[:size] + b"\0x"


def test_both_can_grow(storage: WritableStorage) -> None:
    assert storage.capacity() is None
    with storage.write_lock(0), storage.read_lock():
        assert storage.capacity() is None


def test_neither_is_written_after_it_is_closed(storage: WritableStorage) -> None:
    storage.close()
    storage.close()
    uses: list[Callable[[], object]] = [
        lambda: storage.write(0, [b"x"]),
        lambda: storage.write(0, []),
        storage.barrier,
        lambda: storage.truncate(0),
        lambda: storage.write_lock(0).__enter__(),
    ]
    for use in uses:
        with pytest.raises(StateError) as caught:
            use()
        assert caught.value.required == "open"


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("writing") / "disk"


@given(
    writes=st.lists(
        st.tuples(st.integers(0, 300), st.lists(st.binary(max_size=40), max_size=5)), max_size=5
    ),
    limit=st.integers(1, 50),
)
def test_the_twins_agree_however_little_is_written_at_once(
    scratch: Path, writes: list[tuple[int, list[bytes]]], limit: int
) -> None:
    scratch.write_bytes(CONTENT)
    memory = bytearray(CONTENT)
    file, twin = FileStorage(scratch, writable=True), MemoryStorage(memory)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pwritev", at_most(limit))
        for offset, parts in writes:
            file.write(offset, parts)
            twin.write(offset, parts)
    file.close()
    assert scratch.read_bytes() == memory


# --- files --------------------------------------------------------------------------------------

Pwritev = Callable[[int, Sequence[memoryview], int], int]


def at_most(limit: int) -> Pwritev:
    """Returns a pwritev() that writes at most that many bytes at once."""
    real = os.pwritev

    def write(descriptor: int, parts: Sequence[memoryview], offset: int) -> int:
        data = b"".join(parts)[:limit]
        return real(descriptor, [data], offset)

    return write


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """Limits the size of files of this process, to imitate a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("limit", [1, 2, 7, 100])
def test_short_writes_of_the_system_are_completed(
    file: FileStorage, path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(os, "pwritev", at_most(limit))
    file.write(1000, [b"ab", b"", b"c" * 50, b"d"])
    assert path.read_bytes() == overwritten(CONTENT, 1000, b"ab" + b"c" * 50 + b"d")


def test_a_disk_that_becomes_full_in_the_middle_of_a_write(file: FileStorage, path: Path) -> None:
    with file_size_limit(2000), pytest.raises(StorageError) as caught:
        file.write(1000, [b"x" * 600, b"y" * 600])
    error = caught.value
    assert type(error) is StorageError
    assert (error.errno, error.path, error.action) == (errno.EFBIG, str(path), "writing")
    assert error.offset + error.length == 2200
    assert path.stat().st_size == 2000
    file.truncate(len(CONTENT))
    file.write(1000, [CONTENT[1000:]])
    assert path.read_bytes() == CONTENT


def test_an_offset_that_no_file_can_have_raises_a_storage_error(file: FileStorage) -> None:
    with pytest.raises(StorageError) as caught:
        file.write((1 << 63) - 1, [b"xx"])
    assert caught.value.errno in (errno.EFBIG, errno.EINVAL)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("at", [0, 1])
def test_a_failing_write_says_where(
    file: FileStorage, monkeypatch: pytest.MonkeyPatch, number: int, at: int
) -> None:
    calls = iter([at_most(40)] * at)
    monkeypatch.setattr(os, "pwritev", lambda *arguments: next(calls, failing(number))(*arguments))
    with pytest.raises(StorageError) as caught:
        file.write(512, [b"x" * 64, b"y" * 36])
    error = caught.value
    assert type(error) is StorageError
    assert (error.errno, error.path, error.action) == (number, file.name, "writing")
    assert (error.offset, error.length) == (512 + 40 * at, 100 - 40 * at)
    assert isinstance(error.__cause__, OSError)
    assert str(error).endswith(
        f"{os.strerror(number)} (writing {error.length} bytes at {error.offset:#x})"
    )


def failing(number: int) -> Callable[..., int]:
    def fail(*arguments: object) -> int:
        raise OSError(number, os.strerror(number))

    return fail


def test_a_write_that_makes_no_progress_fails(
    file: FileStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([30, 0])  # and no third one
    monkeypatch.setattr(os, "pwritev", lambda *arguments: next(answers))
    with pytest.raises(StorageError, match="nothing could be written") as caught:
        file.write(512, [b"x" * 64])
    assert (caught.value.offset, caught.value.length) == (542, 34)
    assert (caught.value.errno, caught.value.action) == (None, "writing")


@pytest.mark.parametrize("call", ["fdatasync", "ftruncate", "fstat"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_every_other_failing_call_raises_a_storage_error(
    file: FileStorage, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    uses: dict[str, list[Callable[[], object]]] = {
        "fdatasync": [file.barrier],
        "ftruncate": [lambda: file.truncate(0)],
        "fstat": [lambda: file.truncate(0), file.capacity],
    }
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing(number))
        for use in uses[call]:
            with pytest.raises(StorageError) as caught:
                use()
            assert type(caught.value) is StorageError
            assert (caught.value.errno, caught.value.path) == (number, file.name)
            assert str(caught.value) == f"{file.name}: {os.strerror(number)}"
    assert content(file) == CONTENT


@pytest.mark.parametrize("call", ["fdatasync", "ftruncate"])
def test_no_failure_to_write_is_called_reading(
    file: FileStorage, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    monkeypatch.setattr(os, call, failing(errno.EIO))
    with pytest.raises(StorageError) as caught:
        file.barrier() if call == "fdatasync" else file.truncate(0)
    assert caught.value.action == "writing"


def test_a_barrier_asks_the_descriptor_that_wrote_and_asks_once(
    file: FileStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system reports an error only to the descriptor that wrote, and only once."""
    used: list[int] = []
    real = os.pwritev

    def write(descriptor: int, parts: Sequence[memoryview], offset: int) -> int:
        used.append(descriptor)
        return real(descriptor, parts, offset)

    monkeypatch.setattr(os, "pwritev", write)
    monkeypatch.setattr(os, "fdatasync", used.append)
    file.write(0, [b"x"])
    file.barrier()
    assert used == [file._open_descriptor()] * 2


def test_a_file_for_reading_is_not_written(path: Path) -> None:
    storage = FileStorage(path)
    with pytest.raises(StorageError) as caught:
        storage.write(0, [b"x"])
    assert caught.value.errno == errno.EBADF
    storage.close()
    assert path.read_bytes() == CONTENT


def test_a_file_that_may_not_be_written(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refuse(name: str, flags: int) -> int:
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return real(name, flags)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        with pytest.raises(StorageError) as caught:
            FileStorage(path, writable=True)
        assert caught.value.errno == errno.EACCES
        FileStorage(path).close()


@pytest.mark.parametrize("platform", ["darwin", "win32", "freebsd14"])
def test_files_are_only_read_on_other_systems(
    path: Path, monkeypatch: pytest.MonkeyPatch, platform: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", platform)
        with pytest.raises(UnsupportedError, match="other than Linux"):
            FileStorage(path, writable=True)
        with pytest.raises(UnsupportedError, match="other than Linux"):
            qcow2bm.open(path, "r+")
        storage = FileStorage(path)
        assert content(storage) == CONTENT
        storage.close()


@pytest.mark.usefixtures("file")
def test_a_missing_file_is_not_created(tmp_path: Path) -> None:
    with pytest.raises(StorageError) as caught:
        FileStorage(tmp_path / "missing", writable=True)
    assert caught.value.errno == errno.ENOENT
    assert not (tmp_path / "missing").exists()


def test_a_closed_file_has_no_capacity(file: FileStorage) -> None:
    file.close()
    with pytest.raises(StateError):
        file.capacity()


def test_a_block_device_keeps_its_size(
    file: FileStorage, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = SimpleNamespace(st_mode=stat.S_IFBLK | 0o660, st_size=0)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", lambda descriptor: device)
        assert file.capacity() == len(CONTENT)  # its stat says 0
        file.truncate(0)
    assert path.read_bytes() == CONTENT


# --- memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [bytes, memoryview], ids=["bytes", "view"])
def test_only_a_bytearray_is_written(kind: Callable[[bytes], bytes]) -> None:
    storage = MemoryStorage(kind(CONTENT))
    uses: list[Callable[[], object]] = [
        lambda: storage.write(0, [b"x"]),
        storage.barrier,
        lambda: storage.truncate(0),
        lambda: storage.write_lock(0),
    ]
    for use in uses:
        with pytest.raises(StorageError, match="only a bytearray can be edited") as caught:
            use()
        assert caught.value.action == "writing"
    assert content(storage) == CONTENT


def test_memory_with_a_view_can_be_written_but_not_grow() -> None:
    data = bytearray(CONTENT)
    storage = MemoryStorage(data)
    with memoryview(data) as view:
        storage.write(1020, [b"abcd"])
        assert view[1020:].tobytes() == b"abcd"
        with pytest.raises(StorageError, match="cannot grow while there are views") as caught:
            storage.write(1020, [b"abcde"])
        assert (caught.value.offset, caught.value.length) == (1020, 5)
        with pytest.raises(StorageError):
            storage.truncate(1000)
        storage.truncate(1024)
    assert data == CONTENT[:1020] + b"abcd"
    storage.write(1020, [b"abcde"])
    assert data[1020:] == b"abcde"
