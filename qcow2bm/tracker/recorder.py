"""Recording which ranges of a disk are written, as bits, from any number of threads.

*Spec*: spec/tracking.md, "Marking".
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple

from qcow2bm.bitmaps.tracked_store import PIECE_BYTES
from qcow2bm.bits import pure_python
from qcow2bm.bits.ranges import checked, outside
from qcow2bm.errors import StateError
from qcow2bm.units import ceil_div

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_PIECE_SHIFT = (8 * PIECE_BYTES).bit_length() - 1  # from a bit to its piece
_BATCH_RANGES = 4096  # marked under one lock: others wait so long at most
_BATCH_PIECES = 64


class Bits(NamedTuple):
    """Bits that only ever get set, and which pieces of them were touched.

    ``touched`` has one byte for each piece of ``octets``, 1 if a bit in it was set. Who clears it
    before reading the piece misses nothing: what is set meanwhile shows in one of the two.
    """

    octets: bytearray
    touched: bytearray

    @classmethod
    def of(cls, octets: bytearray) -> Bits:
        """These bits, of which nothing is touched."""
        return cls(octets, bytearray(ceil_div(len(octets), PIECE_BYTES)))


class Recorder:
    """Marks ranges of a disk in `Bits` of one granularity.

    Attributes:
        mark: ``mark(start, length)``, see `qcow2bm.Tracker.mark`. A closure, because it is called
            for every write of a guest.
    """

    def __init__(self, virtual_size: int, granularity: int, bits: Bits) -> None:
        """``bits`` must be clear past the disk of ``virtual_size`` bytes."""
        self._size = virtual_size
        self._lock = Lock()
        self._bits = bits
        self._is_closed = False
        self._state = ""
        self._cause: BaseException | None = None
        self._granularity = granularity
        self.mark, self._take_over, self._refuse_all = self._closures()

    def replace(self, granularity: int, bits: Bits) -> None:
        """Lets all marks from now on go elsewhere."""
        with self._lock:
            self._granularity, self._bits = granularity, bits
            self._take_over(granularity, bits)

    def reopen(self, virtual_size: int, granularity: int, bits: Bits) -> None:
        """After `close`: lets marks in again, of a disk that may have another size."""
        with self._lock:
            self._size, self._is_closed = virtual_size, False
            self._granularity, self._bits = granularity, bits
            self._take_over(granularity, bits, virtual_size)

    def locked(self) -> Lock:
        """Inside ``with`` nothing is marked: for whoever changes bits that marks go to."""
        return self._lock

    def close(self, state: str, cause: BaseException | None = None) -> None:
        """Lets all marks from now on raise; every mark that has returned is in the bits.

        ``state`` and ``cause`` are what they raise.
        """
        with self._lock:
            self._is_closed = True
            self._state, self._cause = state, cause
            self._refuse_all()

    def _closures(
        self,
    ) -> tuple[Callable[[int, int], None], Callable[..., None], Callable[[], None]]:
        size, shift = self._size, self._granularity.bit_length() - 1
        lock, (octets, touched) = self._lock, self._bits
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
                        octets[place] |= bit
                        touched[first >> _PIECE_SHIFT] = 1
                    return
            mark_range(start, end)

        def take_over(granularity: int, bits: Bits, new_size: int | None = None) -> None:
            nonlocal shift, octets, touched, size
            shift = granularity.bit_length() - 1
            octets, touched = bits
            size = size if new_size is None else new_size

        def refuse_all() -> None:
            nonlocal size
            size = -1

        return mark, take_over, refuse_all

    def _refuse(self, start: int, length: int) -> None:
        if self._is_closed:
            raise StateError(self._state, "tracking", "the tracker") from self._cause
        raise outside(start, length, self._size)

    def _mark_range(self, start: int, end: int) -> None:
        """Marks guest bytes that may lie in several pieces, some pieces under one lock."""
        while start < end:
            with self._lock:
                if self._is_closed or end > self._size:  # by now
                    self._refuse(start, end - start)
                start = self._mark_pieces(start, end)

    def _mark_pieces(self, start: int, end: int) -> int:
        """Sets bits for a while; returns up to which guest byte."""
        shift, (octets, touched) = self._granularity.bit_length() - 1, self._bits
        first, stop = start >> shift, (end - 1 >> shift) + 1
        for _ in range(_BATCH_PIECES):
            piece = first >> _PIECE_SHIFT
            last = min(stop, piece + 1 << _PIECE_SHIFT)
            start_byte, stop_byte = first >> 3, (last + 7) >> 3
            old = octets[start_byte:stop_byte]
            new = old[:]
            pure_python.fill(new, first - 8 * start_byte, last - 8 * start_byte, is_set=True)
            if new != old:
                octets[start_byte:stop_byte] = new
                touched[piece] = 1
            first = last
            if first >= stop:
                return end
        return first << shift

    def mark_many(self, ranges: NDArray[np.int64]) -> None:
        """Marks (start, length) of int64[n, 2], all of them or none; see `qcow2bm.Tracker`."""
        if self._is_closed:
            self._refuse(0, 0)
        ranges = checked(ranges, self._size)
        ranges = ranges[ranges[:, 1] > 0]
        for start in range(0, len(ranges), _BATCH_RANGES):
            part = ranges[start : start + _BATCH_RANGES]
            for low, length in part[~self._mark_short(part)].tolist():
                self._mark_range(low, low + length)

    def _mark_short(self, ranges: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Marks those that are one bit each, and says which they are: bool[n]."""
        import numpy as np

        with self._lock:
            if self._is_closed:
                self._refuse(0, 0)
            shift = self._granularity.bit_length() - 1
            first = ranges[:, 0] >> shift
            is_short: NDArray[np.bool_] = first == (ranges[:, 0] + ranges[:, 1] - 1) >> shift
            bits = first[is_short]
            octets, touched = (np.frombuffer(array, np.uint8) for array in self._bits)
            places, masks = bits >> 3, (1 << (bits & 7)).astype(np.uint8)
            is_new = (octets[places] & masks) == 0
            places, pieces = places[is_new], places[is_new] >> _PIECE_SHIFT - 3
            # Before as well: if a signal ends it in between, a bit that is set must not pass for
            # one that is stored. After, because a flush may have begun with the piece meanwhile.
            touched[pieces] = 1
            np.bitwise_or.at(octets, places, masks[is_new])
            touched[pieces] = 1
            return is_short
