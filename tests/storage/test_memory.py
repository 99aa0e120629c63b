from __future__ import annotations

import errno
import io
import os
from array import array
from pathlib import Path
from typing import BinaryIO, cast

import pytest
from support.images import Stored, build_image

import qcow2bm
from qcow2bm.errors import StorageError
from qcow2bm.storage.file_object import FileObjectStorage
from qcow2bm.storage.interface import read_bytes
from qcow2bm.storage.memory import MemoryStorage

CONTENT = bytes(range(200))


class Trickle(io.RawIOBase):
    """A raw stream that reads at most three bytes at a time."""

    def __init__(self) -> None:
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + (len(CONTENT) if whence == io.SEEK_END else 0)
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        part = CONTENT[self._position : self._position + min(3, len(buffer))]
        buffer[: len(part)] = part
        self._position += len(part)
        return len(part)


class Failing(io.BytesIO):
    """A stream whose every read and seek fails."""

    name = "tape\n\x1b"

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        raise OSError(errno.EIO, "first line\nsecond line")


def stream(raw: io.RawIOBase) -> FileObjectStorage:
    return FileObjectStorage(cast(BinaryIO, raw))


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_memory_of_every_kind(kind: type[bytes]) -> None:
    storage = MemoryStorage(kind(CONTENT))
    assert (storage.size(), storage.name) == (200, "<memory>")
    assert read_bytes(storage, 10, 20) == CONTENT[10:30]
    with storage.read_lock():
        pass
    storage.close()
    storage.close()


def test_memory_is_counted_in_bytes_whatever_it_holds() -> None:
    words = array("H", [0x0101, 0x0202])
    storage = MemoryStorage(memoryview(words), name="words")
    assert (storage.size(), storage.name) == (4, "words")
    assert read_bytes(storage, 1, 2) == b"\1\2"


def test_memory_is_not_copied() -> None:
    data = bytearray(4)
    storage = MemoryStorage(data)
    data[2] = 7
    assert read_bytes(storage, 0, 4) == b"\0\0\7\0"


def test_the_owner_can_change_memory_while_an_image_is_read_from_it() -> None:
    data = bytearray(build_image(Stored(table=[b"\x55"] * 3), size=3 * 4096 << 16).data)
    image = qcow2bm.open(data)
    bitmap = image.bitmaps["daily"]
    extents = bitmap.extents()
    next(extents)
    data.append(0)  # would be a BufferError if a view of it were kept
    assert bitmap.count() > 0
    image.close()
    data.clear()
    with pytest.raises(qcow2bm.StateError):
        bitmap.count()


def test_short_reads_of_a_stream_are_joined() -> None:
    storage = stream(Trickle())
    assert storage.size() == 200
    assert read_bytes(storage, 10, 100) == CONTENT[10:110]
    buffer = bytearray(10)
    assert storage.read_into(195, memoryview(buffer)) == 5
    assert buffer == CONTENT[195:] + bytes(5)


def test_a_stream_stays_open() -> None:
    owned = io.BytesIO(CONTENT)
    storage = FileObjectStorage(owned)
    with storage.read_lock():
        assert read_bytes(storage, 0, 8) == CONTENT[:8]
    storage.close()
    storage.close()
    assert not owned.closed


def test_a_storage_has_the_name_of_its_file_object(tmp_path: Path) -> None:
    assert FileObjectStorage(io.BytesIO()).name == "<stream>"
    path = tmp_path / "disk"
    path.write_bytes(b"")
    with open(path, "rb") as file:
        assert FileObjectStorage(file).name == str(path)
        with open(file.fileno(), "rb", closefd=False) as by_number:
            assert FileObjectStorage(by_number).name == str(file.fileno())


def test_a_text_stream_is_refused() -> None:
    with pytest.raises(TypeError, match="binary mode"):
        FileObjectStorage(cast(BinaryIO, io.StringIO("QFI")))


def test_a_stream_that_cannot_seek_is_refused() -> None:
    receiving, sending = os.pipe()
    os.close(sending)
    with open(receiving, "rb") as pipe, pytest.raises(StorageError, match="cannot seek") as caught:
        FileObjectStorage(pipe)
    assert (caught.value.path, caught.value.errno) == (str(receiving), None)


def test_a_stream_that_cannot_be_read_raises_a_storage_error(tmp_path: Path) -> None:
    with open(tmp_path / "new", "wb") as file:
        storage = FileObjectStorage(file)
        assert storage.size() == 0
        with pytest.raises(StorageError, match="read") as caught:
            read_bytes(storage, 0, 1)
    assert isinstance(caught.value.__cause__, io.UnsupportedOperation)


def test_a_failing_stream_says_where_in_one_line() -> None:
    storage = FileObjectStorage(Failing())
    with pytest.raises(StorageError) as caught:
        read_bytes(storage, 512, 64)
    error = caught.value
    assert (error.errno, error.path) == (errno.EIO, "tape\n\x1b")
    assert (error.offset, error.length) == (512, 64)
    assert str(error).isprintable()
    with pytest.raises(StorageError) as caught:
        storage.size()
    assert (caught.value.errno, caught.value.offset, caught.value.length) == (errno.EIO, 0, 0)


def test_a_stream_that_its_owner_closed_raises_a_storage_error() -> None:
    owned = io.BytesIO(CONTENT)
    storage = FileObjectStorage(owned)
    owned.close()
    for use in (storage.size, lambda: read_bytes(storage, 0, 1)):
        with pytest.raises(StorageError):
            use()
