"""Refcounts of every width: reading them, and planning changes."""

from __future__ import annotations

import struct
from array import array
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.audit import Audit
from support.images import Built, build_image
from support.plans import after, opened

from qcow2bm.clusters.refcounts import Refcounts
from qcow2bm.errors import FormatError
from qcow2bm.format.refcounts import build_refcount_block
from qcow2bm.units import align_up

CLUSTER = 512
ORDERS = range(7)
BLOCKS = 3


def per_block(order: int) -> int:
    return 8 * CLUSTER >> order


def image_of(order: int, counts: Counter[int]) -> Built:
    """An image with refcount blocks 0 and 2, but without block 1."""
    image = build_image(refcount_order=order)
    for index in (0, 2):
        place = len(image.data)
        if index:
            image.data.extend(bytes(CLUSTER))
            image.plant(place, "refcount-table", 0, index)
        else:
            place = image.offset("refcount-block")
        base = index * per_block(order)
        block = array("BBBBHIQ"[order], (counts[base + n] for n in range(per_block(order))))
        image.data[place : place + CLUSTER] = build_refcount_block(block, order)
    return image


@st.composite
def some_counts(draw: st.DrawFn, order: int) -> Counter[int]:
    """Refcounts of clusters in the first and the third block."""
    size = per_block(order)
    clusters = st.integers(0, size - 1) | st.integers(2 * size, 3 * size - 1)
    value = st.integers(1, (1 << (1 << order)) - 1)
    return Counter(draw(st.dictionaries(clusters, value, max_size=30)))


@pytest.mark.parametrize("order", ORDERS)
@given(data=st.data())
@settings(max_examples=30)
def test_every_refcount_is_what_the_block_says(order: int, data: st.DataObject) -> None:
    counts = data.draw(some_counts(order))
    image = image_of(order, counts)
    refcounts = Refcounts(opened(image.data))
    assert refcounts.per_block == per_block(order)
    assert refcounts.capacity == CLUSTER // 8
    assert [refcounts.has_block(n) for n in (0, 1, 2, 3, 64, 1 << 40)] == [1, 0, 1, 0, 0, 0]
    assert refcounts.blocks() == [0, 2]
    beyond = [BLOCKS * per_block(order), refcounts.capacity * per_block(order), 1 << 50]
    shown = {n: refcounts[n] for n in (*range(BLOCKS * per_block(order)), *beyond)}
    assert {n: count for n, count in shown.items() if count} == +counts
    assert refcounts.end() == max(counts, default=-1) + 1
    free = {n for first, stop in refcounts.free_runs((0, 2)) for n in range(first, stop)}
    counted = {*range(per_block(order)), *range(2 * per_block(order), 3 * per_block(order))}
    assert free == counted - set(counts)
    runs = list(refcounts.free_runs([2]))
    assert runs == sorted(runs)
    assert all(first >= 2 * per_block(order) for first, _ in runs)


@pytest.mark.parametrize("order", ORDERS)
@given(data=st.data())
@settings(max_examples=30)
def test_a_change_is_written_where_the_refcount_is(order: int, data: st.DataObject) -> None:
    counts = data.draw(some_counts(order))
    image = image_of(order, counts)
    refcounts = Refcounts(opened(image.data))
    expected = Counter(counts)
    changed: set[int] = set()  # host offsets of sectors
    for _ in range(data.draw(st.integers(1, 5))):
        index = data.draw(st.sampled_from((0, 2)))
        entry = data.draw(st.integers(0, per_block(order) - 1))
        first = index * per_block(order) + entry
        before = refcounts[first]
        count = 1
        while count < per_block(order) - entry and refcounts[first + count] == before:
            count += 1
        count = data.draw(st.integers(1, count))
        value = data.draw(st.integers(0, (1 << (1 << order)) - 1))
        refcounts.change(first, count, before, value)
        expected.update({n: value - expected[n] for n in range(first, first + count)})
        changed.add(image.offset("refcount-block") if index == 0 else len(image.data) - CLUSTER)
    writes = refcounts.take_count_writes("some")
    assert {write.offset // 512 * 512 for write in writes} == changed
    assert all(write.length <= 512 for write in writes)
    assert Audit(after(image.data, writes)).refcounts == +expected
    assert refcounts.take_count_writes("some") == []  # taken is taken


def test_a_change_goes_over_the_edge_of_a_block() -> None:
    image = build_image(refcount_order=6)  # one block counts 64 clusters
    place = len(image.data)
    image.data.extend(bytes(CLUSTER))
    image.plant(place, "refcount-table", 0, 1)
    refcounts = Refcounts(opened(image.data))
    refcounts.change(60, 10, 0, 7)
    writes = refcounts.take_count_writes("some")
    counts = Audit(after(image.data, writes)).refcounts
    assert {n: count for n, count in counts.items() if count == 7} == dict.fromkeys(
        range(60, 70), 7
    )


def test_only_the_sectors_that_change_are_written() -> None:
    image = build_image(cluster_bits=12)
    block = image.offset("refcount-block")
    refcounts = Refcounts(opened(image.data))
    refcounts.change(255, 2, 0, 1)  # 256 refcounts of 16 bits are a sector
    refcounts.change(2047, 1, 0, 1)
    writes = refcounts.take_count_writes("some")
    assert [(w.offset - block, w.length) for w in writes] == [(0, 512), (512, 512), (3584, 512)]


@pytest.mark.parametrize(
    ("order", "before", "found"),
    [
        (order, before, found)
        for order in ORDERS
        for before, found in ((1, 0), (0, 1), (1, 2), (1, 255))
        if found < 1 << (1 << order)
    ],
)
def test_a_refcount_other_than_expected_is_refused(order: int, before: int, found: int) -> None:
    image = image_of(order, Counter({20: found} if found else {}))
    refcounts = Refcounts(opened(image.data))
    with pytest.raises(FormatError) as raised:
        refcounts.change(20, 1, before, 1 - before)
    error = raised.value
    assert error.offset == image.offset("refcount-block") + (20 << order) // 8
    assert f"is {found}, must be {before}" in str(error)
    assert f"the cluster at {20 * CLUSTER:#x}" in str(error)


@pytest.mark.parametrize("cluster", [per_block(4), 100 * per_block(4)])
def test_a_cluster_without_refcount_block_cannot_be_changed(cluster: int) -> None:
    refcounts = Refcounts(opened(image_of(4, Counter()).data))
    for before in (0, 1):
        with pytest.raises(FormatError, match=r"is 0, must be"):
            refcounts.change(cluster, 1, before, 1)
    with pytest.raises(FormatError, match=r"is 0, must be"):
        refcounts.change(per_block(4) - 1, 2, 0, 1)


@pytest.mark.parametrize("word", [1, 0x100, 513, 0x208, (1 << 63) + 511])
def test_a_damaged_table_is_refused(word: int) -> None:
    image = build_image()
    offset = image.plant(word, "refcount-table", 0, 5)
    with pytest.raises(FormatError, match=r"repair the image first") as raised:
        Refcounts(opened(image.data))
    assert (raised.value.structure, raised.value.offset) == ("refcount table", offset)


def test_a_block_beyond_the_file_is_refused_when_it_is_needed() -> None:
    image = build_image()
    end = align_up(len(image.data), CLUSTER)
    offset = image.plant(end, "refcount-table", 0, 1)
    refcounts = Refcounts(opened(image.data))
    assert refcounts[0] == 1
    with pytest.raises(FormatError, match=r"beyond the end of the file") as raised:
        refcounts.end()
    assert raised.value.offset == offset


def test_a_new_block_is_written_whole_and_leads_from_the_table() -> None:
    image = build_image()
    refcounts = Refcounts(opened(image.data))
    place = len(image.data) // CLUSTER
    refcounts.add_block(3, place)
    refcounts.change(3 * 256 + 5, 2, 0, 1)
    (block,) = refcounts.take_block_writes()
    assert (block.offset, block.length, block.is_fresh) == (place * CLUSTER, CLUSTER, True)
    (entry,) = refcounts.take_table_writes()
    assert (entry.offset, entry.length) == (image.offset("refcount-table", 0, 3), 8)
    assert refcounts.take_count_writes("some") == []
    counts = Audit(after(image.data, [block, entry])).refcounts
    assert {n for n in counts if n > 255} == {773, 774}


def test_a_table_that_moves_is_written_whole() -> None:
    image = build_image()
    refcounts = Refcounts(opened(image.data))
    refcounts.move_table(40, 3)
    assert (refcounts.table_offset, refcounts.table_clusters) == (40 * CLUSTER, 3)
    assert refcounts.capacity == 3 * CLUSTER // 8
    refcounts.add_block(150, 43)
    refcounts.take_block_writes()
    (table,) = refcounts.take_table_writes()
    assert (table.offset, table.length, table.is_fresh) == (40 * CLUSTER, 3 * CLUSTER, True)
    words = struct.unpack(f">{3 * CLUSTER // 8}Q", b"".join(table.parts))
    expected = {0: image.offset("refcount-block"), 150: 43 * CLUSTER}
    assert {n: word for n, word in enumerate(words) if word} == expected
