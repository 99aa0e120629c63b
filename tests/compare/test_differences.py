"""Comparing two contents tells exactly where they differ, whatever is a hole in them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.contents import MemoryContent, patched, places_in

from qcow2bm.compare.content import Content, RawContent
from qcow2bm.compare.differences import find_differences, find_differences_at
from qcow2bm.compare.pieces import PIECE_BYTES
from qcow2bm.errors import ChangedWhileReadingError, StorageError
from qcow2bm.storage.file import FileStorage


def dirty(octets: np.ndarray[Any, Any], bits: int) -> list[int]:
    assert len(octets) == -(-bits // 8)
    found = np.flatnonzero(np.unpackbits(octets, bitorder="little")).tolist()
    assert all(bit < bits for bit in found)
    return [int(bit) for bit in found]


def expected(old: bytes, new: bytes, granularity: int) -> list[int]:
    """The plainest way: one granule after the other."""
    return [
        number
        for number in range(-(-len(new) // granularity))
        for start in [number * granularity]
        for stop in [min(start + granularity, len(new))]
        if stop > len(old) or old[start:stop] != new[start:stop]
    ]


SECTORS = 3 * PIECE_BYTES // 512
places = places_in(3 * PIECE_BYTES)


@settings(max_examples=40, deadline=None)
@given(
    places,
    places,
    places,
    st.integers(1, SECTORS),
    st.integers(1, SECTORS),
    st.integers(9, 22),
    st.integers(1, 3),
)
def test_it_is_what_the_plainest_way_finds(
    common: dict[int, int],
    only_old: dict[int, int],
    only_new: dict[int, int],
    old_sectors: int,
    new_sectors: int,
    granularity_bits: int,
    workers: int,
) -> None:
    old = patched(common | only_old, 512 * old_sectors)
    new = patched(common | only_new, 512 * new_sectors)
    granularity = 1 << granularity_bits
    done: list[int] = []
    found = find_differences(
        MemoryContent(old), MemoryContent(new), granularity, workers=workers, progress=done.append
    )
    assert dirty(found, -(-len(new) // granularity)) == expected(old, new, granularity)
    assert sum(done) == min(len(old), len(new))


@pytest.mark.spec("SALVAGE-9")
def test_several_granularities_are_found_by_reading_once() -> None:
    old = patched({0: 1, 70_000: 2, 3 * PIECE_BYTES - 1: 3}, 3 * PIECE_BYTES)
    new = MemoryContent(patched({600_000: 1, 70_000: 2}, 3 * PIECE_BYTES + 512))
    granularities = 512, 4096, 65536, 1 << 20, 1 << 31
    found = find_differences_at(MemoryContent(old), new, granularities)
    assert len(new.read) == 3
    for granularity in granularities:
        alone = find_differences(MemoryContent(old), new, granularity)
        assert found[granularity].tolist() == alone.tolist()
        assert dirty(alone, -(-new.size // granularity)) == expected(old, new.data, granularity)


def test_what_is_a_hole_in_both_is_not_read() -> None:
    data = bytearray(64 * PIECE_BYTES)
    data[40 * PIECE_BYTES] = 1
    old, new = MemoryContent(bytes(len(data))), MemoryContent(bytes(data))
    assert dirty(find_differences(old, new, 65536), len(data) >> 16) == [40 * PIECE_BYTES >> 16]
    assert old.read == new.read == [(40 * PIECE_BYTES, PIECE_BYTES)]


class Failing(MemoryContent):
    """Fails at its n-th reading."""

    def __init__(self, data: bytes, number: int) -> None:
        super().__init__(data)
        self.number = number

    def read_into(self, start: int, buffer: memoryview) -> None:
        if len(self.read) >= self.number:
            raise StorageError(self.name, start, len(buffer), "Input/output error")
        super().read_into(start, buffer)


@pytest.mark.parametrize("which", ["old", "new"])
@pytest.mark.parametrize("number", range(8))
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_a_read_that_fails_ends_it(which: str, number: int, workers: int) -> None:
    data = b"\1" * (8 * PIECE_BYTES)
    old: Content = Failing(data, number) if which == "old" else MemoryContent(data)
    new: Content = Failing(data, number) if which == "new" else MemoryContent(data)
    with pytest.raises(StorageError, match="Input/output error"):
        find_differences(old, new, 65536, workers=workers)


# --- raw files ----------------------------------------------------------------------------------


@pytest.fixture
def raw() -> Iterator[Callable[[Path], RawContent]]:
    with ExitStack() as opened:

        def open_raw(path: Path) -> RawContent:
            storage = FileStorage(path)
            opened.callback(storage.close)
            return RawContent(storage)

        yield open_raw


def test_raw_files_with_holes(tmp_path: Path, raw: Callable[[Path], RawContent]) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    for path, places in ((old, (0, 5 << 20)), (new, (0, 9 << 20))):
        with path.open("wb") as file:
            for place in places:
                file.seek(place)
                file.write(b"x" * 4096)
            file.truncate(1 << 40)
    found = find_differences(raw(old), raw(new), 65536)
    assert dirty(found, 1 << 24) == [5 << 4, 9 << 4]


def test_a_raw_file_ends_with_a_whole_sector(
    tmp_path: Path, raw: Callable[[Path], RawContent]
) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_bytes(b"x" * 1000)
    new.write_bytes((b"x" * 1000).ljust(1024, b"\0"))
    assert raw(old).size == raw(new).size == 1024
    assert dirty(find_differences(raw(old), raw(new), 512), 2) == []
    new.write_bytes((b"x" * 1000).ljust(1024, b"\1"))
    assert dirty(find_differences(raw(old), raw(new), 512), 2) == [1]


@pytest.mark.parametrize("how", ["written", "cut"])
def test_a_raw_file_that_changes_meanwhile_is_noticed(
    tmp_path: Path, raw: Callable[[Path], RawContent], how: str
) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    for path in (old, new):
        path.write_bytes(b"x" * (2 * PIECE_BYTES))
    contents = raw(old), raw(new)
    with new.open("r+b") as file:
        if how == "cut":
            file.truncate(100)
        else:
            file.write(b"y")
    os.utime(new, ns=(1, 1))  # the clock of files is coarse
    with pytest.raises(ChangedWhileReadingError):
        find_differences(*contents, 65536)
