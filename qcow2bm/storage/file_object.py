"""Images behind seekable binary file objects that the caller opened; read-only."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import BinaryIO

from qcow2bm.errors import StorageError
from qcow2bm.units import escape


class FileObjectStorage:
    """A seekable binary file object, for reading only. The caller closes it.

    Every exception of the file object becomes `StorageError`, because some file objects, such as
    compressed files, raise exceptions of their own.
    """

    def __init__(self, stream: BinaryIO) -> None:
        """Keeps ``stream`` and does not close it.

        Raises:
            StorageError: ``stream`` cannot seek.
            TypeError: ``stream`` is a text stream.
        """
        self.name = str(getattr(stream, "name", "<stream>"))
        self._stream = stream
        if isinstance(stream, io.TextIOBase):
            raise TypeError("open the image in binary mode")
        with self._own_errors(0, 0):
            if not stream.seekable():
                raise StorageError(self.name, 0, 0, "is a stream that cannot seek")

    @contextmanager
    def _own_errors(self, offset: int, length: int) -> Iterator[None]:
        try:
            yield
        except StorageError:
            raise
        except OSError as error:
            raise StorageError.from_os(error, self.name, offset, length) from error
        except Exception as error:
            reason = escape(str(error)) or type(error).__name__
            raise StorageError(self.name, offset, length, reason) from error

    def size(self) -> int:
        """The present length in bytes."""
        with self._own_errors(0, 0):
            end = self._stream.seek(0, io.SEEK_END)
            # Some file objects return None from seek().
            return end if isinstance(end, int) else int(self._stream.tell())

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Fills ``buffer`` from byte ``offset`` on; returns the number of bytes read."""
        done = 0
        with self._own_errors(offset, len(buffer)):
            self._stream.seek(offset)
            while done < len(buffer):
                data = self._stream.read(len(buffer) - done)
                if not data:
                    break
                buffer[done : done + len(data)] = data
                done += len(data)
        return done

    def change_token(self) -> object:
        """Returns None: a file object does not report changes."""
        return None

    def read_lock(self) -> AbstractContextManager[None]:
        """Takes no lock: locking is up to the caller who opened the file object."""
        return nullcontext()

    def close(self) -> None:
        """Does nothing: the caller closes the file object."""
