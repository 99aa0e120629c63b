from __future__ import annotations

import gzip
import io
import mmap
import sys
from array import array
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcow2bm.errors import StorageError, UnsupportedError
from qcow2bm.storage.file import FileStorage
from qcow2bm.storage.file_object import FileObjectStorage
from qcow2bm.storage.interface import Storage, WritableStorage, read_bytes
from qcow2bm.storage.memory import MemoryStorage
from qcow2bm.storage.sources import open_source, open_writable

if TYPE_CHECKING:
    from qcow2bm.storage.sources import Source


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        (b"", MemoryStorage),
        (bytearray(), MemoryStorage),
        (memoryview(b""), MemoryStorage),
        (io.BytesIO(), FileObjectStorage),
    ],
)
def test_each_source_has_its_storage(source: Source, kind: type[Storage]) -> None:
    storage = open_source(source)
    assert type(storage) is kind
    assert isinstance(storage, Storage)


def test_paths_and_open_files(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"x")
    for source in (path, str(path)):
        storage = open_source(source)
        assert type(storage) is FileStorage
        assert isinstance(storage, Storage)
        assert storage.name == str(path)
        storage.close()
    with open(path, "rb") as buffered, open(path, "rb", buffering=0) as raw:
        assert type(open_source(buffered)) is type(open_source(raw)) is FileObjectStorage


def test_a_storage_is_returned_as_it_is() -> None:
    storage = MemoryStorage(b"")
    assert open_source(storage) is storage


@pytest.mark.parametrize("source", [None, 3, object(), ["path"]])
def test_other_objects_are_refused(source: Any) -> None:
    with pytest.raises(TypeError, match=f"cannot open {type(source).__name__}: need a path"):
        open_source(source)


class ReadOnly:
    """A `Storage` that is not a `WritableStorage`."""

    name = "<read-only>"

    def size(self) -> int:
        return 0

    def read_into(self, offset: int, buffer: memoryview) -> int:
        return 0

    def change_token(self) -> object:
        return None

    def read_lock(self) -> AbstractContextManager[None]:
        return nullcontext()

    def close(self) -> None:
        pass


linux = pytest.mark.skipif(sys.platform != "linux", reason="writing files is for Linux")


@linux
@pytest.mark.parametrize("kind", [Path, str])
@pytest.mark.parametrize("locking", [True, False])
def test_paths_are_opened_for_writing(
    tmp_path: Path, kind: type[Path | str], locking: bool
) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"abc")
    storage, reader = open_writable(kind(path), locking=locking), FileStorage(path)
    assert isinstance(storage, WritableStorage)
    assert (type(storage), storage.name) == (FileStorage, str(path))
    with storage.write_lock(0):
        storage.write(1, [b"x"])
        if not locking:
            with reader.read_lock():  # nothing is locked
                pass
    storage.close()
    reader.close()
    assert path.read_bytes() == b"axc"


@linux
@pytest.mark.parametrize("kind", ["missing", "directory"])
def test_a_path_that_cannot_be_written(tmp_path: Path, kind: str) -> None:
    (tmp_path / "directory").mkdir()
    with pytest.raises(StorageError, match=kind):
        open_writable(tmp_path / kind)
    assert not (tmp_path / "missing").exists()


def test_a_bytearray_is_written() -> None:
    data = bytearray(b"abc")
    storage = open_writable(data)
    assert isinstance(storage, MemoryStorage)
    storage.write(2, [b"xy"])
    assert data == b"abxy"


def test_a_writable_storage_is_returned_as_it_is() -> None:
    storage = MemoryStorage(bytearray())
    assert open_writable(storage) is storage


@pytest.mark.parametrize(
    "source",
    [b"abc", memoryview(bytearray(3)), array("B", b"abc"), io.BytesIO(b"abc"), ReadOnly()],
    ids=lambda source: type(source).__name__,
)
def test_a_source_that_can_only_be_read_is_refused_for_writing(source: Source) -> None:
    open_source(source)
    with pytest.raises(UnsupportedError) as caught:
        open_writable(source)
    name = type(source).__name__
    assert caught.value.feature == f"editing {name}: only paths, bytearrays and storages"


def test_an_open_file_is_refused_for_writing(tmp_path: Path) -> None:
    """The caller's file object may have a buffer with other content."""
    path = tmp_path / "disk"
    path.write_bytes(b"abc")
    with open(path, "r+b") as buffered, open(path, "r+b", buffering=0) as raw:
        for source in (buffered, raw):
            with pytest.raises(UnsupportedError, match=f"editing {type(source).__name__}"):
                open_writable(source)


@pytest.mark.parametrize("source", [None, 3, object(), ["path"]])
def test_other_objects_are_refused_for_writing(source: Any) -> None:
    with pytest.raises(TypeError, match=f"cannot open {type(source).__name__}: need a path"):
        open_writable(source)


WORDS = array("Q", range(100))
CONTENT = WORDS.tobytes()


@pytest.mark.parametrize(
    "source",
    [
        WORDS,
        np.frombuffer(CONTENT, np.uint8),
        np.arange(100, dtype=np.uint64).reshape(10, 10),
        memoryview(CONTENT).cast("H"),
    ],
    ids=["array", "bytes of numpy", "numbers of numpy", "view"],
)
def test_every_bytes_like_object_is_read_as_bytes(source: Source) -> None:
    storage = open_source(source)
    assert storage.size() == 800
    assert read_bytes(storage, 3, 500) == CONTENT[3:503]
    storage.close()


def test_a_mapped_file_can_be_closed_by_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(CONTENT)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        storage = open_source(mapped)
        assert storage.size() == 800
        assert read_bytes(storage, 3, 500) == CONTENT[3:503]
        storage.close()  # or leaving this block would fail


def test_bytes_that_are_not_contiguous_are_refused() -> None:
    source: Any = np.frombuffer(CONTENT, np.uint8)[::2]
    with pytest.raises(TypeError, match="cannot open ndarray: need a path"):
        open_source(source)


class Partial:
    """A file object that lacks some methods."""

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return offset

    def read(self, size: int = -1) -> bytes:
        return b""


class Odd(Partial):
    """A file object whose methods return values that no binary file returns."""

    def __init__(self, answer: object) -> None:
        self.answer = answer

    def seekable(self) -> bool:
        return True

    def read(self, size: int = -1) -> Any:
        return self.answer


def test_an_object_that_only_seeks_and_reads_is_refused() -> None:
    source: Any = Partial()
    with pytest.raises(TypeError, match="cannot open Partial: need a path"):
        open_source(source)


@pytest.mark.parametrize("answer", ["text", 3, b"more than was wanted", object()])
def test_a_file_object_that_does_not_read_bytes_raises_a_storage_error(answer: object) -> None:
    source: Any = Odd(answer)
    with pytest.raises(StorageError) as caught:
        read_bytes(open_source(source), 0, 8)
    assert (caught.value.offset, caught.value.length) == (0, 8)


PACKED = gzip.compress(bytes(range(256)) * 64, mtime=0)


def test_a_compressed_stream_is_read() -> None:
    with gzip.GzipFile(fileobj=io.BytesIO(PACKED)) as stream:
        storage = open_source(stream)  # type: ignore[arg-type]
        assert storage.size() == 256 * 64
        assert read_bytes(storage, 256 * 5 + 7, 3) == b"\7\x08\x09"


@pytest.mark.parametrize(
    "packed",
    [
        PACKED[: len(PACKED) // 2],
        PACKED[:-8] + bytes(8),
        PACKED[:10] + b"\xff" * 50,
        b"no gzip" + PACKED,
    ],
    ids=["truncated", "wrong sum", "corrupt", "something else"],
)
def test_a_broken_compressed_stream_raises_a_storage_error(packed: bytes) -> None:
    with gzip.GzipFile(fileobj=io.BytesIO(packed)) as stream:
        storage = open_source(stream)  # type: ignore[arg-type]
        for use in (storage.size, lambda: read_bytes(storage, 0, 256 * 64 + 1)):
            with pytest.raises(StorageError) as caught:
                use()
            assert str(caught.value).isprintable()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sources") / "disk"


@given(data=st.binary(max_size=100), offset=st.integers(0, 150), length=st.integers(0, 150))
def test_all_storages_read_the_same(path: Path, data: bytes, offset: int, length: int) -> None:
    path.write_bytes(data)
    expected = data[offset : offset + length]
    with open(path, "rb", buffering=0) as raw:
        for source in (path, data, io.BytesIO(data), raw):
            storage = open_source(source)
            buffer = bytearray(length)
            assert storage.size() == len(data)
            assert storage.read_into(offset, memoryview(buffer)) == len(expected)
            assert buffer == expected.ljust(length, b"\0")
            storage.close()
