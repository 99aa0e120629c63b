"""The log of a rescue: each step at INFO, and no output."""

from __future__ import annotations

import logging

import pytest
from support.fakeqemu import FakeBitmap, FakeQemu
from support.rescue import verdict

from qcow2bm.qmp.arm import arm
from qcow2bm.qmp.client import Monitor
from qcow2bm.qmp.save import save_sidecar
from qcow2bm.qmp.veto import lift_vetoes


def test_each_step_is_logged_and_nothing_is_printed(
    qemu: FakeQemu,
    address: str,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.INFO, "qcow2bm")
    qemu.bitmaps["old\n"] = FakeBitmap(inconsistent=True)
    with Monitor(address) as monitor:
        lift_vetoes(monitor)
        save_sidecar(monitor)
        (node,) = arm(monitor, set_mapping=True).nodes
        qemu.migration = "completed"
        verdict(monitor)
    found = [record for record in caplog.records if record.name == "qcow2bm"]
    assert {record.levelno for record in found} == {logging.INFO}
    assert [record.getMessage() for record in found] == [
        'rescue start: bitmap "a" of node "disk" rescued',
        'rescue start: bitmap "b" of node "disk" rescued',
        'rescue start: bitmap "old\\n" of node "disk" left: it is inconsistent: writes are missing '
        "from it; remove it, and take a full backup",
        'saved 2 bitmaps of node "disk"',
        "rescue arm: the block-bitmap-mapping is set",
        f'rescue arm: node "disk" is armed with {node.sentinel}',
        'rescue verdict: node "disk" untouched: this machine wrote to every place that was written '
        "to",
        'rescue verdict: node "disk" is disarmed, bitmaps kept',
    ]
    assert capsys.readouterr() == ("", "")
