"""The results that the operations of a tracker return.

*Spec*: spec/tracking.md, and for `Activation` spec/lifecycle.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from qcow2bm.clusters.plan import Plan
    from qcow2bm.migration.evidence import DiskOutcome, Fate


class FlushReport(NamedTuple):
    """The result of a flush.

    Attributes:
        bytes_written: bitmap data, table entries and refcounts.
        pieces: how many pieces of bitmaps were stored.
        barriers: how many barriers there were.
        seconds: how long the flush took.
    """

    bytes_written: int
    pieces: int
    barriers: int
    seconds: float


class StopReport(NamedTuple):
    """The result of a stop; the bitmaps are valid on disk.

    Attributes:
        bytes_written: bitmap data, table entries, refcounts and flags.
        pieces: how many pieces of bitmaps were stored.
        barriers: how many barriers there were.
        seconds: how long the stop took.
    """

    bytes_written: int
    pieces: int
    barriers: int
    seconds: float


class Pending(NamedTuple):
    """The work that a stop would have now.

    Attributes:
        bytes: of bitmap data.
        pieces: how many pieces of bitmaps these are.
        seconds: how long the stop would take, estimated.
    """

    bytes: int
    pieces: int
    seconds: float


class Convergence(NamedTuple):
    """The result of `qcow2bm.Tracker.converge`.

    Attributes:
        is_reached: whether a stop fits into the downtime now.
        seconds: how long a stop would take, estimated.
        rounds: how many flushes there were.
        elapsed: how many seconds these took.
    """

    is_reached: bool
    seconds: float
    rounds: int
    elapsed: float


class Activation(NamedTuple):
    """The result of taking an image back.

    Attributes:
        outcome: whether the disk is as it was given away. Unless it is "unchanged", a guest that
            was running before must not go on: it does not know what was written meanwhile.
        reason: the evidence for this outcome.
        bitmaps: what became of each bitmap, by name.
        changed: what may have been written meanwhile, int64[n, 2] of (start, length) in guest
            bytes; None if that is not known.
    """

    outcome: DiskOutcome
    reason: str
    bitmaps: dict[str, Fate]
    changed: NDArray[np.int64] | None


class IntentReport(NamedTuple):
    """What the intent bitmap has cost.

    Attributes:
        waits: how many writes had to wait until their region was durable.
        barriers: for how many barriers; writes that wait at the same time share one.
    """

    waits: int
    barriers: int


class Recovery(NamedTuple):
    """The result of `qcow2bm.Image.recover`.

    Attributes:
        names: of the bitmaps that were recovered, or would be.
        plan: what would be written, in a dry run; None otherwise.
    """

    names: tuple[str, ...]
    plan: Plan | None = None
