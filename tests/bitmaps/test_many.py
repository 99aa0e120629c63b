"""Many ranges and many table entries are judged as few are, with other means."""

from __future__ import annotations

from array import array
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.images import ONES, Stored, build_image
from support.problem_images import IDS, broken

import qcow2bm
from qcow2bm.bitmaps import overlaps, tables
from qcow2bm.bitmaps.overlaps import Overlaps
from qcow2bm.problems import DIRECTORY, Problem

CLUSTER = 512

places = st.tuples(st.integers(0, 9), st.integers(0, 30), st.integers(1, 4))


def found(ranges: list[tuple[int, int, int]]) -> tuple[list[Problem], int | None]:
    """The problems of ranges: of each the structure, the first cluster, and how many there are."""
    collected = Overlaps(CLUSTER)
    uses = [
        collected.use(DIRECTORY),
        collected.use("L1 table"),
        *(collected.use(f"table {n}", n, is_table=True) for n in range(4)),
        *(collected.use(f"data {n}", n) for n in range(4)),
    ]
    for use, first, count in ranges:
        if use % 2:
            collected.add(uses[use], CLUSTER * first, CLUSTER * count)
        else:
            ends = array("Q", [CLUSTER * (first + count)])
            collected.add_all(uses[use], array("Q", [CLUSTER * first]), ends)
    return list(collected.problems()), collected.first_shared()


@given(st.lists(places, max_size=20))
def test_ranges_overlap_in_the_same_way_however_many_there_are(
    ranges: list[tuple[int, int, int]],
) -> None:
    few = found(ranges)
    with mock.patch.object(overlaps, "_NUMPY_PAYS", 1):
        assert found(ranges) == few
    clusters = [number for _, first, count in ranges for number in range(first, first + count)]
    shared = [number for number in clusters if clusters.count(number) > 1]
    assert few[1] == (CLUSTER * min(shared) if shared else None)


def judged(data: bytes | bytearray) -> object:
    """All that is known of the bitmaps of an image."""
    with qcow2bm.open(data) as opened:
        bitmaps = [opened.bitmap(number) for number in range(len(opened.directory))]
        return opened.problems, [(bitmap.status, bitmap.clusters) for bitmap in bitmaps]


@pytest.mark.parametrize("id", [id for id in IDS if id.startswith("bitmap-")])
def test_tables_are_judged_in_the_same_way_however_large_they_are(id: str) -> None:
    data = broken(id)
    expected = judged(data)
    with mock.patch.multiple(tables, _NUMPY_PAYS=1, _FEW_ENTRIES=1):
        assert judged(data) == expected


def test_many_faults_of_one_table_are_listed_in_part() -> None:
    words: list[int | bytes] = [ONES, 0, *[1 << 60] * 30, b"x", 1 << 40, 777]
    size = 8 * CLUSTER * len(words) << 16
    data = build_image(Stored(b"b", words), size=size, cluster_bits=9).data
    expected = judged(data)
    with mock.patch.multiple(tables, _NUMPY_PAYS=1, _FEW_ENTRIES=1):
        assert judged(data) == expected
