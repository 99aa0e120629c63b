"""What editing a dirty bitmap means, said with sets of numbers."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field

from qcow2bm.units import ceil_div

OPERATORS = {
    "or": operator.or_,
    "and": operator.and_,
    "xor": operator.xor,
    "subtract": operator.sub,
}


@dataclass
class Granules:
    """The dirty granules of a disk of ``size`` bytes, by their numbers."""

    size: int
    granularity: int
    dirty: set[int] = field(default_factory=set)

    @property
    def all(self) -> set[int]:
        """Every granule there is."""
        return set(range(ceil_div(self.size, self.granularity)))

    def set(self, start: int, length: int) -> None:
        """Makes dirty whatever a range touches."""
        if length:
            stop = ceil_div(start + length, self.granularity)
            self.dirty |= set(range(start // self.granularity, stop))

    def reset(self, start: int, length: int) -> None:
        """Makes clean what lies in a range with all its bytes that are on the disk."""
        end = start + length
        self.dirty -= {
            n
            for n in range(start // self.granularity, ceil_div(end, self.granularity))
            if start <= n * self.granularity and min((n + 1) * self.granularity, self.size) <= end
        }

    def invert(self) -> None:
        """Makes dirty what is clean, and clean what is dirty."""
        self.dirty = self.all - self.dirty

    def at(self, granularity: int) -> Granules:
        """The same at another granularity: dirty is whatever has a dirty byte."""
        twin = Granules(self.size, granularity)
        for n in self.dirty:
            start = n * self.granularity
            twin.set(start, min(self.granularity, self.size - start))
        return twin

    def merge(self, other: Granules, op: str) -> None:
        """Combines with another bitmap, at the finer granularity of the two."""
        finer = min(self.granularity, other.granularity)
        dirty = OPERATORS[op](self.at(finer).dirty, other.at(finer).dirty)
        self.dirty = Granules(self.size, finer, dirty).at(self.granularity).dirty
