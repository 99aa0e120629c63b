"""A storage in memory that lists every call and fails at the call a test names, as real disks fail.

    storage = FaultyStorage(data, Fault(17, errno.EIO))

Half a write is half of its sectors: one sector is written whole or not at all.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from qcow2bm.errors import StorageError
from qcow2bm.storage import file
from qcow2bm.storage.memory import MemoryStorage
from qcow2bm.units import ceil_div

if TYPE_CHECKING:
    import pytest
    from typing_extensions import Buffer

SECTOR = 512


class Fault(NamedTuple):
    """A fault: call ``number`` fails, and with ``is_sticky`` every later call of the same name.

    A write that fails has written ``share`` of its sectors all the same.
    """

    number: int
    error: int | BaseException = errno.EIO
    is_sticky: bool = False
    share: float = 0

    def strike(self) -> None:
        """Raises what the storage raises."""
        if isinstance(self.error, BaseException):
            raise self.error
        raise StorageError("<faulty>", 0, 0, os.strerror(self.error), self.error)


_WRITE_FAULTS = [
    Fault(0, errno.EIO),
    Fault(0, errno.EIO, is_sticky=True),
    Fault(0, errno.ENOSPC, share=0.5),
    Fault(0, errno.ENOSPC, is_sticky=True, share=0.5),
    Fault(0, errno.EIO, share=1),
]
_OTHER_FAULTS = [Fault(0, errno.EIO), Fault(0, errno.EIO, is_sticky=True)]


def faults_at(calls: Sequence[str]) -> Iterator[Fault]:
    """Each kind of fault at each of the calls."""
    for number, call in enumerate(calls):
        for fault in _WRITE_FAULTS if call == "write" else _OTHER_FAULTS:
            yield fault._replace(number=number)


class FaultyStorage:
    """An image in memory that lists every call, and fails where its fault says.

    When a barrier fails, ``keeps`` says of the number of every sector written since the last good
    one whether it reached the disk. The others are as they were, also for a reader from now on,
    and later barriers succeed: so Linux may do after a failed fdatasync.
    """

    name = "<faulty>"
    excludes_other_hosts = True

    def __init__(
        self,
        data: bytearray,
        fault: Fault | None = None,
        *,
        is_watched: bool = True,
        keeps: Callable[[int], bool] = lambda sector: True,
    ) -> None:
        self.data = data
        self.fault = fault
        self.calls: list[str] = []
        self._memory = MemoryStorage(data, self.name)
        self._durable = bytes(data)
        self._is_watched = is_watched
        self._keeps = keeps

    @property
    def effects(self) -> list[str]:
        """The calls that change something, or claim to have made it last."""
        return [call for call in self.calls if call in ("write", "barrier", "truncate")]

    @property
    def was_hit(self) -> bool:
        """Whether the fault has happened."""
        return self.fault is not None and self.fault.number < len(self.calls)

    def _is_struck(self, call: str) -> bool:
        number = len(self.calls)
        self.calls.append(call)
        fault = self.fault
        if fault is None or number < fault.number:
            return False
        return number == fault.number or (fault.is_sticky and call == self.calls[fault.number])

    def _enter(self, call: str) -> None:
        if self._is_struck(call):
            assert self.fault
            self.fault.strike()

    def size(self) -> int:
        self._enter("size")
        return self._memory.size()

    def read_into(self, offset: int, buffer: memoryview) -> int:
        self._enter("read_into")
        return self._memory.read_into(offset, buffer)

    def change_token(self) -> object:
        self._enter("change_token")
        return self.calls.count("write") if self._is_watched else None

    @contextmanager
    def read_lock(self) -> Iterator[None]:
        self._enter("read_lock")
        yield

    def close(self) -> None:
        self._memory.close()

    def write(self, offset: int, parts: Sequence[Buffer]) -> None:
        if not self._is_struck("write"):
            self._memory.write(offset, parts)
            return
        assert self.fault
        data = b"".join(parts)
        stop = sectors_of(offset, len(data), self.fault.share)
        self._memory.write(offset, [data[:stop]])
        self.fault.strike()

    def barrier(self) -> None:
        if not self._is_struck("barrier"):
            self._durable = bytes(self.data)
            return
        assert self.fault
        self._drop_sectors()
        self.fault.strike()

    def _drop_sectors(self) -> None:
        old = self._durable.ljust(len(self.data), b"\0")
        end = len(self._durable)
        for start in range(0, len(old), SECTOR):
            sector = slice(start, start + SECTOR)
            if self.data[sector] == old[sector]:
                continue
            if self._keeps(start // SECTOR):
                end = max(end, min(start + SECTOR, len(old)))
            else:
                self.data[sector] = old[sector]
        del self.data[end:]

    def truncate(self, size: int) -> None:
        self._enter("truncate")
        self._memory.truncate(size)

    def capacity(self) -> int | None:
        self._enter("capacity")
        return None

    def refresh(self) -> None:
        self._enter("refresh")

    @contextmanager
    def write_lock(self, timeout: float) -> Iterator[None]:
        self._enter("write_lock")
        yield


def sectors_of(offset: int, length: int, share: float) -> int:
    """The bytes from ``offset`` on that are a share of the sectors that a write touches."""
    first, last = offset // SECTOR, ceil_div(offset + length, SECTOR)
    stop = (first + int((last - first) * share)) * SECTOR
    return max(0, min(stop - offset, length))


class FailingRead:
    """One read of files fails: the one that ``left`` counts down to; none while it is 0."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Takes the place of the function that reads from files."""
        self.left = 0
        self._read = file._pread_into
        monkeypatch.setattr(file, "_pread_into", self._fail_or_read)

    def _fail_or_read(self, descriptor: int, buffer: memoryview, offset: int) -> int:
        self.left -= 1
        if self.left == 0:
            raise OSError(5, "Input/output error")
        return self._read(descriptor, buffer, offset)
