"""Sidecars of running QEMUs, and what QEMU has of bitmaps that came out of one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.console import run
from support.qemu import Disk
from support.twin import KiB, MiB
from support.vm import Machine

pytestmark = pytest.mark.usefixtures("system_emulator")

SIZE = 10 * MiB + 512
GRANULARITIES = {"daily": 64 * KiB, "fine": 512, "huge bits": 2 << 30, "größe \N{SNOWMAN}": MiB}


@pytest.mark.spec("SIDECAR-8")
@pytest.mark.spec("SIDECAR-9")
def test_from_a_running_machine_into_another_image(tmp_path: Path) -> None:
    disk = Disk.create(tmp_path / "disk.qcow2", SIZE)
    for name, granularity in GRANULARITIES.items():
        disk.add(name, granularity)
    address = tmp_path / "qmp"
    command = ["sidecar", "save", "--qmp", str(address)]
    with Machine(disk.path, monitor=address) as machine:
        machine.write(MiB, 3 * MiB)
        machine.write(SIZE - 512, 512)
        where = {"node": "disk", "name": "fine"}
        machine.execute("block-dirty-bitmap-disable", where)
        machine.write(7 * MiB, 512)
        nodes = machine.execute("query-named-block-nodes", {"flat": True})
        digests = {name: digest(machine, name) for name in GRANULARITIES}
        for name in ("first", "second"):
            assert run([*command, name], tmp_path) == (0, "", "")
        assert machine.execute("query-named-block-nodes", {"flat": True}) == nodes
        assert machine.execute("query-fdsets") == []
        machine.quit()
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()
    document = json.loads(run(["sidecar", "dump", "first", "--output=json"], tmp_path).out)
    assert {b["name"]: b["sha256"] for b in document["bitmaps"]} == digests
    assert {b["name"]: b["enabled"] for b in document["bitmaps"]} == {
        name: name != "fine" for name in GRANULARITIES
    }
    other = Disk.create(tmp_path / "other.qcow2", SIZE)
    load = ["sidecar", "load", "first", "other.qcow2", "--assert-unchanged"]
    assert run(load, tmp_path) == (0, "", "")
    with Machine(other.path) as machine:
        assert {name: digest(machine, name) for name in GRANULARITIES} == digests


def digest(machine: Machine, name: str) -> str:
    where = {"node": "disk", "name": name}
    return str(machine.execute("x-debug-block-dirty-bitmap-sha256", where)["sha256"])


@pytest.mark.spec("SIDECAR-4")
@pytest.mark.parametrize("writes", [False, True])
def test_a_sentinel_that_qemu_kept_tells_whether_the_guest_wrote(
    tmp_path: Path, writes: bool
) -> None:
    disk = Disk.create(tmp_path / "disk.qcow2", SIZE)
    disk.add("daily", 64 * KiB)
    disk.io("write 1M 64k")
    assert run(["sidecar", "save", "--sentinel", "disk.qcow2", "saved"], tmp_path) == (0, "", "")
    with Machine(disk.path) as machine:
        if writes:
            machine.write(5 * MiB, 512)
        machine.execute("block-dirty-bitmap-remove", {"node": "disk", "name": "daily"})
        machine.quit()
    done = run(["sidecar", "load", "saved", "disk.qcow2"], tmp_path)
    assert done.status == (1 if writes else 0), done.err
    if writes:
        assert "the sentinel has ranges that were written" in done.err
        # The operator asserts that this does no harm, and these ranges become dirty all the same.
        load = ["sidecar", "load", "saved", "disk.qcow2", "--assert-unchanged"]
        assert run(load, tmp_path) == (0, "", "")
    expected = [(MiB, 64 * KiB)] + ([(5 * MiB, 64 * KiB)] if writes else [])
    assert disk.extents("daily") == expected
