"""Brings marks from the one place where they are recorded to the bitmaps they belong in.

*Spec*: spec/tracking.md, "Marking".
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from qcow2bm.bitmaps.draft_bits import Source
from qcow2bm.bitmaps.tracked_bitmap import PIECE_BYTES, Bits, TrackedBitmap
from qcow2bm.bits import pure_python
from qcow2bm.bits.algebra import Octets, coarsen, refine
from qcow2bm.units import ceil_div


class Recording(NamedTuple):
    """The bits that take the marks at a time, and the bitmaps that the marks belong in.

    The only place that says how large the disk is, and of which granularity the bits are.

    Attributes:
        virtual_size: of the disk in bytes.
        granularity: of ``bits``, in guest bytes.
        bits: where marks go: the bits of the only bitmap, or bits beside the bitmaps.
        bitmaps: those that are tracked.
    """

    virtual_size: int
    granularity: int
    bits: Bits
    bitmaps: tuple[TrackedBitmap, ...]

    @classmethod
    def of(
        cls, bitmaps: Iterable[TrackedBitmap], virtual_size: int, *, is_beside: bool = False
    ) -> Recording:
        """A recording in the bitmap itself if there is one, else beside them, at the finest.

        Marking once costs the same for any number of bitmaps. Bits beside the bitmaps begin with
        nothing set, so that whatever is marked for the first time gets to all bitmaps. With
        ``is_beside`` a single bitmap has bits beside it, too: marks recorded before still have to
        be brought to the bitmap.
        """
        tracked = tuple(bitmaps)
        granularity = min((bitmap.granularity for bitmap in tracked), default=1 << 31)
        if len(tracked) == 1 and not is_beside:
            return cls(virtual_size, granularity, tracked[0].bits, tracked)
        length = ceil_div(virtual_size, 8 * granularity)
        return cls(virtual_size, granularity, Bits.of(bytearray(length)), tracked)

    @property
    def is_beside(self) -> bool:
        """Whether marks go into bits beside the bitmaps."""
        return all(bitmap.bits is not self.bits for bitmap in self.bitmaps)

    def fan_out(self) -> None:
        """Brings what was marked since the last time to all bitmaps; touches what that changes."""
        if not self.is_beside:
            return
        octets, flags = (np.frombuffer(array, np.uint8) for array in self.bits)
        pieces = np.flatnonzero(flags.copy())  # numpy minds if they change meanwhile
        try:
            self._fan_out(octets, flags, pieces)
        except BaseException:
            flags[pieces] = 1  # to bring them once more does no harm
            raise

    def _fan_out(self, octets: Octets, flags: Octets, pieces: NDArray[np.int64]) -> None:
        # Before the bits are read: a mark made in between shows in the flag, or in the bits.
        flags[pieces] = 0
        whole = pieces[: np.searchsorted(pieces, len(octets) // PIECE_BYTES)]
        for bitmap in self.bitmaps:
            factor = bitmap.granularity // self.granularity
            rest = pieces
            if factor == 1:
                _add_pieces(bitmap.bits, octets, whole)
                rest = pieces[len(whole) :]
            for first, stop in _runs(rest):
                _add(bitmap.bits, octets, first * PIECE_BYTES, stop * PIECE_BYTES, factor)


def _add_pieces(bits: Bits, source: Octets, pieces: NDArray[np.int64]) -> None:
    """Sets the bits that whole pieces of the same granularity have, many at a time."""
    stop = len(source) // PIECE_BYTES * PIECE_BYTES
    fine = source[:stop].reshape(-1, PIECE_BYTES)
    target = np.frombuffer(bits.octets, np.uint8)[:stop].reshape(-1, PIECE_BYTES)
    touched = np.frombuffer(bits.touched, np.uint8)
    for start in range(0, len(pieces), 256):
        some = pieces[start : start + 256]
        copy = fine[some]  # of bits that stay as they are
        is_new = (copy & ~target[some]).any(axis=1)
        touched[some[is_new]] = 1  # first: after an interrupt no new bit counts as stored
        target[some[is_new]] |= copy[is_new]


def _runs(pieces: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Ascending numbers as ranges (first, stop), none of them longer than 256."""
    runs: list[tuple[int, int]] = []
    for piece in pieces.tolist():
        if runs and runs[-1][1] == piece and piece - runs[-1][0] < 256:
            runs[-1] = runs[-1][0], piece + 1
        else:
            runs.append((piece, piece + 1))
    return runs


def _add(bits: Bits, source: Octets, start: int, stop: int, factor: int) -> None:
    """Sets the bits that bytes of finer bits come to, ``factor`` of those bytes to one."""
    start -= start % factor
    fine = source[start : min(stop + -stop % factor, len(source))]
    coarse = coarsen(fine.copy(), factor)  # of bits that stay as they are
    _set(bits, start // factor, coarse)


def _set(bits: Bits, first: int, octets: Octets) -> None:
    """Sets bits from byte ``first`` on, and touches the pieces in which that changes something."""
    target = np.frombuffer(bits.octets, np.uint8)[first : first + len(octets)]
    new = np.flatnonzero(octets & ~target)
    if len(new):
        # First: after an interrupt no new bit counts as stored.
        np.frombuffer(bits.touched, np.uint8)[(first + new) // PIECE_BYTES] = 1
        target |= octets


def merge(bitmap: TrackedBitmap, source: Source, virtual_size: int) -> None:
    """Sets all that is set in ``source``, of whatever granularity; no thread marks meanwhile."""
    granularity = bitmap.granularity
    coarser = max(1, source.granularity // granularity)
    finer = max(1, granularity // source.granularity)
    length = ceil_div(ceil_div(virtual_size, granularity), 8)
    bits = source.octets(0, ceil_div(length * finer, coarser))
    octets = coarsen(bits, finer)[:length] if finer > 1 else refine(bits, coarser, length).copy()
    pure_python.fill(octets.data, ceil_div(virtual_size, granularity), 8 * length, is_set=False)
    _set(bitmap.bits, 0, octets)
