"""The kinds of entries in a bitmap table, and runs of entries of one kind."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ALL_ZEROES = 0
ALL_ONES = 1
ALLOCATED = 2
INVALID = 3  # a reserved bit, an unaligned offset, or both an offset and bit 0

KINDS = 4


class Run(NamedTuple):
    """A run of table entries of one kind: ``entries`` entries, of which the first is ``first``.

    In a run of ALLOCATED entries, ``offset`` is the host offset of the first cluster, and the other
    clusters follow without a gap. In other runs ``offset`` is 0.
    """

    kind: int
    first: int
    entries: int
    offset: int


class RunRows:
    """Runs as an array, because a table can have a million of them.

    Attributes:
        rows: int64[m, 4]; the columns are the fields of `Run`.
    """

    def __init__(self, rows: NDArray[np.int64]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Run]:
        """Yields the runs in order."""
        return (Run(*row) for row in self.rows.tolist())

    def counts(self) -> list[int]:
        """Returns how many entries there are of each kind."""
        import numpy as np

        counts = np.bincount(self.rows[:, 0], self.rows[:, 2], KINDS)
        return [int(count) for count in counts]

    def allocated(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Returns the host offsets of the ALLOCATED runs, and how many entries each of them has."""
        rows = self.rows[self.rows[:, 0] == ALLOCATED]
        return rows[:, 3], rows[:, 2]
