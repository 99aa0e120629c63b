"""A storage as it would be after some writes, which go nowhere."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from qcow2bm.storage.interface import Storage

if TYPE_CHECKING:
    from typing_extensions import Buffer

_PAGE = 4096


class DryRunStorage:
    """Another storage with writes on top of it, in memory. It stays open when this is closed."""

    def __init__(self, base: Storage) -> None:
        """Nothing is on top of it so far."""
        self.name = base.name
        self._base = base
        self._pages: dict[int, bytearray] = {}
        self._size = base.size()

    def size(self) -> int:
        """The length in bytes, with what was written behind the end."""
        return self._size

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Fills ``buffer`` from byte ``offset`` on; returns how many bytes there were."""
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
        """Writes all ``parts``, one behind the other, from byte ``offset`` on."""
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
        """Nothing: nobody else writes here."""
        return None

    def read_lock(self) -> AbstractContextManager[None]:
        """No lock: who made this holds that of the other storage."""
        return nullcontext()

    def close(self) -> None:
        """Nothing to give back."""
