"""The map of several bitmaps is what QEMU gives when it merges copies of them."""

from __future__ import annotations

import json
import shutil
from itertools import combinations
from pathlib import Path
from random import Random

import pytest
from support.console import run
from support.qemu import Disk
from support.twin import SECTOR, KiB, MiB

import qcow2bm

SIZE = 600 * MiB + 3 * SECTOR
GRANULARITIES = {"a": 64 * KiB, "b": MiB, "c": 512, "d": 256 * MiB}


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Disk:
    """Bitmaps of several granularities, in which something else was written each time."""
    random = Random(2)
    disk = Disk.create(tmp_path_factory.mktemp("algebra") / "disk", SIZE, cluster_size=4096)
    for name, granularity in GRANULARITIES.items():
        disk.add(name, granularity)
        places = [random.randrange(SIZE // SECTOR) for _ in range(4)]
        disk.io(
            *(f"write -z {place * SECTOR} 512" for place in places),
            f"write -z {places[0] // 2 * SECTOR} {random.randrange(300) * SECTOR}",
        )
        disk.bitmap(name, "--disable")
    disk.bitmap("a", "--enable")
    disk.io(f"write -z {SIZE - SECTOR} 512")
    return disk


def mapped(disk: Disk, *names: str) -> list[tuple[int, int]]:
    result = run(["map", "--dirty", "--json", disk.path.name, *names], disk.path.parent)
    assert (result.status, result.err) == (0, "")
    return [(row["offset"], row["length"]) for row in json.loads(result.out)]


@pytest.mark.spec("ALG-6")
@pytest.mark.parametrize("names", [*combinations("abcd", 2), tuple("abcd")], ids="".join)
def test_or_is_what_qemu_merges_into_the_finest(
    tmp_path: Path, disk: Disk, names: tuple[str, ...]
) -> None:
    """Only a merge into a bitmap as fine as the finest is exact in QEMU."""
    copy = Disk(tmp_path / "copy")
    shutil.copy(disk.path, copy.path)
    copy.add("all", min(GRANULARITIES[name] for name in names))
    for name in names:
        copy.bitmap("all", "--merge", name)
    expected = copy.extents("all")
    assert mapped(disk, *names) == mapped(copy, "all") == expected
    with qcow2bm.open(disk.path) as image:
        union = qcow2bm.union(*(image.bitmaps[name] for name in names))
        assert union.count() == sum(length for _, length in expected)


@pytest.mark.spec("ALG-7")
def test_qemu_reads_what_was_set_from_a_map(tmp_path: Path, disk: Disk) -> None:
    copy = Disk(tmp_path / "copy")
    shutil.copy(disk.path, copy.path)
    copy.add("all", 512)
    text = run(["map", copy.path.name, *"abcd"], tmp_path).out
    done = run(["set", copy.path.name, "all", "-"], tmp_path, text.encode())
    assert (done.status, done.err) == (0, "")
    assert copy.extents("all") == mapped(disk, *"abcd")
    assert copy.check().returncode == 0
