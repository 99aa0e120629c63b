"""QEMU opens the container of an existing raw disk, and tracks the writes to the disk in it."""

from __future__ import annotations

import random
import subprocess
from hashlib import sha256
from pathlib import Path

import pytest
from support.qemu import StorageDaemon, run_ok
from support.specreader import page

import qcow2bm

pytestmark = pytest.mark.qemu

KiB, MiB, GiB = 1 << 10, 1 << 20, 1 << 30


def raw_disk(path: Path, size: int) -> str:
    """A sparse disk with random data at its start and at its end; returns its digest."""
    source = random.Random(size)
    part = min(size, MiB)
    with path.open("wb") as file:
        file.write(source.randbytes(part))
        file.truncate(size)
        file.seek(size - part)
        file.write(source.randbytes(part))
    return digest(path)


def digest(path: Path) -> str:
    with path.open("rb") as file:
        found = sha256()
        while piece := file.read(MiB):
            found.update(piece)
    return found.hexdigest()


@pytest.mark.parametrize("cluster_size", [512, 4 * KiB, 64 * KiB, 2 * MiB, None])
@pytest.mark.parametrize("size", [512, 1536, 64 * KiB, 3 * MiB + 512, 70 * MiB])
def test_qemu_sees_the_disk_as_it_is(tmp_path: Path, size: int, cluster_size: int | None) -> None:
    disk, image = tmp_path / "disk.raw", tmp_path / "vm.qcow2"
    before = raw_disk(disk, size)
    qcow2bm.attach(disk, image, ["daily"], granularity=4096, cluster_size=cluster_size)
    assert digest(disk) == before
    run_ok("qemu-img", "check", str(image))
    run_ok("qemu-img", "compare", "-f", "qcow2", "-F", "raw", str(image), str(disk))
    assert digest(disk) == before


def test_a_write_of_a_guest_reaches_disk_and_bitmap(tmp_path: Path) -> None:
    disk, image = tmp_path / "disk.raw", tmp_path / "vm.qcow2"
    raw_disk(disk, 64 * MiB)
    qcow2bm.attach(disk, image, ["daily"], granularity=64 * KiB)
    run_ok("qemu-io", "-f", "qcow2", "-c", "write -P 7 5M 100k", str(image))
    run_ok("qemu-img", "check", str(image))
    with disk.open("rb") as file:
        file.seek(5 * MiB)
        assert file.read(100 * KiB) == b"\7" * (100 * KiB)
    with qcow2bm.open(image) as found:
        (extents,) = found.bitmaps["daily"].extents()
        assert extents.tolist() == [[5 * MiB, 128 * KiB]]


def test_a_disk_of_a_terabyte_takes_a_moment(tmp_path: Path) -> None:
    disk, image = tmp_path / "disk.raw", tmp_path / "vm.qcow2"
    with disk.open("wb") as file:
        file.truncate(1 << 40)
    qcow2bm.attach(disk, image, ["daily"])
    assert image.stat().st_size < 48 * MiB
    run_ok("qemu-img", "check", str(image))
    run_ok("qemu-io", "-f", "qcow2", "-c", f"write -P 7 {(1 << 40) - 512} 512", str(image))
    with qcow2bm.open(image) as found:
        assert found.bitmaps["daily"].count() == 64 * KiB


def test_a_disk_that_qemu_writes_to_is_refused(tmp_path: Path) -> None:
    disk, image = tmp_path / "disk.raw", tmp_path / "vm.qcow2"
    raw_disk(disk, MiB)
    with StorageDaemon() as daemon:
        daemon.execute("blockdev-add", {"driver": "file", "filename": str(disk), "node-name": "n"})
        address = {"type": "unix", "data": {"path": str(tmp_path / "nbd.sock")}}
        daemon.execute("nbd-server-start", {"addr": address})
        export = {"type": "nbd", "id": "x", "node-name": "n", "writable": True}
        daemon.execute("block-export-add", export)
        with pytest.raises(qcow2bm.ImageLockedError):
            qcow2bm.attach(disk, image)
        assert not image.exists()
    qcow2bm.attach(disk, image)


def test_the_path_of_a_disk_that_was_moved_is_stored_again(tmp_path: Path) -> None:
    """Runs the command of spec/image.md."""
    disk, image, moved = tmp_path / "disk.raw", tmp_path / "vm.qcow2", tmp_path / "moved.raw"
    raw_disk(disk, MiB)
    qcow2bm.attach(disk, image, ["daily"])
    disk.rename(moved)
    (block,) = (block for block in page("image.md").blocks if block.info == "sh")
    command = block.text.replace("/new/disk.raw", str(moved)).replace("vm.qcow2", str(image))
    subprocess.run(["bash", "-ec", command], check=True)
    run_ok("qemu-img", "compare", "-f", "qcow2", "-F", "raw", str(image), str(moved))
    with qcow2bm.open(image) as found:
        assert found.bitmaps["daily"].status == "valid"
