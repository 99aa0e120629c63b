"""Finding host bytes that more than one structure uses.

*Spec*: spec/bitmaps.md, "Bitmap table"; the ids are in spec/problems.md.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import NamedTuple

from qcow2bm.problem_kinds import problem
from qcow2bm.problems import DIRECTORY, Problem
from qcow2bm.units import align_up

_LAST = (1 << 64) - 1  # the sum of an offset and a length may exceed it


class _Use(NamedTuple):
    """A structure that uses ranges; ``owner`` is the number of the directory entry, if any."""

    name: str
    owner: int | None
    is_table: bool


class Overlaps:
    """Collects ranges of host bytes, and finds those that overlap.

    There can be a range for every cluster of bitmap data, so ranges are kept as bare numbers.
    """

    def __init__(self, cluster_size: int) -> None:
        """Ranges are widened to whole clusters."""
        self._cluster_size = cluster_size
        self._uses: list[_Use] = []
        self._ranges: list[tuple[int, int, int]] = []  # start, end, number of the use

    def use(self, name: str, owner: int | None = None, *, is_table: bool = False) -> int:
        """Announces a structure by the name that messages use; returns a number for `add`."""
        self._uses.append(_Use(name, owner, is_table))
        return len(self._uses) - 1

    def __len__(self) -> int:
        return len(self._ranges)

    def add(self, use: int, offset: int, length: int) -> None:
        """Adds a range of the structure that `use` returned this number for."""
        if length:
            self._ranges.append((offset, offset + align_up(length, self._cluster_size), use))

    def ranges(self) -> tuple[array[int], array[int]]:
        """All ranges in no order: their starts and their ends, host bytes in whole clusters."""
        return (
            array("Q", (start for start, _, _ in self._ranges)),
            array("Q", (min(end, _LAST) for _, end, _ in self._ranges)),
        )

    def problems(self) -> Iterator[Problem]:
        """Yields one problem for each bitmap and each structure that it shares bytes with.

        Two structures that belong to no bitmap are not reported, except the directory.
        """
        seen: set[tuple[int, int]] = set()
        reach, last = 0, -1  # the highest end of the ranges before, and the use of that range
        for start, end, use in sorted(self._ranges):
            if start < reach:
                for mine, other in ((use, last), (last, use)):
                    if (mine, other) not in seen:
                        seen.add((mine, other))
                        yield from self._problem(mine, other, start)
            if end > reach:
                reach, last = end, use

    def _problem(self, use: int, other: int, offset: int) -> Iterator[Problem]:
        mine, reason = self._uses[use], f"is also used by the {self._uses[other].name}"
        if mine.owner is not None:
            id = "bitmap-table.overlap" if mine.is_table else "bitmap-data.overlap"
            yield problem(id, offset, reason, mine.owner)
        elif mine.name == DIRECTORY:
            yield problem("bitmap-directory.overlap", offset, reason)
