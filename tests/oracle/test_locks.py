"""Next to a running QEMU: never read what it may be changing, never stand in its way."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from support.qemu import Disk, held_by_storage_daemon, run
from support.qemu_facts import fact

import qcow2bm
from qcow2bm.storage.file import FileStorage

MiB, GiB = 1 << 20, 1 << 30

Holder = Callable[[Disk], AbstractContextManager[None]]


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    disk = Disk.create(tmp_path / "disk", 64 * MiB, cluster_size=4096)
    disk.add("daily", 512)
    disk.io("write 1M 512", "write 33M 64k")
    return disk


def extents(bitmap: qcow2bm.Bitmap) -> list[tuple[int, int]]:
    return [(start, length) for array in bitmap.extents() for start, length in array.tolist()]


def dirty_bits(bitmap: qcow2bm.Bitmap) -> int:
    return int.from_bytes(bitmap.packed().tobytes()).bit_count()


@pytest.mark.parametrize("holder", [Disk.held_by_qemu_io, held_by_storage_daemon])
def test_an_image_somebody_writes_to(disk: Disk, holder: Holder) -> None:
    with holder(disk):
        with pytest.raises(qcow2bm.ImageLockedError, match="is writing to it"):
            qcow2bm.open(disk.path)
        with qcow2bm.open(disk.path, force_share=True) as image:
            bitmap = image.bitmaps["daily"]
            assert bitmap.in_use
            assert bitmap.status == "inconsistent"
            with pytest.raises(qcow2bm.BitmapInconsistentError):
                bitmap.count()
    with qcow2bm.open(disk.path) as image:
        if holder == held_by_storage_daemon and fact("daemon-quit") == "no":
            assert image.bitmaps["daily"].status == "inconsistent"
        else:
            assert extents(image.bitmaps["daily"]) == disk.extents("daily")


def test_an_image_somebody_reads(disk: Disk) -> None:
    with disk.held_by_qemu_io(read_only=True), qcow2bm.open(disk.path) as image:
        assert image.bitmaps["daily"].count() == 512 + 64 * 1024


def test_qemu_starts_writing_while_an_image_is_open(disk: Disk) -> None:
    with qcow2bm.open(disk.path) as image:
        assert image.bitmaps["daily"].status == "valid"
        # QEMU marks the bitmaps when it starts, which shows before its lock does.
        with disk.held_by_qemu_io(), pytest.raises(qcow2bm.ChangedWhileReadingError):
            image.bitmaps["daily"].packed()
        with disk.held_by_qemu_io(), pytest.raises(qcow2bm.ImageLockedError):
            qcow2bm.open(disk.path)


def test_qemu_waits_while_bits_are_read(disk: Disk) -> None:
    storage = FileStorage(disk.path)
    try:
        with storage.read_lock():
            refused = run("qemu-img", "bitmap", "--add", str(disk.path), "weekly")
            assert refused.returncode == 1
            assert 'Failed to get "write" lock' in refused.stderr
            assert disk.extents("daily")  # another reader is welcome
    finally:
        storage.close()
    disk.add("weekly", 65536)


def nothing(bitmap: qcow2bm.Bitmap) -> object:
    return None


def status(bitmap: qcow2bm.Bitmap) -> object:
    return bitmap.status


def rewrite(disk: Disk) -> None:
    disk.io("write 50M 512")


def clear_and_write(disk: Disk) -> None:
    """Leaves the header as it was: the directory moves back to where it has been before."""
    disk.io("write 17M 512")
    disk.bitmap("daily", "--clear")


def remove_and_add(disk: Disk) -> None:
    disk.bitmap("daily", "--remove")
    disk.add("daily", 512)
    disk.io("write 3M 512")


@pytest.mark.parametrize("force_share", [False, True])
@pytest.mark.parametrize("times", [1, 2, 3, 4])
@pytest.mark.parametrize("change", [rewrite, clear_and_write, remove_and_add])
@pytest.mark.parametrize("look", [nothing, status])
def test_bits_that_moved_away(
    disk: Disk,
    look: Callable[[qcow2bm.Bitmap], object],
    change: Callable[[Disk], None],
    times: int,
    force_share: bool,
) -> None:
    """QEMU discards the clusters of bits that it stored anew: they read as zeros from then on."""
    with qcow2bm.open(disk.path, force_share=force_share) as image:
        bitmap = image.bitmaps["daily"]
        look(bitmap)
        for _ in range(times):
            change(disk)
        expected = disk.extents("daily")
        dirty = sum(length for _, length in expected)
        reads: list[tuple[Callable[[qcow2bm.Bitmap], object], object]] = [
            (dirty_bits, dirty // 512),
            (qcow2bm.Bitmap.count, dirty),
            (extents, expected),
        ]
        for read, today in reads:
            try:
                found = read(bitmap)
            except qcow2bm.ChangedWhileReadingError:
                continue
            # Not noticed: only where everything stands where it stood before.
            assert found == today


def test_one_rewrite_is_noticed(disk: Disk) -> None:
    with qcow2bm.open(disk.path) as image:
        rewrite(disk)
        with pytest.raises(qcow2bm.ChangedWhileReadingError):
            _ = image.bitmaps["daily"].status


def test_a_change_between_two_arrays_of_extents(tmp_path: Path) -> None:
    disk = Disk.create(tmp_path / "disk", 20 * GiB)
    disk.add("daily", 512)
    # Several arrays' worth of single sectors, in three chunks of the bitmap.
    for start in (0, 8, 16):
        disk.io(*(f"write -z {(start << 30) + 1024 * n} 512" for n in range(5000)))
    with qcow2bm.open(disk.path) as image:
        arrays = image.bitmaps["daily"].extents()
        first = next(arrays)
        assert first[0].tolist() == [0, 512]
        disk.io("write 19G 512")  # nothing is locked while the caller works on an array
        with pytest.raises(qcow2bm.ChangedWhileReadingError):
            list(arrays)
