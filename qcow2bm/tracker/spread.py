"""From the one place where marks are recorded to the bitmaps they belong in.

*Spec*: spec/tracking.md, "Marking".
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from qcow2bm.bits.algebra import Octets, coarsen
from qcow2bm.store.live import PIECE_BYTES, LiveBitmap
from qcow2bm.tracker.recorder import Bits, Recorder


class Tracked(NamedTuple):
    """A bitmap that is tracked, and which pieces of it are not stored yet."""

    live: LiveBitmap
    bits: Bits

    @classmethod
    def of(cls, live: LiveBitmap) -> Tracked:
        """A bitmap of which everything is stored."""
        return cls(live, Bits.of(live.octets))


def recorder_for(tracked: Iterable[Tracked], virtual_size: int) -> Recorder:
    """Where marks are recorded: in the bitmap itself if there is one, else beside them.

    Recording once costs the same for any number of bitmaps. Beside them it begins with nothing,
    at the finest granularity, so that every mark of something new gets to all of them.
    """
    bitmaps = list(tracked)
    granularity = min(bitmap.live.entry.granularity for bitmap in bitmaps)
    if len(bitmaps) == 1:
        return Recorder(virtual_size, granularity, bitmaps[0].bits)
    length = -(-virtual_size // (8 * granularity))
    return Recorder(virtual_size, granularity, Bits.of(bytearray(length)))


def spread(recorder: Recorder, tracked: Iterable[Tracked]) -> None:
    """Brings what was marked since the last time to all bitmaps, and touches what it changes."""
    octets, touched = recorder.bits
    targets = [bitmap for bitmap in tracked if bitmap.bits is not recorder.bits]
    if not targets:
        return
    source = np.frombuffer(octets, np.uint8)
    flags = np.frombuffer(touched, np.uint8)
    pieces = np.flatnonzero(flags)
    flags[pieces] = 0  # before the bits are read: what comes in between shows in one of the two
    for first, stop in _runs(pieces):
        for bitmap in targets:
            factor = bitmap.live.entry.granularity // recorder.granularity
            _add(bitmap.bits, source, first * PIECE_BYTES, stop * PIECE_BYTES, factor)


def _runs(pieces: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Ascending numbers as ranges (first, stop), none longer than 256."""
    runs: list[tuple[int, int]] = []
    for piece in pieces.tolist():
        if runs and runs[-1][1] == piece and piece - runs[-1][0] < 256:
            runs[-1] = runs[-1][0], piece + 1
        else:
            runs.append((piece, piece + 1))
    return runs


def _add(
    bits: Bits,
    source: Octets,
    start: int,
    stop: int,
    factor: int,
) -> None:
    """Sets what bytes of finer bits come to, ``factor`` of them to a byte."""
    start -= start % factor
    coarse = coarsen(source[start : min(stop + -stop % factor, len(source))], factor)
    first = start // factor
    target = np.frombuffer(bits.octets, np.uint8)[first : first + len(coarse)]
    new = np.flatnonzero(coarse & ~target)
    if len(new):
        target |= coarse
        np.frombuffer(bits.touched, np.uint8)[(first + new) // PIECE_BYTES] = 1
