"""That the QEMU that is used differs from others as spec/compatibility.md says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.qemu import Disk, QmpError, StorageDaemon, run_ok
from support.qemu_facts import fact
from support.vm import Machine

import qcow2bm
from qcow2bm import rescue


@pytest.mark.usefixtures("system_emulator")
def test_whether_a_node_is_active_is_told(tmp_path: Path) -> None:
    disk = Disk.create(tmp_path / "disk", 1 << 20)
    with Machine(disk.path) as machine:
        nodes = machine.execute("query-named-block-nodes", {"flat": True})
        assert {"active" in node for node in nodes} == {fact("active") == "yes"}


def names(daemon: StorageDaemon) -> list[str]:
    """The bitmaps of the node ``disk`` in memory."""
    (node,) = (
        node
        for node in daemon.execute("query-named-block-nodes", {"flat": True})
        if node["node-name"] == "disk"
    )
    return sorted(bitmap["name"] for bitmap in node.get("dirty-bitmaps", []))


def set_active(daemon: StorageDaemon, *, active: bool) -> None:
    daemon.execute("blockdev-set-active", {"node-name": "disk", "active": active})


@pytest.mark.spec("RESCUE-1")
def test_an_inactive_node_is_edited_and_activated_again(tmp_path: Path) -> None:
    """QEMU stores the bitmaps when it gives the image away, and reads what it finds later."""
    disk = Disk.create(tmp_path / "disk", 64 << 20)
    disk.add("daily", 65536)
    with StorageDaemon() as daemon:
        daemon.open(disk, read_only=False)
        assert names(daemon) == ["daily"]
        if fact("blockdev-set-active") == "no":
            with pytest.raises(QmpError, match="blockdev-set-active has not been found"):
                set_active(daemon, active=False)
            return
        with pytest.raises(qcow2bm.ImageLockedError):
            qcow2bm.open(disk.path, "r+")
        set_active(daemon, active=False)
        assert names(daemon) == []
        with qcow2bm.open(disk.path, "r+") as image, image.edit() as edit:
            assert image.bitmaps["daily"].status == "valid"
            edit.set("daily", 1 << 20, 65536)
            edit.add("weekly", 4096)
        set_active(daemon, active=True)
        assert names(daemon) == ["daily", "weekly"]
        with pytest.raises(qcow2bm.ImageLockedError):
            qcow2bm.open(disk.path, "r+")
    with qcow2bm.open(disk.path) as image:
        assert image.problems == ()
        assert image.bitmaps["daily"].count() == 65536
        assert image.bitmaps["weekly"].count() == 0


def write(daemon: StorageDaemon, place: int, socket: Path) -> None:
    """Writes 64 KiB to the node ``disk``, as a guest does."""
    daemon.execute("nbd-server-start", {"addr": {"type": "unix", "data": {"path": str(socket)}}})
    export = {"type": "nbd", "id": "export", "node-name": "disk", "writable": True}
    daemon.execute("block-export-add", export)
    try:
        url = f"nbd+unix:///disk?socket={socket}"
        run_ok("qemu-io", "-f", "raw", "-c", f"write {place} 64k", url)
    finally:
        daemon.execute("block-export-del", {"id": "export", "mode": "hard"})
        daemon.execute("nbd-server-stop")


@pytest.mark.spec("TRACK-1")
def test_two_daemons_and_a_tracker_hand_an_image_over(tmp_path: Path) -> None:
    """Each records its own writes, and the next one goes on with all of them.

    The daemons have the image open all the time, and give it to each other as at a migration.
    """
    if fact("blockdev-set-active") == "no":
        return  # test_an_inactive_node_is_edited_and_activated_again shows that it cannot
    disk = Disk.create(tmp_path / "disk", 64 << 20)
    disk.add("daily", 65536)
    os.truncate(disk.path, 4 << 20)  # room: where the image grows, QEMU ejects it (grown-inactive)
    with StorageDaemon() as source, StorageDaemon() as destination:
        source.open(disk, read_only=False)
        destination.open(disk, read_only=False, active=False)
        write(source, 1 << 20, tmp_path / "source")
        set_active(source, active=False)
        with qcow2bm.open(disk.path, "r+") as image, image.track() as tracker:
            tracker.mark(2 << 20, 65536)
        set_active(destination, active=True)
        write(destination, 3 << 20, tmp_path / "destination")
        set_active(destination, active=False)
        set_active(source, active=True)
        write(source, 4 << 20, tmp_path / "source")
    assert disk.check().returncode == 0
    assert disk.extents("daily") == [(number << 20, 65536) for number in (1, 2, 3, 4)]
    with qcow2bm.open(disk.path) as image:
        assert image.bitmaps["daily"].count() == 4 * 65536


def test_an_image_that_grew_before_its_node_became_active(tmp_path: Path) -> None:
    """QEMU does not know the new length of the file. The image is sound, and no bitmap is lost."""
    disk = Disk.create(tmp_path / "disk", 64 << 20)
    disk.add("daily", 65536)
    with StorageDaemon() as daemon:
        if fact("grown-inactive") == "no such option":
            with pytest.raises(QmpError, match="active"):
                daemon.open(disk, read_only=False, active=False)
            return
        daemon.open(disk, read_only=False, active=False)
        disk.io("write 2M 64k")
        with pytest.raises(QmpError, match="doesn't satisfy the constraints"):
            set_active(daemon, active=True)
        with pytest.raises(QmpError, match="is ejected"):
            names(daemon)
    assert disk.check().returncode == 0
    assert disk.extents("daily") == [(2 << 20, 65536)]


@pytest.mark.spec("RESCUE-1")
@pytest.mark.usefixtures("system_emulator")
def test_rescue_leaves_a_machine_alone_that_has_given_its_disk_away(tmp_path: Path) -> None:
    if fact("blockdev-set-active") == "no":
        return  # test_an_inactive_node_is_edited_and_activated_again shows that it cannot
    disk = Disk.create(tmp_path / "disk", 64 << 20)
    disk.add("daily", 65536)
    address = str(tmp_path / "qmp")
    with Machine(disk.path, monitor=tmp_path / "qmp") as machine:
        machine.execute("stop")
        machine.execute("blockdev-set-active", {"active": False})
        for function in (rescue.lift_vetoes, rescue.arm, rescue.judge):
            with (
                rescue.Monitor(address) as monitor,
                pytest.raises(qcow2bm.StateError, match="a disk is inactive"),
            ):
                function(monitor)
        machine.execute("blockdev-set-active", {"active": True})
        with rescue.Monitor(address) as monitor:
            (done,) = rescue.lift_vetoes(monitor).bitmaps
        assert done.outcome == "rescued"
