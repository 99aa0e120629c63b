"""Setting and clearing ranges of bits without numpy, compared with the twin."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from qcow2bm.bits import pure_python
from qcow2bm.bits.algebra import mask_of, merged

LENGTH = 40


@given(
    st.binary(min_size=LENGTH, max_size=LENGTH),
    st.integers(0, 8 * LENGTH),
    st.integers(-9, 8 * LENGTH),
    st.booleans(),
)
def test_filling_is_its_twin_of_one_range(
    before: bytes, first: int, length: int, is_set: bool
) -> None:
    stop = min(first + length, 8 * LENGTH)
    filled = bytearray(before)
    pure_python.fill(filled, first, stop, is_set=is_set)
    mask = mask_of(merged(np.array([[first, stop]], np.int64)), LENGTH)
    old = np.frombuffer(before, np.uint8)
    assert filled == (old | mask if is_set else old & ~mask).tobytes()


def test_every_range_of_three_bytes() -> None:
    for first in range(25):
        for stop in range(25):
            covered = sum(1 << n for n in range(first, stop))
            filled = bytearray(3)
            pure_python.fill(filled, first, stop, is_set=True)
            assert int.from_bytes(filled, "little") == covered
            filled = bytearray(b"\xff" * 3)
            pure_python.fill(filled, first, stop, is_set=False)
            assert int.from_bytes(filled, "little") == 0xFFFFFF & ~covered


def test_an_empty_range_needs_no_bytes() -> None:
    empty = bytearray()
    pure_python.fill(empty, 0, 0, is_set=True)
    pure_python.fill(empty, 5, 5, is_set=False)
    assert empty == b""
