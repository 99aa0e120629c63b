"""Old or new after any crash: what an edit leaves behind when the power fails at any time."""

from __future__ import annotations

from collections.abc import Iterable
from random import Random

import pytest
from support.edit_operations import Operation, named, operations, planned
from support.layouts import FAMILIES, LAYOUTS, NAMES, build, header, image, set_refcount

import qcow2bm

MIN_STATES = 1500
"""In a family; so that all of them cannot have less than 10,000."""


@pytest.mark.spec("INV-ATOMIC", "INV-HEADER", "INV-REFCOUNT", "INV-UNKNOWN")
@pytest.mark.parametrize("name", LAYOUTS)
def test_some_states(name: str) -> None:
    random = Random(name)
    found = operations(LAYOUTS[name])
    for operation in random.sample(found, min(len(found), 2)):
        judge, plan = planned(build(name), operation)
        judge.judge_all(plan, random, most=4)


@pytest.mark.spec("INV-ATOMIC", "INV-HEADER", "INV-REFCOUNT", "EDIT-21")
@pytest.mark.parametrize("name", ["invalidate", "invalidate two"])
@pytest.mark.parametrize("refcount", [0, 2])
@pytest.mark.parametrize("layout", ["12", "9"])
def test_wrong_refcounts_of_bitmaps_do_not_matter_if_bitmaps_are_only_invalidated(
    layout: str, refcount: int, name: str
) -> None:
    """The header was restored from an older copy: the clusters of its bitmaps were freed."""
    data = image(int(layout), 3)
    with qcow2bm.open(bytes(data)) as opened:
        extension = opened.bitmaps_extension
        assert extension
        for place in (
            extension.bitmap_directory_offset,
            *(entry.bitmap_table_offset for entry in opened.directory),
        ):
            set_refcount(data, place // opened.cluster_size, refcount)
    other = named("set")
    with pytest.raises(qcow2bm.FormatError, match="refcount"):
        planned(bytes(data), other)
    judge, plan = planned(bytes(data), named(name))
    assert judge.judge_all(plan, Random(name)) >= 9
    with qcow2bm.open(bytes(data)) as opened, opened.edit(dry_run=True) as edit:
        edit.invalidate("b00")
        edit.rename("b01", "other")
        with pytest.raises(qcow2bm.FormatError, match="refcount"):
            edit.plan()


@pytest.mark.spec("INV-ATOMIC", "INV-HEADER", "INV-REFCOUNT")
@pytest.mark.deep
@pytest.mark.parametrize("family", FAMILIES)
def test_all_states(family: str) -> None:
    count = 0
    for name, layout in LAYOUTS.items():
        if layout.family == family:
            for operation in operations(layout):
                judge, plan = planned(build(name), operation)
                count += judge.judge_all(plan, Random(f"{name} {operation.name}"))
    print(f"crash states checked: {count} ({family})")
    assert count >= MIN_STATES


@pytest.mark.spec("INV-ATOMIC")
@pytest.mark.spec("INV-HEADER")
@pytest.mark.parametrize("backing", ["none", *NAMES])
@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("cluster_bits", [9, 10, 12])
def test_some_places_of_the_extension(cluster_bits: int, count: int, backing: str) -> None:
    places = Random(f"{cluster_bits} {count} {backing}").sample(range(112, 1048, 8), 4)
    judge_places(cluster_bits, count, backing, places, most=4)


@pytest.mark.spec("INV-HEADER")
@pytest.mark.deep
@pytest.mark.parametrize("backing", ["none", *NAMES])
@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("cluster_bits", [9, 10, 12])
def test_every_place_of_the_extension(cluster_bits: int, count: int, backing: str) -> None:
    states = judge_places(cluster_bits, count, backing, range(112, 1048, 8), most=8)
    print(f"crash states checked: {states} ({cluster_bits} {count} {backing})")


def judge_places(
    cluster_bits: int, count: int, backing: str, places: Iterable[int], most: int
) -> int:
    """Where there is no room the edit is refused, and nothing is changed."""
    states = 0
    for place in places:
        for is_followed in {False, count > 0}:
            layout = header(count, place, backing, is_followed, cluster_bits)
            try:
                data = layout.make()
            except ValueError:  # such an image cannot be
                continue
            for operation in map(named, ("add", "remove all")[: 1 + count]):
                random = Random(f"{layout.name} {operation.name}")
                try:
                    judge, plan = planned(data, operation)
                except qcow2bm.LimitError:
                    assert cluster_bits < 12, "there is room for every change"
                    assert_refused(data, operation)
                    continue
                states += judge.judge_all(plan, random, most)
    return states


def assert_refused(data: bytes, operation: Operation) -> None:
    edited = bytearray(data)
    with qcow2bm.open(edited, "r+") as image:
        with pytest.raises(qcow2bm.LimitError) as caught, image.edit() as edit:
            operation.edit(edit)
        assert caught.value.limit == image.cluster_size
    assert edited == data
