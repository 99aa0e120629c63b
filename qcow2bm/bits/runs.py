"""The kinds of entries in a bitmap table, and runs of entries of one kind."""

from typing import NamedTuple

ALL_ZEROES = 0
ALL_ONES = 1
ALLOCATED = 2
INVALID = 3  # a reserved bit, an unaligned offset, or both an offset and bit 0


class Run(NamedTuple):
    """A run of table entries of one kind: ``entries`` entries, of which the first is ``first``.

    In a run of ALLOCATED entries, ``offset`` is the host offset of the first cluster, and the other
    clusters follow without a gap. In other runs ``offset`` is 0.
    """

    kind: int
    first: int
    entries: int
    offset: int
