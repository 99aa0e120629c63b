"""The entries of a bitmap table as a caller sees them: runs of entries of one kind.

*Spec*: spec/bitmaps.md, "Bitmap table".
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Literal, NamedTuple

from qcow2bm.bitmaps.tables import table_runs
from qcow2bm.bits.runs import ALL_ONES, ALL_ZEROES, ALLOCATED, INVALID

EntryKind = Literal["all-zeroes", "all-ones", "allocated", "invalid"]
"""What a bitmap table entry says of its cluster; "invalid" if the specification forbids the entry.
"""

_KINDS: dict[int, EntryKind] = {
    ALL_ZEROES: "all-zeroes",
    ALL_ONES: "all-ones",
    ALLOCATED: "allocated",
    INVALID: "invalid",
}


class TableRun(NamedTuple):
    """Entries of a bitmap table that follow one another and are of one kind.

    Attributes:
        first: the number of the first entry, from 0.
        entries: how many entries there are; 1 if they are invalid.
        kind: the kind.
        offset: of allocated entries, the host offset of the first cluster; the other clusters
            follow without a gap. None for entries of other kinds.
        word: of an invalid entry, the entry as it is stored; None for entries of other kinds.
    """

    first: int
    entries: int
    kind: EntryKind
    offset: int | None
    word: int | None


def runs_of_entries(words: array[int], cluster_size: int) -> Iterator[TableRun]:
    """Yields the entries of a bitmap table, uint64[n], as runs in order."""
    for run in table_runs(words, cluster_size):
        kind = _KINDS[run.kind]
        if run.kind == INVALID:
            for number in range(run.first, run.first + run.entries):
                yield TableRun(number, 1, kind, None, words[number])
        else:
            offset = run.offset if run.kind == ALLOCATED else None
            yield TableRun(run.first, run.entries, kind, offset, None)
