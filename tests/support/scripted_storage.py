"""A storage that does what a test says, at the n-th read."""

from __future__ import annotations

import errno
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from qcow2bm.errors import StorageError

Script = Callable[[int], int | None]
"""Called before read number n: may raise, change the bytes, or say how many to hand over."""


class ScriptedStorage:
    """An image in memory that lists every read and lets a script interfere."""

    name = "<scripted>"

    def __init__(self, data: bytes | bytearray, script: Script | None = None) -> None:
        self.data = data
        self.reads: list[tuple[int, int]] = []
        self.closed = False
        self.token: object = None
        self._script = script

    def size(self) -> int:
        return len(self.data)

    def read_into(self, offset: int, buffer: memoryview) -> int:
        number = len(self.reads)
        self.reads.append((offset, offset + len(buffer)))
        limit = self._script(number) if self._script else None
        part = self.data[offset : offset + len(buffer)][:limit]
        buffer[: len(part)] = part
        return len(part)

    def change_token(self) -> object:
        return self.token

    def read_lock(self) -> AbstractContextManager[None]:
        return nullcontext()

    def close(self) -> None:
        self.closed = True

    def bytes_read(self, start: int, length: int) -> int:
        """The number of bytes read of a range; a byte that was read twice counts twice."""
        end = start + length
        return sum(max(0, min(end, stop) - max(start, first)) for first, stop in self.reads)


class OnceAt:
    """A script that does one thing, before read number ``number``, and knows whether it did."""

    def __init__(self, number: int, action: Callable[[], int | None]) -> None:
        self.number, self._action = number, action
        self.fired = False

    def __call__(self, number: int) -> int | None:
        if number != self.number:
            return None
        self.fired = True
        return self._action()


def io_error() -> int | None:
    """Raises the error of a failing disk."""
    raise StorageError("<scripted>", 0, 0, "Input/output error", errno.EIO)


def short_read() -> int | None:
    """Reads nothing, as from a file that became shorter."""
    return 0
