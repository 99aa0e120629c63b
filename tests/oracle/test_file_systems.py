"""Images on each kind of file system: QEMU and this library agree there as elsewhere."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest
from support.qemu import Disk, ToolError, run, run_ok

import qcow2bm

KiB, MiB = 1 << 10, 1 << 20
SIZE = 64 * MiB
WRITES = [(start, 512) for start in range(0, SIZE, 96 * KiB)]


class FileSystem(NamedTuple):
    """The command that makes a file system in a file, and the least size of that file in bytes."""

    make: tuple[str, ...]
    size: int


ON_A_DEVICE = {
    "ext4": FileSystem(("mkfs.ext4", "-q", "-m", "0"), 64 * MiB),
    "xfs": FileSystem(("mkfs.xfs", "-q"), 320 * MiB),
    "btrfs": FileSystem(("mkfs.btrfs", "-q"), 256 * MiB),
}
TMPFS = ("mount", "-t", "tmpfs", "-o", "size=64M", "tmpfs")
FUSE = ("bindfs",)  # shows the files of another folder


@pytest.fixture(scope="module", params=["tmpfs", "fuse", *ON_A_DEVICE])
def mounted(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """The root of a new file system; skips where none can be mounted."""
    kind = request.param
    device = tmp_path_factory.mktemp("made") / "device"
    root = tmp_path_factory.mktemp("mounted")
    with ExitStack() as stack:

        def mount(*command: str | Path) -> None:
            run_ok(*command, root)
            stack.callback(run_ok, "umount", root)

        try:
            if kind in ON_A_DEVICE:
                with device.open("wb") as file:
                    file.truncate(ON_A_DEVICE[kind].size)
                run_ok(*ON_A_DEVICE[kind].make, device)
                mount("mount", "-o", "loop", device)
            else:
                mount(*TMPFS)
            if kind == "fuse":
                mount(*FUSE, root)
        except (ToolError, FileNotFoundError) as error:
            pytest.skip(f"no {kind}: {error}")
        yield root


@pytest.fixture
def folder(mounted: Path) -> Iterator[Path]:
    """The root, which is empty before and after."""
    yield mounted
    for path in mounted.iterdir():
        if path.is_file():
            path.unlink()


@pytest.fixture
def disk(folder: Path) -> Disk:
    disk = Disk.create(folder / "disk", SIZE, cluster_size=4096)
    disk.add("daily", 512)
    disk.io("write 1M 512", "write 33M 64k")
    return disk


def extents(path: Path, name: str) -> list[tuple[int, int]]:
    with qcow2bm.open(path) as image:
        arrays = image.bitmaps[name].extents()
        return [(start, length) for array in arrays for start, length in array.tolist()]


def assert_agreed(disk: Disk, *names: str) -> None:
    """The image is sound to QEMU, which reads the same bits as this library."""
    assert disk.check().returncode == 0
    for name in names:
        assert extents(disk.path, name) == disk.extents(name)


def test_editing_and_tracking(disk: Disk) -> None:
    with qcow2bm.open(disk.path, "r+") as image:
        with image.edit() as edit:
            edit.add("weekly", granularity=4 * KiB)
            edit.merge("weekly", "daily")
            edit.clear("daily")
        assert image.bitmaps["weekly"].count() == 4 * KiB + 64 * KiB
    assert_agreed(disk, "daily", "weekly")
    disk.io("write 5M 4k")
    assert extents(disk.path, "daily") == [(5 * MiB, 4 * KiB)]
    with qcow2bm.open(disk.path, "r+") as image, image.track() as tracker:
        for start, length in WRITES:
            with tracker.writing(start, length):
                pass
            if start % MiB == 0:
                tracker.flush()
    assert len(extents(disk.path, "daily")) >= len(WRITES)
    assert_agreed(disk, "daily", "weekly")


def test_locks(disk: Disk) -> None:
    with disk.held_by_qemu_io(), pytest.raises(qcow2bm.ImageLockedError, match="is writing to it"):
        qcow2bm.open(disk.path, "r+")
    with qcow2bm.open(disk.path, "r+") as image, image.track():
        refused = run("qemu-img", "bitmap", "--add", str(disk.path), "monthly")
        assert 'Failed to get "write" lock' in refused.stderr
    disk.add("monthly", 64 * KiB)


def fill(folder: Path) -> None:
    """Takes all the room that is left."""

    def grow(descriptor: int, step: int) -> None:
        while True:
            os.posix_fallocate(descriptor, os.fstat(descriptor).st_size, step)

    with (folder / "filling").open("wb") as file:
        for step in (16 * MiB, MiB, 64 * KiB, 4 * KiB, 512):
            with pytest.raises(OSError, match="No space left"):
                grow(file.fileno(), step)


@pytest.mark.spec("EDIT-1")
def test_a_full_file_system(disk: Disk) -> None:
    """An edit for which there is no room changes nothing; one that is reported stays."""
    before = extents(disk.path, "daily")
    fill(disk.path.parent)
    kept: list[str] = []

    def add_many(image: qcow2bm.Image) -> None:
        while True:
            name = f"large {len(kept)}"
            with image.edit() as edit:
                edit.add(name, granularity=512)
                edit.set_many(name, WRITES)
            kept.append(name)

    refused = pytest.raises(qcow2bm.CommitError, match="No space left")
    with qcow2bm.open(disk.path, "r+") as image, refused as caught:
        add_many(image)
    assert caught.value.outcome in ("old", "new")
    if caught.value.outcome == "new":
        kept.append(f"large {len(kept)}")
    with qcow2bm.open(disk.path) as image:
        assert {*image.bitmaps} == {"daily", *kept}
        assert {bitmap.status for bitmap in image.bitmaps.values()} == {"valid"}
    assert extents(disk.path, "daily") == before
    (disk.path.parent / "filling").unlink()
    assert_agreed(disk, "daily", *kept)
