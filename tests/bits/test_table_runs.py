from __future__ import annotations

from array import array
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcow2bm.bits import pure_python, table_runs
from qcow2bm.bits.runs import ALL_ONES, ALL_ZEROES, ALLOCATED, INVALID, Run

OFFSET_MASK = 0x00FFFFFFFFFFFE00


def kind_of(word: int, cluster_size: int) -> int:
    """The kind of a single entry, by the rule of the specification."""
    if word in (0, 1):
        return (ALL_ZEROES, ALL_ONES)[word]
    if word >> 56 or word % 512 or word % cluster_size:
        return INVALID
    return ALLOCATED


@st.composite
def bitmap_tables(draw: st.DrawFn) -> tuple[list[int], int]:
    """Draws words and a cluster size: constants, ascending and descending clusters, faults."""
    cluster_size = 1 << draw(st.integers(9, 21))
    last = OFFSET_MASK // cluster_size
    words: list[int] = []
    for _ in range(draw(st.integers(0, 6))):
        count = draw(st.integers(1, 4))
        first = draw(st.one_of(st.integers(1, 6), st.integers(last - 6, last)))
        step = draw(st.sampled_from((1, 1, 0, -1, 2)))
        cluster_words = [(first + step * i) * cluster_size for i in range(count)]
        any_words = st.lists(st.integers(0, (1 << 64) - 1), min_size=count, max_size=count)
        spoilt = draw(st.sampled_from((1, 2, 0x100, cluster_size >> 1, 1 << 56, 1 << 63)))
        words += draw(
            st.one_of(
                st.just([0] * count),
                st.just([1] * count),
                st.just([max(0, word) for word in cluster_words]),
                st.just([max(0, word) | spoilt for word in cluster_words]),
                any_words,
            )
        )
    return words, cluster_size


def both(words: list[int], cluster_size: int) -> list[Run]:
    """The runs, after checking that both implementations find the same."""
    table = array("Q", words)
    runs = list(pure_python.table_runs(table, OFFSET_MASK, cluster_size))
    found = table_runs.table_runs(table, OFFSET_MASK, cluster_size)
    assert found.dtype == np.int64
    assert found.shape == (len(runs), 4)
    assert [Run(*row) for row in found.tolist()] == runs
    return runs


@given(bitmap_tables())
def test_the_runs_have_the_kind_and_offset_of_every_entry(table: tuple[list[int], int]) -> None:
    words, cluster_size = table
    spelled_out = [
        (run.kind, run.offset + i * cluster_size if run.kind == ALLOCATED else run.offset)
        for run in both(words, cluster_size)
        for i in range(run.entries)
    ]
    kinds = [kind_of(word, cluster_size) for word in words]
    assert spelled_out == [
        (kind, word if kind == ALLOCATED else 0) for kind, word in zip(kinds, words, strict=True)
    ]


@given(bitmap_tables())
def test_runs_follow_each_other_and_none_could_be_longer(table: tuple[list[int], int]) -> None:
    words, cluster_size = table
    runs = both(words, cluster_size)
    assert sum(run.entries for run in runs) == len(words)
    assert [run.first for run in runs[:1]] == [0] * bool(words)
    for run, following in pairwise(runs):
        assert following.first == run.first + run.entries
        end = run.offset + run.entries * cluster_size
        joins = run.kind != ALLOCATED or following.offset == end
        assert not (run.kind == following.kind and joins)


@pytest.mark.parametrize(
    ("words", "runs"),
    [
        ([], []),
        ([0, 0, 1], [(ALL_ZEROES, 0, 2, 0), (ALL_ONES, 2, 1, 0)]),
        ([0x4000, 0x5000, 0x7000], [(ALLOCATED, 0, 2, 0x4000), (ALLOCATED, 2, 1, 0x7000)]),
        ([0x5000, 0x4000], [(ALLOCATED, 0, 1, 0x5000), (ALLOCATED, 1, 1, 0x4000)]),
        ([0x4000, 0x4000], [(ALLOCATED, 0, 1, 0x4000), (ALLOCATED, 1, 1, 0x4000)]),
        ([0x4000, 0x5001, 0x5000], [(2, 0, 1, 0x4000), (INVALID, 1, 1, 0), (2, 2, 1, 0x5000)]),
        ([2, 0x4200, 1 << 56, 0x4002], [(INVALID, 0, 4, 0)]),
        ([0x00FFFFFFFFFFF000, 1 << 56], [(2, 0, 1, 0x00FFFFFFFFFFF000), (INVALID, 1, 1, 0)]),
    ],
)
def test_written_out(words: list[int], runs: list[tuple[int, int, int, int]]) -> None:
    assert both(words, 4096) == runs
