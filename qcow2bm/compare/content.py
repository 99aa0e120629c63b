"""What a disk holds, to be read by several threads at once.

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
"""Tells a file from others: device and inode, or of a block device its number."""


def identity(status: os.stat_result) -> Identity:
    """The same for all names of a file, and of a block device for all its nodes."""
    is_device = stat.S_ISBLK(status.st_mode)
    return (-1, status.st_rdev) if is_device else (status.st_dev, status.st_ino)


class Reader(Protocol):
    """One thread's way to a content."""

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fills ``buffer`` from byte ``start`` on, which all lies in the content.

        Raises:
            StorageError: reading failed.
        """
        ...

    def next_data(self, start: int) -> int:
        """Where there can be data from ``start`` on, before which all is zero; else the size.

        Raises:
            StorageError: reading failed.
        """
        ...


class Content(Protocol):
    """What a disk holds.

    Attributes:
        name: what messages call it.
        size: in bytes.
    """

    name: str
    size: int

    def reader(self) -> AbstractContextManager[Reader]:
        """A reader for one thread; raises `StorageError`."""
        ...

    def require_unchanged(self) -> None:
        """Raises `ChangedWhileReadingError` if somebody is known to have written to it."""
        ...

    def interrupt(self) -> None:
        """Lets readers that wait for something fail."""
        ...


class RawContent:
    """A raw file or a block device. Its holes are skipped where the system tells of them."""

    def __init__(self, storage: FileStorage) -> None:
        """The caller holds the storage's lock, and closes it."""
        self.name = storage.name
        self._stored = storage.size()
        self.size = align_up(self._stored, SECTOR_SIZE)  # as QEMU has it
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
        """See `Content`: the system waits for as long as it does."""

    def require_unchanged(self) -> None:
        """See `Content`."""
        if self._storage.change_token() != self._token:
            raise ChangedWhileReadingError(self.name, "content")
