"""Counts of clusters are right however they come, and take the memory of what differs."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.random import Generator
from support.traced_memory import traced_memory

from qcow2bm.checking import cluster_counts
from qcow2bm.checking.cluster_counts import CHUNK, ClusterCounts
from qcow2bm.checking.runs import Numbers, Runs

END = 5 * CHUNK

places = st.integers(0, END - 1)


def add_runs(counts: ClusterCounts, expected: Numbers, random: Generator, times: int) -> None:
    firsts = random.integers(0, END, 4)
    stops = np.minimum(END, firsts + random.integers(1, 2 * CHUNK, 4))
    counts.add_runs(Runs(firsts, stops), times)
    for first, stop in zip(firsts, stops, strict=True):
        expected[first:stop] += times


def add_few(counts: ClusterCounts, expected: Numbers, random: Generator, times: int) -> None:
    clusters = random.integers(0, END, random.integers(0, 20))
    counts.add(clusters, times)
    np.add.at(expected, clusters, times)


def add_many(counts: ClusterCounts, expected: Numbers, random: Generator, times: int) -> None:
    clusters = random.integers(0, CHUNK, 9000) + random.integers(0, END - CHUNK)
    counts.add(clusters, times)
    np.add.at(expected, clusters, times)


def add_weighted(counts: ClusterCounts, expected: Numbers, random: Generator, times: int) -> None:
    clusters = random.integers(0, CHUNK, 9000) + random.integers(0, END - CHUNK)
    each = times + random.integers(0, 3, 9000)
    counts.add(clusters, each)
    np.add.at(expected, clusters, each)


Step = Callable[[ClusterCounts, Numbers, Generator, int], None]
STEPS: tuple[Step, ...] = (add_runs, add_few, add_many, add_weighted)


@given(
    st.lists(st.tuples(st.sampled_from(STEPS), st.sampled_from([1, 2, 1 << 33])), max_size=6),
    st.integers(0, 1 << 32),
    st.integers(0, 30_000),
    st.tuples(places, places).map(sorted),
)
@settings(max_examples=80)
def test_they_are_those_of_an_array(
    steps: list[tuple[Step, int]], seed: int, waiting: int, between: list[int]
) -> None:
    counts, expected = ClusterCounts(), np.zeros(END, np.int64)
    random = np.random.default_rng(seed)
    with mock.patch.object(cluster_counts, "_MAX_WAITING_BYTES", waiting):
        for step, times in steps:
            step(counts, expected, random, times)
    first, stop = between
    assert np.array_equal(counts.counts(first, stop), expected[first:stop])
    wanted = np.arange(END)[:: END // 1000 + 1][::-1]
    assert np.array_equal(counts.of(wanted), expected[wanted])
    found = np.zeros(END, np.int64)
    for runs, numbers in counts.runs(first, stop):
        assert (numbers > 0).all()
        for low, high, number in zip(*runs, numbers, strict=True):
            found[low:high] += number
    assert np.array_equal(found[first:stop], expected[first:stop])
    each_one = [np.zeros((2, 0), np.int64), *(np.array(some) for some in counts.each(first, stop))]
    clusters, numbers = np.concatenate(each_one, axis=1)
    assert np.array_equal(clusters, first + np.flatnonzero(expected[first:stop]))
    assert np.array_equal(numbers, expected[clusters])


@pytest.mark.spec("CHECK-5")
@pytest.mark.parametrize("far", [1, 1 << 20])
def test_memory_grows_with_the_clusters_and_not_with_their_numbers(far: int) -> None:
    """A million clusters in a row, and 20,000 far apart."""
    counts = ClusterCounts()
    with traced_memory() as memory:
        if far == 1:
            for start in range(0, 1 << 20, 8192):
                counts.add(np.arange(start, start + 8192))
        else:
            counts.add(far * np.arange(20_000))
        assert counts.counts(0, 1)[0] == 1
    assert memory.kept < 1 << 20
    assert memory.peak < 8 << 20


def test_a_chunk_whose_counts_change_often_takes_a_byte_for_each_cluster() -> None:
    counts = ClusterCounts()
    clusters = np.random.default_rng(1).permutation(1 << 20)[: 1 << 19]
    with traced_memory() as memory:
        for part in np.split(clusters, 64):
            counts.add(part)
        assert int(counts.counts(0, 1 << 20).sum()) == 1 << 19
    assert memory.kept < 3 << 20


numbers = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9)), max_size=12)


def as_runs(pairs: list[tuple[int, int]]) -> Runs:
    """Runs, of which a pair has the first cluster and the length."""
    firsts, lengths = np.array(pairs, np.int64).reshape(-1, 2).T
    return Runs(firsts, firsts + lengths)


def members(runs: Runs) -> list[set[int]]:
    """The clusters of each run."""
    pairs = zip(runs.firsts.tolist(), runs.stops.tolist(), strict=True)
    return [set(range(first, stop)) for first, stop in pairs]


@given(numbers, numbers)
def test_runs_are_joined_and_overlap_as_sets_of_clusters_do(
    one: list[tuple[int, int]], other: list[tuple[int, int]]
) -> None:
    runs, others = as_runs(one), Runs.joined([as_runs(other)])
    assert set().union(*members(others)) == set().union(*members(as_runs(other)))
    assert (others.firsts[1:] > others.stops[:-1]).all()
    all_others = set().union(*members(others))
    shared = [sorted(each & all_others) for each in members(runs)]
    overlaps = runs.overlaps(others)
    assert [c for each in members(overlaps) for c in sorted(each)] == [c for s in shared for c in s]
    assert overlaps.clusters == sum(map(len, shared))
    assert runs.first_shared(others).tolist() == [each[0] if each else -1 for each in shared]
    clusters = np.arange(80)
    assert set(clusters[others.contain(clusters)].tolist()) == all_others


@given(st.lists(st.integers(0, 20), max_size=30))
def test_clusters_become_runs_in_the_order_in_which_they_come(clusters: list[int]) -> None:
    runs = Runs.of_clusters(np.array(clusters, np.int64))
    pairs = zip(runs.firsts.tolist(), runs.stops.tolist(), strict=True)
    assert [number for first, stop in pairs for number in range(first, stop)] == clusters
    assert all(stop != first for stop, first in zip(runs.stops[:-1], runs.firsts[1:], strict=True))
