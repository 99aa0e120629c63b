"""Where the used part of a file ends, and how much before that is free."""

from __future__ import annotations

import pytest
from support.images import Built, Stored, build_image
from support.layouts import append, set_refcount
from support.plans import opened

from qcow2bm.clusters import space
from qcow2bm.clusters.problems import header_problems
from qcow2bm.clusters.space import FileSpace, file_space

CLUSTER = 512
UNKNOWN = FileSpace(None, None)


def measured(data: bytearray, *, count_free: bool = True) -> FileSpace:
    file = opened(data)
    return file_space(file, header_problems(file), count_free=count_free)


def image(order: int = 4) -> Built:
    return build_image(Stored(b"daily", [b"\x01"]), refcount_order=order, size=1 << 20)


@pytest.mark.spec("REF-11")
@pytest.mark.parametrize("order", range(7))
def test_clusters_with_refcount_0_before_the_last_one_with_another_are_free(order: int) -> None:
    data = image(order).data
    used = len(data) // CLUSTER
    assert measured(data) == FileSpace(used * CLUSTER, 0)
    for _ in range(5):
        append(data, b"more")
    for cluster in (used, used + 2, used + 4):
        set_refcount(data, cluster, 0)
    assert measured(data) == FileSpace((used + 4) * CLUSTER, 2 * CLUSTER)
    assert measured(data, count_free=False) == FileSpace((used + 4) * CLUSTER, None)


@pytest.mark.spec("REF-11")
def test_clusters_that_no_block_counts_are_free() -> None:
    """Of the blocks of 64 refcounts, the second is missing, and the third counts one cluster."""
    data = image(6).data
    used = len(data) // CLUSTER
    data.extend(bytes(200 * CLUSTER - len(data)))
    set_refcount(data, 130, 1)  # which makes the third block, in that very cluster
    assert measured(data) == FileSpace(131 * CLUSTER, (131 - used - 1) * CLUSTER)


@pytest.mark.spec("REF-11")
def test_refcounts_of_clusters_behind_the_end_of_the_file_do_not_count() -> None:
    data = image().data
    end = len(data) // CLUSTER
    set_refcount(data, end + 3, 1)
    assert measured(data) == FileSpace(end * CLUSTER, 0)
    data.append(0)  # the last cluster is a part, and has the refcount 0
    assert measured(data) == FileSpace(end * CLUSTER, 0)
    set_refcount(data, end, 1)
    assert measured(data) == FileSpace((end + 1) * CLUSTER, 0)


@pytest.mark.spec("REF-11")
def test_the_end_is_looked_for_in_a_few_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    data = image(6).data
    used = len(data) // CLUSTER
    data.extend(bytes(256 * CLUSTER - len(data)))
    for cluster in (70, 140, 210):  # blocks 1 to 3, which count themselves
        set_refcount(data, cluster, 1)
    for cluster in (140, 210):
        set_refcount(data, cluster, 0)
    for blocks, end in ((1, None), (2, None), (3, 71 * CLUSTER)):
        monkeypatch.setattr(space, "_END_BYTES", blocks * CLUSTER)
        assert measured(data, count_free=False) == FileSpace(end, None)
        assert measured(data) == FileSpace(71 * CLUSTER, (71 - used - 1) * CLUSTER)


@pytest.mark.spec("REF-11")
def test_an_image_that_counts_nothing_ends_at_its_beginning() -> None:
    built = image()
    block = built.offset("refcount-block")
    built.data[block : block + CLUSTER] = bytes(CLUSTER)
    assert measured(built.data) == FileSpace(0, 0)
    assert measured(built.data, count_free=False) == FileSpace(0, None)


@pytest.mark.spec("REF-11")
@pytest.mark.parametrize("count_free", [True, False])
@pytest.mark.parametrize(
    ("value", "place"),
    [
        (255, ("header", "refcount_order")),
        (0, ("header", "refcount_table_clusters")),
        (1 << 30, ("header", "refcount_table_clusters")),
        (1 << 40, ("header", "refcount_table_offset")),
        (513, ("header", "refcount_table_offset")),
        (0x401, ("refcount-table", 0)),
        (0x420, ("refcount-table", 0)),
        (1 << 40, ("refcount-table", 0)),
    ],
)
def test_nothing_is_known_if_the_refcounts_are_damaged(
    value: int, place: tuple[str, str | int], count_free: bool
) -> None:
    built = image()
    structure, field = place
    built.plant(value, structure, 0, field)
    assert measured(built.data, count_free=count_free) == UNKNOWN
