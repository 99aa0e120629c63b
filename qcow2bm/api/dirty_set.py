"""What is dirty on a disk, and combining it: by a bitmap, or by an expression of several.

*Spec*: spec/algebra.md.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING

from qcow2bm.bits.operations import OPS, Op

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class DirtySet(ABC):
    """The dirty bytes of a disk: a `Bitmap`, a `Combination`, or a class of the caller.

    ``a | b``, ``a & b``, ``a ^ b`` and ``a - b`` are a `Combination`.
    """

    @property
    @abstractmethod
    def disk_size(self) -> int:
        """The size of the disk in bytes."""

    @abstractmethod
    def extents(self) -> Iterator[NDArray[np.int64]]:
        """Yields the dirty ranges of the disk: int64[n, 2] of (start, length) in guest bytes.

        *Guarantees*: the extents are ascending, merged, and clipped to the disk. An extent is
        never split, not even over two arrays.
        """

    def count(self) -> int:
        """Returns how many guest bytes are dirty; raises as `extents` does."""
        return sum(int(extents[:, 1].sum()) for extents in self.extents())

    def __or__(self, other: DirtySet) -> Combination:
        return _combined("or", self, other)

    def __and__(self, other: DirtySet) -> Combination:
        return _combined("and", self, other)

    def __xor__(self, other: DirtySet) -> Combination:
        return _combined("xor", self, other)

    def __sub__(self, other: DirtySet) -> Combination:
        return _combined("subtract", self, other)


class Combination(DirtySet):
    """Bitmaps of one or several images, combined by a set operation; nothing is written.

    An operand can be a `Combination` in turn. The result is exact: sets of guest bytes are
    combined, whatever the granularities are. What lies behind the end of an operand's disk is
    clean in the operand, and the disk of the result is the largest (ALG-3).

    Nothing is kept: `count` and `extents` read the bits of the operands each time.

    Attributes:
        op: the operation, between the first operand and each other one.
        operands: one at least. The operands of an operand with the same operation take its place,
            where that means the same.
    """

    def __init__(self, op: Op, *operands: DirtySet) -> None:
        """Combines the operands.

        Raises:
            ValueError: ``op`` is no operation, or there is no operand.
        """
        if op not in OPS:
            raise ValueError(f'op is {op!r}, must be "or", "and", "xor" or "subtract"')
        if not operands:
            raise ValueError("give one bitmap at least")
        self.op: Op = op
        # The depth of a long expression without parentheses is then 1.
        self.operands = tuple(
            part
            for number, operand in enumerate(operands)
            for part in self._parts(operand, is_first=number == 0)
        )

    def _parts(self, operand: DirtySet, *, is_first: bool) -> tuple[DirtySet, ...]:
        if not isinstance(operand, DirtySet):
            raise TypeError(f"an operand is a DirtySet, not {type(operand).__name__}")
        is_associative = is_first or self.op != "subtract"
        if isinstance(operand, Combination) and operand.op == self.op and is_associative:
            return operand.operands
        return (operand,)

    def __repr__(self) -> str:
        return f"<qcow2bm.Combination {self.op} of {self.operands!r}>"

    @property
    def disk_size(self) -> int:
        """The size of the largest disk of the operands in bytes."""
        return max(operand.disk_size for operand in self.operands)

    def extents(self) -> Iterator[NDArray[np.int64]]:
        """Yields the dirty ranges: int64[n, 2] of (start, length) in guest bytes.

        *Guarantees*: as `Bitmap.extents` gives. Memory grows with the number of operands only.

        Raises:
            As `Bitmap.extents` does, for any operand: before the first array because of the status,
            before any array because reading failed.
        """
        from qcow2bm.bits.extent_streams import combine  # loads numpy

        return combine(self.op, [operand.extents() for operand in self.operands])


def union(*operands: DirtySet) -> Combination:
    """Returns what is dirty in any of the operands.

    Raises:
        ValueError: there is no operand.
    """
    return Combination("or", *operands)


def _combined(op: Op, left: DirtySet, right: object) -> Combination:
    """Returns the value of an operator; `NotImplemented` lets Python ask the right operand."""
    return Combination(op, left, right) if isinstance(right, DirtySet) else NotImplemented
