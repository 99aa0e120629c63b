"""Contents of disks, in memory or in raw files, to be compared.

old = MemoryContent(patched({100: 1}, size=4096))
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from hypothesis import strategies as st

from qcow2bm.compare.content import Reader

HOLE = 4096
GRANULE = 65536


class MemoryContent:
    """A content in memory that tells of its holes.

    Attributes:
        read: the (start, length) of everything that was read.
    """

    name = "memory"

    def __init__(self, data: bytes) -> None:
        self.data, self.size = data, len(data)
        self.read: list[tuple[int, int]] = []

    def reader(self) -> AbstractContextManager[Reader]:
        return nullcontext(self)

    def read_into(self, start: int, buffer: memoryview) -> None:
        self.read.append((start, len(buffer)))
        assert start + len(buffer) <= self.size
        buffer[:] = self.data[start : start + len(buffer)]

    def next_data(self, start: int) -> int:
        while start < self.size and not any(self.data[start : start + HOLE]):
            start += HOLE
        return min(start, self.size)

    def require_unchanged(self) -> None:
        pass

    def interrupt(self) -> None:
        pass


def write_raw(path: Path, *granules: int, size: int) -> None:
    """Writes a raw disk of zeros with holes, in which something stands in these 64 KiB granules."""
    with path.open("wb") as file:
        for number in granules:
            file.seek(number * GRANULE + 100)
            file.write(b"x")
        file.truncate(size)


def patched(places: Mapping[int, int], size: int) -> bytes:
    """Returns zeros in which some bytes are other values."""
    data = bytearray(size)
    for place, value in places.items():
        if place < size:
            data[place] = value
    return bytes(data)


def places_in(size: int) -> st.SearchStrategy[dict[int, int]]:
    """Generates a few bytes that are not zero, by their places."""
    return st.dictionaries(st.integers(0, size - 1), st.integers(1, 255), max_size=6)
