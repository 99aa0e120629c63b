"""Bitmaps that tell whether the disk was written to while it was given away.

Every program that keeps bitmaps keeps these, too. So what the sentinel records when the disk
comes back is what was written meanwhile.

*Spec*: spec/lifecycle.md, "Sentinel".
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple
from uuid import uuid4

from qcow2bm.format.directory import DirectoryEntry
from qcow2bm.migration import canary
from qcow2bm.units import align_up

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PREFIX = "qcow2bm-sentinel-"
CANARY_SUFFIX = "-canary"
_NAME = re.compile(PREFIX + r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}(" + CANARY_SUFFIX + r")?")

_MIN_GRANULARITY = 512


class Sentinel(NamedTuple):
    """The sentinel of one hand-over, and its canary.

    The sentinel records writes, and begins clean. The canary is disabled, and its first and last
    bits are set: no write to the disk ever changes the canary. If one of these bits is clear, or
    the canary is gone, then bitmaps were cleared or removed, or the disk was shorter for a while,
    and the sentinel proves nothing.
    """

    name: str
    granularity: int
    virtual_size: int

    @classmethod
    def fresh(cls, virtual_size: int, cluster_size: int) -> Sentinel:
        """A sentinel with a new name, of the finest granularity at which it fits in a cluster."""
        most_bits = 8 * min(cluster_size, canary.MAX_BYTES)
        granularity = canary.finest_granularity(virtual_size, most_bits, _MIN_GRANULARITY)
        return cls(f"{PREFIX}{uuid4()}", granularity, virtual_size)

    @property
    def canary_name(self) -> str:
        """The name of the canary, which has the same granularity."""
        return self.name + CANARY_SUFFIX

    @property
    def canary_ranges(self) -> list[tuple[int, int]]:
        """The dirty ranges of the canary: (start, length) in guest bytes."""
        return canary.ranges(self.virtual_size)

    def is_alive(self, octets: NDArray[np.uint8]) -> bool:
        """Whether the bits of the canary are as they were made."""
        return canary.is_alive(octets, self.granularity, self.virtual_size)

    def why_no_evidence(self, entry: DirectoryEntry | None, other: DirectoryEntry | None) -> str:
        """The reason why the sentinel proves nothing; empty if it does prove what was written.

        ``other`` is the canary.
        """
        return canary.why_no_evidence("sentinel", entry, other, self.granularity)

    def written(self, octets: NDArray[np.uint8]) -> NDArray[np.int64]:
        """The ranges that the bits record: int64[n, 2] of (start, length) in guest bytes."""
        import numpy as np

        from qcow2bm.bits.extents import ExtentFinder

        words = np.zeros(align_up(len(octets), 8), np.uint8)
        words[: len(octets)] = octets
        finder = ExtentFinder(self.granularity, self.virtual_size)
        return np.concatenate([finder.bits(words), finder.finish()])


def is_sentinel(name: str | None) -> bool:
    """Whether a bitmap of that name is the sentinel or the canary of some hand-over."""
    return name is not None and _NAME.fullmatch(name) is not None
