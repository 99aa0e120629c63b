"""An edit does what QEMU does, and refuses what QEMU refuses."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from support.qemu import Disk, StorageDaemon, run
from support.twin import SECTOR, GiB, KiB, MiB, do, hashes

import qcow2bm

TiB = 1 << 40


@pytest.fixture(scope="module")
def daemon() -> Iterator[StorageDaemon]:
    with StorageDaemon() as daemon:
        yield daemon


GRANULARITIES = (512, 1 * KiB, 64 * KiB, 1 * MiB, 256 * MiB)


@pytest.fixture(scope="module")
def merging(tmp_path_factory: pytest.TempPathFactory) -> Disk:
    """Two bitmaps of each granularity, which differ; the finest take several clusters."""
    random = Random(1)
    size = 600 * MiB + 3 * SECTOR
    disk = Disk.create(tmp_path_factory.mktemp("merging") / "disk", size, cluster_size=4096)
    for granularity in GRANULARITIES:
        for name in "ab":
            disk.add(f"{name}{granularity}", granularity)
            places = [random.randrange(size // SECTOR) for _ in range(4)]
            disk.io(
                *(f"write -z {place * SECTOR} 512" for place in places),
                f"write -z {places[0] // 2 * SECTOR} {random.randrange(300) * SECTOR}",
            )
            disk.bitmap(f"{name}{granularity}", "--disable")
    disk.bitmap("a512", "--enable")
    disk.io(f"write -z {size - SECTOR} 512")
    return disk


@pytest.mark.parametrize("target", GRANULARITIES)
@pytest.mark.parametrize("source", GRANULARITIES)
def test_merge_gives_what_qemu_gives(
    tmp_path: Path, daemon: StorageDaemon, merging: Disk, target: int, source: int
) -> None:
    theirs, ours = (Disk(tmp_path / name) for name in ("theirs", "ours"))
    for disk in (theirs, ours):
        shutil.copy(merging.path, disk.path)
    theirs.bitmap(f"a{target}", "--merge", f"b{source}")
    do(ours, ("merge", (f"a{target}", f"b{source}")))
    assert hashes(ours, daemon) == hashes(theirs, daemon)
    assert ours.listed() == theirs.listed()
    assert ours.check().returncode == 0


def test_merge_from_another_image_gives_what_qemu_gives(
    tmp_path: Path, daemon: StorageDaemon, merging: Disk
) -> None:
    theirs, ours = (Disk(tmp_path / name) for name in ("theirs", "ours"))
    for disk in (theirs, ours):
        Disk.create(disk.path, 600 * MiB + 3 * SECTOR, cluster_size=512).add("all", 4 * KiB)
    with qcow2bm.open(merging.path) as source, qcow2bm.open(ours.path, "r+") as image:
        for name in source.bitmaps:
            theirs.bitmap("all", "--merge", name, "-b", str(merging.path), "-F", "qcow2")
            with image.edit() as edit:
                edit.merge("all", source.bitmaps[name])
    assert hashes(ours, daemon) == hashes(theirs, daemon)
    assert ours.check().returncode == 0


@pytest.mark.parametrize("cluster_bits", range(9, 22))
def test_the_default_granularity(tmp_path: Path, cluster_bits: int) -> None:
    disk = Disk.create(tmp_path / "disk", 10 * MiB, cluster_size=1 << cluster_bits)
    disk.bitmap("theirs", "--add")
    do(disk, ("add", ("ours",)))
    theirs, ours = disk.listed()
    assert ours == theirs | {"name": "ours"}
    assert disk.check().returncode == 0


def qemu_adds(disk: Disk, name: str, granularity: int | None) -> bool:
    """Whether QEMU stores such a bitmap; it may exit with 0 and have lost it."""
    copy = Disk(disk.path.with_name("copy"))
    shutil.copy(disk.path, copy.path)
    before = copy.listed()
    size = [] if granularity is None else ["-g", str(granularity)]
    run("qemu-img", "bitmap", "--add", *size, *copy.arguments, name)
    return len(copy.listed()) > len(before)


def this_library_adds(disk: Disk, name: str, granularity: int | None) -> bool:
    """Whether an edit adds such a bitmap; if it refuses, nothing is written."""
    before = disk.path.read_bytes()
    try:
        do(disk, ("add", (name, granularity)))
    except (ValueError, qcow2bm.Qcow2BmError):
        assert disk.path.read_bytes() == before, "refused, and written all the same"
        return False
    return True


def assert_qemu_reads_it(disk: Disk, name: str) -> None:
    assert disk.listed()[-1]["name"] == name
    assert disk.check().returncode == 0
    disk.io("write -z 0 512")  # QEMU stores it in its turn
    assert disk.listed()[-1]["name"] == name
    assert disk.check().returncode == 0


@pytest.mark.parametrize(
    ("name", "is_accepted"),
    [
        ("", False),
        ("n", True),
        ("n" * 1023, True),
        ("n" * 1024, False),
        ("ü" * 511 + "n", True),
        ("ü" * 512, False),
        ("täglich-日次-💾", True),
        ("taken", False),
        ("two\nlines", True),
        ("\x1b[31mred", True),
        ('a "b", \\c=,d', True),
    ],
)
def test_names(tmp_path: Path, name: str, is_accepted: bool) -> None:
    disk = Disk.create(tmp_path / "disk", 10 * MiB)
    disk.add("taken", 64 * KiB)
    assert qemu_adds(disk, name, None) == is_accepted
    assert this_library_adds(disk, name, None) == is_accepted
    if is_accepted:
        assert_qemu_reads_it(disk, name)


@pytest.mark.parametrize(
    ("size", "granularity", "is_accepted"),
    [
        (10 * MiB, 256, False),
        (10 * MiB, 512, True),
        (10 * MiB, 768, False),
        (10 * MiB, 65535, False),
        (10 * MiB, 2 * GiB, True),
        (10 * MiB, 4 * GiB, False),
        (SECTOR, 512, True),
        (SECTOR, 2 * GiB, True),
        # QEMU takes up to 512 MiB of bits.
        (2 * TiB, 512, True),
        (2 * TiB + SECTOR, 512, False),
        (2 * TiB + SECTOR, 1024, True),
        (4 * TiB, 512, False),
        (4 * TiB, 1024, True),
        (4 * TiB + 1024, 1024, False),
        (0, 512, False),
        (0, None, False),
        (0, 64 * KiB, False),
    ],
)
def test_sizes_and_granularities(
    tmp_path: Path, size: int, granularity: int | None, is_accepted: bool
) -> None:
    disk = Disk.create(tmp_path / "disk", size)
    assert qemu_adds(disk, "new", granularity) == is_accepted
    assert this_library_adds(disk, "new", granularity) == is_accepted
    if is_accepted:
        assert_qemu_reads_it(disk, "new")


@pytest.mark.parametrize("with_stale_bitmaps", [False, True])
def test_version_2(tmp_path: Path, with_stale_bitmaps: bool) -> None:
    disk = Disk.create(tmp_path / "disk", 10 * MiB)
    if with_stale_bitmaps:
        disk.add("daily", 64 * KiB)
    assert run("qemu-img", "amend", "-o", "compat=0.10", disk.path).returncode == 0
    assert not qemu_adds(disk, "new", None)
    with pytest.raises(qcow2bm.UnsupportedError, match="version 2"):
        do(disk, ("add", ("new",)))
    assert run("qemu-img", "amend", "-o", "compat=1.1", disk.path).returncode == 0
    if with_stale_bitmaps:
        do(disk, ("remove_all", ()))
    assert this_library_adds(disk, "new", None)
    assert disk.listed()[-1]["name"] == "new"


def test_a_thousand_long_names(tmp_path: Path) -> None:
    """A directory of a mebibyte, in one edit."""
    disk = Disk.create(tmp_path / "disk", 10 * MiB, cluster_size=512)
    names = [f"{number:01023}" for number in range(1000)]
    do(disk, *(("add", (name,)) for name in names))
    assert [bitmap["name"] for bitmap in disk.listed()] == names
    assert disk.check().returncode == 0
    do(disk, *(("remove", (name,)) for name in names[::2]))
    assert [bitmap["name"] for bitmap in disk.listed()] == names[1::2]
    assert disk.check().returncode == 0


def overlay(folder: Path, name_size: int, cluster_size: int) -> tuple[Disk, str]:
    """An overlay whose backing file has a name of so many bytes."""
    Disk.create(folder / "base", 10 * MiB).io("write -P 5 0 64k")
    name = f"{folder}{'/' * (name_size - len(str(folder)) - 4)}base"
    backing = "-b", name, "-F", "qcow2"
    return Disk.create(folder / "disk", 10 * MiB, *backing, cluster_size=cluster_size), name


def assert_backed(disk: Disk, name: str) -> None:
    info = disk.info()
    assert (info["backing-filename"], info["backing-filename-format"]) == (name, "qcow2")
    assert "Pattern verification failed" not in disk.io("read -P 5 4k 60k", read_only=True)
    assert disk.check().returncode == 0


@pytest.mark.parametrize(
    ("cluster_size", "name_size", "by_qemu", "by_this_library"),
    [
        (512, 344, True, True),
        (512, 345, False, False),
        (512, 376, False, False),
        (KiB, 440, True, True),
        # QEMU writes the whole header at once; who wants the name to survive a loss of power at
        # any time needs room for a second copy of it meanwhile.
        (KiB, 441, True, False),
        (KiB, 857, False, False),
        (2 * KiB, 952, True, True),
        (2 * KiB, 953, True, False),
        (4 * KiB, 1023, True, True),
    ],
)
def test_room_in_the_header(
    tmp_path: Path, cluster_size: int, name_size: int, by_qemu: bool, by_this_library: bool
) -> None:
    disk, name = overlay(tmp_path, name_size, cluster_size)
    assert qemu_adds(disk, "new", None) == by_qemu
    assert this_library_adds(disk, "new", None) == by_this_library
    assert_backed(disk, name)
    if by_this_library:
        assert_qemu_reads_it(disk, "new")
        do(disk, ("remove", ("new",)))
    assert_backed(disk, name)
    assert disk.listed() == []


def test_backing_names_of_any_size(tmp_path: Path) -> None:
    """The extension comes and goes in front of a name that ends anywhere in its sector."""
    for name_size in range(300, 345, 3):
        disk, name = overlay(tmp_path, name_size, 512)
        for _ in range(2):
            do(disk, ("add", ("new",)))
            assert_backed(disk, name)
            assert [bitmap["name"] for bitmap in disk.listed()] == ["new"]
            do(disk, ("remove", ("new",)))
            assert_backed(disk, name)
            assert disk.listed() == []
            disk.io("write -P 5 0 512")  # QEMU writes the header its own way
