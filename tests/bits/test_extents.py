from __future__ import annotations

from itertools import groupby
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcow2bm.bits import extents
from qcow2bm.bits.extents import ExtentFinder

WORD = 64  # bits; chunks are whole words
MAX_SIZE = 1 << 62  # of a disk in bytes

Extents = list[list[int]]


class Case(NamedTuple):
    """A disk and its bits; no bit beyond the disk is set (INV-TAIL)."""

    granularity: int
    virtual_size: int
    bits: int  # packed, bit 0 first
    words: int
    chunks: list[tuple[int, bool]]  # words each, and whether to say so if it is constant


segments = st.one_of(
    st.binary(min_size=1, max_size=24).map(lambda data: (int.from_bytes(data), 8 * len(data))),
    st.integers(1, 500).map(lambda length: (0, length)),
    st.integers(1, 500).map(lambda length: ((1 << length) - 1, length)),
    st.tuples(st.integers(0, 199), st.just(200)).map(lambda at: (1 << at[0], at[1])),
    st.integers(1, 40).map(lambda pairs: (int("10" * pairs, 2), 2 * pairs)),
)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    bits = count = 0
    for value, length in draw(st.lists(segments, min_size=1, max_size=8)):
        bits |= value << count
        count += length
    granularity = 1 << draw(st.integers(0, 63))
    count = min(count, max(1, MAX_SIZE // granularity))
    virtual_size = min(count * granularity, MAX_SIZE)
    virtual_size -= draw(st.integers(0, min(granularity, virtual_size) - 1))
    words = -(-count // WORD)
    chunks = draw(st.lists(st.tuples(st.integers(1, 8), st.booleans()), max_size=words))
    return Case(granularity, virtual_size, bits & ((1 << count) - 1), words, chunks)


def expected(case: Case) -> Extents:
    """Finds the extents bit by bit."""
    found: Extents = []
    bits = range(WORD * case.words)
    for is_set, group in groupby(bits, lambda bit: case.bits >> bit & 1):
        run = list(group)
        if is_set:
            start = run[0] * case.granularity
            end = min((run[-1] + 1) * case.granularity, case.virtual_size)
            found.append([start, end - start])
    return found


def feed(case: Case) -> Extents:
    """Feeds the bits in the chunks of the case, and the rest in one chunk; returns all extents."""
    finder = ExtentFinder(case.granularity, case.virtual_size)
    data = case.bits.to_bytes(8 * case.words, "little")
    parts = []
    for words, as_constant in [*case.chunks, (case.words, False)]:
        part, data = data[: 8 * words], data[8 * words :]
        if as_constant and part and part in (bytes(len(part)), b"\xff" * len(part)):
            parts.append(finder.constant(part[0] == 0xFF, len(part)))
        else:
            parts.append(finder.bits(np.frombuffer(part, np.uint8)))
    parts.append(finder.finish())
    assert {(found.dtype, found.shape[1:]) for found in parts} == {(np.dtype(np.int64), (2,))}
    return [row for found in parts for row in found.tolist()]


@pytest.mark.parametrize(
    "dense", [0, extents._DENSE, 1 << 40], ids=["always sparse", "as measured", "always dense"]
)
@given(case=cases())
def test_the_extents_are_those_of_the_bits(dense: int, case: Case) -> None:
    with mock.patch.object(extents, "_DENSE", dense):
        assert feed(case) == expected(case)


@given(cases(), st.integers(1, 9))
def test_an_extent_comes_as_soon_as_it_is_complete(case: Case, words: int) -> None:
    finder = ExtentFinder(case.granularity, case.virtual_size)
    whole = expected(case)
    given_out: Extents = []
    for start in range(0, case.words, words):
        stop = min(start + words, case.words)
        part = case.bits >> WORD * start & ((1 << WORD * (stop - start)) - 1)
        data = part.to_bytes(8 * (stop - start), "little")
        given_out += finder.bits(np.frombuffer(data, np.uint8)).tolist()
        is_open = case.bits >> (WORD * stop - 1) & 1
        so_far = [e for e in whole if e[0] < WORD * stop * case.granularity]
        assert given_out == so_far[: len(so_far) - is_open]
    assert given_out + finder.finish().tolist() == whole


@pytest.mark.parametrize("pattern", [0x01, 0x80, 0x55, 0xAA, 0x7E])
@pytest.mark.parametrize("gap", [0, 1, 2, 3, 4, 7, 63])
def test_every_density(pattern: int, gap: int) -> None:
    octets = (bytes([pattern]) + bytes(gap)) * 64
    words = len(octets) // 8
    case = Case(512, 512 * WORD * words, int.from_bytes(octets, "little"), words, [])
    assert feed(case) == expected(case)


def test_what_is_set_past_the_disk_is_clipped() -> None:
    finder = ExtentFinder(65536, 100_000)
    assert finder.bits(np.frombuffer(b"\xff" * 8, np.uint8)).tolist() == []
    assert finder.finish().tolist() == [[0, 100_000]]


@pytest.mark.parametrize("granularity_bits", range(64))
def test_one_bit_may_stand_for_more_than_the_disk(granularity_bits: int) -> None:
    size = min(1 << granularity_bits, MAX_SIZE)
    finder = ExtentFinder(1 << granularity_bits, size)
    assert finder.bits(np.frombuffer(b"\1" + bytes(7), np.uint8)).tolist() == [[0, size]]
    assert finder.finish().tolist() == []


def test_nothing_fed_is_nothing_found() -> None:
    assert ExtentFinder(512, 0).finish().shape == (0, 2)
    finder = ExtentFinder(512, 1 << 20)
    assert finder.bits(np.zeros(0, np.uint8)).shape == (0, 2)
    assert finder.finish().shape == (0, 2)


@pytest.mark.parametrize("value", [True, False])
def test_a_constant_of_no_length_changes_nothing(value: bool) -> None:
    other = np.full(8, 0 if value else 255, np.uint8)
    finder = ExtentFinder(512, 1 << 20)
    found = [finder.bits(other), finder.constant(value, 0), finder.bits(other), finder.finish()]
    assert np.concatenate(found).tolist() == ([] if value else [[0, 128 * 512]])
