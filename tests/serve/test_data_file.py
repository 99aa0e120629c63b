"""A block server zeroes and trims a data file, even if the file system has no such functions."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qcow2bm.errors import StorageError, UnsupportedError
from qcow2bm.serve.data_file import DataFile

SIZE = (3 << 20) + 512
Fallocate = Callable[[int, int, int, int], int]


@pytest.fixture
def file(tmp_path: Path) -> Iterator[DataFile]:
    path = tmp_path / "vm.raw"
    path.write_bytes(b"\xaa" * SIZE)
    file = DataFile(path)
    yield file
    file.close()


def content(file: DataFile) -> bytes:
    return Path(file.name).read_bytes()


def failing(*numbers: int) -> Fallocate:
    """A system call that fails in these ways, one after the other, and succeeds then."""
    left = list(numbers)

    def fallocate(*_: int) -> int:
        if not left:
            return 0
        ctypes.set_errno(left.pop(0))
        return -1

    return fallocate


@pytest.mark.parametrize("may_trim", [False, True])
@pytest.mark.parametrize("cannot", [0, errno.EOPNOTSUPP, errno.EINVAL])
@pytest.mark.parametrize(
    ("start", "length"), [(0, SIZE), (1, 1), (4096, 8192), (1000, 2 << 20), (SIZE - 1, 1), (7, 0)]
)
def test_zeroing_zeroes_what_it_says_and_no_more(
    file: DataFile,
    monkeypatch: pytest.MonkeyPatch,
    may_trim: bool,
    cannot: int,
    start: int,
    length: int,
) -> None:
    if cannot:
        monkeypatch.setattr(file, "_fallocate", failing(cannot, cannot))
    file.zero(start, length, may_trim=may_trim, is_fast=False)
    end = start + length
    assert content(file) == b"\xaa" * start + bytes(length) + b"\xaa" * (SIZE - end)


def test_trimming_keeps_the_length_and_what_is_around(file: DataFile) -> None:
    file.trim(1 << 20, SIZE - (1 << 20))
    assert len(content(file)) == SIZE
    assert content(file)[: 1 << 20] == b"\xaa" * (1 << 20)


def test_trimming_is_a_hint(file: DataFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file, "_fallocate", failing(errno.EOPNOTSUPP))
    file.trim(0, SIZE)
    assert content(file) == b"\xaa" * SIZE


def test_zeroing_that_is_to_be_fast_does_not_write(
    file: DataFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file, "_fallocate", failing(errno.EOPNOTSUPP, errno.EOPNOTSUPP))
    with pytest.raises(UnsupportedError):
        file.zero(0, SIZE, may_trim=True, is_fast=True)
    assert content(file) == b"\xaa" * SIZE


def test_an_interrupted_call_is_made_again(file: DataFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file, "_fallocate", failing(errno.EINTR, errno.EINTR))
    file.zero(0, SIZE, may_trim=True, is_fast=True)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_what_the_system_says_is_raised(
    file: DataFile, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(file, "_fallocate", failing(number))
    with pytest.raises(StorageError, match="writing 512 bytes at 0x200") as raised:
        file.zero(512, 512, may_trim=False, is_fast=False)
    assert raised.value.errno == number


def test_after_a_failed_barrier_none_succeeds_and_the_first_is_logged(
    file: DataFile, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    file.barrier()
    with monkeypatch.context() as patched:
        patched.setattr(os, "fdatasync", fail)
        with pytest.raises(StorageError):
            file.barrier()
    for _ in range(2):  # the system reports success again, although the data are lost
        with pytest.raises(StorageError, match="could not be made durable") as raised:
            file.barrier()
        assert raised.value.errno == errno.EIO
    (record,) = caplog.records
    assert record.name == "qcow2bm"
    assert record.levelname == "ERROR"
    assert file.name in record.getMessage()
