"""The interfaces that every storage has to the layers above, and functions for all storages.

`Storage` is for reading, and `WritableStorage` is for editing, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from qcow2bm.errors import ShortReadError

if TYPE_CHECKING:
    from typing_extensions import Buffer


@runtime_checkable
class Storage(Protocol):
    """The bytes of an image. Implement this protocol to read images from other places than files.

    Every failure must be raised as ``qcow2bm.StorageError(name, offset, length, reason)``.

    Attributes:
        name: the name of the storage in messages, usually a path.
    """

    name: str

    def size(self) -> int:
        """Returns the present length in bytes."""
        ...

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Fills ``buffer`` from byte ``offset`` on, and returns the number of bytes read.

        The number may be below ``len(buffer)`` only if the storage ends there.
        """
        ...

    def change_token(self) -> object:
        """Returns a value that changes with every write to the storage; None if there is none.

        The library compares the value because two writers, one after the other, can leave the same
        metadata at the same place.
        """
        ...

    def read_lock(self) -> AbstractContextManager[None]:
        """Returns a context manager, which the library holds while it reads and no other may write.

        Entering raises `qcow2bm.ImageLockedError` if another process writes. A storage without
        locks returns ``contextlib.nullcontext()``.
        """
        ...

    def close(self) -> None:
        """Closes what the storage opened itself. May be called twice."""
        ...


@runtime_checkable
class WritableStorage(Storage, Protocol):
    """A Storage that can be edited. Every failure must be raised as `qcow2bm.StorageError`.

    *Guarantees* that an implementation must give: a sector of 512 bytes is written whole or not at
    all. All that was written before a successful `barrier` survives a loss of power. After a failed
    barrier, the library assumes nothing about the writes since the last successful one.
    """

    @property
    def excludes_other_hosts(self) -> bool:
        """Whether `write_lock` excludes all other users of the image, on other hosts as well."""
        ...

    def write(self, offset: int, parts: Sequence[Buffer]) -> None:
        """Writes all ``parts``, one after the other, from byte ``offset`` on.

        If ``parts`` reach beyond the end of the storage, the storage grows.
        """
        ...

    def barrier(self) -> None:
        """Makes all earlier writes durable, and returns when they are."""
        ...

    def truncate(self, size: int) -> None:
        """Removes the bytes from ``size`` on, if the storage can shrink."""
        ...

    def capacity(self) -> int | None:
        """Returns the length in bytes that the storage cannot exceed; None if it can grow."""
        ...

    def write_lock(self, timeout: float) -> AbstractContextManager[None]:
        """Returns a context manager, which the library holds while the image is open for editing.

        The lock excludes every other user of the image, but `read_lock` of this storage must still
        work. If another process still uses the image after ``timeout`` seconds, entering raises
        `qcow2bm.ImageLockedError`. A storage without locks returns ``contextlib.nullcontext()``.
        """
        ...

    def refresh(self) -> None:
        """Drops cached data, so that later reads return what another host has written.

        The library calls it with the lock held, before its first read, if another host may have
        written to the image.
        """
        ...


OtherUse = Literal["no", "reader", "writer"]
"""Whether another process uses an image, and how: see `qcow2bm.Image.use_by_another_process`."""


@runtime_checkable
class LockedStorage(Protocol):
    """A storage whose locks show how other processes use it; a `Storage` need not be one."""

    def use_by_another_process(self) -> OtherUse | None:
        """Returns how another process uses the storage at this moment; None if that is unknown."""
        ...


def use_by_another_process(storage: object) -> OtherUse | None:
    """Returns how another process uses a storage; None if the storage cannot tell."""
    return storage.use_by_another_process() if isinstance(storage, LockedStorage) else None


@runtime_checkable
class SparseStorage(Protocol):
    """A storage that knows its holes, which read as zeros; a `Storage` need not be one."""

    def next_data(self, offset: int) -> int:
        """Returns the first byte at or after ``offset`` that is in no hole; the size if none is.

        Raises:
            StorageError: the storage could not be asked.
        """
        ...

    def next_hole(self, offset: int) -> int:
        """Returns the first byte at or after ``offset`` that is in a hole; the size if none is.

        Raises:
            StorageError: the storage could not be asked.
        """
        ...


class _WithoutHoles:
    """A storage that does not know its holes, as a `SparseStorage` that has none."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def next_data(self, offset: int) -> int:
        return min(offset, self._storage.size())

    def next_hole(self, offset: int) -> int:
        return self._storage.size()


def as_sparse(storage: Storage) -> SparseStorage:
    """Returns what knows the holes of a storage: the storage itself, if it knows any."""
    return storage if isinstance(storage, SparseStorage) else _WithoutHoles(storage)


def read_exactly(storage: Storage, offset: int, buffer: memoryview) -> None:
    """Fills ``buffer`` from byte ``offset`` on.

    Raises:
        ShortReadError: the storage ends before ``buffer`` is full.
        StorageError: reading failed.
    """
    if storage.read_into(offset, buffer) != len(buffer):
        raise ShortReadError(storage.name, offset, len(buffer))


def read_bytes(storage: Storage, offset: int, length: int) -> bytes:
    """Reads exactly ``length`` bytes from byte ``offset`` on; raises as `read_exactly` does."""
    buffer = bytearray(length)
    read_exactly(storage, offset, memoryview(buffer))
    return bytes(buffer)
