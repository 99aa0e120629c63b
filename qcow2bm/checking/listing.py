"""The problems that a check finds; of many alike only the first are listed.

*Spec*: spec/check.md, CHECK-5.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np

from qcow2bm.checking.runs import Flags
from qcow2bm.problem_kinds import KINDS, problem, summary_of
from qcow2bm.problems import UNUSABLE, Problem

MAX_LISTED = 16
"""The number of problems of one kind that are listed, unless they concern bitmaps."""


class Faults(NamedTuple):
    """A kind of problem that entries of an array have.

    Attributes:
        id: that of the kind.
        where: which entries have it, bool[n].
        describe: returns for the number of an entry the host offset, the reason and the element.
    """

    id: str
    where: Flags
    describe: Callable[[int], tuple[int, str, int]]


class Listing:
    """Collects problems.

    Of a kind that concerns the image, the first `MAX_LISTED` problems are kept, and one more
    stands for all others. Problems of bitmaps are all kept: a bitmap has at most one of a kind,
    and each bitmap must be known that has one.
    """

    def __init__(self) -> None:
        """Begins without any problem."""
        self._found: dict[str, list[Problem]] = {}
        self._counts: Counter[str] = Counter()

    def add(
        self,
        id: str,
        offset: int,
        reason: str,
        element: int | None = None,
        bitmap_index: int | None = None,
    ) -> None:
        """Adds a problem of the kind with this id."""
        self._counts[id] += 1
        if bitmap_index is None and self._counts[id] > MAX_LISTED:
            return
        new = problem(id, offset, reason, bitmap_index, element=element)
        self._found.setdefault(id, []).append(new)

    def add_many(self, id: str, count: int, found: Iterable[tuple[int, str, int]]) -> None:
        """Adds ``count`` problems of one kind that concerns the image.

        ``found`` yields the host offset, the reason and the element of each. No more are taken
        from it than are listed.
        """
        listed = max(0, min(count, MAX_LISTED - self._counts[id]))
        for offset, reason, element in islice(found, listed):
            self.add(id, offset, reason, element)
        if count > listed:
            self._counts[id] += count - listed

    def add_faults(self, faults: Iterable[Faults]) -> None:
        """Adds the faults of the entries of one array, those kinds first that come first in it."""
        found = [(np.flatnonzero(each.where).tolist(), each) for each in faults]
        for entries, each in sorted((one for one in found if one[0]), key=lambda one: one[0][0]):
            self.add_many(each.id, len(entries), map(each.describe, entries))

    @property
    def has_unusable(self) -> bool:
        """Whether a problem of a kind with the severity "unusable" was added."""
        return any(KINDS[id].severity == UNUSABLE for id in self._counts)

    def __iter__(self) -> Iterator[Problem]:
        """Yields the problems that are listed, those of one kind together."""
        for id, found in self._found.items():
            yield from found
            more = self._counts[id] - len(found)
            if more:
                summary = summary_of(KINDS[id].structure).id
                reason = f"is not the last: {more} more are like it"
                yield problem(summary, found[-1].offset, reason)
