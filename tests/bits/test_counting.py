from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcow2bm.bits import counting, pure_python
from qcow2bm.bits.extents import edges


class Counting(Protocol):
    """The functions that both modules have."""

    count_bits: Callable[[bytes | memoryview], int]
    count_edges: Callable[[bytes | memoryview, int], int]


MODULES = pytest.mark.parametrize("module", [pure_python, counting], ids=["plain", "numpy"])

# Long runs of one value and single odd bits, as bitmaps have them; every length modulo 8.
packed = st.lists(
    st.one_of(
        st.binary(max_size=20),
        st.integers(0, 40).map(bytes),
        st.integers(0, 40).map(lambda length: b"\xff" * length),
    ),
    max_size=6,
).map(b"".join)
carries = st.integers(0, 1)


def bits_of(data: bytes) -> list[int]:
    """The rule: bit i is bit i % 8, least significant first, of byte i // 8."""
    return [data[i // 8] >> i % 8 & 1 for i in range(8 * len(data))]


def edge_positions(data: bytes, carry: int) -> list[int]:
    bits = bits_of(data)
    return [
        i
        for i, (before, bit) in enumerate(zip([carry, *bits], bits, strict=False))
        if before != bit
    ]


@MODULES
@given(data=packed)
def test_bits_are_counted(module: Counting, data: bytes) -> None:
    assert module.count_bits(data) == sum(bits_of(data))


@MODULES
@given(data=packed, carry=carries)
def test_edges_are_counted(module: Counting, data: bytes, carry: int) -> None:
    assert module.count_edges(data, carry) == len(edge_positions(data, carry))


@given(data=packed.map(lambda data: data[: len(data) // 8 * 8]), carry=carries)
def test_edges_are_found_where_they_are(data: bytes, carry: int) -> None:
    found = edges(np.frombuffer(data, np.uint64), carry)
    assert found.dtype == np.int64
    assert found.tolist() == edge_positions(data, carry)


@MODULES
@given(data=packed, cuts=st.lists(st.integers(0, 240), max_size=5))
def test_counts_of_the_parts_add_up(module: Counting, data: bytes, cuts: list[int]) -> None:
    stops = sorted({min(cut, len(data)) for cut in cuts} | {len(data)})
    start = carry = bits = edge_count = 0
    for stop in stops:
        # A view that begins anywhere: what is counted need not be aligned in memory.
        part = memoryview(bytearray(data))[start:stop]
        bits += module.count_bits(part)
        edge_count += module.count_edges(part, carry)
        carry = part[-1] >> 7 if len(part) else carry
        start = stop
    assert bits == module.count_bits(data)
    assert edge_count == module.count_edges(data, 0)


@MODULES
@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 64 << 10, (64 << 10) + 1])
def test_constants(module: Counting, length: int) -> None:
    zeros, ones = bytes(length), b"\xff" * length
    assert (module.count_bits(zeros), module.count_bits(ones)) == (0, 8 * length)
    assert (module.count_edges(zeros, 0), module.count_edges(ones, 1)) == (0, 0)
    assert (module.count_edges(zeros, 1), module.count_edges(ones, 0)) == (length > 0, length > 0)
