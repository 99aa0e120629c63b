"""That the QEMU that is used differs from others as spec/compatibility.md says."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.qemu import Disk
from support.qemu_facts import fact
from support.vm import Machine


@pytest.mark.usefixtures("system_emulator")
def test_whether_a_node_is_active_is_told(tmp_path: Path) -> None:
    disk = Disk.create(tmp_path / "disk", 1 << 20)
    with Machine(disk.path) as machine:
        nodes = machine.execute("query-named-block-nodes", {"flat": True})
        assert {"active" in node for node in nodes} == {fact("active") == "yes"}
