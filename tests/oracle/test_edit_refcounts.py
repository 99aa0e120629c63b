"""Refcount blocks and the refcount table grow when bitmaps need room, on images QEMU has filled."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.qemu import StorageDaemon
from support.twin import SECTOR, KiB, MiB, Step, Twin, make_kind

import qcow2bm

CLUSTER = 512


@pytest.fixture(scope="module")
def daemon() -> Iterator[StorageDaemon]:
    with StorageDaemon() as daemon:
        yield daemon


def refcount_structures(twin: Twin) -> tuple[int, int]:
    """The clusters of the refcount table, and the number of refcount blocks it leads to."""
    with qcow2bm.open(twin.disk.path) as image:
        header = image.header
    data = twin.disk.path.read_bytes()
    start = header.refcount_table_offset
    table = data[start : start + header.refcount_table_clusters * CLUSTER]
    blocks = sum(any(table[place : place + 8]) for place in range(0, len(table), 8))
    return header.refcount_table_clusters, blocks


def add_a_large_one(name: str, size: int) -> list[Step]:
    """A bitmap of which no cluster is all zeros or all ones."""
    ranges = [(start, SECTOR) for start in range(0, size, 64 * KiB)]
    return [("add", (name, 512)), ("set_many", (name, ranges))]


@pytest.mark.parametrize(
    ("refcount_bits", "filled"),
    [
        # What a refcount table of one cluster covers, less a little.
        (64, 2 * MiB - 160 * KiB),
        (16, 8 * MiB - 512 * KiB),
        pytest.param(8, 16 * MiB - MiB, marks=pytest.mark.deep),
        pytest.param(1, 126 * MiB, marks=pytest.mark.deep),
    ],
)
def test_the_table_grows(
    tmp_path: Path, daemon: StorageDaemon, refcount_bits: int, filled: int
) -> None:
    kind = make_kind(200 * MiB, cluster_size=CLUSTER, refcount_bits=refcount_bits)
    twin = Twin.create(kind, tmp_path)
    twin.write((0, filled // 65 * 64))  # one in 65 clusters is an L2 table
    sizes = [refcount_structures(twin)]
    places = twin.map()
    while len({table for table, _ in sizes}) < 2:
        assert len(sizes) < 40, "it should have grown by now"
        twin.edit(*add_a_large_one(f"bitmap {len(sizes)}", twin.size))
        sizes.append(refcount_structures(twin))
        check = twin.disk.check()
        assert check.returncode == 0, check
    twin.verify(daemon)
    assert twin.map() == places
    assert sizes[0][0] < sizes[-1][0]
    assert sizes[0][1] < sizes[-1][1]

    twin.write((filled, 3 * MiB))
    twin.verify(daemon)
    twin.edit(("remove_all", ()))
    twin.verify(daemon)


def test_the_table_grows_in_a_single_edit(tmp_path: Path, daemon: StorageDaemon) -> None:
    """One edit must be able to enlarge the refcount table by several clusters.

    More than one of the new refcount blocks has to describe other new refcount blocks.
    """
    kind = make_kind(200 * MiB, cluster_size=CLUSTER, refcount_bits=64)
    twin = Twin.create(kind, tmp_path)
    assert refcount_structures(twin)[0] == 1
    twin.edit(*(step for n in range(120) for step in add_a_large_one(f"{n}", twin.size)))
    tables, blocks = refcount_structures(twin)
    assert tables > 2
    assert blocks > 128
    twin.verify(daemon)
    twin.write((MiB, MiB))
    twin.verify(daemon)
    twin.edit(*(("clear", (f"{n}",)) for n in range(0, 120, 2)))
    twin.verify(daemon)


@pytest.mark.parametrize("refcount_bits", [1, 16, 64])
def test_what_was_freed_is_used_again(
    tmp_path: Path, daemon: StorageDaemon, refcount_bits: int
) -> None:
    """Rewriting a bitmap for ever does not make the file grow for ever."""
    kind = make_kind(200 * MiB, cluster_size=CLUSTER, refcount_bits=refcount_bits)
    twin = Twin.create(kind, tmp_path)
    twin.edit(*add_a_large_one("daily", twin.size))
    sizes = []
    for number in range(20):
        start = 100 * KiB * number
        twin.edit(("invert", ("daily",)), ("set", ("daily", start, 1)), ("reset", ("daily", 0, 1)))
        sizes.append(twin.disk.path.stat().st_size)
        assert twin.disk.check().returncode == 0
    assert sizes[-1] == max(sizes[:4])
    twin.verify(daemon)
