"""Images in memory: bytes-like objects, of which a bytearray can be edited."""

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
        """Keeps ``data``, no copy, until it is closed."""
        self.name = name
        self._data: Buffer | None = data
        memoryview(data).cast("B")  # raises TypeError now, not at the first use

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
        """Fills ``buffer`` from byte ``offset`` on; returns how many bytes there were."""
        with self._open_view() as view, view[offset : offset + len(buffer)] as part:
            buffer[: len(part)] = part
            return len(part)

    def write(self, offset: int, parts: Sequence[Buffer]) -> None:
        """Writes all ``parts``, one behind the other, from byte ``offset`` on.

        A bytearray that somebody else has a view of cannot grow: that is a StorageError.
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
        """Memory needs none."""
        self._open_bytearray()

    def truncate(self, size: int) -> None:
        """Shortens the bytearray."""
        data = self._open_bytearray()
        try:
            del data[size:]
        except BufferError as error:
            reason = "cannot shrink while there are views of it"
            raise StorageError(self.name, 0, 0, reason, action="writing") from error

    def capacity(self) -> int | None:
        """A bytearray can grow."""
        return None

    def write_lock(self, timeout: float) -> AbstractContextManager[None]:
        """Memory has no locks."""
        self._open_bytearray()
        return nullcontext()

    @property
    def excludes_other_hosts(self) -> bool:
        """Memory is in no other host; who else uses it here, its owner knows."""
        return True

    def refresh(self) -> None:
        """Nothing of memory is cached."""
        self._open_bytearray()

    def change_token(self) -> object:
        """Nobody tells when memory changes."""
        return None

    def read_lock(self) -> AbstractContextManager[None]:
        """Memory has no locks."""
        return nullcontext()

    def close(self) -> None:
        """Leaves the bytes to their owner. May be called twice."""
        self._data = None
