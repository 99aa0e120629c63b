"""A storage for dry runs: it reads like another storage, and keeps writes in memory."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from qcow2bm.storage.interface import Storage, as_sparse

if TYPE_CHECKING:
    from typing_extensions import Buffer

_PAGE = 4096


class DryRunStorage:
    """Another storage, the base, as it would be after some writes. The base is never written to.

    Closing a `DryRunStorage` does not close the base.
    """

    def __init__(self, base: Storage) -> None:
        """Begins with the content of ``base``."""
        self.name = base.name
        self._base = base
        self._holes = as_sparse(base)
        self._pages: dict[int, bytearray] = {}
        self._numbers: list[int] = []  # the keys of _pages, ascending
        self._size = self._base_size = base.size()

    def size(self) -> int:
        """The length in bytes, including writes beyond the end of the base."""
        return self._size

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Fills ``buffer`` from byte ``offset`` on; returns the number of bytes read."""
        length = max(0, min(len(buffer), self._size - offset))
        found = self._base.read_into(offset, buffer[:length])
        buffer[found:length] = bytes(length - found)
        for number in range(offset // _PAGE, (offset + length + _PAGE - 1) // _PAGE):
            if number in self._pages:
                start = number * _PAGE
                low, high = max(start, offset), min(start + _PAGE, offset + length)
                page = self._pages[number]
                buffer[low - offset : high - offset] = page[low - start : high - start]
        return length

    def write(self, offset: int, parts: Sequence[Buffer]) -> None:
        """Keeps all ``parts`` in memory, one after the other, from byte ``offset`` on."""
        data = b"".join(parts)
        end = offset + len(data)
        for number in range(offset // _PAGE, (end + _PAGE - 1) // _PAGE):
            start = number * _PAGE
            if number not in self._pages:
                page = bytearray(_PAGE)
                self._base.read_into(start, memoryview(page))
                self._pages[number] = page
                insort(self._numbers, number)
            low, high = max(start, offset), min(start + _PAGE, end)
            self._pages[number][low - start : high - start] = data[low - offset : high - offset]
        self._size = max(self._size, end)

    def next_data(self, offset: int) -> int:
        """The first byte at or after ``offset`` that is in no hole of the base, or was written."""
        found = self._holes.next_data(offset) if offset < self._base_size else self._size
        if found >= self._base_size:
            found = self._size
        place = bisect_left(self._numbers, offset // _PAGE)
        if place < len(self._numbers):
            found = min(found, max(offset, self._numbers[place] * _PAGE))
        return min(found, self._size)

    def next_hole(self, offset: int) -> int:
        """The first byte at or after ``offset`` that is in a hole of the base, and not written."""
        while offset < self._size:
            if offset // _PAGE in self._pages:
                offset = (offset // _PAGE + 1) * _PAGE
            elif offset < self._base_size and (found := self._holes.next_hole(offset)) > offset:
                offset = found
            else:
                break
        return min(offset, self._size)

    def change_token(self) -> object:
        """Returns None: no other writer changes a dry run."""
        return None

    def read_lock(self) -> AbstractContextManager[None]:
        """Takes no lock: the creator of the dry run holds the lock of the base."""
        return nullcontext()

    def close(self) -> None:
        """Does nothing: the base stays open."""
