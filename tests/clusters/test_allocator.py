"""Allocating and freeing clusters in images with refcounts of every width."""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.audit import Audit
from support.images import Built, build_image
from support.plans import after, opened

from qcow2bm.clusters.allocator import Allocation, Allocator
from qcow2bm.clusters.cluster_runs import Run
from qcow2bm.clusters.guest_map import GuestMap
from qcow2bm.clusters.plan import Barrier, Step
from qcow2bm.errors import FormatError, LimitError, StorageError

ORDERS = range(7)
CLUSTER_BITS = (9, 12, 16)
TABLE_ENTRIES = 64  # of a refcount table of one cluster of 512 bytes


class Done(NamedTuple):
    """An allocation, and the image after its writes."""

    allocation: Allocation
    prepared: list[Step]
    image: bytearray

    @property
    def clusters(self) -> Counter[int]:
        return clusters_of(self.allocation.loose)


def clusters_of(runs: Iterable[Run]) -> Counter[int]:
    return Counter(n for first, stop in runs for n in range(first, stop))


def allocator_of(
    data: bytearray, taken: Iterable[Run] = (), near: int = 0, capacity: int | None = None
) -> Allocator:
    file = opened(data)
    return Allocator(file, taken, near, capacity, GuestMap(file))


def allocate(
    data: bytearray, runs: Sequence[int], loose: int, allocator: Allocator | None = None
) -> Done:
    """Allocates clusters, executes the writes, and checks the image.

    For every request, the refcounts of the new clusters change from 0 to 1, the refcounts of new
    refcount structures are right, and all other refcounts stay the same.
    """
    allocator = allocator or allocator_of(data)
    before = Audit(data)
    allocation = allocator.allocate(runs, loose)
    prepared = allocator.preparation()
    image = after(data, [*prepared, *allocator.refcounts.take_count_writes("new")])
    got = clusters_of(allocation.loose)
    assert got.total() == loose
    assert len(allocation.firsts) == len(runs)
    for first, length in zip(allocation.firsts, runs, strict=True):
        got.update(range(first, first + length))
    assert not got or max(got.values()) == 1  # none twice
    assert not got.keys() & before.refcounts.keys()
    audit = Audit(image)
    structures = audit.references.keys() - before.references.keys()
    assert not structures & got.keys()
    expected = before.refcounts + got + Counter(structures)
    assert audit.refcounts == expected
    return Done(allocation, prepared, image)


def with_refcounts(image: Built, order: int, clusters: Iterable[int], value: int = 1) -> bytearray:
    """The image with refcounts of further clusters, as if guest data were there."""
    block, width = image.offset("refcount-block"), 1 << order
    for cluster in clusters:
        place = block + cluster * width // 8
        if width < 8:
            image.data[place] |= value << cluster * width % 8
        else:
            image.data[place : place + width // 8] = value.to_bytes(width // 8, "big")
    return image.data


# --- what is handed out -----------------------------------------------------------------------


@pytest.mark.parametrize("cluster_bits", CLUSTER_BITS)
@pytest.mark.parametrize("order", ORDERS)
@given(data=st.data())
@settings(max_examples=12)
def test_only_free_clusters_are_handed_out(
    cluster_bits: int, order: int, data: st.DataObject
) -> None:
    image = build_image(cluster_bits=cluster_bits, refcount_order=order)
    own = len(image.data) >> cluster_bits
    last = min(8 << cluster_bits >> order, 90)
    clusters = st.integers(own, last - 1)
    counted = data.draw(st.sets(clusters, max_size=60))
    taken = data.draw(st.lists(st.tuples(clusters, st.integers(0, 9)), max_size=5))
    taken_runs = [(first, min(first + length, last)) for first, length in taken]
    counted |= clusters_of(taken_runs).keys()
    runs = data.draw(st.lists(st.integers(1, 9), max_size=4))
    loose = data.draw(st.integers(0, 30))
    stored = with_refcounts(image, order, counted)
    done = allocate(stored, runs, loose, allocator_of(stored, taken_runs, own))
    got = done.clusters
    for first, length in zip(done.allocation.firsts, runs, strict=True):
        got.update(range(first, first + length))
    assert not got.keys() & clusters_of(taken_runs).keys()


def test_a_cluster_in_use_without_refcount_ends_the_search() -> None:
    image = build_image()
    stored = with_refcounts(image, 4, (6, 9))
    allocator = allocator_of(stored, [(6, 8)])
    with pytest.raises(FormatError, match="cluster at 0xe00 at 0x40e is 0, must be 1"):
        allocator.allocate([], 1)
    assert allocator_of(stored, [(6, 7)]).allocate([], 1).loose


def test_gaps_are_filled_before_the_image_grows() -> None:
    image = build_image()
    stored = with_refcounts(image, 4, (6, 9, 12, 13, 200))
    done = allocate(stored, [2, 3, 1], 2)
    assert done.allocation == Allocation((4, 14, 7), ((8, 9), (10, 11)))
    assert done.prepared == []


def test_the_search_begins_near_what_is_there_and_goes_on_elsewhere() -> None:
    image = build_image(refcount_order=6)  # a block counts 64 clusters
    stored = allocate(image.data, [], 5000).image
    audit = Audit(stored)
    freed = [70, 71, 72, 4000]
    allocator = allocator_of(stored)
    allocator.free((n, n + 1) for n in freed)
    stored = after(stored, allocator.refcounts.take_count_writes("freed"))
    assert Audit(stored).refcounts == audit.refcounts - Counter(freed)
    end = max(audit.refcounts) + 1
    for near, runs, loose, expected in (
        (3990, [], 1, Allocation((), ((4000, 4001),))),
        (64, [], 1, Allocation((), ((70, 71),))),
        (64, [3], 1, Allocation((70,), ((4000, 4001),))),
        (3990, [3], 1, Allocation((end,), ((4000, 4001),))),  # behind before round the end
        (0, [4], 0, Allocation((end,), ())),
    ):
        assert allocate(stored, runs, loose, allocator_of(stored, near=near)).allocation == expected
    fixed = allocator_of(stored, near=4100, capacity=512 * end)
    assert allocate(stored, [], 2, fixed).allocation == Allocation((), ((70, 72),))


# --- room for refcounts -----------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
def test_new_blocks_are_made_and_count_themselves(order: int) -> None:
    per_block = 4096 >> order
    image = build_image(refcount_order=order)
    done = allocate(image.data, [], 2 * per_block)
    barriers = [n for n, step in enumerate(done.prepared) if isinstance(step, Barrier)]
    assert len(barriers) == 2  # the blocks before what leads to them
    blocks = done.prepared[: barriers[0]]
    entries = done.prepared[barriers[0] + 1 : barriers[1]]
    assert {step.what for step in entries} == {"refcount table entries of new blocks"}
    assert len(entries) == 2
    assert sum(step.what == "new refcount block" for step in blocks) == 2
    # Half of it done, the image is as sound as before.
    for count in range(len(done.prepared) + 1):
        audit = Audit(after(image.data, done.prepared[:count]))
        assert audit.miscounted == {n: (1, 0) for n in audit.refcounts if n not in audit.references}


@pytest.mark.parametrize("order", [4, 5, 6])
def test_the_refcount_table_grows(order: int) -> None:
    """A table of 64 entries serves a file of 8 MiB with 16 bits, and of 2 MiB with 64 bits."""
    per_block = 4096 >> order
    image = build_image(refcount_order=order)
    old_table = image.offset("refcount-table") // 512
    wanted = TABLE_ENTRIES * per_block
    allocator = allocator_of(image.data)
    done = allocate(image.data, [3], wanted, allocator)
    audit = Audit(done.image)
    assert audit.table_clusters >= 2
    assert audit.table_offset != 512 * old_table
    assert old_table not in audit.references
    assert audit.refcounts[old_table] == 1  # still, until nothing leads there for good
    # One sector makes it count, behind a barrier.
    switch = done.prepared[-2:]
    assert (switch[0].what, switch[1].what) == (
        "place of the refcount table",
        "use of the larger refcount table",
    )
    assert isinstance(done.prepared[-3], Barrier)
    assert sum(isinstance(step, Barrier) for step in done.prepared) == 2
    runs = [*done.allocation.loose, (done.allocation.firsts[0], done.allocation.firsts[0] + 3)]
    allocator.free(runs)
    freed = after(done.image, allocator.refcounts.take_count_writes("freed"))
    Audit(freed).check()
    # Again, and again: each time from what the last one left.
    for _ in range(2):
        done = allocate(freed, [], wanted)
        allocator = allocator_of(done.image)
        allocator.free(done.allocation.loose)
        freed = after(done.image, allocator.refcounts.take_count_writes("freed"))
        Audit(freed).check()


@pytest.mark.parametrize("order", [0, 3, 6])
def test_a_preparation_alone_leaves_a_sound_image(order: int) -> None:
    image = build_image(refcount_order=order)
    allocator = allocator_of(image.data)
    allocator.allocate([], (TABLE_ENTRIES + 1) * (4096 >> order))
    prepared = allocator.preparation()
    for count in range(len(prepared) + 1):
        audit = Audit(after(image.data, prepared[:count]))
        assert all(refcount >= refs for refcount, refs in audit.miscounted.values())
    assert audit.miscounted == {image.offset("refcount-table") // 512: (1, 0)}


def test_the_table_grows_by_half_at_least() -> None:
    image = build_image(refcount_order=6)
    stored = allocate(image.data, [], 64 * TABLE_ENTRIES).image
    assert Audit(stored).table_clusters == 2
    stored = allocate(stored, [], 64 * TABLE_ENTRIES).image
    assert Audit(stored).table_clusters == 3


def test_a_refcount_table_has_a_limit() -> None:
    image = build_image(refcount_order=6)
    allocator = allocator_of(image.data)
    with pytest.raises(LimitError, match="the number of refcount blocks"):
        allocator.allocate([], 64 * (8 << 20) // 8)
    assert allocator.preparation() == []
    assert allocator.refcounts.take_count_writes("none") == []


@pytest.mark.parametrize("cluster_bits", CLUSTER_BITS)
@pytest.mark.parametrize("order", ORDERS)
def test_freeing_undoes_an_allocation(cluster_bits: int, order: int) -> None:
    """After both, the image is byte for byte the same, except for new refcount blocks."""
    image = build_image(cluster_bits=cluster_bits, refcount_order=order)
    allocator = allocator_of(image.data)
    done = allocate(image.data, [2, 1], 5, allocator)
    first, second = done.allocation.firsts
    allocator.free([*done.allocation.loose, (first, first + 2), (second, second + 1)])
    freed = after(done.image, allocator.refcounts.take_count_writes("freed"))
    Audit(freed).check()
    assert freed == image.data


@pytest.mark.parametrize(
    ("order", "found"), [(o, f) for o in ORDERS for f in (0, 2) if f < 1 << (1 << o)]
)
def test_only_what_is_counted_once_is_freed(order: int, found: int) -> None:
    image = build_image(refcount_order=order)
    stored = with_refcounts(image, order, [20, 22])
    if found:
        with_refcounts(image, order, [21], found)
    with pytest.raises(FormatError, match=rf"0x2a00 .*is {found}, must be 1"):
        allocator_of(stored).free([(20, 23)])
    # What is behind the last block has no refcount either.
    with pytest.raises(FormatError, match="is 0, must be 1"):
        allocator_of(stored).free([(1 << 30, (1 << 30) + 1)])


# --- storage of fixed size --------------------------------------------------------------------


@given(
    st.sets(st.integers(4, 255), max_size=252),
    st.integers(0, 255),
    st.integers(200, 256),
    st.lists(st.integers(1, 5), max_size=2),
)
@settings(max_examples=60)
def test_fixed_storage_is_used_up_to_its_end(
    counted: set[int], wanted: int, end: int, runs: list[int]
) -> None:
    stored = with_refcounts(build_image(), 4, counted)
    allocator = allocator_of(stored, capacity=512 * end + 511)
    free = [n for n in range(4, end) if n not in counted]
    failure: StorageError | None = None
    try:
        done = allocate(stored, runs, wanted, allocator)
    except StorageError as error:
        failure = error
    if failure:
        assert (failure.path, failure.errno) == ("<memory>", errno.ENOSPC)
        assert "nothing was changed" in str(failure)
        assert runs or wanted > len(free)
        assert allocator.preparation() == []
        assert allocator.refcounts.take_count_writes("none") == []
        return
    assert done.prepared == []
    got = [*done.clusters, *(n + m - 1 for n, m in zip(done.allocation.firsts, runs, strict=True))]
    assert max(got, default=0) < end
    assert wanted + sum(runs) <= len(free)


def test_fixed_storage_is_searched_from_end_to_end() -> None:
    """All blocks are searched, also where an image that can grow would have grown."""
    image = build_image(refcount_order=6)
    stored = allocate(image.data, [], 3000).image
    end = max(Audit(stored).refcounts) + 1
    allocator = allocator_of(stored)
    gaps = [(30, 34), (2900, 2901)]
    allocator.free(gaps)
    stored = after(stored, allocator.refcounts.take_count_writes("freed"))
    done = allocate(stored, [3], 2, allocator_of(stored, near=2000, capacity=512 * end))
    assert done.allocation == Allocation((30,), ((2900, 2901), (33, 34)))
    with pytest.raises(StorageError) as raised:
        allocate(stored, [5], 0, allocator_of(stored, near=2000, capacity=512 * end))
    assert raised.value.errno == errno.ENOSPC


@pytest.mark.parametrize("missing", [0, 1])
def test_on_fixed_storage_there_must_be_room_for_refcounts_too(missing: int) -> None:
    image = build_image(refcount_order=6)
    # 60 free clusters in the first block, then a block of its own, and one cluster more.
    capacity = 512 * (64 + 2 - missing)
    allocator = allocator_of(image.data, capacity=capacity)
    if missing:
        with pytest.raises(StorageError, match="No space left"):
            allocator.allocate([], 61)
        return
    done = allocate(image.data, [], 61, allocator)
    assert max(Audit(done.image).refcounts) == 65
