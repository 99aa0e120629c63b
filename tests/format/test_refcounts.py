from __future__ import annotations

from array import array
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcow2bm.format.refcounts import build_refcount_block, parse_refcount_block

ORDERS = range(7)
TYPECODES = "BBBBHIQ"
every_order = pytest.mark.parametrize("order", ORDERS)


def refcount(data: bytes, order: int, index: int) -> int:
    """Reads one refcount by the rule of the specification."""
    bits = 1 << order
    if bits >= 8:
        start = index * bits // 8
        return int.from_bytes(data[start : start + bits // 8], "big")
    return data[index * bits // 8] >> (index % (8 // bits)) * bits & ((1 << bits) - 1)


blocks = st.lists(st.binary(min_size=8, max_size=8), max_size=16).map(b"".join)


@every_order
@given(data=blocks)
def test_each_refcount_follows_the_rule(order: int, data: bytes) -> None:
    counts = parse_refcount_block(data, order)
    assert counts.typecode == TYPECODES[order]
    assert list(counts) == [refcount(data, order, index) for index in range(8 * len(data) >> order)]


@every_order
@given(data=blocks)
def test_what_is_parsed_is_built_again(order: int, data: bytes) -> None:
    counts = parse_refcount_block(data, order)
    before = counts[:]
    assert build_refcount_block(counts, order) == data
    assert counts == before  # and left alone


@every_order
@given(data=st.data())
def test_refcounts_survive_being_built_and_parsed(order: int, data: st.DataObject) -> None:
    count = st.integers(0, (1 << (1 << order)) - 1)
    whole = st.lists(st.lists(count, min_size=8, max_size=8), max_size=8)
    counts = array(TYPECODES[order], chain.from_iterable(data.draw(whole)))
    assert parse_refcount_block(build_refcount_block(counts, order), order) == counts


@pytest.mark.parametrize(
    ("order", "data", "counts"),
    [
        (0, "0180", [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]),
        (1, "e4", [0, 1, 2, 3]),
        (2, "21f0", [1, 2, 0, 15]),
        (3, "0100ff", [1, 0, 255]),
        (4, "0001ff00", [1, 0xFF00]),
        (5, "00000001fffffffe", [1, 0xFFFFFFFE]),
        (6, "0000000000000001fffffffffffffffe", [1, 0xFFFFFFFFFFFFFFFE]),
    ],
)
def test_written_out(order: int, data: str, counts: list[int]) -> None:
    assert list(parse_refcount_block(bytes.fromhex(data), order)) == counts


@pytest.mark.parametrize("order", [-1, 7])
def test_there_are_seven_orders(order: int) -> None:
    with pytest.raises(ValueError, match="refcount_order"):
        parse_refcount_block(bytes(8), order)
    with pytest.raises(ValueError, match="refcount_order"):
        build_refcount_block(array("Q", [0]), order)


@pytest.mark.parametrize("order", [4, 5, 6])
def test_a_block_that_ends_inside_a_refcount_is_refused(order: int) -> None:
    with pytest.raises(ValueError, match="multiple"):
        parse_refcount_block(bytes((1 << order) // 8 + 1), order)


@pytest.mark.parametrize("order", range(3))
def test_refcounts_that_do_not_fill_a_byte_are_refused(order: int) -> None:
    with pytest.raises(ValueError, match=f"{1 << order}-bit"):
        build_refcount_block(array("B", [0] * ((8 >> order) + 1)), order)


@pytest.mark.parametrize("order", range(6))
def test_a_refcount_too_large_for_its_width_is_refused(order: int) -> None:
    # The type of the next order holds a number that this order cannot.
    counts = array(TYPECODES[order + 1], [1 << (1 << order)] + [0] * 7)
    with pytest.raises(ValueError, match="bit"):
        build_refcount_block(counts, order)


@every_order
def test_the_type_of_the_array_does_not_matter(order: int) -> None:
    counts = [1, 0, 0, 1, 1, 0, 1, 0]
    expected = build_refcount_block(array(TYPECODES[order], counts), order)
    assert build_refcount_block(array("Q", counts), order) == expected
