"""Partitions of a disk, in whatever pieces they come, against one label for each byte."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcow2bm.bits.partitions import Piece, Ranges, partition, refine

Labels = list[int]
labels = st.lists(st.integers(0, 2), max_size=40)
cuts = st.lists(st.integers(0, 40), max_size=5)


def spelled_out(starts_at: int, ends: Sequence[int], names: Sequence[object]) -> list[object]:
    found = []
    for end, name in zip(ends, names, strict=True):
        assert end > starts_at
        found += [name] * (end - starts_at)
        starts_at = end
    return found


def ranges(disk: Labels, cuts: list[int]) -> Iterator[Ranges]:
    """The bytes of the disk whose label is not 0, one by one, in pieces that end at ``cuts``."""
    edges = sorted({0, len(disk), *(min(cut, len(disk)) for cut in cuts)})
    for first, stop in pairwise(edges):
        places = np.array([p for p in range(first, stop) if disk[p]], np.int64)
        yield Ranges(places, places + 1, np.array(disk, np.int64)[places])


def pieces(disk: Labels, cuts: list[int]) -> list[Piece]:
    return list(partition(ranges(disk, cuts), len(disk)))


@pytest.mark.spec("MAP-2")
@given(labels, cuts)
def test_a_partition_has_no_gaps_and_no_neighbours_of_one_label(
    disk: Labels, cuts: list[int]
) -> None:
    found = pieces(disk, cuts)
    assert all(len(piece.ends) for piece in found)
    ends = [end for piece in found for end in piece.ends.tolist()]
    names = [name for piece in found for name in piece.labels.tolist()]
    assert spelled_out(0, ends, names) == disk
    assert all(one != other for one, other in pairwise(names))


@pytest.mark.spec("MAP-3")
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1)), max_size=40), cuts, cuts)
def test_two_partitions_cut_a_disk_together(
    disk: list[tuple[int, int]], cuts: list[int], other_cuts: list[int]
) -> None:
    ours = pieces([one for one, _ in disk], cuts)
    theirs = pieces([other for _, other in disk], other_cuts)
    ends: list[int] = []
    names: list[tuple[int, int]] = []
    for part in refine(iter(ours), iter(theirs)):
        ends += part.ends.tolist()
        names += zip(part.labels.tolist(), part.others.tolist(), strict=True)
    assert spelled_out(0, ends, names) == disk
    assert all(one != other for one, other in pairwise(names))
