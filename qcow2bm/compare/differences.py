"""Finds the granules in which two contents differ.

*Spec*: spec/repair.md, "Comparing".
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Event, Lock

import numpy as np
from numpy.typing import NDArray

from qcow2bm.bits import pure_python
from qcow2bm.compare.content import Content, Reader
from qcow2bm.units import ceil_div

PIECE_BYTES = 512 << 10
"""The number of bytes that are compared at once: two pieces fit into the processor's cache."""

WORKERS = 2
"""The number of threads that compare by default."""

Progress = Callable[[int], None]
"""Is called with the number of bytes just compared, by any thread, but one call at a time."""


def find_differences(
    old: Content,
    new: Content,
    granularity: int,
    *,
    workers: int = WORKERS,
    progress: Progress | None = None,
) -> NDArray[np.uint8]:
    """Returns the bits of the granules in which ``new`` differs from ``old``.

    Every granule behind the end of ``old`` counts as different: what the backup has there is not
    known.

    Args:
        old: the content of the backup.
        new: the content of the disk now; its size is that of the disk.
        granularity: in bytes, a power of two, 512 or more.
        workers: how many threads compare.
        progress: is called with each number of bytes that were compared.

    Returns:
        uint8[ceil(bits / 8)], least significant bit first, as `qcow2bm.Edit.salvage` takes it.

    Raises:
        ChangedWhileReadingError: one of the two changed meanwhile.
        StorageError: reading failed.
    """
    work = _Work(old, new, granularity, progress)
    with ThreadPoolExecutor(workers) as threads:
        try:
            for thread in [threads.submit(work.run) for _ in range(workers)]:
                thread.result()
        except BaseException:
            old.interrupt()  # or the executor would wait for threads that wait for data
            new.interrupt()
            raise
        finally:
            work.is_over.set()
    old.require_unchanged()
    new.require_unchanged()
    return work.octets


class _Work:
    """The comparison, which the threads share.

    Attributes:
        is_over: set when the threads are to stop.
        octets: the bits so far.
    """

    def __init__(
        self, old: Content, new: Content, granularity: int, progress: Progress | None
    ) -> None:
        bits = ceil_div(new.size, granularity)
        self.is_over = Event()
        self.octets = np.zeros(ceil_div(bits, 8), np.uint8)
        self._old, self._new = old, new
        self._granularity = granularity
        self._unit = min(granularity, PIECE_BYTES)
        self._progress = progress
        self._common = min(old.size, new.size)
        self._lock = Lock()
        self._done = 0
        if old.size < new.size:
            pure_python.fill(self.octets.data, old.size // granularity, bits, is_set=True)

    def run(self) -> None:
        """Compares pieces that no other thread has taken, until there are no more."""
        try:
            with self._old.reader() as old, self._new.reader() as new:
                self._compare(old, new)
        except BaseException:
            self.is_over.set()
            raise

    def _compare(self, old: Reader, new: Reader) -> None:
        buffers = bytearray(PIECE_BYTES), bytearray(PIECE_BYTES)
        while not self.is_over.is_set():
            with self._lock:
                start = self._next(old, new)
            if start >= self._common:
                return
            length = min(PIECE_BYTES, self._common - start)
            for reader, buffer in zip((old, new), buffers, strict=True):
                reader.read_into(start, memoryview(buffer)[:length])
                buffer[length:] = bytes(PIECE_BYTES - length)
            if buffers[0] != buffers[1]:  # this takes no time compared with reading
                self._set(start, *buffers)

    def _next(self, old: Reader, new: Reader) -> int:
        """Takes the next piece in which one of the two can have data; returns its start."""
        start = self._done
        if start < self._common:
            first = min(old.next_data(start), new.next_data(start), self._common)
            start = max(start, first // PIECE_BYTES * PIECE_BYTES)
            end = min(start + PIECE_BYTES, self._common)
            if self._progress:
                self._progress(end - self._done)
            self._done = end
        return start

    def _set(self, start: int, old: bytearray, new: bytearray) -> None:
        words = np.frombuffer(old, np.uint64) != np.frombuffer(new, np.uint64)
        differs = words.reshape(-1, self._unit // 8).any(axis=1)
        bits = np.unique((start + np.flatnonzero(differs) * self._unit) // self._granularity)
        with self._lock:
            np.bitwise_or.at(self.octets, bits >> 3, (1 << (bits & 7)).astype(np.uint8))
