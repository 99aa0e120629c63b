"""Recording which ranges of a disk are written, as bits, from any number of threads.

*Spec*: spec/tracking.md, "Marking".
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple

from qcow2bm.bitmaps.tracked_bitmap import PIECE_BYTES
from qcow2bm.bits import pure_python
from qcow2bm.bits.ranges import checked, outside
from qcow2bm.errors import StateError, UnsupportedError
from qcow2bm.tracker.fanout import Recording

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from qcow2bm.migration.lifecycle import State

_PIECE_SHIFT = (8 * PIECE_BYTES).bit_length() - 1  # from a bit to its piece
_BATCH_RANGES = 4096  # marked under one lock: others wait so long at most
_BATCH_PIECES = 64


def require_global_lock() -> None:
    """Returns if Python runs one thread at a time, by its global interpreter lock.

    `TrackedBitmap.take` untouches a piece before it copies the piece. Without the global lock no
    other thread need see these two, and the two of a mark, in this order.

    Raises:
        UnsupportedError: this Python runs threads in parallel (free-threaded Python).
    """
    is_free_threaded = "t" in getattr(sys, "abiflags", "")  # PEP 703
    if is_free_threaded and getattr(sys.flags, "gil", None) != 1:
        feature = (
            "tracking in a free-threaded Python, where a mark could be lost; run Python with the "
            "environment variable PYTHON_GIL=1"
        )
        raise UnsupportedError(feature)


class Refusal(NamedTuple):
    """The reason why marks are refused: the state that the tracker is in, or is about to be in."""

    state: State
    cause: BaseException | None


class Recorder:
    """Marks ranges of a disk in the bits of a `Recording`.

    Attributes:
        mark: ``mark(start, length)``, see `qcow2bm.Tracker.mark`. A closure, because a program
            calls it for every write of a guest. Its copies of what the recording says are made
            anew by every `replace`, `reopen` and `close`.
    """

    def __init__(self, recording: Recording) -> None:
        """Begins with marks going to ``recording``."""
        self._lock = Lock()
        self._recording = recording
        self._refusal: Refusal | None = None
        self.mark, self._take_over, self._refuse_all = self._closures()

    @property
    def recording(self) -> Recording:
        """The recording that takes the marks."""
        return self._recording

    def replace(self, recording: Recording) -> None:
        """Lets all marks from now on go elsewhere; the disk is of the same size."""
        with self._lock:
            self._recording = recording
            self._take_over(recording, is_open=self._refusal is None)

    def reopen(self, recording: Recording) -> None:
        """Lets marks in again after `close`; the disk may have another size."""
        with self._lock:
            self._recording, self._refusal = recording, None
            self._take_over(recording, is_open=True)

    def paused(self) -> Lock:
        """A lock, inside of which nothing is marked: to change bits that marks go to."""
        return self._lock

    def close(self, state: State, cause: BaseException | None = None) -> None:
        """Lets all marks from now on raise; every mark that has returned is in the bits.

        ``state`` and ``cause`` are those of the `StateError` that marks raise.
        """
        with self._lock:
            self._refusal = Refusal(state, cause)
            self._refuse_all()

    def disown(self, state: State) -> None:
        """`close` in a forked process; a thread of the parent may hold the lock, so it is new."""
        self._refusal = Refusal(state, None)
        self._lock = Lock()
        self._refuse_all()

    def _closures(
        self,
    ) -> tuple[Callable[[int, int], None], Callable[..., None], Callable[[], None]]:
        size, granularity, (octets, touched), _ = self._recording
        shift, lock = granularity.bit_length() - 1, self._lock
        mark_range, refuse = self._mark_range, self._refuse

        def mark(start: int, length: int) -> None:
            end = start + length
            if not 0 <= start < end <= size:  # numbers of numpy may wrap
                with lock:  # it may just have been opened again
                    if not 0 <= start <= end <= size:
                        refuse(start, length)
                if start == end:
                    return
            with lock:
                if end > size:  # closed meanwhile
                    refuse(start, length)
                first = start >> shift
                if end - 1 >> shift == first:
                    place, bit = first >> 3, 1 << (first & 7)
                    if not octets[place] & bit:
                        # Before, so that after an interrupt no new bit counts as stored; and
                        # after, because a flush may have taken the piece meanwhile.
                        touched[first >> _PIECE_SHIFT] = 1
                        octets[place] |= bit
                        touched[first >> _PIECE_SHIFT] = 1
                    return
            mark_range(start, end)

        def take_over(recording: Recording, *, is_open: bool) -> None:
            nonlocal shift, octets, touched, size
            shift = recording.granularity.bit_length() - 1
            octets, touched = recording.bits
            if is_open:
                size = recording.virtual_size

        def refuse_all() -> None:
            nonlocal size, lock
            size, lock = -1, self._lock

        return mark, take_over, refuse_all

    def _refuse(self, start: int, length: int) -> None:
        if self._refusal:
            raise StateError(
                self._refusal.state, "tracking", "the tracker"
            ) from self._refusal.cause
        raise outside(start, length, self._recording.virtual_size)

    def _mark_range(self, start: int, end: int) -> None:
        """Marks guest bytes that may lie in several pieces, some pieces under one lock."""
        while start < end:
            with self._lock:
                if self._refusal or end > self._recording.virtual_size:  # by now
                    self._refuse(start, end - start)
                start = self._mark_pieces(start, end)

    def _mark_pieces(self, start: int, end: int) -> int:
        """Sets bits of some pieces; returns the guest byte up to which that was done."""
        _, granularity, (octets, touched), _ = self._recording
        shift = granularity.bit_length() - 1
        first, stop = start >> shift, (end - 1 >> shift) + 1
        for _ in range(_BATCH_PIECES):
            piece = first >> _PIECE_SHIFT
            last = min(stop, piece + 1 << _PIECE_SHIFT)
            start_byte, stop_byte = first >> 3, (last + 7) >> 3
            old = octets[start_byte:stop_byte]
            new = old[:]
            pure_python.fill(new, first - 8 * start_byte, last - 8 * start_byte, is_set=True)
            if new != old:
                touched[piece] = 1  # before and after, as in `mark`
                octets[start_byte:stop_byte] = new
                touched[piece] = 1
            first = last
            if first >= stop:
                return end
        return first << shift

    def mark_many(self, ranges: NDArray[np.int64]) -> None:
        """Marks (start, length) of int64[n, 2], all of them or none; see `qcow2bm.Tracker`."""
        if self._refusal:
            self._refuse(0, 0)
        ranges = checked(ranges, self._recording.virtual_size)
        ranges = ranges[ranges[:, 1] > 0]
        for start in range(0, len(ranges), _BATCH_RANGES):
            part = ranges[start : start + _BATCH_RANGES]
            for low, length in part[~self._mark_short(part)].tolist():
                self._mark_range(low, low + length)

    def _mark_short(self, ranges: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Marks the ranges that are one bit each; returns which these are: bool[n]."""
        import numpy as np

        with self._lock:
            if self._refusal:
                self._refuse(0, 0)
            recording = self._recording
            shift = recording.granularity.bit_length() - 1
            first = ranges[:, 0] >> shift
            is_short: NDArray[np.bool_] = first == (ranges[:, 0] + ranges[:, 1] - 1) >> shift
            bits = first[is_short]
            octets, touched = (np.frombuffer(array, np.uint8) for array in recording.bits)
            places, masks = bits >> 3, (1 << (bits & 7)).astype(np.uint8)
            is_new = (octets[places] & masks) == 0
            places, pieces = places[is_new], places[is_new] >> _PIECE_SHIFT - 3
            # Before the bits are set: if a signal interrupts this in between, no new bit counts
            # as stored. And after: a flush may have taken the piece meanwhile.
            touched[pieces] = 1
            np.bitwise_or.at(octets, places, masks[is_new])
            touched[pieces] = 1
            return is_short
