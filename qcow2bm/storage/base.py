"""What the library needs of a storage, and exact reading on top of it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

from qcow2bm.errors import ShortReadError


@runtime_checkable
class Storage(Protocol):
    """Where an image's bytes come from. Implement it to read images from elsewhere.

    Every failure is raised as `qcow2bm.StorageError`.
    """

    name: str
    """What messages call it: mostly a path."""

    def size(self) -> int:
        """The present length in bytes."""
        ...

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Fills ``buffer`` from byte ``offset`` on and returns how many bytes it got.

        Fewer than ``len(buffer)`` only where the storage ends.
        """
        ...

    def change_token(self) -> object:
        """Something that differs once the storage was written to, or None if that is unknown.

        Bitmap metadata can come back to the same bytes at the same place after two writers.
        """
        ...

    def read_lock(self) -> AbstractContextManager[None]:
        """Held while the library reads and needs to know that nobody writes.

        Raises `qcow2bm.ImageLockedError` on entry if somebody does. A storage without locks
        returns ``contextlib.nullcontext()``.
        """
        ...

    def close(self) -> None:
        """Gives back what was opened. May be called twice."""
        ...


def read_exactly(storage: Storage, offset: int, buffer: memoryview) -> None:
    """Fills ``buffer`` from byte ``offset`` on.

    Raises:
        ShortReadError: the storage ends before.
        StorageError: reading failed.
    """
    if storage.read_into(offset, buffer) != len(buffer):
        raise ShortReadError(storage.name, offset, len(buffer))


def read_bytes(storage: Storage, offset: int, length: int) -> bytes:
    """Exactly ``length`` bytes from byte ``offset`` on; raises as `read_exactly` does."""
    buffer = bytearray(length)
    read_exactly(storage, offset, memoryview(buffer))
    return bytes(buffer)
