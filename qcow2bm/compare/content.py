"""The content of a disk, as several threads can read it at once.

*Spec*: spec/repair.md, "Comparing".
"""

from __future__ import annotations

import os
import stat
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from qcow2bm.clusters.plan import SECTOR_SIZE
from qcow2bm.errors import ChangedWhileReadingError
from qcow2bm.storage.file import FileStorage
from qcow2bm.units import align_up

Identity = tuple[int, int]
"""Tells two files apart: device and inode, or for a block device -1 and its number."""


def identity(status: os.stat_result) -> Identity:
    """Returns the identity of a file; all names and device nodes of one file have the same."""
    is_device = stat.S_ISBLK(status.st_mode)
    return (-1, status.st_rdev) if is_device else (status.st_dev, status.st_ino)


class Reader(Protocol):
    """Reads a content, for one thread."""

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fills ``buffer`` from byte ``start`` on; all these bytes lie in the content.

        Raises:
            StorageError: reading failed.
        """
        ...

    def next_data(self, start: int) -> int:
        """Returns the first byte from ``start`` on that may not be zero; the size if all are zero.

        Raises:
            StorageError: reading failed.
        """
        ...


class Content(Protocol):
    """The content of a disk.

    Attributes:
        name: the name that messages have for it.
        size: in bytes.
    """

    name: str
    size: int

    def reader(self) -> AbstractContextManager[Reader]:
        """Returns a reader for one thread, as a context manager that may raise `StorageError`."""
        ...

    def require_unchanged(self) -> None:
        """Raises `ChangedWhileReadingError` if the content is known to have changed since."""
        ...

    def interrupt(self) -> None:
        """Makes all readers that wait for data fail."""
        ...


class RawContent:
    """A raw file or a block device; its holes are skipped, if the system tells where they are."""

    def __init__(self, storage: FileStorage) -> None:
        """Takes a storage that the caller has locked, and closes afterwards."""
        self.name = storage.name
        self._stored = storage.size()
        self.size = align_up(self._stored, SECTOR_SIZE)  # as QEMU rounds it up
        self._storage = storage
        self._token = storage.change_token()

    def reader(self) -> AbstractContextManager[Reader]:
        """See `Content`."""
        return nullcontext(self)

    def read_into(self, start: int, buffer: memoryview) -> None:
        """See `Reader`."""
        count = self._storage.read_into(start, buffer)
        if count < min(len(buffer), self._stored - start):
            raise ChangedWhileReadingError(self.name, "length")
        buffer[count:] = bytes(len(buffer) - count)

    def next_data(self, start: int) -> int:
        """See `Reader`."""
        first = self._storage.next_data(start)
        return first if first < self._stored else self.size

    def interrupt(self) -> None:
        """Does nothing: a read of a file cannot be interrupted."""

    def require_unchanged(self) -> None:
        """See `Content`."""
        if self._storage.change_token() != self._token:
            raise ChangedWhileReadingError(self.name, "content")
