"""The kinds of entries in a bitmap table, and runs of entries of one kind."""

from typing import NamedTuple

ALL_ZEROES = 0
ALL_ONES = 1
ALLOCATED = 2
INVALID = 3  # reserved bits, a misaligned offset, or an offset together with bit 0


class Run(NamedTuple):
    """``entries`` table entries of one kind from entry ``first`` on.

    For ALLOCATED, ``offset`` is the host offset of the first cluster and the others follow it
    without a gap; for the other kinds it is 0.
    """

    kind: int
    first: int
    entries: int
    offset: int
