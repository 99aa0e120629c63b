"""Expressions of bitmaps of one or several images."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from functools import reduce
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.images import Stored, build_image
from support.model import OPERATORS, Model

import qcow2bm
from qcow2bm.bits.operations import OPS
from qcow2bm.format.directory import FLAG_IN_USE

SECTOR = 512
_OPERATORS: dict[str, Callable[[Any, Any], qcow2bm.Combination]] = {
    "or": operator.or_,
    "and": operator.and_,
    "xor": operator.xor,
    "subtract": operator.sub,
}


def sectors(extents: list[list[int]]) -> set[int]:
    """The numbers of the sectors in ranges of bytes."""
    return {
        number
        for start, length in extents
        for number in range(start // SECTOR, (start + length) // SECTOR)
    }


class Leaf:
    """A bitmap of an image of its own, and the set of its dirty sectors."""

    def __init__(self, packed: bytes, granularity_bits: int, sectors_of_disk: int) -> None:
        size = SECTOR * sectors_of_disk
        image = build_image(Stored(table=(packed,), granularity_bits=granularity_bits), size=size)
        self.bitmap = qcow2bm.open(image.data).bitmaps["daily"]
        self.sectors = sectors(Model.of_packed(packed, 1 << granularity_bits, size).extents)


Expression = tuple[qcow2bm.DirtySet, set[int]]

leaves = st.builds(
    Leaf, st.binary(min_size=1, max_size=8), st.integers(9, 13), st.integers(1, 80)
).map(lambda leaf: (leaf.bitmap, leaf.sectors))


def _combined(op: str, left: Expression, right: Expression) -> Expression:
    return _OPERATORS[op](left[0], right[0]), OPERATORS[op](left[1], right[1])


expressions = st.recursive(
    leaves,
    lambda inner: st.builds(_combined, st.sampled_from(OPS), inner, inner),
    max_leaves=6,
)


@pytest.mark.spec("ALG-1")
@settings(max_examples=50)
@given(expressions)
def test_an_expression_has_exactly_the_bytes_of_the_sets(expression: Expression) -> None:
    dirty, expected = expression
    found = [extent for extents in dirty.extents() for extent in extents.tolist()]
    assert sectors(found) == expected
    assert all(value % SECTOR == 0 for extent in found for value in extent)
    assert dirty.count() == SECTOR * len(expected)


def bitmaps_of(*tables: bytes, size: int = 1 << 20, flags: int = 0) -> list[qcow2bm.Bitmap]:
    image = build_image(
        *(Stored(b"%d" % n, (table,), flags=flags) for n, table in enumerate(tables)), size=size
    )
    return list(qcow2bm.open(image.data).bitmaps.values())


def ranges(dirty: qcow2bm.DirtySet) -> list[list[int]]:
    return [extent for extents in dirty.extents() for extent in extents.tolist()]


@pytest.mark.spec("ALG-2")
def test_a_bitmap_and_a_combination_answer_in_the_same_way() -> None:
    a, b = bitmaps_of(b"\x03", b"\x06")
    both = qcow2bm.union(a, b)
    assert isinstance(a, qcow2bm.DirtySet)
    assert isinstance(both, qcow2bm.DirtySet)
    (extents,) = both.extents()
    assert extents.dtype == np.int64
    assert extents.tolist() == [[0, 3 << 16]]
    assert [both.count(), both.count()] == [3 << 16, 3 << 16]
    assert both.disk_size == a.disk_size
    assert ranges(a - a) == []
    assert repr(a | b) == f"<qcow2bm.Combination or of ({a!r}, {b!r})>"


@pytest.mark.spec("ALG-3")
@pytest.mark.parametrize(
    ("op", "expected"),
    [
        ("or", [[0, 8 << 16]]),
        ("and", [[0, 100 << 10]]),
        ("xor", [[100 << 10, (8 << 16) - (100 << 10)]]),
        ("subtract", [[100 << 10, (8 << 16) - (100 << 10)]]),
    ],
)
def test_what_lies_behind_the_end_of_a_disk_is_clean(
    op: qcow2bm.Op, expected: list[list[int]]
) -> None:
    (large,), (small,) = bitmaps_of(b"\xff"), bitmaps_of(b"\xff", size=100 << 10)
    assert ranges(qcow2bm.Combination(op, large, small)) == expected
    assert (large | small).disk_size == (small - large).disk_size == 1 << 20
    assert ranges(small - large) == []


@pytest.mark.spec("ALG-5")
def test_a_bitmap_that_is_not_valid_has_no_part_in_an_expression() -> None:
    (good,), (bad,) = bitmaps_of(b"\xff"), bitmaps_of(b"\xff", flags=FLAG_IN_USE)
    for dirty in (good | bad, good & (good - bad), bad ^ good):
        with pytest.raises(qcow2bm.BitmapInconsistentError):
            dirty.extents()
        with pytest.raises(qcow2bm.BitmapInconsistentError):
            dirty.count()


def test_a_long_expression_is_not_deep() -> None:
    """Python's stack would not do for a thousand generators that wait for each other."""
    bitmaps: list[qcow2bm.DirtySet] = [*bitmaps_of(b"\x01", b"\x02", b"\x04")] * 350
    for op, expected in (("or", 3), ("subtract", 0)):
        dirty = reduce(_OPERATORS[op], bitmaps)
        assert isinstance(dirty, qcow2bm.Combination)
        assert len(dirty.operands) == len(bitmaps)
        assert dirty.count() == expected << 16


def test_parentheses_behind_a_minus_count() -> None:
    a, b, c = bitmaps_of(b"\x07", b"\x03", b"\x01")
    assert ranges(a - b - c) == [[2 << 16, 1 << 16]]
    assert ranges(a - (b - c)) == [[0, 1 << 16], [2 << 16, 1 << 16]]


def test_what_is_no_dirty_set_is_refused() -> None:
    (bitmap,) = bitmaps_of(b"\x01")
    nothing: Any = 1
    with pytest.raises(TypeError, match="unsupported operand"):
        bitmap | nothing
    with pytest.raises(TypeError, match="an operand is a DirtySet, not int"):
        qcow2bm.union(bitmap, nothing)
    with pytest.raises(ValueError, match="one bitmap at least"):
        qcow2bm.union()
    with pytest.raises(ValueError, match="op is 'nor'"):
        qcow2bm.Combination("nor", bitmap)  # type: ignore[arg-type]


class Whole(qcow2bm.DirtySet):
    """A disk that is dirty all over, as a caller may have it."""

    @property
    def disk_size(self) -> int:
        return 4 << 16

    def extents(self) -> Iterator[Any]:
        yield np.array([[0, self.disk_size]])


def test_a_class_of_the_caller_can_be_an_operand() -> None:
    (bitmap,) = bitmaps_of(b"\x02")
    whole = Whole()
    assert whole.count() == 4 << 16
    assert ranges(whole - bitmap) == [[0, 1 << 16], [2 << 16, 2 << 16]]
    assert ranges(bitmap & whole) == [[1 << 16, 1 << 16]]
