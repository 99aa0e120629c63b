"""The bitmap that tells of writes: how fine it is, its canary, and what it says was written."""

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
    names = {Sentinel.fresh(1 << 30, 65536).name for _ in range(200)}
    assert len(names) == 200
    assert all(map(is_sentinel, names))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (f"{PREFIX}{UUID}", True),
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


@pytest.mark.spec("LIFE-10")
@given(sizes, cluster_sizes)
def test_the_canary_is_the_last_bit(size: int, cluster_size: int) -> None:
    sentinel = Sentinel.fresh(size, cluster_size)
    start, length = sentinel.canary
    assert start % sentinel.granularity == 0
    assert start + length == size
    assert 0 < length <= sentinel.granularity
    assert start // sentinel.granularity == ceil_div(size, sentinel.granularity) - 1


def dense(size: int, cluster_size: int = 512) -> tuple[Sentinel, int]:
    """A sentinel and how many bytes its bits take in whole clusters."""
    sentinel = Sentinel.fresh(size, cluster_size)
    bits = ceil_div(size, sentinel.granularity)
    return sentinel, ceil_div(bits, 8 * cluster_size) * cluster_size


@pytest.mark.spec("LIFE-10")
@given(st.integers(1, 5000).map(lambda n: n * 512))
def test_in_the_beginning_it_has_its_canary_and_nothing_else(size: int) -> None:
    sentinel, length = dense(size)
    octets = np.frombuffer(sentinel.octets(length), np.uint8)
    assert np.unpackbits(octets).sum() == 1
    written = sentinel.written(octets)
    assert written is not None
    assert written.tolist() == [list(sentinel.canary)]


@pytest.mark.spec("LIFE-10")
@given(
    st.integers(1, 5000).map(lambda n: n * 512),
    st.lists(st.tuples(st.integers(0, 1 << 30), st.integers(1, 1 << 16)), max_size=6),
    st.booleans(),
)
def test_what_it_says_was_written(
    size: int, writes: list[tuple[int, int]], keeps_canary: bool
) -> None:
    sentinel, length = dense(size)
    granularity, count = sentinel.granularity, ceil_div(size, sentinel.granularity)
    bits = np.zeros(8 * length, np.uint8)
    for place, span in writes:
        start = place % size
        bits[start // granularity : ceil_div(min(start + span, size), granularity)] = 1
    bits[count - 1] = keeps_canary
    found = sentinel.written(np.packbits(bits, bitorder="little"))
    if not keeps_canary:
        assert found is None
        return
    assert found is not None
    assert found.dtype == np.int64
    marked = np.zeros(count, np.uint8)
    ends = [0]
    for start, span in found.tolist():
        assert span > 0
        assert start > ends[-1] or start == 0
        ends.append(start + span)
        marked[start // granularity : ceil_div(start + span, granularity)] = 1
    assert ends[-1] == size
    assert np.array_equal(marked, bits[:count])


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (None, "is gone"),
        (entry(FLAG_AUTO | FLAG_IN_USE), "in_use"),
        (entry(FLAG_IN_USE), "in_use"),
        (entry(0), "disabled"),
        (entry(granularity_bits=17), "another granularity"),
        (entry(), ""),
    ],
)
def test_when_it_is_no_evidence(found: DirectoryEntry | None, reason: str) -> None:
    sentinel = Sentinel(f"{PREFIX}{UUID}", 65536, 1 << 30)
    why = sentinel.why_no_evidence(found)
    assert reason in why
    assert bool(why) == bool(reason)
