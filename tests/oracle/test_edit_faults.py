"""Editing what crashes and foreign programs leave: bitmaps in_use, ones that do not fit."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.model import Bitmaps, Model
from support.qemu import Disk, StorageDaemon, ToolError, run, run_ok
from support.twin import SECTOR, KiB, MiB, Step, do, hashes

import qcow2bm


@pytest.fixture(scope="module")
def daemon() -> Iterator[StorageDaemon]:
    with StorageDaemon() as daemon:
        yield daemon


def die_in_qemu_io(disk: Disk) -> None:
    disk.crash("write 0 1M", "write 5M 512")


def die_in_storage_daemon(disk: Disk) -> None:
    with StorageDaemon() as daemon:
        daemon.open(disk, read_only=False)
        daemon.add("never stored", 64 * KiB)
        daemon.kill()


@pytest.fixture(params=[die_in_qemu_io, die_in_storage_daemon])
def crashed(request: pytest.FixtureRequest, tmp_path: Path) -> Disk:
    """A disk with the bitmaps daily and weekly, in use, and fresh, which is sound."""
    disk = Disk.create(tmp_path / "disk", 64 * MiB, cluster_size=4096)
    disk.io("write 0 8M")
    disk.add("daily", 512)
    disk.add("weekly", 64 * KiB)
    disk.bitmap("weekly", "--disable")
    disk.io("write 3M 300k", "write 63M 64k")
    request.param(disk)
    disk.add("fresh", 4 * KiB)
    disk.io("write 5M 4k")
    assert disk.check().returncode == 0
    return disk


DAILY = {"name": "daily", "flags": ["in-use", "auto"], "granularity": 512}
WEEKLY = {"name": "weekly", "flags": ["in-use"], "granularity": 64 * KiB}
FRESH = {"name": "fresh", "flags": ["auto"], "granularity": 4 * KiB}

ONLY_IF_SOUND: list[Step] = [
    ("clear", ("daily",)),
    ("enable", ("daily",)),
    ("disable", ("daily",)),
    ("rename", ("daily", "other")),
    ("copy", ("daily", "other")),
    ("set", ("daily", 0, 1)),
    ("reset", ("daily", 0, 512)),
    ("set_many", ("daily", [(0, 1)])),
    ("reset_many", ("daily", [(0, 512)])),
    ("invert", ("daily",)),
    ("merge", ("daily", "fresh")),
    ("merge", ("fresh", "daily")),
    ("fit", ("daily",)),
]


def test_a_bitmap_in_use_can_only_be_removed(crashed: Disk) -> None:
    assert crashed.listed() == [DAILY, WEEKLY, FRESH]
    before = crashed.path.read_bytes()
    for step in ONLY_IF_SOUND:
        with pytest.raises(qcow2bm.BitmapInconsistentError):
            do(crashed, ("set", ("fresh", 0, 1)), step)
    with pytest.raises(qcow2bm.BitmapExistsError):
        do(crashed, ("add", ("daily",)))
    with pytest.raises(qcow2bm.BitmapExistsError):
        do(crashed, ("rename", ("fresh", "daily")))
    assert crashed.path.read_bytes() == before

    do(crashed, ("remove", ("daily",)))
    assert crashed.listed() == [WEEKLY, FRESH]
    assert crashed.check().returncode == 0
    refused = run("qemu-img", "resize", *crashed.arguments, "65M")
    assert refused.returncode == 1, "as long as one is in use"
    do(crashed, ("remove", ("weekly",)), ("add", ("daily", 512)))
    assert crashed.listed() == [FRESH, DAILY | {"flags": ["auto"]}]
    run_ok("qemu-img", "resize", "-q", *crashed.arguments, "65M")
    assert crashed.extents("daily") == []
    assert crashed.extents("fresh") == [(5 * MiB, 4 * KiB)]
    assert crashed.check().returncode == 0


def test_a_sound_bitmap_beside_ones_in_use(crashed: Disk, daemon: StorageDaemon) -> None:
    """QEMU still finds those in use, and what was stored of them is as it was."""
    with qcow2bm.open(crashed.path) as image:
        stale = {name: image.bitmaps[name].stale_bits().tolist() for name in ("daily", "weekly")}
    do(crashed, ("set", ("fresh", MiB, 1)), ("copy", ("fresh", "copied")), ("add", ("new",)))
    assert [b["name"] for b in crashed.listed()] == ["daily", "weekly", "fresh", "copied", "new"]
    assert crashed.listed()[:3] == [DAILY, WEEKLY, FRESH]
    assert crashed.check().returncode == 0
    daemon.open(crashed)
    try:
        in_memory = daemon.bitmaps()
    finally:
        daemon.close()
    assert {name for name, b in in_memory.items() if b.get("inconsistent")} == {"daily", "weekly"}
    for name in ("fresh", "copied"):
        assert crashed.extents(name) == [(MiB, 4 * KiB), (5 * MiB, 4 * KiB)]
    with qcow2bm.open(crashed.path) as image:
        for name, bits in stale.items():
            assert image.bitmaps[name].stale_bits().tolist() == bits
    crashed.bitmap("daily", "--remove")
    crashed.bitmap("weekly", "--remove")
    assert crashed.check().returncode == 0


def test_refcounts_that_a_crash_left_outdated(tmp_path: Path) -> None:
    disk = Disk.create(tmp_path / "disk", 64 * MiB, cluster_size=4096, lazy_refcounts="on")
    disk.add("daily", 512)
    disk.crash("write 0 1M")
    before = disk.path.read_bytes()
    with pytest.raises(qcow2bm.FormatError, match="has the dirty bit"):
        do(disk, ("remove", ("daily",)))
    assert disk.path.read_bytes() == before
    run_ok("qemu-img", "check", "-q", "-r", "all", disk.path)
    do(disk, ("remove", ("daily",)), ("add", ("weekly",)))
    assert [bitmap["name"] for bitmap in disk.listed()] == ["weekly"]
    assert disk.check().returncode == 0


def test_leaks_do_not_matter(tmp_path: Path) -> None:
    """Clusters that another program leaked stay leaked, no more and no less."""
    disk = Disk.create(tmp_path / "disk", 64 * MiB, cluster_size=4096)
    disk.add("old", 512)
    disk.io("write 1M 512")
    with disk.path.open("r+b") as file:
        file.seek(88)
        file.write(bytes(8))
    check = disk.check()
    leaks = [line for line in check.stdout.splitlines() if "leaked clusters" in line]
    assert leaks
    with pytest.raises(qcow2bm.BitmapStaleError):
        do(disk, ("add", ("new",)))
    do(disk, ("remove_all", ()), ("add", ("new", 512)), ("set", ("new", 0, 9 * MiB)))
    assert disk.extents("new") == [(0, 9 * MiB)]
    assert [line for line in disk.check().stdout.splitlines() if "leaked clusters" in line] == leaks
    run_ok("qemu-img", "check", "-q", "-r", "leaks", disk.path)
    assert disk.extents("new") == [(0, 9 * MiB)]
    assert disk.check().returncode == 0


CLUSTER = 4 * KiB
SIZE = 64 * MiB
GRANULARITIES = {"fine": 512, "middle": 4 * KiB, "coarse": 64 * KiB}


def resize_behind_its_back(disk: Disk, size: int) -> None:
    """Changes an image as a program does that knows neither bitmaps nor autoclear bits.

    The L1 table never becomes shorter, or what it leads to would leak.
    """
    entries = -(-max(size, SIZE) // (CLUSTER * CLUSTER // 8))
    with disk.path.open("r+b") as file:
        file.seek(24)
        file.write(struct.pack(">Q", size))
        file.seek(36)
        file.write(struct.pack(">I", entries))


@pytest.fixture
def resized(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Disk, Bitmaps, int]:
    """A disk that was resized; what its bitmaps recorded before; and the size it has now."""
    disk = Disk.create(tmp_path / "disk", SIZE, cluster_size=CLUSTER)
    before = Bitmaps(SIZE, CLUSTER)
    for name, granularity in GRANULARITIES.items():
        disk.add(name, granularity)
        before.add(name, granularity)
    for start in (0, 3 * MiB, 33 * MiB + SECTOR, 33 * MiB + 3 * SECTOR, SIZE - SECTOR):
        disk.io(f"write {start} 512")
        before.guest_writes(start, SECTOR)
    disk.bitmap("middle", "--disable")
    before.disable("middle")
    resize_behind_its_back(disk, request.param)
    return disk, before, request.param


def fitted(old: Model, size: int) -> Model:
    """The bitmap after a resize behind its back: what was recorded is kept, the rest is dirty.

    If the disk ended inside a cluster of the bitmap, that cluster is not known either.
    """
    new = Model(size, old.granularity, enabled=old.enabled)
    per_cluster = 8 * CLUSTER
    known = old.count
    if -(-new.count // per_cluster) > -(-known // per_cluster):
        known = (known - 1) // per_cluster * per_cluster
        new.bits = new.mask >> known << known
    known = (1 << min(known, new.count)) - 1
    new.bits |= old.bits & known
    return new


GROWN = [SIZE + SECTOR, 100 * MiB + SECTOR, 200 * MiB]
SHRUNK = [SIZE - 16 * MiB, 33 * MiB + 3 * SECTOR, 33 * MiB + 2 * SECTOR, SECTOR]


@pytest.mark.parametrize("resized", [*GROWN, *SHRUNK], indirect=True)
def test_bitmaps_are_made_to_fit(resized: tuple[Disk, Bitmaps, int], daemon: StorageDaemon) -> None:
    disk, before, size = resized
    with pytest.raises(ToolError) as refused:
        disk.info()
    said = "doesn't satisfy the constraints" if size > SIZE else "Could not read bitmap"
    assert said in str(refused.value)
    untouched = disk.path.read_bytes()
    with pytest.raises(qcow2bm.BitmapBrokenError, match='fit bitmap "fine" first'):
        do(disk, ("set", ("fine", 0, 1)))
    assert disk.path.read_bytes() == untouched

    do(disk, *(("fit", (name,)) for name in GRANULARITIES))
    bitmaps = Bitmaps(size, CLUSTER)
    bitmaps.by_name = {name: fitted(old, size) for name, old in before.by_name.items()}

    def verify() -> None:
        assert disk.listed() == bitmaps.listed
        assert disk.check().returncode == 0
        for name in bitmaps.by_name:
            assert disk.extents(name) == list(map(tuple, bitmaps[name].extents))
        assert hashes(disk, daemon) == {
            name: bitmap.sha256 for name, bitmap in bitmaps.by_name.items()
        }

    verify()
    disk.io("write 0 512", f"write {size - SECTOR} 512")
    bitmaps.guest_writes(0, SECTOR)
    bitmaps.guest_writes(size - SECTOR, SECTOR)
    verify()
    run_ok("qemu-img", "resize", "-q", *disk.arguments, str(300 * MiB))
    bitmaps.resize(300 * MiB)
    verify()


@pytest.mark.parametrize("resized", [GROWN[1], SHRUNK[1]], indirect=True)
def test_work_goes_on_in_the_edit_that_fits(resized: tuple[Disk, Bitmaps, int]) -> None:
    disk, before, size = resized
    do(
        disk,
        ("fit", ("fine",)),
        ("copy", ("fine", "copied", 64 * KiB)),
        ("remove", ("middle",)),
        ("fit", ("coarse",)),
        ("set", ("fine", size - 1, 1)),
    )
    fine, coarse = (fitted(before[name], size) for name in ("fine", "coarse"))
    copied = Model(size, 64 * KiB)
    copied.merge(fine, "or")
    fine.set(size - 1, 1)
    for name, bitmap in (("fine", fine), ("coarse", coarse), ("copied", copied)):
        assert disk.extents(name) == list(map(tuple, bitmap.extents))
    assert disk.check().returncode == 0


@pytest.mark.parametrize("resized", [GROWN[1], SHRUNK[1]], indirect=True)
def test_or_they_are_removed(resized: tuple[Disk, Bitmaps, int]) -> None:
    disk, _, _ = resized
    do(disk, ("remove_all", ()), ("add", ("new",)))
    assert disk.extents("new") == []
    assert disk.check().returncode == 0
