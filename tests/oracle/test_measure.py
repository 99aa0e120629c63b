"""Bitmaps that QEMU adds, fills and resizes take what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.audit import Audit
from support.console import run
from support.qemu import Disk, run_ok

import qcow2bm
from qcow2bm import BitmapSpace

SIZE = 24 << 20
NAME = "n" * 36


def used(disk: Disk) -> int:
    """The bytes of all clusters that are in use."""
    audit = Audit(disk.path.read_bytes())
    assert audit.miscounted == {}
    size: int = audit.cluster_size
    return size * len(audit.refcounts)


def all_dirty(path: Path, granularity: int, size: int = SIZE) -> Disk:
    """An image with a bitmap "source" in which everything is dirty."""
    disk = Disk.create(path, size)
    with qcow2bm.open(path, "r+") as image, image.edit() as edit:
        edit.add("source", granularity)
        edit.invert("source")
    return disk


def fill(disk: Disk, name: str, source: Disk) -> None:
    """Lets QEMU make everything dirty in a bitmap, which it stores then."""
    disk.bitmap(name, "--merge", "source", "-b", str(source.path), "-F", "qcow2")


@pytest.mark.spec("MEASURE-5")
@pytest.mark.parametrize("granularity", [512, 64 << 10])
@pytest.mark.parametrize("refcount_bits", [1, 16, 64])
@pytest.mark.parametrize("cluster_size", [512, 4096, 65536])
def test_a_bitmap_of_qemu_takes_what_was_measured(
    cluster_size: int, refcount_bits: int, granularity: int, tmp_path: Path
) -> None:
    disk = Disk.create(
        tmp_path / "disk", SIZE, cluster_size=cluster_size, refcount_bits=refcount_bits
    )
    before = used(disk)
    with qcow2bm.open(disk.path) as image:
        addition = image.measure_addition(granularity=granularity)
    disk.add(NAME, granularity)
    assert used(disk) - before == addition.empty.total
    fill(disk, NAME, all_dirty(tmp_path / "source", granularity))
    assert used(disk) - before == addition.full.total


@pytest.mark.spec("MEASURE-7")
@pytest.mark.parametrize("refcount_bits", [1, 16, 64])
@pytest.mark.parametrize("cluster_size", [512, 65536])
def test_a_new_image_is_as_large_as_one_of_qemu(
    cluster_size: int, refcount_bits: int, tmp_path: Path
) -> None:
    theirs = Disk.create(
        tmp_path / "theirs", SIZE, cluster_size=cluster_size, refcount_bits=refcount_bits
    )
    new = qcow2bm.build_empty_image(SIZE, cluster_size, refcount_bits)
    ours = Disk(tmp_path / "ours")
    ours.path.write_bytes(new.head.ljust(new.length, b"\0"))
    assert ours.check().returncode == 0
    assert used(ours) == used(theirs)
    grown = []
    for disk in (theirs, ours):
        before = used(disk)
        disk.add(NAME, 512)
        grown.append(used(disk) - before)
    with qcow2bm.open(new.head.ljust(new.length, b"\0")) as image:
        assert grown == [image.measure_addition(granularity=512).empty.total] * 2


@pytest.mark.spec("MEASURE-1")
@pytest.mark.spec("MEASURE-2")
@pytest.mark.parametrize("cluster_size", [512, 4096])
def test_after_a_resize_by_qemu_a_bitmap_takes_what_was_measured(
    cluster_size: int, tmp_path: Path
) -> None:
    disk = Disk.create(tmp_path / "disk", SIZE, cluster_size=cluster_size)
    disk.add("daily", 512)
    fill(disk, "daily", all_dirty(tmp_path / "source", 512))
    with qcow2bm.open(disk.path) as image:
        bitmap = image.bitmaps["daily"]
        assert bitmap.space == bitmap.full_space()
        larger = 3 * SIZE + 512
        expected = bitmap.space_after_resize(larger)
        most = bitmap.full_space(larger)
    run_ok("qemu-img", "resize", "-q", disk.path, str(larger))
    assert space(disk) == expected
    fill(disk, "daily", all_dirty(tmp_path / "larger", 512, larger))
    assert space(disk) == most
    smaller = SIZE // 3 // 512 * 512
    with qcow2bm.open(disk.path) as image:
        expected = image.bitmaps["daily"].space_after_resize(smaller)
    run_ok("qemu-img", "resize", "-q", "--shrink", disk.path, str(smaller))
    assert space(disk) == expected


@pytest.mark.spec("MEASURE-1")
@pytest.mark.parametrize("cluster_size", [512, 4096, 65536])
def test_the_most_is_what_qemu_img_measures(cluster_size: int, tmp_path: Path) -> None:
    disk = Disk.create(tmp_path / "disk", SIZE, cluster_size=cluster_size)
    with qcow2bm.open(disk.path, "r+") as image, image.edit() as edit:
        for number in range(20):
            edit.add(f"{number}" * (number + 1), 512 << number % 8)
    theirs = run_ok("qemu-img", "measure", "--output=json", "-O", "qcow2",
                    "-o", f"cluster_size={cluster_size}", disk.path)  # fmt: skip
    ours = run(["measure", "--json", disk.path.name], tmp_path)
    assert json.loads(ours.out)["together"]["full"]["total"] == json.loads(theirs)["bitmaps"]


def space(disk: Disk) -> BitmapSpace | None:
    with qcow2bm.open(disk.path) as image:
        return image.bitmaps["daily"].space
