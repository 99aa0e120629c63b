"""Compares two contents piece by piece, with several threads.

*Spec*: spec/repair.md, "Comparing".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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

_WORD_BYTES = 8


def differing_bits(
    old: Content,
    new: Content,
    granularity: int,
    start: int,
    stop: int,
    *,
    skipped: NDArray[np.int64] | None = None,
    workers: int = WORKERS,
    progress: Progress | None = None,
) -> NDArray[np.uint8]:
    """Returns the bits of the granules in which two contents differ, from one byte to another.

    Every granule behind the end of ``old`` counts as different.

    Args:
        old: the content of the backup.
        new: the content of the disk now.
        granularity: in bytes, a power of two, 512 or more.
        start: where the part begins, in bytes: a multiple of the granularity.
        stop: where the part ends, in bytes: a multiple of the granularity, or the end of ``new``.
        skipped: ranges of whole granules that are not read: int64[n, 2] of (start, stop) in bytes,
            ascending. Their bits are clear, unless they lie behind the end of ``old``.
        workers: how many threads compare.
        progress: is called with each number of bytes that were compared or skipped.

    Returns:
        uint8[ceil(bits / 8)], least significant bit first; bit 0 is the granule at ``start``.

    Raises:
        StorageError: reading failed.
    """
    work = _Work(old, new, granularity, (start, stop), skipped, progress)
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
    return work.octets


class _Work:
    """The comparison, which the threads share.

    Attributes:
        is_over: set when the threads are to stop.
        octets: the bits so far.
    """

    def __init__(
        self,
        old: Content,
        new: Content,
        granularity: int,
        part: tuple[int, int],
        skipped: NDArray[np.int64] | None,
        progress: Progress | None,
    ) -> None:
        start, stop = part
        bits = ceil_div(stop - start, granularity)
        self.is_over = Event()
        self.octets = np.zeros(ceil_div(bits, 8), np.uint8)
        self._old, self._new = old, new
        self._granularity = granularity
        self._first = start // granularity
        self._unit = min(granularity, PIECE_BYTES)
        self._progress = progress
        self._end = max(start, min(old.size, stop))
        self._ranges = _between(start, self._end, skipped)
        self._range = start, start  # what is left of the range that is being compared
        self._lock = Lock()
        self._done = start
        self._data = start  # up to here it is known that neither content has data
        if old.size < stop:
            known = max(0, old.size // granularity - self._first)
            pure_python.fill(self.octets.data, known, bits, is_set=True)

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
                piece = self._next(old, new)
            if piece is None:
                return
            start, length = piece
            for reader, buffer in zip((old, new), buffers, strict=True):
                reader.read_into(start, memoryview(buffer)[:length])
            before, now = buffers if length == PIECE_BYTES else (b[:length] for b in buffers)
            if before != now:  # this takes no time compared with reading
                self._set(start, before, now)

    def _next(self, old: Reader, new: Reader) -> tuple[int, int] | None:
        """Takes the next piece in which one of the two can have data: its start and length."""
        start, stop = self._range
        while True:
            if start == stop:
                found = next(self._ranges, None)
                if found is None:
                    self._advance(self._end)
                    return None
                start, stop = found
            if self._data <= start:
                self._data = min(old.next_data(start), new.next_data(start))
            if self._data < stop:
                break
            start = stop
        start = max(start, self._data // PIECE_BYTES * PIECE_BYTES)
        end = min(stop, (start // PIECE_BYTES + 1) * PIECE_BYTES)
        self._range = end, stop
        self._advance(end)
        return start, end - start

    def _advance(self, end: int) -> None:
        if self._progress and end > self._done:
            self._progress(end - self._done)
        self._done = end

    def _set(self, start: int, old: bytearray, new: bytearray) -> None:
        words = np.frombuffer(old, np.uint64) != np.frombuffer(new, np.uint64)
        units = np.arange(0, len(words), self._unit // _WORD_BYTES)
        differs = np.logical_or.reduceat(words, units)
        bits = np.unique((start + np.flatnonzero(differs) * self._unit) // self._granularity)
        bits -= self._first
        with self._lock:
            np.bitwise_or.at(self.octets, bits >> 3, (1 << (bits & 7)).astype(np.uint8))


def _between(start: int, stop: int, skipped: NDArray[np.int64] | None) -> Iterator[tuple[int, int]]:
    """Yields the parts of a range that are not skipped, as (start, stop)."""
    for first, end in () if skipped is None else skipped.tolist():
        if start < min(first, stop):
            yield start, min(first, stop)
        start = end
    if start < stop:
        yield start, stop
