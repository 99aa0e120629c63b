"""Images in memory: bytes-like objects. Only a bytearray can be edited."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from qcow2bm.errors import StateError, StorageError

if TYPE_CHECKING:
    from typing_extensions import Buffer


class MemoryStorage:
    """An image that is a bytes-like object; a bytearray can be edited."""

    def __init__(self, data: Buffer, name: str = "<memory>") -> None:
        """Keeps ``data`` without copying it, until `close`.

        Raises:
            TypeError: ``data`` is not bytes-like.
        """
        self.name = name
        self._data: Buffer | None = data
        memoryview(data).cast("B")  # raises TypeError here instead of at the first use

    def _open_view(self) -> memoryview:
        if self._data is None:
            raise StateError("closed", "open")
        return memoryview(self._data).cast("B")

    def _open_bytearray(self) -> bytearray:
        if self._data is None:
            raise StateError("closed", "open")
        if not isinstance(self._data, bytearray):
            raise StorageError(self.name, 0, 0, "only a bytearray can be edited", action="writing")
        return self._data

    def size(self) -> int:
        """The length in bytes."""
        with self._open_view() as view:
            return len(view)

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Fills ``buffer`` from byte ``offset`` on; returns the number of bytes read."""
        with self._open_view() as view, view[offset : offset + len(buffer)] as part:
            buffer[: len(part)] = part
            return len(part)

    def write(self, offset: int, parts: Sequence[Buffer]) -> None:
        """Writes all ``parts``, one after the other, from byte ``offset`` on.

        Raises:
            StorageError: the data are not a bytearray, or the bytearray would have to grow while a
                memoryview of it exists.
        """
        data = self._open_bytearray()
        new = b"".join(parts)
        try:
            data.extend(bytes(max(0, offset + len(new) - len(data))))
        except BufferError as error:
            reason = "cannot grow while there are views of it"
            raise StorageError(self.name, offset, len(new), reason, action="writing") from error
        data[offset : offset + len(new)] = new

    def barrier(self) -> None:
        """Does nothing: memory is as durable as it gets."""
        self._open_bytearray()

    def truncate(self, size: int) -> None:
        """Shortens the bytearray; raises `StorageError` while a memoryview of it exists."""
        data = self._open_bytearray()
        try:
            del data[size:]
        except BufferError as error:
            reason = "cannot shrink while there are views of it"
            raise StorageError(self.name, 0, 0, reason, action="writing") from error

    def capacity(self) -> int | None:
        """Returns None: a bytearray can grow."""
        return None

    def write_lock(self, timeout: float) -> AbstractContextManager[None]:
        """Takes no lock: memory has none."""
        self._open_bytearray()
        return nullcontext()

    @property
    def excludes_other_hosts(self) -> bool:
        """Always true: no other host has access to this memory."""
        return True

    def refresh(self) -> None:
        """Does nothing: memory is not cached."""
        self._open_bytearray()

    def change_token(self) -> object:
        """Returns None: changes of memory are not counted."""
        return None

    def read_lock(self) -> AbstractContextManager[None]:
        """Takes no lock: memory has none."""
        return nullcontext()

    def close(self) -> None:
        """Drops the reference to the data. May be called twice."""
        self._data = None
