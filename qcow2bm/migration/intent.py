"""The bitmap that is durable before the guest writes: what a crash cost other bitmaps is in it.

The intent bitmap is an ordinary coarse bitmap. It records, and is valid on disk all the time. Every
program that keeps bitmaps keeps this one, too. Beside it is its canary, which does not record. The
name of the canary says which bitmaps the intent bitmap stands for.

*Spec*: spec/intent.md.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple, Self
from uuid import uuid4

from qcow2bm.errors import LimitError
from qcow2bm.format.directory import DirectoryEntry
from qcow2bm.migration import canary
from qcow2bm.units import ceil_div, encode_name

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PREFIX = "qcow2bm-intent-"
_UUID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_DIGEST_LENGTH = 12
_NAME = re.compile(PREFIX + _UUID)
_CANARY = re.compile(f"({PREFIX}{_UUID})-of((?:-[0-9a-f]{{{_DIGEST_LENGTH}}})*)")
_MAX_COVERED = 72
"""More do not fit into the longest name that a bitmap can have, of 1023 bytes."""

_MIN_GRANULARITY = 1 << 20


class Intent(NamedTuple):
    """An intent bitmap and its canary.

    Attributes:
        name: of the intent bitmap.
        granularity: how many guest bytes a bit stands for: a *region*.
        virtual_size: of the disk, in bytes.
        canary_name: it has the digests of the names of the bitmaps that the intent stands for.
    """

    name: str
    granularity: int
    virtual_size: int
    canary_name: str

    @classmethod
    def fresh(cls, virtual_size: int, cluster_size: int, covered: Iterable[str]) -> Self:
        """A new intent bitmap for the bitmaps of these names; it takes one cluster.

        The cluster has bits past the end of the disk, so that it never becomes an all-ones entry.

        Raises:
            LimitError: there are too many of them, or the disk is too large.
        """
        most_bits = 8 * min(cluster_size, canary.MAX_BYTES) - 1
        granularity = canary.finest_granularity(virtual_size, most_bits, _MIN_GRANULARITY)
        bits = ceil_div(virtual_size, granularity)
        if bits > most_bits:
            raise LimitError("the number of bits of an intent bitmap", bits, most_bits)
        return cls(f"{PREFIX}{uuid4()}", granularity, virtual_size, "").covering(covered)

    def covering(self, names: Iterable[str]) -> Self:
        """Returns the same intent bitmap, for other bitmaps.

        Raises:
            LimitError: there are too many of them.
        """
        digests = sorted(_digest(name) for name in names)
        if len(digests) > _MAX_COVERED:
            raise LimitError("the bitmaps that are tracked with intent", len(digests), _MAX_COVERED)
        return self._replace(canary_name="-".join([f"{self.name}-of", *digests]))

    def covers(self, name: str) -> bool:
        """Whether the intent bitmap stands for the bitmap of this name."""
        return _digest(name) in self.canary_name.rpartition("-of")[2].split("-")

    @property
    def canary_ranges(self) -> list[tuple[int, int]]:
        """The dirty ranges of the canary: (start, length) in guest bytes."""
        return canary.ranges(self.virtual_size)

    def is_alive(self, octets: NDArray[np.uint8]) -> bool:
        """Whether the bits of the canary are as they were made."""
        return canary.is_alive(octets, self.granularity, self.virtual_size)


def _digest(name: str) -> str:
    return hashlib.sha256(encode_name(name)).hexdigest()[:_DIGEST_LENGTH]


def is_intent(name: str | None) -> bool:
    """Whether a bitmap of that name is an intent bitmap, or the canary of one."""
    return name is not None and bool(_NAME.fullmatch(name) or _CANARY.fullmatch(name))


def find(entries: Iterable[DirectoryEntry], virtual_size: int) -> tuple[Intent | None, str]:
    """Returns the intent bitmap of an image, if it has every write; otherwise None, and why.

    Whether the bits of the canary are as they were made is for the caller to find out.

    Args:
        entries: the bitmap directory, which is consistent.
        virtual_size: of the disk, in bytes.
    """
    named = [entry for entry in entries if is_intent(entry.name)]
    if not named:
        return None, "there is no intent bitmap"
    canaries = [(entry, _CANARY.fullmatch(entry.name or "")) for entry in named]
    found = [(entry, match) for entry, match in canaries if match]
    intents = [entry for entry in named if _NAME.fullmatch(entry.name or "")]
    if len(found) != 1 or len(intents) != 1 or intents[0].name != found[0][1].group(1):
        return None, "the intent bitmap or its canary is gone, or there are several"
    (entry,), ((other, _),) = intents, found
    reason = canary.why_no_evidence("intent bitmap", entry, other, entry.granularity)
    if reason:
        return None, reason
    if not virtual_size or ceil_div(virtual_size, entry.granularity) > 8 * canary.MAX_BYTES:
        return None, "the intent bitmap is not of a granularity that it is made with"
    assert entry.name is not None
    assert other.name is not None
    return Intent(entry.name, entry.granularity, virtual_size, other.name), ""
