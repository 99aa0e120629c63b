"""The problems that a check finds; of many alike only the first are listed.

*Spec*: spec/check.md, CHECK-5.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from qcow2bm.problem_kinds import KINDS, problem, summary_of
from qcow2bm.problems import UNUSABLE, Problem

MAX_LISTED = 16
"""The number of problems of one kind that are listed, unless they concern bitmaps."""


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
