"""QEMU opens a repaired image, checks it without an error, and finds the same bitmaps."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.broken_images import broken_images
from support.console import run
from support.qemu import LEAKS, Disk
from support.qemu import run as run_tool

import qcow2bm

MiB = 1 << 20
IMAGES = list(broken_images())
PARTS = 8


@pytest.mark.spec("REPAIR-1", "REPAIR-7")
@pytest.mark.parametrize(
    "part", [pytest.param(n, marks=pytest.mark.deep) if n % 2 else n for n in range(PARTS)]
)
def test_qemu_opens_what_was_repaired(part: int, tmp_path: Path) -> None:
    repaired = 0
    for what, data in IMAGES[part::PARTS]:
        path = tmp_path / "vm.qcow2"
        path.write_bytes(data)
        done = run(["repair", "vm.qcow2", "--no-undo"], tmp_path)
        assert done.status in (0, 1, 2), what
        if done.status:
            continue
        repaired += 1
        assert run_tool("qemu-img", "info", path).returncode == 0, what
        checked = run_tool("qemu-img", "check", path)
        # What a stale extension names, or one that is gone named, is not given back; nor what the
        # disk uses, however often it is counted.
        may_leak = "autoclear" in what or "refcount" in what
        assert checked.returncode in ((0, LEAKS) if may_leak else (0,)), what
        with qcow2bm.open(path) as image:
            names = [name for name, b in image.bitmaps.items() if b.status == "valid"]
        listed = [b["name"] for b in Disk(path).listed() if "in-use" not in b["flags"]]
        assert len(listed) == len(names), what
    assert repaired > len(IMAGES) // PARTS * 2 // 3


@pytest.mark.spec("REPAIR-6")
def test_a_guest_that_wrote_to_a_data_file_leaves_no_trace_so_it_is_asked_for(
    tmp_path: Path,
) -> None:
    disk = Disk.create(
        tmp_path / "vm.qcow2",
        64 * MiB,
        data_file=tmp_path / "data",
        data_file_raw="on",
        preallocation="metadata",
    )
    for name in ("kept", "dropped"):
        disk.add(name, 65536)
    with qcow2bm.open(disk.path) as image:
        place = image.bitmaps["dropped"].entry.offset_of("flags")
    with disk.path.open("r+b") as file:
        file.seek(place)
        file.write(b"\0\0\0\x10")
    before = disk.path.read_bytes()
    assert run(["repair", "vm.qcow2", "--undo", "back"], tmp_path).status == 0
    (tmp_path / "data").write_bytes(b"x" * 64 * MiB)
    done = run(["undo", "vm.qcow2", "back"], tmp_path)
    assert (done.status, done.out) == (1, "")
    assert "its guest data are in another file" in done.err
    assert run(["undo", "vm.qcow2", "back", "--assert-unchanged"], tmp_path).status == 0
    assert disk.path.read_bytes() == before
