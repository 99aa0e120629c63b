"""What became of the bitmaps of an offload file when they were put back.

*Spec*: spec/live.md, "Restore".
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from qcow2bm.clusters.plan import Plan

RestoreOutcome = Literal["restored", "kept", "left", "lost"]


class WrittenFacts(NamedTuple):
    """What a bitmap got besides its copy.

    Attributes:
        is_exact: whether it is exactly what was written, in granules of the finest bitmap; False
            if it is the tail.
        dirty_bytes: how many bytes of the disk it marks as written, in whole granules; at most so
            many, if several tails followed each other.
        reason: why the tail was taken, although the offload was exact; "" if it was not, or is.
    """

    is_exact: bool
    dirty_bytes: int
    reason: str = ""


class BitmapReturn(NamedTuple):
    """The result for one bitmap.

    Attributes:
        node: the node that has it, or is to have it.
        name: of the bitmap.
        outcome: "restored": it is there again, with every write. "kept": nothing was done, because
            it is there as it was planned. "left": nothing was done, because something stands in the
            way. "lost": it is neither in the machine nor in the file.
        reason: why it is kept, left or lost.
        written: what it got besides its copy; None if nothing: it is disabled, or was never gone.
    """

    node: str
    name: str
    outcome: RestoreOutcome
    reason: str = ""
    written: WrittenFacts | None = None

    @property
    def is_safe(self) -> bool:
        """Whether the bitmap is there."""
        return self.outcome in ("restored", "kept")


class RestoreReport(NamedTuple):
    """The result of `restore` or `restore_offline`.

    ``bitmaps`` is what became of each bitmap, or would become of it. ``plan`` is what would be
    written in a dry run; else it is None.
    """

    bitmaps: tuple[BitmapReturn, ...]
    plan: Plan | None = None
