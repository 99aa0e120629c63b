"""A bitmap that tells whether anybody wrote to the disk while it was in other hands.

Every program that keeps bitmaps keeps this one, too. So what it has when the disk comes back is
what was written by then.

*Spec*: spec/lifecycle.md, "Sentinel".
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple
from uuid import uuid4

from qcow2bm.format.directory import DirectoryEntry
from qcow2bm.units import ceil_div

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PREFIX = "qcow2bm-sentinel-"
_NAME = re.compile(PREFIX + r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")

_MAX_BYTES = 64 << 10  # of its bits: what QEMU has to load and to store
_MIN_GRANULARITY, _MAX_GRANULARITY = 512, 2 << 30


class Sentinel(NamedTuple):
    """The sentinel of one hand-over.

    The last bit is set from the beginning. If it is found clear, somebody cleared bitmaps, and
    the others tell nothing. Writes to what it covers cannot be seen, so that range counts as
    written.
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
    def canary(self) -> tuple[int, int]:
        """The range, (start, length) in guest bytes, whose bit is set from the beginning."""
        start = (self.virtual_size - 1) // self.granularity * self.granularity
        return start, self.virtual_size - start

    def octets(self, length: int) -> bytearray:
        """Its bits in so many bytes, as they are stored when the disk is given away."""
        octets = bytearray(length)
        bit = self.canary[0] // self.granularity
        octets[bit // 8] = 1 << bit % 8
        return octets

    def why_no_evidence(self, entry: DirectoryEntry | None) -> str:
        """What keeps it from telling which ranges were written; nothing if it can."""
        if entry is None:
            return "the sentinel is gone"
        if entry.in_use:
            return "the sentinel is in_use: somebody opened the image for writing and did not end"
        if not entry.auto:
            return "the sentinel is disabled"
        if entry.granularity != self.granularity:
            return "the sentinel has another granularity"
        return ""

    def written(self, octets: NDArray[np.uint8]) -> NDArray[np.int64] | None:
        """What it says was written: int64[n, 2] of (start, length) in guest bytes.

        The range of the canary is always in it. None if the canary is gone.
        """
        import numpy as np

        from qcow2bm.bits.extents import ExtentFinder

        bit = self.canary[0] // self.granularity
        if not octets[bit // 8] >> bit % 8 & 1:
            return None
        finder = ExtentFinder(self.granularity, self.virtual_size)
        return np.concatenate([finder.bits(octets), finder.finish()])


def is_sentinel(name: str | None) -> bool:
    """Whether a bitmap of that name is a sentinel, of whatever hand-over."""
    return name is not None and _NAME.fullmatch(name) is not None
