"""Set operations on packed bits, and rescaling them, compared with sets of numbers."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.model import OPERATORS

from qcow2bm.bits.algebra import Octets, coarsen, combine, mask_of, merged, refine
from qcow2bm.bits.operations import OPS, Op

ops = st.sampled_from(OPS)
octets = st.one_of(
    st.binary(max_size=70),
    # Few bits, far apart: what a coarse bit is made of is mostly one of them.
    st.lists(st.sampled_from((b"\0" * 40, b"\xff" * 3, b"\x80", b"\x01", b"\0")), max_size=12).map(
        b"".join
    ),
)
FACTORS = [1 << bits for bits in range(13)]


def packed(data: bytes) -> Octets:
    return np.frombuffer(data, np.uint8)


def numbers(bits: Octets) -> set[int]:
    """The numbers of the bits that are set."""
    return {8 * n + m for n, byte in enumerate(bits.tolist()) for m in range(8) if byte >> m & 1}


def of_numbers(found: set[int], length: int) -> bytes:
    return sum(1 << n for n in found).to_bytes(length, "little")


@pytest.mark.spec("INV-COARSE")
@pytest.mark.parametrize("factor", FACTORS)
@settings(max_examples=40)
@given(data=octets)
def test_a_coarse_bit_is_set_if_any_of_its_bits_is(factor: int, data: bytes) -> None:
    coarse = coarsen(packed(data), factor)
    assert coarse.dtype == np.uint8
    assert len(coarse) == -(-len(data) // factor)
    assert numbers(coarse) == {n // factor for n in numbers(packed(data))}


@pytest.mark.parametrize("factor", [1 << 13, 1 << 22, 1 << 31])
@pytest.mark.parametrize("data", [b"\0" * 33, b"\0" * 32 + b"\x80"])
def test_of_few_bits_a_large_factor_makes_one(factor: int, data: bytes) -> None:
    assert coarsen(packed(data), factor).tolist() == [int(any(data))]


@pytest.mark.parametrize("factor", FACTORS)
@settings(max_examples=40)
@given(data=octets, cut=st.integers(0, 80))
def test_a_fine_bit_is_what_its_coarse_bit_is(factor: int, data: bytes, cut: int) -> None:
    length = max(0, min(len(data) * factor - cut, 2000))
    fine = refine(packed(data), factor, length)
    assert fine.dtype == np.uint8
    assert len(fine) == length
    expected = {n for n in range(8 * length) if data[n // factor // 8] >> (n // factor % 8) & 1}
    assert numbers(fine) == expected


@pytest.mark.parametrize("factor", FACTORS)
@settings(max_examples=40)
@given(data=st.binary(max_size=16))
def test_refining_loses_nothing(factor: int, data: bytes) -> None:
    fine = refine(packed(data), factor, len(data) * factor)
    assert coarsen(fine, factor).tobytes() == data


@given(ops, st.lists(st.tuples(st.integers(0, 255), st.integers(0, 255)), max_size=40))
def test_of_one_granularity_it_is_plain_set_algebra(op: Op, pairs: list[tuple[int, int]]) -> None:
    target, source = (packed(bytes(column)) for column in ([p[n] for p in pairs] for n in (0, 1)))
    before = target.tobytes(), source.tobytes()
    for clean in (None, ~source):
        result = combine(op, target, source, clean)
        assert numbers(result) == OPERATORS[op](numbers(target), numbers(source))
    assert (target.tobytes(), source.tobytes()) == before


@given(ops, st.sampled_from(FACTORS[:8]), st.data())
def test_a_finer_source_dirties_what_has_a_dirty_part(
    op: Op, factor: int, data: st.DataObject
) -> None:
    """The result is the same as refining the target, combining, and coarsening again."""
    target = data.draw(st.binary(max_size=6))
    length = len(target) * factor
    chosen = data.draw(st.sets(st.integers(0, max(0, 8 * length - 1)), max_size=20))
    # Dense ones as well: all of a coarse bit dirty is what makes subtract clear it.
    chosen |= {
        n
        for whole in data.draw(st.sets(st.integers(0, max(0, 8 * len(target) - 1)), max_size=20))
        for n in range(whole * factor, (whole + 1) * factor)
    }
    source = {n for n in chosen if n < 8 * length}
    fine = packed(of_numbers(source, length))
    result = combine(op, packed(target), coarsen(fine, factor), coarsen(~fine, factor))
    refined = {n for n in range(8 * length) if target[n // factor // 8] >> (n // factor % 8) & 1}
    assert numbers(result) == {n // factor for n in OPERATORS[op](refined, source)}


ranges = st.lists(
    st.tuples(st.integers(0, 300), st.integers(-3, 60)).map(lambda r: (r[0], max(0, sum(r)))),
    max_size=30,
)


def as_array(pairs: list[tuple[int, int]]) -> NDArray[np.int64]:
    return np.array(pairs, np.int64).reshape(-1, 2)


@given(ranges)
def test_merged_ranges_are_the_same_numbers(pairs: list[tuple[int, int]]) -> None:
    given_ranges = as_array(pairs)
    found = merged(given_ranges)
    assert found.dtype == np.int64
    assert found.shape[1:] == (2,)
    rows = found.tolist()
    assert {n for row in rows for n in range(*row)} == {n for pair in pairs for n in range(*pair)}
    assert all(first < stop for first, stop in rows)
    assert all(one[1] < other[0] for one, other in pairwise(rows))
    assert given_ranges.tolist() == [list(pair) for pair in pairs]


@given(ranges, st.integers(0, 3))
def test_a_mask_is_set_in_the_ranges_and_nowhere_else(
    pairs: list[tuple[int, int]], rest: int
) -> None:
    length = -(-max((stop for _, stop in pairs), default=0) // 8) + rest
    mask = mask_of(merged(as_array(pairs)), length)
    assert mask.dtype == np.uint8
    assert len(mask) == length
    assert numbers(mask) == {n for pair in pairs for n in range(*pair)}


def test_a_mask_can_be_all_of_it() -> None:
    assert mask_of(as_array([(0, 64)]), 8).tobytes() == b"\xff" * 8
    assert len(mask_of(as_array([]), 0)) == 0
