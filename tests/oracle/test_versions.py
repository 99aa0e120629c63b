"""That the QEMU that is used differs from others as spec/compatibility.md says."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.qemu import Disk, QmpError, StorageDaemon
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
