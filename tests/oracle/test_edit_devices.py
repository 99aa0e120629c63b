"""Images on storage of a fixed size, full of what was there before: block devices."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from support.qemu import Disk, ToolError, run_ok
from support.twin import SECTOR, KiB, MiB, Step, do

import qcow2bm
from qcow2bm.api import repair
from qcow2bm.format.undo_file import UndoLog
from qcow2bm.storage.file import FileStorage

SIZE = 40 * MiB + SECTOR
GARBAGE = b"\xaa"
RANGES = [(96 * KiB * n, SECTOR) for n in range(SIZE // (96 * KiB))]


class FixedFile(FileStorage):
    """A file that cannot grow."""

    def capacity(self) -> int:
        return self.size()


class Device(Disk):
    """A disk on a block device."""

    @property
    def arguments(self) -> tuple[str, ...]:
        return tuple(
            a.replace("file.driver=file", "file.driver=host_device") for a in super().arguments
        )


@contextmanager
def loop_device(path: Path) -> Iterator[Path]:
    """A block device whose content is that of a file; skips where there can be none."""
    try:
        device = Path(run_ok("losetup", "--find", "--show", path).strip())
    except (ToolError, FileNotFoundError) as error:
        pytest.skip(f"no loop device: {error}")
    try:
        yield device
    finally:
        run_ok("losetup", "--detach", device)


def large(name: str) -> list[Step]:
    """A bitmap none of whose clusters is all zeros or all ones."""
    return [("add", (name, 512)), ("set_many", (name, RANGES))]


@pytest.fixture(params=[(512, MiB), (4 * KiB, MiB), (64 * KiB, 4 * MiB)])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Disk:
    """An image in the first part of a file that is full of garbage."""
    cluster_size, room = request.param
    disk = Disk.create(tmp_path / "disk", SIZE, cluster_size=cluster_size)
    disk.add("daily", 512)
    disk.io("write -P 1 1M 512", "write -P 2 33M 64k")
    with disk.path.open("ab") as file:
        file.write(GARBAGE * (room - file.tell()))
    return disk


def fill_up(disk: Disk, target: Disk | FileStorage) -> list[str]:
    """Adds bitmaps until there is no room for another, and returns their names."""
    names: list[str] = []
    while True:
        name = f"bitmap {len(names)}"
        before = disk.path.read_bytes()
        try:
            do(target, *large(name))
        except qcow2bm.StorageError as error:
            if error.errno != errno.ENOSPC:
                raise
            assert disk.path.read_bytes() == before
            return names
        names.append(name)
        assert len(disk.path.read_bytes()) == len(before)
        if len(names) % 16 == 1:
            assert_sound(disk, names)


def assert_sound(disk: Disk, names: list[str]) -> None:
    assert disk.check().returncode == 0
    assert [bitmap["name"] for bitmap in disk.listed()] == ["daily", *names]
    assert disk.extents("daily") == [(MiB, 512), (33 * MiB, 64 * KiB)]
    for name in names[-1:]:
        assert disk.extents(name) == RANGES
    for command in ("read -P 1 1M 512", "read -P 2 33M 64k", "read -P 0 2M 64k"):
        assert "Pattern verification failed" not in disk.io(command, read_only=True)


def test_storage_of_a_fixed_size(disk: Disk) -> None:
    storage = FixedFile(disk.path, writable=True)
    try:
        names = fill_up(disk, storage)
        assert_sound(disk, names)
        assert len(names) > 4
        do(storage, ("remove", (names.pop(),)))
        assert_sound(disk, names)
        do(storage, *large("again"))
        assert_sound(disk, [*names, "again"])
        do(storage, ("remove_all", ()))
    finally:
        storage.close()
    assert disk.check().returncode == 0
    disk.io("write 0 2M")
    disk.add("by QEMU", 512)
    assert disk.check().returncode == 0


def test_a_block_device(disk: Disk) -> None:
    with loop_device(disk.path) as path:
        device = Device(path)
        names = fill_up(device, device)
        assert_sound(device, names)
        # QEMU needs room to store all bitmaps anew: leave it one.
        do(device, *(("remove", (name,)) for name in names[:-1]))
        assert_sound(device, names[-1:])
        device.io("write -P 3 5M 64k")
        assert device.check().returncode == 0
        assert (5 * MiB, 64 * KiB) in device.extents("daily")
        with pytest.raises(qcow2bm.ImageLockedError), device.held_by_qemu_io():
            qcow2bm.open(path, "r+")


def test_a_repair_finds_room_on_it_and_is_undone(disk: Disk) -> None:
    disk.add("broken", 64 * KiB)
    with disk.path.open("ab") as file:
        file.write(GARBAGE * MiB)
    with qcow2bm.open(disk.path) as image:
        place = image.bitmaps["broken"].entry.offset_of("flags")
    with disk.path.open("r+b") as written:
        written.seek(place)
        written.write(b"\0\0\0\x10")
    before = disk.path.read_bytes()
    kept: list[UndoLog] = []
    with closing(FixedFile(disk.path, writable=True)) as storage:

        def keep(undo: UndoLog) -> Callable[[int], None]:
            kept.append(undo)
            return lambda mtime_ns: None

        done = repair.repair(storage, keep)
        assert ([name for name, _ in done.lost], done.left) == (["broken"], ())
        assert disk.path.stat().st_size == len(before)
        assert [bitmap["name"] for bitmap in disk.listed()] == ["daily"]
        assert disk.check().returncode == 0
        assert repair.undo(storage, kept[0], is_asserted=True)
    assert disk.path.read_bytes() == before
