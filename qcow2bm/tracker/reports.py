"""What the operations of a tracker say they did.

*Spec*: spec/tracking.md.
"""

from __future__ import annotations

from typing import NamedTuple


class FlushReport(NamedTuple):
    """What one flush wrote: bytes of everything, pieces of bitmaps, barriers, and how long."""

    bytes_written: int
    pieces: int
    barriers: int
    seconds: float


class StopReport(NamedTuple):
    """What a stop wrote; the bitmaps are valid on disk."""

    bytes_written: int
    pieces: int
    barriers: int
    seconds: float


class Pending(NamedTuple):
    """What a stop would have to write of bitmap data now, and an estimate of how long it takes."""

    bytes: int
    pieces: int
    seconds: float


class Convergence(NamedTuple):
    """Whether a stop fits now, how long one would take, and after how many rounds and seconds."""

    is_reached: bool
    seconds: float
    rounds: int
    elapsed: float
