"""Joined runs are the clusters of all runs, few or many of them."""

from __future__ import annotations

from array import array
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcow2bm.clusters import cluster_runs
from qcow2bm.clusters.cluster_runs import JoinedRuns, Run

SIZE = 512
END = 80

runs = st.lists(
    st.tuples(st.integers(0, 60), st.integers(1, 9)).map(lambda run: (run[0], sum(run))),
    max_size=12,
)


@pytest.mark.parametrize("numpy_pays", [1, 1 << 16])
@given(runs=runs, between=st.tuples(st.integers(0, END), st.integers(0, END)).map(sorted))
def test_they_are_the_clusters_of_ranges(
    numpy_pays: int, runs: list[Run], between: list[int]
) -> None:
    clusters = {number for first, stop in runs for number in range(first, stop)}
    starts, ends = (array("Q", (SIZE * run[side] for run in runs)) for side in (0, 1))
    with mock.patch.object(cluster_runs, "_NUMPY_PAYS", numpy_pays):
        joined = JoinedRuns.of_ranges(starts, ends, SIZE)
    assert list(joined) == list(JoinedRuns.of(runs))
    assert {number for number in range(END) if number in joined} == clusters
    assert all(stop < first for (_, stop), (first, _) in zip(joined, [*joined][1:], strict=False))
    assert joined.clusters == len(clusters)
    assert joined.end == max(clusters, default=-1) + 1
    first, stop = between
    inside = [number for low, high in joined.within(first, stop) for number in range(low, high)]
    assert inside == sorted(clusters & set(range(first, stop)))
