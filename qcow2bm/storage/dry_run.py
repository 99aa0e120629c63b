"""A storage for dry runs: it reads like another storage, and keeps writes in memory."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from qcow2bm.storage.interface import Storage

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
        self._pages: dict[int, bytearray] = {}
        self._size = base.size()

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
            low, high = max(start, offset), min(start + _PAGE, end)
            self._pages[number][low - start : high - start] = data[low - offset : high - offset]
        self._size = max(self._size, end)

    def change_token(self) -> object:
        """Returns None: no other writer changes a dry run."""
        return None

    def read_lock(self) -> AbstractContextManager[None]:
        """Takes no lock: the creator of the dry run holds the lock of the base."""
        return nullcontext()

    def close(self) -> None:
        """Does nothing: the base stays open."""
