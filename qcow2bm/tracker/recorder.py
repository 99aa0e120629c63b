"""Recording which ranges of a disk are written, as bits, from any number of threads.

*Spec*: spec/tracking.md, "Marking".
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple

from qcow2bm.bits import plain
from qcow2bm.errors import StateError
from qcow2bm.store.live import PIECE_BYTES
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
        granularity: in guest bytes.
        mark: ``mark(start, length)``, see `qcow2bm.Tracker.mark`. A closure, because it is called
            for every write of a guest.
    """

    def __init__(self, virtual_size: int, granularity: int, bits: Bits) -> None:
        """``bits`` must be clear past the disk of ``virtual_size`` bytes."""
        self._size = virtual_size
        self._lock = Lock()
        self._bits = bits
        self._is_closed = False
        self.granularity = granularity
        self.mark, self._take_over, self._refuse_all = self._closures()

    @property
    def bits(self) -> Bits:
        """Where marks go at present."""
        return self._bits

    def replace(self, bits: Bits) -> None:
        """Lets all marks from now on go elsewhere; each goes to one of the two, whole."""
        with self._lock:
            self._bits = bits
            self._take_over(bits)

    def close(self) -> None:
        """Lets all marks from now on raise; every mark that has returned is in the bits."""
        with self._lock:
            self._is_closed = True
            self._refuse_all()

    def _closures(
        self,
    ) -> tuple[Callable[[int, int], None], Callable[[Bits], None], Callable[[], None]]:
        size, shift = self._size, self.granularity.bit_length() - 1
        lock, (octets, touched) = self._lock, self._bits
        mark_bits, refuse = self._mark_bits, self._refuse

        def mark(start: int, length: int) -> None:
            end = start + length
            if start < 0 or length < 0 or end > size:
                refuse(start, length)
            first = start >> shift
            if end - 1 >> shift != first:
                if length:
                    mark_bits(first, (end - 1 >> shift) + 1)
                return
            place, bit = first >> 3, 1 << (first & 7)
            if octets[place] & bit:
                return
            with lock:
                if end > size:  # closed meanwhile
                    refuse(start, length)
                octets[place] |= bit
                touched[first >> _PIECE_SHIFT] = 1

        def take_over(bits: Bits) -> None:
            nonlocal octets, touched
            octets, touched = bits

        def refuse_all() -> None:
            nonlocal size
            size = -1

        return mark, take_over, refuse_all

    def _refuse(self, start: int, length: int) -> None:
        if self._is_closed:
            raise StateError("stopped", "tracking", "the tracker")
        raise ValueError(f"range {start}:{length} is not on the disk of {self._size} bytes")

    def _mark_bits(self, first: int, stop: int) -> None:
        """Sets bits that may lie in several pieces, some pieces under one lock."""
        while first < stop:
            with self._lock:
                if self._is_closed:
                    self._refuse(0, 0)
                octets, touched = self._bits
                for _ in range(_BATCH_PIECES):
                    piece = first >> _PIECE_SHIFT
                    end = min(stop, piece + 1 << _PIECE_SHIFT)
                    start_byte, stop_byte = first >> 3, (end + 7) >> 3
                    old = octets[start_byte:stop_byte]
                    new = old[:]
                    plain.fill(new, first - 8 * start_byte, end - 8 * start_byte, is_set=True)
                    if new != old:
                        octets[start_byte:stop_byte] = new
                        touched[piece] = 1
                    first = end
                    if first >= stop:
                        return

    def mark_many(self, ranges: NDArray[np.int64]) -> None:
        """Marks (start, length) of int64[n, 2], all of them or none; see `qcow2bm.Tracker`."""
        import numpy as np

        ranges = np.asarray(ranges)
        if ranges.ndim != 2 or ranges.shape[1] != 2 or ranges.dtype.kind not in "iu":
            shape = f"{ranges.dtype}{list(ranges.shape)}"
            raise ValueError(f"ranges are {shape}, must be int64[n, 2]")
        bad = (ranges < 0).any(axis=1) | (ranges > self._size).any(axis=1)
        ranges = ranges.astype(np.int64, copy=False)
        bad |= ranges.sum(axis=1) > self._size
        if bad.any():
            start, length = ranges[bad][0].tolist()
            self._refuse(start, length)
        ranges = ranges[ranges[:, 1] > 0]
        shift = self.granularity.bit_length() - 1
        first = ranges[:, 0] >> shift
        last = (ranges[:, 0] + ranges[:, 1] - 1) >> shift
        is_single = first == last
        single = first[is_single]
        places, masks = single >> 3, (1 << (single & 7)).astype(np.uint8)
        for start in range(0, len(single), _BATCH_RANGES):
            part = slice(start, start + _BATCH_RANGES)
            with self._lock:
                if self._is_closed:
                    self._refuse(0, 0)
                octets, touched = (np.frombuffer(array, np.uint8) for array in self._bits)
                is_new = (octets[places[part]] & masks[part]) == 0
                new = places[part][is_new]
                np.bitwise_or.at(octets, new, masks[part][is_new])
                touched[new >> _PIECE_SHIFT - 3] = 1
        for low, high in zip(first[~is_single].tolist(), last[~is_single].tolist(), strict=True):
            self._mark_bits(low, high + 1)
