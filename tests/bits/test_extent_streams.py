"""Streams of extents are combined as the sets of their bytes are."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.model import OPERATORS
from support.traced_memory import traced_memory

from qcow2bm.bits import extent_streams
from qcow2bm.bits.extent_streams import Extents, combine
from qcow2bm.bits.operations import OPS, Op


@st.composite
def streams(draw: st.DrawFn) -> list[list[int]]:
    """The bounds of the pieces of a stream, in order; ranges never touch."""
    bounds = sorted(draw(st.sets(st.integers(0, 60), max_size=24)))
    bounds = bounds[: len(bounds) // 2 * 2]
    pieces = []
    while bounds:
        count = 2 * draw(st.integers(0, 4))
        pieces.append(bounds[:count])
        bounds = bounds[count:]
    return pieces


def extents_of(pieces: list[list[int]], unit: int) -> Iterator[Extents]:
    for piece in pieces:
        extents = unit * np.array(piece, np.int64).reshape(-1, 2)
        extents[:, 1] -= extents[:, 0]
        yield extents


def numbers_of(pieces: list[list[int]]) -> set[int]:
    bounds = [bound for piece in pieces for bound in piece]
    return {
        number
        for start, stop in zip(bounds[::2], bounds[1::2], strict=True)
        for number in range(start, stop)
    }


@pytest.mark.spec("ALG-2")
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("stretch", [1, 3, 1 << 16])
@settings(max_examples=40)
@given(operands=st.lists(streams(), min_size=1, max_size=4), unit=st.sampled_from([1, 1 << 56]))
def test_a_combination_is_that_of_the_sets(
    op: Op, stretch: int, operands: list[list[list[int]]], unit: int
) -> None:
    """A disk can have 2^62 bytes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extent_streams, "STRETCH_EDGES", stretch)
        pieces = list(combine(op, [extents_of(operand, unit) for operand in operands]))
    assert all(0 < 2 * len(piece) <= stretch * len(operands) + 1 for piece in pieces)
    found = [tuple(extent) for piece in pieces for extent in piece.tolist()]
    assert all(length > 0 for _, length in found)
    assert all(start + length < following for (start, length), (following, _) in pairwise(found))
    expected, *others = map(numbers_of, operands)
    for other in others:
        expected = OPERATORS[op](expected, other)
    assert {
        number
        for start, length in found
        for number in range(start // unit, (start + length) // unit)
    } == expected


def alternating(extents: int, granularity: int, phase: int, piece: int) -> Iterator[Extents]:
    """Every second granule, in pieces of so many extents."""
    for first in range(0, extents, piece):
        numbers = np.arange(first, min(extents, first + piece), dtype=np.int64)
        starts = (2 * numbers + phase) * granularity
        yield np.stack((starts, np.full(len(starts), granularity)), axis=1)


def peak(op: Op, extents: int) -> int:
    """The memory for combining streams of very different densities."""
    step = 8
    with traced_memory() as memory:
        fine = alternating(extents, 512, 0, 1 << 13)
        coarse = alternating(extents >> step, 512 << step, 0, 1 << 4)
        lonely = alternating(1, 512 * extents, 1, 1)
        for _ in combine(op, [fine, coarse, lonely]):
            pass
    return memory.peak


@pytest.mark.spec("ALG-4")
@pytest.mark.parametrize("op", ["or", "subtract"])
def test_memory_does_not_grow_with_the_extents(op: Op) -> None:
    assert peak(op, 1 << 18) < 1.2 * peak(op, 1 << 16)
