"""Storages know the holes of a sparse file; what they do not know counts as data."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcow2bm.errors import StateError
from qcow2bm.storage.dry_run import DryRunStorage
from qcow2bm.storage.file import FileStorage
from qcow2bm.storage.file_object import FileObjectStorage
from qcow2bm.storage.interface import SparseStorage, as_sparse
from qcow2bm.storage.memory import MemoryStorage
from qcow2bm.storage.read_once import ReadOnceStorage
from qcow2bm.storage.write_guard import WriteGuard

MIB = 1 << 20
PAGE = 4096


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[FileStorage]:
    """A file of 8 MiB that has data in the third MiB only, and is a hole elsewhere."""
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.seek(2 * MIB)
        file.write(b"x" * MIB)
        file.truncate(8 * MIB)
    storage = FileStorage(path, writable=True)
    yield storage
    storage.close()


def extents(storage: SparseStorage, size: int) -> list[tuple[int, int]]:
    """The stretches of data, by asking for data and holes in turn."""
    found, place = [], 0
    while (start := storage.next_data(place)) < size:
        place = storage.next_hole(start)
        found.append((start, place))
    return found


def test_a_file_has_the_holes_that_the_file_system_reports(storage: FileStorage) -> None:
    assert extents(storage, 8 * MIB) == [(2 * MIB, 3 * MIB)]
    assert storage.next_data(2 * MIB + 5) == 2 * MIB + 5
    assert storage.next_hole(5) == 5
    for place in (8 * MIB, 9 * MIB):
        assert (storage.next_data(place), storage.next_hole(place)) == (8 * MIB, 8 * MIB)


def test_without_such_reports_all_bytes_are_data(
    storage: FileStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, offset: int, whence: int) -> int:
        if whence == os.SEEK_END:
            return 8 * MIB
        raise OSError(errno.EINVAL, "no such whence")

    monkeypatch.setattr(os, "lseek", refuse)
    assert extents(storage, 8 * MIB) == [(0, 8 * MIB)]
    assert (storage.next_data(9 * MIB), storage.next_hole(9 * MIB)) == (8 * MIB, 8 * MIB)


def test_a_closed_file_has_no_holes(storage: FileStorage) -> None:
    storage.close()
    for ask in (storage.next_data, storage.next_hole):
        with pytest.raises(StateError):
            ask(0)


@pytest.mark.parametrize(
    "storage", [MemoryStorage(bytearray(PAGE)), FileObjectStorage(io.BytesIO(bytes(PAGE)))]
)
def test_a_storage_that_does_not_know_its_holes_has_none(
    storage: MemoryStorage | FileObjectStorage,
) -> None:
    assert extents(as_sparse(storage), PAGE) == [(0, PAGE)]
    assert extents(as_sparse(DryRunStorage(storage)), PAGE) == [(0, PAGE)]


@pytest.mark.parametrize("wrap", [WriteGuard, ReadOnceStorage, DryRunStorage])
def test_a_storage_around_another_one_has_its_holes(
    storage: FileStorage, wrap: type[WriteGuard | ReadOnceStorage | DryRunStorage]
) -> None:
    around = wrap(storage)
    assert as_sparse(around) is around
    assert extents(around, 8 * MIB) == [(2 * MIB, 3 * MIB)]
    assert extents(as_sparse(wrap(MemoryStorage(bytearray(PAGE)))), PAGE) == [(0, PAGE)]


class Sparse(MemoryStorage):
    """Bytes in memory of which those from ``start`` to ``end`` are no hole."""

    def __init__(self, size: int, start: int, end: int) -> None:
        super().__init__(bytearray(size))
        self._start, self._end = start, end

    def next_data(self, offset: int) -> int:
        return max(offset, self._start) if offset < self._end else self.size()

    def next_hole(self, offset: int) -> int:
        return self._end if self._start <= offset < self._end else min(offset, self.size())


pages = st.integers(0, 12)


@given(pages, pages, st.lists(st.tuples(st.integers(0, 14 * PAGE), st.integers(1, 2 * PAGE))))
def test_what_a_dry_run_writes_is_no_hole(
    one: int, other: int, writes: list[tuple[int, int]]
) -> None:
    start, end = sorted((one * PAGE, other * PAGE))
    dry = DryRunStorage(Sparse(12 * PAGE, start, end))
    is_data = [start <= number * PAGE < end for number in range(20)]
    for offset, length in writes:
        dry.write(offset, [bytes(length)])
        for number in range(offset // PAGE, (offset + length - 1) // PAGE + 1):
            is_data[number] = True
    size = dry.size()
    found = extents(dry, size)
    assert found == sorted(found)
    for number in range(-(-size // PAGE)):
        byte = number * PAGE
        assert any(low <= byte < high for low, high in found) == is_data[number]
