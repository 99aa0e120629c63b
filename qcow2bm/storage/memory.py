"""Images in memory, and behind file objects somebody else opened."""

from __future__ import annotations

import io
from contextlib import AbstractContextManager, nullcontext
from typing import BinaryIO

from qcow2bm.errors import StorageError
from qcow2bm.units import escape


class MemoryStorage:
    """An image that is a bytes-like object."""

    def __init__(self, data: bytes | bytearray | memoryview, name: str = "<memory>") -> None:
        """Keeps a view of ``data``, no copy."""
        self.name = name
        self._data = memoryview(data).cast("B")

    def size(self) -> int:
        """The length in bytes."""
        return len(self._data)

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Fills ``buffer`` from byte ``offset`` on; returns how many bytes there were."""
        part = self._data[offset : offset + len(buffer)]
        buffer[: len(part)] = part
        return len(part)

    def change_token(self) -> object:
        """Nobody tells when memory changes."""
        return None

    def read_lock(self) -> AbstractContextManager[None]:
        """Memory has no locks."""
        return nullcontext()

    def close(self) -> None:
        """Leaves the bytes to their owner."""


class StreamStorage:
    """A seekable binary file object, which its owner closes."""

    def __init__(self, stream: BinaryIO) -> None:
        """Raises `StorageError` if ``stream`` cannot seek, TypeError if it is a text stream."""
        self.name = str(getattr(stream, "name", "<stream>"))
        self._stream = stream
        if isinstance(stream, io.TextIOBase):
            raise TypeError("open the image in binary mode")
        if not stream.seekable():
            raise StorageError(self.name, 0, 0, "is a stream that cannot seek")

    def size(self) -> int:
        """The present length in bytes."""
        try:
            return self._stream.seek(0, io.SEEK_END)
        except OSError as error:
            raise StorageError.from_os(error, self.name, 0, 0) from error
        except ValueError as error:  # its owner closed it
            raise StorageError(self.name, 0, 0, escape(str(error))) from error

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Fills ``buffer`` from byte ``offset`` on; returns how many bytes there were."""
        done = 0
        try:
            self._stream.seek(offset)
            while done < len(buffer):
                data = self._stream.read(len(buffer) - done)
                if not data:
                    break
                buffer[done : done + len(data)] = data
                done += len(data)
        except OSError as error:
            raise StorageError.from_os(error, self.name, offset, len(buffer)) from error
        except ValueError as error:  # its owner closed it
            raise StorageError(self.name, offset, len(buffer), escape(str(error))) from error
        return done

    def change_token(self) -> object:
        """A stream does not tell when it changes."""
        return None

    def read_lock(self) -> AbstractContextManager[None]:
        """The owner of the stream does the locking."""
        return nullcontext()

    def close(self) -> None:
        """Leaves the stream to its owner."""
