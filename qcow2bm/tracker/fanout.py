"""From the one place where marks are recorded to the bitmaps they belong in.

*Spec*: spec/tracking.md, "Marking".
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from qcow2bm.bitmaps.draft_bits import Source
from qcow2bm.bitmaps.tracked_store import PIECE_BYTES, Changes, TrackedBitmap
from qcow2bm.bits import pure_python
from qcow2bm.bits.algebra import Octets, coarsen, refine
from qcow2bm.tracker.recorder import Bits
from qcow2bm.units import ceil_div

if TYPE_CHECKING:
    from typing_extensions import Buffer


class Tracked(NamedTuple):
    """A bitmap that is tracked, and which pieces of it are not stored yet."""

    live: TrackedBitmap
    bits: Bits

    @classmethod
    def of(cls, live: TrackedBitmap) -> Tracked:
        """A bitmap of which everything is stored."""
        return cls(live, Bits.of(live.octets))

    def due(self) -> NDArray[np.int64]:
        """The numbers of the pieces that are to be stored, ascending."""
        # A copy, because numpy minds if it changes meanwhile.
        return np.flatnonzero(np.frombuffer(bytes(self.bits.touched), np.uint8))

    def take(self, pieces: Iterable[int], *, is_quiet: bool = False) -> Changes:
        """These pieces as they are to be stored; they count as stored from now on.

        They are copies, unless ``is_quiet``: nobody marks any more.
        """
        octets, touched = self.bits
        view = memoryview(octets)
        changes: dict[int, Buffer] = {}
        for piece in pieces:
            touched[piece] = 0  # before it is copied: what is marked meanwhile counts anew
            part = view[piece * PIECE_BYTES : (piece + 1) * PIECE_BYTES]
            changes[piece] = part if is_quiet else bytes(part)
        return changes


class Recording(NamedTuple):
    """Where marks go at a time: bits of one granularity, and the bitmaps they belong in."""

    granularity: int
    bits: Bits
    tracked: tuple[Tracked, ...]

    @classmethod
    def of(
        cls, tracked: Iterable[Tracked], virtual_size: int, *, is_beside: bool = False
    ) -> Recording:
        """In the bitmap itself if there is one, else beside them at the finest granularity.

        Recording once costs the same for any number of bitmaps. Beside them it begins with
        nothing, so that whatever is marked for the first time gets to all of them. With
        ``is_beside`` it is beside one, too: something is still to be spread to that.
        """
        bitmaps = tuple(tracked)
        granularity = min((b.live.entry.granularity for b in bitmaps), default=1 << 31)
        if len(bitmaps) == 1 and not is_beside:
            return cls(granularity, bitmaps[0].bits, bitmaps)
        length = ceil_div(virtual_size, 8 * granularity)
        return cls(granularity, Bits.of(bytearray(length)), bitmaps)

    @property
    def is_beside(self) -> bool:
        """Whether marks do not go into a bitmap itself."""
        return all(bitmap.bits is not self.bits for bitmap in self.tracked)

    def spread(self) -> None:
        """Brings what was marked since the last time to all bitmaps; touches what it changes."""
        if not self.is_beside:
            return
        octets, flags = (np.frombuffer(array, np.uint8) for array in self.bits)
        pieces = np.flatnonzero(flags.copy())  # numpy minds if they change meanwhile
        try:
            self._spread(octets, flags, pieces)
        except BaseException:
            flags[pieces] = 1  # once more does no harm
            raise

    def _spread(self, octets: Octets, flags: Octets, pieces: NDArray[np.int64]) -> None:
        flags[pieces] = 0  # before the bits are read: what comes in between shows in one of the two
        whole = pieces[: np.searchsorted(pieces, len(octets) // PIECE_BYTES)]
        for bitmap in self.tracked:
            factor = bitmap.live.entry.granularity // self.granularity
            rest = pieces
            if factor == 1:
                _add_pieces(bitmap.bits, octets, whole)
                rest = pieces[len(whole) :]
            for first, stop in _runs(rest):
                _add(bitmap.bits, octets, first * PIECE_BYTES, stop * PIECE_BYTES, factor)


def _add_pieces(bits: Bits, source: Octets, pieces: NDArray[np.int64]) -> None:
    """Sets what whole pieces of bits of the same granularity have, many at a time."""
    stop = len(source) // PIECE_BYTES * PIECE_BYTES
    fine = source[:stop].reshape(-1, PIECE_BYTES)
    target = np.frombuffer(bits.octets, np.uint8)[:stop].reshape(-1, PIECE_BYTES)
    touched = np.frombuffer(bits.touched, np.uint8)
    for start in range(0, len(pieces), 256):
        some = pieces[start : start + 256]
        copy = fine[some]  # of bits that stay as they are
        is_new = (copy & ~target[some]).any(axis=1)
        touched[some[is_new]] = 1  # first: an interrupt must leave no bit that counts as stored
        target[some[is_new]] |= copy[is_new]


def _runs(pieces: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Ascending numbers as ranges (first, stop), none longer than 256."""
    runs: list[tuple[int, int]] = []
    for piece in pieces.tolist():
        if runs and runs[-1][1] == piece and piece - runs[-1][0] < 256:
            runs[-1] = runs[-1][0], piece + 1
        else:
            runs.append((piece, piece + 1))
    return runs


def _add(bits: Bits, source: Octets, start: int, stop: int, factor: int) -> None:
    """Sets what bytes of finer bits come to, ``factor`` of them to a byte."""
    start -= start % factor
    fine = source[start : min(stop + -stop % factor, len(source))]
    coarse = coarsen(fine.copy(), factor)  # of bits that stay as they are
    _set(bits, start // factor, coarse)


def _set(bits: Bits, first: int, octets: Octets) -> None:
    """Sets bits from byte ``first`` on, and touches the pieces in which that changes something."""
    target = np.frombuffer(bits.octets, np.uint8)[first : first + len(octets)]
    new = np.flatnonzero(octets & ~target)
    if len(new):
        # First: an interrupt must leave no bit that counts as stored.
        np.frombuffer(bits.touched, np.uint8)[(first + new) // PIECE_BYTES] = 1
        target |= octets


def merge(bitmap: Tracked, source: Source, virtual_size: int) -> None:
    """Sets all that is set in ``source``, of whatever granularity; nobody marks meanwhile."""
    granularity = bitmap.live.entry.granularity
    coarser = max(1, source.granularity // granularity)
    finer = max(1, granularity // source.granularity)
    length = ceil_div(ceil_div(virtual_size, granularity), 8)
    bits = source.octets(0, ceil_div(length * finer, coarser))
    octets = coarsen(bits, finer)[:length] if finer > 1 else refine(bits, coarser, length).copy()
    pure_python.fill(octets.data, ceil_div(virtual_size, granularity), 8 * length, is_set=False)
    _set(bitmap.bits, 0, octets)
