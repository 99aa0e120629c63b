"""Ranges of guest bytes as ranges of bits.

*Spec*: spec/edit.md, EDIT-11.
"""

from __future__ import annotations

from operator import index
from typing import TYPE_CHECKING, NamedTuple, cast

from qcow2bm.bits.ranges import checked, outside
from qcow2bm.units import ceil_div

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np
    from numpy.typing import NDArray

    Ranges = NDArray[np.int64] | Iterable[tuple[int, int]]
    """Guest bytes: (start, length), as int64[n, 2] if there are many."""

MANY_RANGES = 64
"""For so many ranges or more, it takes less time to load numpy than to go without."""


class Granules(NamedTuple):
    """The granules into which a bitmap divides the disk.

    Attributes:
        granularity: in guest bytes; at most 2^62, which is more than any disk.
        bits: how many bits the bitmap has.
        virtual_size: the size of the disk in bytes.
    """

    granularity: int
    bits: int
    virtual_size: int

    def of_array(self, ranges: NDArray[np.int64], *, is_set: bool) -> NDArray[np.int64]:
        """Returns ranges of bits, int64[n, 2] of (first, stop).

        Ranges are widened to whole granules if they are set, and narrowed if they are reset. A
        range that is left empty has a ``stop`` that is not above its ``first``.

        Raises:
            ValueError: a range reaches beyond the disk.
        """
        import numpy as np

        granularity = self.granularity
        pairs = checked(ranges, self.virtual_size)
        starts, lengths = pairs.T
        ends = starts + lengths
        rounded = np.empty(pairs.shape, np.int64)
        if is_set:
            rounded[:, 0] = starts // granularity
            rounded[:, 1] = np.where(lengths > 0, -(-ends // granularity), 0)
        else:
            rounded[:, 0] = -(-starts // granularity)
            rounded[:, 1] = np.where(ends == self.virtual_size, self.bits, ends // granularity)
        return rounded

    def of(self, ranges: Ranges, *, is_set: bool) -> NDArray[np.int64] | list[tuple[int, int]]:
        """Returns ranges of bits as `of_array` does, as a list if there are few.

        Raises:
            ValueError: a range reaches beyond the disk.
        """
        if hasattr(ranges, "dtype"):
            return self.of_array(cast("NDArray[np.int64]", ranges), is_set=is_set)
        size, granularity = self.virtual_size, self.granularity
        listed = [(index(start), index(length)) for start, length in ranges]
        for start, length in listed:
            if not 0 <= start <= start + length <= size:
                raise outside(start, length, size)
        if len(listed) >= MANY_RANGES:
            import numpy as np

            return self.of_array(np.array(listed, np.int64), is_set=is_set)
        rounded = []
        for start, length in listed:
            end = start + length
            if is_set and length:
                rounded.append((start // granularity, ceil_div(end, granularity)))
            elif length:
                stop = self.bits if end == size else end // granularity
                rounded.append((ceil_div(start, granularity), stop))
        return rounded
