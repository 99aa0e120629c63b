"""What the library needs of a storage: reading, and for edits writing and barriers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from qcow2bm.errors import ShortReadError

if TYPE_CHECKING:
    from typing_extensions import Buffer


@runtime_checkable
class Storage(Protocol):
    """Where an image's bytes come from. Implement it to read images from elsewhere.

    Every failure is raised as ``qcow2bm.StorageError(name, offset, length, reason)``. Besides
    the methods there has to be an attribute ``name``: what messages call it, mostly a path.
    """

    name: str

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


@runtime_checkable
class WritableStorage(Storage, Protocol):
    """A Storage that can be edited. Every failure is raised as `qcow2bm.StorageError`.

    *Guarantees* asked for: a sector of 512 bytes is written whole or not at all, and all that was
    written before a `barrier` that returned survives a loss of power. Once a barrier has failed,
    nothing is known of what was written since the last good one.
    """

    @property
    def excludes_other_hosts(self) -> bool:
        """Whether `write_lock` keeps everybody away, on other hosts as well."""
        ...

    def write(self, offset: int, parts: Sequence[Buffer]) -> None:
        """Writes all ``parts``, one behind the other, from byte ``offset`` on.

        The storage grows where that is beyond its end.
        """
        ...

    def barrier(self) -> None:
        """Returns once everything written so far is durable."""
        ...

    def truncate(self, size: int) -> None:
        """Gives back what lies behind byte ``size``, where the storage can."""
        ...

    def capacity(self) -> int | None:
        """The length in bytes beyond which it cannot grow; None if it can."""
        ...

    def write_lock(self, timeout: float) -> AbstractContextManager[None]:
        """Held while the image is open for editing; keeps every other user away.

        `read_lock` must be usable meanwhile. Raises `qcow2bm.ImageLockedError` on entry if
        somebody uses the image for longer than ``timeout`` seconds. A storage without locks
        returns ``contextlib.nullcontext()``.
        """
        ...

    def refresh(self) -> None:
        """Forgets all that is cached here, so that what another host wrote is read from now on.

        Called with the lock held, before the first read, after the image was in other hands.
        """
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
