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
        """The dirty ranges of the canary: (start, length) in guest bytes."""
        return [(0, 1), (self.virtual_size - 1, 1)]

    def is_alive(self, canary: NDArray[np.uint8]) -> bool:
        """Whether the bits of the canary are as they were made."""
        last = ceil_div(self.virtual_size, self.granularity) - 1
        return bool(canary[0] & 1 and canary[last // 8] >> last % 8 & 1)

    def why_no_evidence(self, entry: DirectoryEntry | None, canary: DirectoryEntry | None) -> str:
        """The reason why the sentinel proves nothing; empty if it does prove what was written."""
        for what, found, is_enabled in (("sentinel", entry, True), ("canary", canary, False)):
            if found is None:
                return f"the {what} is gone"
            if found.in_use:
                return f"the {what} is in_use: a program that wrote to the image did not close it"
            if found.auto != is_enabled:
                return f"the {what} was {'enabled' if found.auto else 'disabled'}"
            if found.granularity != self.granularity:
                return f"the {what} has another granularity"
        return ""

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
