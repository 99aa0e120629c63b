"""The two tables of 64-bit words: the bitmap table and the refcount table."""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.hostile_bytes import U64

from qcow2bm.format.bitmap_table import MASKS, build_bitmap_table, parse_bitmap_table
from qcow2bm.format.refcounts import (
    TABLE_OFFSET_MASK,
    TABLE_RESERVED_MASK,
    build_refcount_table,
    parse_refcount_table,
)

Parse = Callable[[bytes], "array[int]"]
Build = Callable[["array[int]"], bytes]

both_tables = pytest.mark.parametrize(
    ("parse", "build"),
    [(parse_bitmap_table, build_bitmap_table), (parse_refcount_table, build_refcount_table)],
    ids=["bitmap table", "refcount table"],
)


@both_tables
@given(words=st.lists(U64, max_size=20))
def test_entries_are_big_endian_words(parse: Parse, build: Build, words: list[int]) -> None:
    data = struct.pack(f">{len(words)}Q", *words)
    assert list(parse(data)) == words
    given_words = array("Q", words)
    assert build(given_words) == data
    assert list(given_words) == words  # and left alone


@both_tables
@given(data=st.binary(max_size=80))
def test_any_whole_number_of_words_is_kept(parse: Parse, build: Build, data: bytes) -> None:
    if len(data) % 8:
        with pytest.raises(ValueError, match="multiple"):
            parse(data)
    else:
        assert build(parse(data)) == data


@both_tables
def test_a_big_endian_host_swaps_nothing(
    parse: Parse, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "byteorder", "big")
    native = array("Q", [1, 2, 3])
    assert parse(native.tobytes()) == native
    assert build(native) == native.tobytes()


def test_the_parts_of_a_bitmap_table_entry() -> None:
    assert MASKS.offset == 0x00FFFFFFFFFFFE00
    assert MASKS.all_ones == 0x0000000000000001
    assert MASKS.reserved == 0xFF000000000001FE


def test_the_parts_of_a_refcount_table_entry() -> None:
    assert TABLE_OFFSET_MASK == 0xFFFFFFFFFFFFFE00
    assert TABLE_RESERVED_MASK == 0x00000000000001FF
