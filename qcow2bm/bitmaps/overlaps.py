"""Finding host bytes that more than one structure uses.

*Spec*: spec/bitmaps.md, "Bitmap table"; the ids are in spec/problems.md.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from qcow2bm.problem_kinds import problem
from qcow2bm.problems import DIRECTORY, Problem
from qcow2bm.units import align_up

_LAST = (1 << 64) - 1  # the sum of an offset and a length may exceed it

_NUMPY_PAYS = 1 << 16  # ranges: to sort fewer takes less time than to load numpy


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
        self._starts = array("Q")
        self._ends = array("Q")
        self._numbers = array("L")  # of the use of each range
        self._known: tuple[int, list[tuple[int, int, int]]] | None = None  # for so many ranges

    def use(self, name: str, owner: int | None = None, *, is_table: bool = False) -> int:
        """Announces a structure by the name that messages use; returns a number for `add`."""
        self._uses.append(_Use(name, owner, is_table))
        return len(self._uses) - 1

    def __len__(self) -> int:
        return len(self._starts)

    def add(self, use: int, offset: int, length: int) -> None:
        """Adds a range of the structure that `use` returned this number for."""
        if length:
            self._starts.append(offset)
            self._ends.append(min(offset + align_up(length, self._cluster_size), _LAST))
            self._numbers.append(use)

    def add_all(self, use: int, starts: array[int], ends: array[int]) -> None:
        """Adds ranges of whole clusters of one structure, by their starts and ends, uint64[n]."""
        self._starts += starts
        self._ends += ends
        self._numbers += array("L", [use]) * len(starts)

    def ranges(self) -> tuple[array[int], array[int]]:
        """All ranges in no order: their starts and their ends, host bytes in whole clusters."""
        return self._starts, self._ends

    def problems(self) -> Iterator[Problem]:
        """Yields one problem for each bitmap and each structure that it shares bytes with.

        Two structures that belong to no bitmap are not reported, except the directory.
        """
        seen: set[tuple[int, int]] = set()
        for start, use, last in self._found():
            for mine, other in ((use, last), (last, use)):
                if (mine, other) not in seen:
                    seen.add((mine, other))
                    yield from self._problem(mine, other, start)

    def first_shared(self) -> int | None:
        """Returns the first host byte that is in two ranges; None if there is none."""
        return next((start for start, _, _ in self._found()), None)

    def _found(self) -> Iterable[tuple[int, int, int]]:
        """Returns what `_shared` yields, as far as it is needed for the problems."""
        if self._known is None or self._known[0] != len(self):
            is_few = len(self) < _NUMPY_PAYS
            self._known = len(self), list(self._shared() if is_few else self._first_shared())
        return self._known[1]

    def _shared(self) -> Iterator[tuple[int, int, int]]:
        """Yields the ranges that begin before the highest end of the ranges before.

        A range is its start, its use, and the use of the range that has that end.
        """
        reach, last = 0, -1
        for start, end, use in sorted(zip(self._starts, self._ends, self._numbers, strict=True)):
            if start < reach:
                yield start, use, last
            if end > reach:
                reach, last = end, use

    def _first_shared(self) -> Iterator[tuple[int, int, int]]:
        """Yields of the ranges that `_shared` yields the first one for each pair of uses."""
        import numpy as np

        columns = self._numbers, self._ends, self._starts
        uses, ends, starts = (np.array(column, np.uint64) for column in columns)
        order = np.lexsort((uses, ends, starts))
        uses, ends, starts = uses[order], ends[order], starts[order]
        reach = np.maximum.accumulate(ends)
        is_higher = np.append(True, ends[1:] > reach[:-1])
        highest = np.maximum.accumulate(np.where(is_higher, np.arange(len(order)), 0))
        shared = np.flatnonzero(starts[1:] < reach[:-1]) + 1
        mine, other = uses[shared], uses[highest[shared - 1]]
        pairs = np.minimum(mine, other) * np.uint64(len(self._uses)) + np.maximum(mine, other)
        first = np.sort(np.unique(pairs, return_index=True)[1])
        found = starts[shared[first]], mine[first], other[first]
        return zip(*(column.tolist() for column in found), strict=True)

    def _problem(self, use: int, other: int, offset: int) -> Iterator[Problem]:
        mine, reason = self._uses[use], f"is also used by the {self._uses[other].name}"
        if mine.owner is not None:
            id = "bitmap-table.overlap" if mine.is_table else "bitmap-data.overlap"
            yield problem(id, offset, reason, mine.owner)
        elif mine.name == DIRECTORY:
            yield problem("bitmap-directory.overlap", offset, reason)
