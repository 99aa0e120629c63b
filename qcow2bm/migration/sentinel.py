"""Bitmaps that tell whether anybody wrote to the disk while it was in other hands.

Every program that keeps bitmaps keeps these, too. So what the sentinel has when the disk comes
back is what was written by then.

*Spec*: spec/lifecycle.md, "Sentinel".
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple
from uuid import uuid4

from qcow2bm.format.directory import DirectoryEntry
from qcow2bm.units import align_up, ceil_div

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PREFIX = "qcow2bm-sentinel-"
CANARY_SUFFIX = "-canary"
_NAME = re.compile(PREFIX + r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}(" + CANARY_SUFFIX + r")?")

_MAX_BYTES = 64 << 10  # of its bits: what QEMU has to load and to store
_MIN_GRANULARITY, _MAX_GRANULARITY = 512, 2 << 30


class Sentinel(NamedTuple):
    """The sentinel of one hand-over, and its canary.

    The sentinel records writes, and begins with nothing. The canary is disabled, and its first and
    last bits are set: no write to the disk ever changes it, so if one of them is clear, or the
    canary gone, somebody cleared or removed bitmaps, or made the disk shorter for a while, and the
    sentinel tells nothing.
    """

    name: str
    granularity: int
    virtual_size: int

    @classmethod
    def fresh(cls, virtual_size: int, cluster_size: int) -> Sentinel:
        """One whose name was never used: of the finest granularity that fits in a cluster."""
        most_bits = 8 * min(cluster_size, _MAX_BYTES)
        granularity = _MIN_GRANULARITY
        while granularity < _MAX_GRANULARITY and ceil_div(virtual_size, granularity) > most_bits:
            granularity *= 2
        return cls(f"{PREFIX}{uuid4()}", granularity, virtual_size)

    @property
    def canary_name(self) -> str:
        """The name of the canary, which has the same granularity."""
        return self.name + CANARY_SUFFIX

    @property
    def canary_ranges(self) -> list[tuple[int, int]]:
        """What is dirty in the canary: (start, length) in guest bytes."""
        return [(0, 1), (self.virtual_size - 1, 1)]

    def is_alive(self, canary: NDArray[np.uint8]) -> bool:
        """Whether the canary, by its bits, is as it was made."""
        last = ceil_div(self.virtual_size, self.granularity) - 1
        return bool(canary[0] & 1 and canary[last // 8] >> last % 8 & 1)

    def why_no_evidence(self, entry: DirectoryEntry | None, canary: DirectoryEntry | None) -> str:
        """What keeps it from telling which ranges were written; nothing if it can."""
        for what, found, is_enabled in (("sentinel", entry, True), ("canary", canary, False)):
            if found is None:
                return f"the {what} is gone"
            if found.in_use:
                return f"the {what} is in_use: somebody opened the image to write and did not end"
            if found.auto != is_enabled:
                return f"the {what} was {'enabled' if found.auto else 'disabled'}"
            if found.granularity != self.granularity:
                return f"the {what} has another granularity"
        return ""

    def written(self, octets: NDArray[np.uint8]) -> NDArray[np.int64]:
        """What its bits say was written: int64[n, 2] of (start, length) in guest bytes."""
        import numpy as np

        from qcow2bm.bits.extents import ExtentFinder

        words = np.zeros(align_up(len(octets), 8), np.uint8)
        words[: len(octets)] = octets
        finder = ExtentFinder(self.granularity, self.virtual_size)
        return np.concatenate([finder.bits(words), finder.finish()])


def is_sentinel(name: str | None) -> bool:
    """Whether a bitmap of that name is a sentinel or a canary, of whatever hand-over."""
    return name is not None and _NAME.fullmatch(name) is not None
