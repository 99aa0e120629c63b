"""Direct input and output: reading and writing a block device without the system's page cache.

If another host writes to a shared device, the page cache of this host does not notice. A read from
the cache would return the old bytes. A write of a few bytes through the cache would write the whole
page around these bytes, including old bytes.
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

_PIECE = 1 << 20  # bytes read or written at once: a multiple of every logical block size
_FILE_BLOCK = 4096  # bytes: an alignment that a regular file accepts on any disk
_BLKSSZGET = 0x1268  # ioctl: the logical block size


class DirectFile:
    """Direct reads and writes at any offset and of any length, on Linux only.

    Every failure is raised as OSError. To write a part of a block, a `DirectFile` reads the block
    and writes it back. So only one thread or process at a time may write.
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
        """Fills ``buffer`` from byte ``offset`` on; returns the number of bytes read."""
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
        """Writes all ``parts``, one after the other, from byte ``offset`` on.

        Only the blocks in which ``parts`` lie are written, so every sector is written whole or not
        at all.
        """
        block = self._block
        views = [memoryview(part).cast("B") for part in parts]
        end = offset + sum(map(len, views))
        views.reverse()  # the next part is the last in the list
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
            done -= done % self._block  # the next write must begin at a block
            if not done:
                raise OSError(errno.EIO, "nothing could be written")
            offset += done
            blocks = blocks[done:]

    def barrier(self) -> None:
        """Makes all earlier writes durable, and returns when they are."""
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
    """Returns zeroed memory with the alignment that devices require.

    The memory is private, so a forked process does not share it. It is freed with its last view.
    An explicit close would fail if a traceback still refers to a view.
    """
    return memoryview(mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE))


def _move(views: list[memoryview], target: memoryview) -> None:
    """Moves bytes from the ``views``, the last of which comes first, until ``target`` is full."""
    while target:
        view = views.pop()
        count = min(len(view), len(target))
        target[:count] = view[:count]
        target = target[count:]
        if count < len(view):
            views.append(view[count:])
