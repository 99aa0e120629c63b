"""What sentinels and intent bitmaps have in common: a coarse bitmap that records, and its canary.

The canary is disabled, and its first and last bits are set: no write to the disk ever changes the
canary. If one of these bits is clear, then bitmaps were cleared, or the disk was shorter for a
while, and the bitmap beside the canary proves nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qcow2bm.format.directory import DirectoryEntry
from qcow2bm.units import ceil_div

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAX_BYTES = 64 << 10
"""The most bytes of bits that such a bitmap has: QEMU has to load and to store them."""


def finest_granularity(virtual_size: int, most_bits: int, least: int, most: int = 2 << 30) -> int:
    """Returns the finest granularity from ``least`` on at which a bitmap has at most so many bits.

    The result is a power of two times ``least``, and is not coarser than ``most``.
    """
    granularity = least
    while granularity < most and ceil_div(virtual_size, granularity) > most_bits:
        granularity *= 2
    return granularity


def ranges(virtual_size: int) -> list[tuple[int, int]]:
    """Returns the dirty ranges of a canary: (start, length) in guest bytes."""
    return [(0, 1), (virtual_size - 1, 1)]


def is_alive(octets: NDArray[np.uint8], granularity: int, virtual_size: int) -> bool:
    """Whether the bits of a canary are as they were made."""
    last = ceil_div(virtual_size, granularity) - 1
    return bool(octets[0] & 1 and octets[last // 8] >> last % 8 & 1)


def why_no_evidence(
    what: str, entry: DirectoryEntry | None, canary: DirectoryEntry | None, granularity: int
) -> str:
    """Returns why a bitmap does not have all that was written; "" if nothing is known against it.

    Args:
        what: what the bitmap is called.
        entry: of the bitmap; None if it is gone.
        canary: of its canary; None if it is gone.
        granularity: that of both.
    """
    for subject, found, is_enabled in ((what, entry, True), ("canary", canary, False)):
        if found is None:
            return f"the {subject} is gone"
        if found.in_use:
            return f"the {subject} is in_use: a program that wrote to the image did not close it"
        if found.auto != is_enabled:
            return f"the {subject} was {'enabled' if found.auto else 'disabled'}"
        if found.granularity != granularity:
            return f"the {subject} has another granularity"
    return ""
