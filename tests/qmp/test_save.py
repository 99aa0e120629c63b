"""Saving the bitmaps of a running machine, also if that is interrupted."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import pytest
from support.console import run
from support.fakeqemu import SIZE, FakeBitmap, FakeNode, FakeQemu

from qcow2bm.errors import QmpError, StateError
from qcow2bm.migration.sidecar import read_sidecar
from qcow2bm.qmp.arm import arm
from qcow2bm.qmp.client import Monitor
from qcow2bm.qmp.names import SCRATCH_NODE
from qcow2bm.qmp.save import save_sidecar

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux")


def expected(qemu: FakeQemu) -> list[tuple[str, int, bool, str]]:
    """Returns name, granularity, recording and digest of all bitmaps that can be saved."""
    return [
        (name, b.granularity, b.recording, b.digest(SIZE))
        for name, b in qemu.bitmaps.items()
        if b.persistent and not b.busy and not b.inconsistent
    ]


def saved(address: str, node: str | None = None) -> list[tuple[str, int, bool, str]]:
    with Monitor(address) as monitor:
        sidecar, _ = save_sidecar(monitor, node)
    assert (sidecar.disk_size, sidecar.header) == (SIZE, b"")
    return [(b.name, b.granularity, b.enabled, b.sha256()) for b in sidecar.bitmaps]


@pytest.mark.spec("SIDECAR-8")
@pytest.mark.spec("SIDECAR-9")
def test_all_are_saved_and_nothing_is_left(qemu: FakeQemu, address: str) -> None:
    before = copy.deepcopy(qemu.nodes)
    assert saved(address) == expected(qemu)
    assert len(expected(qemu)) == 2
    assert (qemu.nodes, qemu.descriptors) == (before, [])
    transactions = [a for command, a in qemu.commands if command == "transaction"]
    assert len(transactions) == 1
    assert {action["type"] for action in transactions[0]["actions"]} == {
        "block-dirty-bitmap-add",
        "block-dirty-bitmap-merge",
    }


@pytest.mark.spec("SIDECAR-10")
def test_what_is_left_out(qemu: FakeQemu, address: str, tmp_path: Path) -> None:
    qemu.bitmaps["busy"] = FakeBitmap(busy=True)
    qemu.bitmaps["dead"] = FakeBitmap(inconsistent=True)
    qemu.bitmaps["transient"] = FakeBitmap(persistent=False)
    done = run(["sidecar", "save", "--qmp", address, "saved"], tmp_path)
    assert (done.status, done.out) == (2, "")
    assert done.err.splitlines() == [
        f'qcow2bm: warning: {address}: bitmap "busy" is busy: a job uses it, and left out',
        f'qcow2bm: warning: {address}: bitmap "dead" is inconsistent, and left out',
    ]
    found = read_sidecar([(tmp_path / "saved").read_bytes()])
    assert [b.name for b in found.bitmaps] == ["a", "b"]


@pytest.mark.spec("SIDECAR-10")
@pytest.mark.parametrize("state", ["active", "device", "pre-switchover"])
def test_not_while_a_migration_is_under_way(qemu: FakeQemu, address: str, state: str) -> None:
    qemu.migration = state
    with Monitor(address) as monitor, pytest.raises(StateError, match="migrating"):
        save_sidecar(monitor)
    assert qemu.changes() == []


@pytest.mark.spec("SIDECAR-10")
@pytest.mark.parametrize("migration", ["completed", "failed"])
def test_not_before_the_verdict(qemu: FakeQemu, address: str, migration: str) -> None:
    with Monitor(address) as monitor:
        arm(monitor, set_mapping=True)
        assert save_sidecar(monitor).sidecar.bitmaps
        qemu.migration = migration
        with pytest.raises(StateError, match=r"not judged.*; call qcow2bm\.rescue\.judge"):
            save_sidecar(monitor)


def test_which_node(qemu: FakeQemu, address: str, tmp_path: Path) -> None:
    qemu.nodes["other"] = FakeNode({"c": FakeBitmap()})
    qemu.nodes["bare"] = FakeNode()
    assert saved(address, "disk") == expected(qemu)
    for options, said in (
        ([], 'several nodes have such bitmaps: choose one with --node ("disk", "other")'),
        (["--node", "dsk"], 'there is no node "dsk"; persistent bitmaps are on: disk, other'),
        (["--node", "bare"], "has no persistent bitmaps"),
    ):
        done = run(["sidecar", "save", "--qmp", address, *options, "saved"], tmp_path)
        assert (done.status, done.out, done.err) == (1, "", f"qcow2bm: {address}: {said}\n")
    del qemu.nodes["other"], qemu.nodes["disk"]
    done = run(["sidecar", "save", "--qmp", address, "saved"], tmp_path)
    assert (done.status, done.err) == (1, f"qcow2bm: {address}: no node has persistent bitmaps\n")
    assert not (tmp_path / "saved").exists()


@pytest.mark.spec("SIDECAR-9")
@pytest.mark.parametrize("how", ["refused", "hang-up"])
def test_interrupted_at_every_command(qemu: FakeQemu, address: str, how: str) -> None:
    """A second run then saves all bitmaps, and leaves nothing behind."""
    before = copy.deepcopy(qemu.nodes)
    saved(address)
    steps = qemu.changes()
    assert steps == ["add-fd", "blockdev-add", "transaction", "blockdev-del", "remove-fd"]
    for step, command in enumerate(steps):
        if how == "hang-up":
            qemu.hang_up_after = step
        else:
            qemu.refuse = lambda name, _, command=command: "No" if name == command else None  # type: ignore[misc]
        if command == "remove-fd":  # what fails there does no harm
            assert saved(address) == expected(qemu)
        else:
            with pytest.raises(QmpError):
                saved(address)
        qemu.hang_up_after, qemu.refuse = None, lambda name, _: None
        bitmaps = {n: node.bitmaps for n, node in qemu.nodes.items() if n != SCRATCH_NODE}
        assert bitmaps == {"disk": before["disk"].bitmaps}
        assert saved(address) == expected(qemu)
        assert (qemu.nodes, qemu.descriptors) == (before, [])


@pytest.mark.spec("SIDECAR-8")
@pytest.mark.parametrize("what", ["lost", "other bits"])
def test_what_qemu_did_not_store_is_noticed(qemu: FakeQemu, address: str, what: str) -> None:
    def spoil(command: str) -> None:
        if command == "x-debug-block-dirty-bitmap-sha256":
            bitmaps = qemu.nodes[SCRATCH_NODE].bitmaps
            bitmaps.pop("a", None) if what == "lost" else bitmaps["a"].bits.add(9)

    qemu.after = spoil
    said = "did not store a bitmap" if what == "lost" else "are not what QEMU said they were"
    with pytest.raises(QmpError, match=said):
        saved(address)


def test_without_digests_it_works_all_the_same(qemu: FakeQemu, address: str) -> None:
    qemu.refuse = lambda name, _: "not found" if name.startswith("x-debug") else None
    assert saved(address) == expected(qemu)


def test_without_room_for_temporary_files(
    qemu: FakeQemu, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    done = run(["sidecar", "save", "--qmp", address, "saved"], tmp_path)
    assert (done.status, done.out) == (1, "")
    assert done.err.startswith("qcow2bm: a temporary file: ")
    assert qemu.changes() == []
