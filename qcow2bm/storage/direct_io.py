"""A block device read and written past the system's page cache.

The cache knows nothing of what another host wrote to a shared device. Reading from it gives back
what was there before, and writing a few bytes through it writes their whole page, stale neighbours
included.
"""

from __future__ import annotations

import errno
import io
import mmap
import os
import stat
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qcow2bm.units import align_up

if sys.platform == "linux":
    import fcntl

if TYPE_CHECKING:
    from typing_extensions import Buffer

_PIECE = 1 << 20  # bytes moved at once: a multiple of every logical block size
_FILE_BLOCK = 4096  # what a regular file takes on any disk
_BLKSSZGET = 0x1268  # ioctl: the logical block size


class DirectFile:
    """Unbuffered reads and writes of any offset and length; for Linux.

    What fails is an OSError. One write at a time: a block written in part is read before, and
    what somebody else wrote to it in between would be lost.
    """

    def __init__(self, path: str) -> None:
        """Opens a block device, or for tests a regular file, which grows by whole blocks."""
        self._file = io.FileIO(path, "r+", opener=_open_direct)
        try:
            self._block = _block_size(self._file.fileno())
        except BaseException:
            self._file.close()
            raise

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Fills ``buffer`` from byte ``offset`` on; returns how many bytes there were."""
        descriptor, block = self._file.fileno(), self._block
        pages = _pages(min(len(buffer) + 2 * block, _PIECE))
        done = 0
        while done < len(buffer):
            skipped = (offset + done) % block
            left = len(buffer) - done
            blocks = pages[: align_up(skipped + left, block)]
            count = os.preadv(descriptor, [blocks], offset + done - skipped)
            count = min(count - skipped, left)
            if count <= 0:
                break
            buffer[done : done + count] = blocks[skipped : skipped + count]
            done += count
        return done

    def write(self, offset: int, parts: Sequence[Buffer]) -> None:
        """Writes all ``parts``, one behind the other, from byte ``offset`` on.

        No block is written but those they lie in, so that a sector stays written whole or not
        at all.
        """
        block = self._block
        views = [memoryview(part).cast("B") for part in parts]
        end = offset + sum(map(len, views))
        views.reverse()  # what comes next is at the end
        while offset < end:
            first = offset - offset % block
            stop = min(first + _PIECE, end)
            blocks = _pages(align_up(stop - first, block))
            for partial in {at - at % block for at in (offset, stop) if at % block}:
                self.read_into(partial, blocks[partial - first :][:block])
            _move(views, blocks[offset - first : stop - first])
            self._write_blocks(first, blocks)
            offset = stop

    def _write_blocks(self, offset: int, blocks: memoryview) -> None:
        while blocks:
            done = os.pwritev(self._file.fileno(), [blocks], offset)
            done -= done % self._block  # the rest has to begin with a whole block
            if not done:
                raise OSError(errno.EIO, "nothing could be written")
            offset += done
            blocks = blocks[done:]

    def barrier(self) -> None:
        """Returns once everything written so far is on the disk."""
        os.fdatasync(self._file.fileno())

    def close(self) -> None:
        """Closes the device. May be called twice."""
        self._file.close()


def _open_direct(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_DIRECT | os.O_CLOEXEC | os.O_NONBLOCK)


def _block_size(descriptor: int) -> int:
    if not stat.S_ISBLK(os.fstat(descriptor).st_mode):
        return _FILE_BLOCK
    return int.from_bytes(fcntl.ioctl(descriptor, _BLKSSZGET, bytes(4)), sys.byteorder)


def _pages(length: int) -> memoryview:
    """Zeroed memory aligned as a device asks for; private, as a fork must not share it.

    It goes with the last view of it: closing it would fail where a traceback still has one.
    """
    return memoryview(mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE))


def _move(views: list[memoryview], target: memoryview) -> None:
    """Fills ``target`` with what ``views`` begin with, the last one first, and takes it away."""
    while target:
        view = views.pop()
        count = min(len(view), len(target))
        target[:count] = view[:count]
        target = target[count:]
        if count < len(view):
            views.append(view[count:])
