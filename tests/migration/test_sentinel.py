"""The bitmaps that tell of writes: how fine they are, and when and what they tell."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcow2bm.format.directory import (
    FLAG_AUTO,
    FLAG_IN_USE,
    TYPE_DIRTY_TRACKING,
    DirectoryEntry,
)
from qcow2bm.migration.sentinel import PREFIX, Sentinel, is_sentinel
from qcow2bm.units import ceil_div

UUID = "0f0e0d0c-0b0a-4908-8706-050403020100"
LIMITS = 512, 2 << 30

cluster_sizes = st.integers(9, 21).map(lambda bits: 1 << bits)
sizes = st.integers(0, 56).flatmap(lambda bits: st.integers(1, 1 << bits)).map(lambda n: n * 512)


def entry(flags: int = FLAG_AUTO, granularity_bits: int = 16) -> DirectoryEntry:
    key = f"{PREFIX}{UUID}".encode()
    sizes = len(key), 0, b"", key, b""
    return DirectoryEntry(0, 0, 65536, 1, flags, TYPE_DIRTY_TRACKING, granularity_bits, *sizes)


@pytest.mark.spec("LIFE-8")
@given(sizes, cluster_sizes)
def test_it_is_the_finest_whose_bits_fit(size: int, cluster_size: int) -> None:
    granularity = Sentinel.fresh(size, cluster_size).granularity
    room = 8 * min(cluster_size, 65536)
    assert granularity & (granularity - 1) == 0
    assert LIMITS[0] <= granularity <= LIMITS[1]
    if granularity < LIMITS[1]:
        assert ceil_div(size, granularity) <= room
    if granularity > LIMITS[0]:
        assert ceil_div(size, granularity // 2) > room


@pytest.mark.parametrize(
    ("size", "cluster_size", "granularity"),
    [
        (512, 512, 512),
        (512 * 4096, 512, 512),
        (512 * 4096 + 512, 512, 1024),
        (1 << 40, 65536, 2 << 20),
        (1 << 40, 2 << 20, 2 << 20),
        ((1 << 40) + 512, 65536, 4 << 20),
        (1 << 62, 65536, 2 << 30),
    ],
)
def test_some_granularities(size: int, cluster_size: int, granularity: int) -> None:
    assert Sentinel.fresh(size, cluster_size).granularity == granularity


@pytest.mark.spec("LIFE-8")
def test_no_two_have_the_same_name() -> None:
    fresh = [Sentinel.fresh(1 << 30, 65536) for _ in range(200)]
    names = {name for sentinel in fresh for name in (sentinel.name, sentinel.canary_name)}
    assert len(names) == 400
    assert all(map(is_sentinel, names))


@pytest.mark.spec("LIFE-8")
def test_the_canary_has_the_name_of_its_sentinel() -> None:
    sentinel = Sentinel.fresh(1 << 30, 65536)
    assert sentinel.canary_name == f"{sentinel.name}-canary"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (f"{PREFIX}{UUID}", True),
        (f"{PREFIX}{UUID}-canary", True),
        (f"{PREFIX}{UUID}-canary-canary", False),
        (f"{PREFIX}{UUID}-canary\n", False),
        (f"{PREFIX}{UUID}-Canary", False),
        (f"{PREFIX}{UUID}-", False),
        (f"{PREFIX}{UUID}canary", False),
        (f"{PREFIX}-canary", False),
        ("-canary", False),
        (PREFIX, False),
        (f"{PREFIX}{UUID}x", False),
        (f"{PREFIX}{UUID}\n", False),
        (f"x{PREFIX}{UUID}", False),
        (f"{PREFIX}{UUID.upper()}", False),
        (f"{PREFIX}{UUID.replace('-', '')}", False),
        ("daily", False),
        ("", False),
        (None, False),
    ],
)
def test_what_is_a_sentinel_by_its_name(name: str | None, expected: bool) -> None:
    assert is_sentinel(name) is expected


def dense(size: int, cluster_size: int = 512) -> tuple[Sentinel, int]:
    """A sentinel and how many bytes its bits take in whole clusters."""
    sentinel = Sentinel.fresh(size, cluster_size)
    bits = ceil_div(size, sentinel.granularity)
    return sentinel, ceil_div(bits, 8 * cluster_size) * cluster_size


@given(st.integers(1, 5000).map(lambda n: n * 512))
def test_in_the_beginning_nothing_was_written(size: int) -> None:
    sentinel, length = dense(size)
    written = sentinel.written(np.zeros(length, np.uint8))
    assert written.dtype == np.int64
    assert written.shape == (0, 2)


@pytest.mark.spec("LIFE-10")
@given(
    st.integers(1, 5000).map(lambda n: n * 512),
    st.lists(st.tuples(st.integers(0, 1 << 30), st.integers(1, 1 << 16)), max_size=6),
    st.booleans(),
    st.booleans(),
)
def test_what_it_says_was_written(
    size: int, writes: list[tuple[int, int]], reaches_the_end: bool, is_stored: bool
) -> None:
    sentinel, length = dense(size)
    granularity, count = sentinel.granularity, ceil_div(size, sentinel.granularity)
    length = length if is_stored else ceil_div(count, 8)  # whole clusters, or no more than needed
    bits = np.zeros(8 * length, np.uint8)
    for place, span in [*writes, *([(size - 1, 1)] if reaches_the_end else [])]:
        start = place % size
        bits[start // granularity : ceil_div(min(start + span, size), granularity)] = 1
    found = sentinel.written(np.packbits(bits, bitorder="little"))
    assert found.dtype == np.int64
    marked = np.zeros(count, np.uint8)
    end = -1
    for start, span in found.tolist():
        assert span > 0
        assert start > end
        end = start + span
        marked[start // granularity : ceil_div(end, granularity)] = 1
    assert end <= size
    assert np.array_equal(marked, bits[:count])
    if reaches_the_end:
        assert end == size


NAME = f"{PREFIX}{UUID}"


@pytest.mark.spec("LIFE-10")
@pytest.mark.parametrize(
    ("found", "canary", "reason"),
    [
        (None, entry(0), "the sentinel is gone"),
        (entry(FLAG_AUTO | FLAG_IN_USE), entry(0), "the sentinel is in_use"),
        (entry(FLAG_IN_USE), entry(0), "the sentinel is in_use"),
        (entry(0), entry(0), "the sentinel was disabled"),
        (entry(granularity_bits=17), entry(0), "the sentinel has another granularity"),
        (entry(), None, "the canary is gone"),
        (entry(), entry(FLAG_IN_USE), "the canary is in_use"),
        (entry(), entry(FLAG_AUTO | FLAG_IN_USE), "the canary is in_use"),
        (entry(), entry(FLAG_AUTO), "the canary was enabled"),
        (entry(), entry(0, 15), "the canary has another granularity"),
        (None, None, "is gone"),
        (entry(), entry(0), ""),
    ],
)
def test_when_it_is_no_evidence(
    found: DirectoryEntry | None, canary: DirectoryEntry | None, reason: str
) -> None:
    why = Sentinel(NAME, 65536, 1 << 30).why_no_evidence(found, canary)
    assert reason in why
    assert bool(why) == bool(reason)


@pytest.mark.spec("LIFE-10")
def test_there_is_one_way_for_both_to_be() -> None:
    """All flags and two granularities of each, and either gone."""
    sentinel = Sentinel(NAME, 65536, 1 << 30)
    kinds = [None, *(entry(flags, bits) for flags in range(4) for bits in (15, 16))]
    sound = [
        (found, canary)
        for found in kinds
        for canary in kinds
        if not sentinel.why_no_evidence(found, canary)
    ]
    assert sound == [(entry(FLAG_AUTO), entry(0))]
