"""Lifting vetoes, and what is done if QEMU refuses."""

from __future__ import annotations

from typing import Any

import pytest
from support.fakeqemu import SIZE, FakeBitmap, FakeNode, FakeQemu

from qcow2bm.errors import QmpError, StateError
from qcow2bm.migration.sentinel import PREFIX
from qcow2bm.qmp.arm import arm
from qcow2bm.qmp.client import Monitor
from qcow2bm.qmp.names import copy_of
from qcow2bm.qmp.veto import RescueReport, lift_vetoes


def started(address: str, *nodes: str, dry_run: bool = False) -> RescueReport:
    with Monitor(address) as monitor:
        return lift_vetoes(monitor, nodes, dry_run=dry_run)


def outcomes(found: RescueReport) -> dict[str, tuple[str, str | None]]:
    return {one.bitmap.name: (one.outcome, one.proof) for one in found.bitmaps}


def digests(qemu: FakeQemu) -> dict[str, str]:
    return {name: bitmap.digest(SIZE) for name, bitmap in qemu.bitmaps.items()}


@pytest.mark.spec("RESCUE-4", "RESCUE-7")
def test_the_veto_is_lifted_by_one_transaction_a_bitmap(qemu: FakeQemu, address: str) -> None:
    before = digests(qemu)
    for _ in range(2):
        found = started(address)
        assert outcomes(found) == {"a": ("rescued", "sha256"), "b": ("rescued", "sha256")}
        assert found.migration == "cancelled"
        assert not any(bitmap.vetoed for bitmap in qemu.bitmaps.values())
        assert digests(qemu) == before
    assert qemu.changes() == ["transaction"] * 4


@pytest.mark.spec("RESCUE-7")
def test_a_dry_run_only_asks(qemu: FakeQemu, address: str) -> None:
    assert outcomes(started(address, dry_run=True)) == dict.fromkeys("ab", ("planned", None))
    assert qemu.changes() == []


def test_nodes(qemu: FakeQemu, address: str) -> None:
    qemu.nodes["second"] = FakeNode({"c": FakeBitmap(vetoed=True)})
    qemu.nodes["third"] = FakeNode({"t": FakeBitmap(persistent=False, vetoed=True)})
    qemu.devices["second"] = "drive0"
    assert list(outcomes(started(address, "drive0", "second"))) == ["c"]
    assert qemu.bitmaps["a"].vetoed
    with pytest.raises(ValueError, match='the node "third" has no persistent bitmaps'):
        started(address, "third")
    assert list(outcomes(started(address))) == ["a", "b", "c"]
    with pytest.raises(ValueError, match='no node "x"; persistent bitmaps are on: disk, second'):
        started(address, "x")


@pytest.mark.spec("RESCUE-5")
def test_a_guest_that_writes_meanwhile_makes_more_dirty(qemu: FakeQemu, address: str) -> None:
    def write(command: str) -> None:
        if command == "transaction":
            qemu.bitmaps["a"].bits.add(100 + len(qemu.bitmaps["a"].bits))

    qemu.after = write
    assert outcomes(started(address))["a"] == ("rescued", "count")
    qemu.status = "paused"  # then the guest does not write
    assert outcomes(started(address))["a"] == ("lost", None)


@pytest.mark.spec("RESCUE-5")
@pytest.mark.parametrize("name", ["a", "b"])
def test_bits_that_change_are_lost(qemu: FakeQemu, address: str, name: str) -> None:
    def spoil(command: str) -> None:
        if command == "transaction":
            qemu.bitmaps[name].bits = {1000 + len(qemu.commands)}

    qemu.after = spoil
    assert outcomes(started(address))[name] == ("lost", None)


@pytest.mark.spec("RESCUE-5")
def test_a_bitmap_that_goes_away_is_lost(qemu: FakeQemu, address: str) -> None:
    def spoil(command: str) -> None:
        if command == "transaction":
            qemu.bitmaps.pop("a", None)

    qemu.after = spoil
    found = started(address)
    assert outcomes(found)["a"] == ("lost", None)
    assert "full backup" in found.bitmaps[0].reason


def test_without_digests_the_count_has_to_do(qemu: FakeQemu, address: str) -> None:
    qemu.refuse = lambda command, arguments: "no" if command.startswith("x-debug") else None
    assert set(outcomes(started(address)).values()) == {("rescued", "count")}


def no_removal_to_abort(command: str, arguments: dict[str, Any]) -> str | None:
    return "not possible" if command == "abort" else None


@pytest.mark.spec("RESCUE-6")
def test_where_the_abort_fails_a_copy_takes_the_place(qemu: FakeQemu, address: str) -> None:
    before = {name: bitmap.described(name) for name, bitmap in qemu.bitmaps.items()}
    hashes = digests(qemu)
    qemu.refuse = no_removal_to_abort
    for bitmap in qemu.bitmaps.values():
        bitmap.vetoed = True
    assert set(outcomes(started(address)).values()) == {("copied", "sha256")}
    assert {name: bitmap.described(name) for name, bitmap in qemu.bitmaps.items()} == before
    assert digests(qemu) == hashes
    assert not any(bitmap.vetoed for bitmap in qemu.bitmaps.values())


def test_what_qemu_refuses_altogether_is_left(qemu: FakeQemu, address: str) -> None:
    def refuse(command: str, arguments: dict[str, Any]) -> str | None:
        is_removal = command == "block-dirty-bitmap-remove"
        return "No space left" if is_removal and arguments["name"] == "a" else None

    qemu.refuse = refuse
    found = started(address)
    assert outcomes(found) == {"a": ("left", None), "b": ("rescued", "sha256")}
    assert found.bitmaps[0].reason == "QEMU refuses: No space left"


@pytest.mark.spec("RESCUE-6")
def test_a_name_too_long_for_a_copy_is_left(qemu: FakeQemu, address: str) -> None:
    name = "ä" * 505
    qemu.bitmaps.clear()
    qemu.bitmaps[name] = FakeBitmap()
    qemu.refuse = no_removal_to_abort
    assert outcomes(started(address)) == {name: ("left", None)}
    assert list(qemu.bitmaps) == [name]


@pytest.mark.spec("RESCUE-7")
def test_a_copy_gets_the_name_of_its_original(qemu: FakeQemu, address: str) -> None:
    qemu.bitmaps[copy_of("a")] = qemu.bitmaps.pop("a")
    assert outcomes(started(address))["a"] == ("copied", "sha256")
    assert sorted(qemu.bitmaps) == ["a", "b"]


@pytest.mark.spec("RESCUE-7")
def test_an_inconsistent_original_gives_way_to_its_copy(qemu: FakeQemu, address: str) -> None:
    qemu.bitmaps[copy_of("a")] = qemu.bitmaps.pop("a")
    qemu.bitmaps["a"] = FakeBitmap(inconsistent=True)
    assert outcomes(started(address)) == {"a": ("copied", "sha256"), "b": ("rescued", "sha256")}
    assert qemu.bitmaps["a"].bits == {1, 2, 3}


@pytest.mark.spec("RESCUE-6")
def test_a_copy_that_cannot_be_renamed_says_so(qemu: FakeQemu, address: str) -> None:
    qemu.bitmaps[copy_of("a")] = qemu.bitmaps.pop("a")
    qemu.refuse = lambda c, a: "no room" if c.endswith("-add") else None
    (_, found) = started(address).bitmaps
    assert (found.reason, found.hint) == ("QEMU refuses: no room", "rename-copies")
    assert found.message == (
        "QEMU refuses: no room; try again, or call qcow2bm.rescue.rename_copies when the machine "
        "is off"
    )
    assert found.bitmap.name == copy_of("a")


@pytest.mark.spec("RESCUE-8")
def test_what_is_left_and_why(qemu: FakeQemu, address: str) -> None:
    qemu.bitmaps.clear()
    qemu.bitmaps["bad"] = FakeBitmap(inconsistent=True)
    qemu.bitmaps["busy"] = FakeBitmap(busy=True)
    qemu.bitmaps["both"] = FakeBitmap()
    qemu.bitmaps[copy_of("both")] = FakeBitmap()
    qemu.bitmaps[PREFIX + "0f0e0d0c-0b0a-4908-8706-050403020100"] = FakeBitmap()
    qemu.nodes["fixed"] = FakeNode({"x": FakeBitmap()}, read_only=True)
    qemu.nodes["armed"] = FakeNode({"y": FakeBitmap()})
    with Monitor(address) as monitor:
        arm(monitor, ["armed"], set_mapping=True)
    assert "x" not in outcomes(started(address))  # read-only nodes are not listed, unless asked for
    done = started(address, "disk", "fixed", "armed")
    found = {one.bitmap.name: (one.outcome, one.message) for one in done.bitmaps}
    assert found.pop("both") == ("rescued", "")
    for name, word in {
        "bad": "inconsistent", "busy": "busy", copy_of("both"): "remove one of them",
        "x": "read-only", "y": "call qcow2bm.rescue.judge",
    }.items():  # fmt: skip
        outcome, reason = found.pop(name)
        assert (outcome, word in reason) == ("left", True)
    assert found == {}


@pytest.mark.spec("RESCUE-1")
@pytest.mark.parametrize(
    ("status", "migration", "active", "allowed"),
    [
        ("running", "", None, True),
        ("running", "none", None, True),
        ("paused", "cancelled", None, True),
        ("paused", "failed", None, True),
        ("prelaunch", "", None, True),
        ("running", "completed", None, True),
        ("io-error", "cancelled", None, True),
        ("paused", "completed", True, True),
        ("paused", "completed", None, True),
        ("running", "completed", False, False),
        ("postmigrate", "completed", None, False),
        ("inmigrate", "", None, False),
        ("finish-migrate", "failed", None, False),
        *(("running", m, None, False) for m in ("setup", "active", "cancelling", "device")),
        *(("paused", m, None, False) for m in ("pre-switchover", "postcopy-active", "colo")),
    ],
)
def test_when_there_is_a_time_for_it(
    qemu: FakeQemu, address: str, status: str, migration: str, active: bool | None, allowed: bool
) -> None:
    qemu.status, qemu.migration, qemu.nodes["disk"].active = status, migration, active
    if allowed:
        assert started(address).bitmaps
        return
    with pytest.raises(StateError):
        started(address)
    assert qemu.changes() == []


@pytest.mark.spec("RESCUE-1")
@pytest.mark.parametrize("migration", ["failed", "completed", "cancelled"])
@pytest.mark.parametrize("status", ["running", "paused"])
def test_a_disk_that_is_not_here_is_found_by_an_empty_write(
    qemu: FakeQemu, address: str, status: str, migration: str
) -> None:
    """QEMU ends by an assertion if a bitmap is removed there, and does not say that it is so."""
    qemu.status, qemu.migration, qemu.inactive = status, migration, {"disk"}
    with pytest.raises(StateError, match="a disk is inactive"):
        started(address)
    assert qemu.changes() == []
    qemu.inactive = set()
    assert started(address).bitmaps


@pytest.mark.spec("RESCUE-1")
@pytest.mark.parametrize("active", [None, False])
def test_a_machine_without_its_disks_has_no_bitmaps_in_memory(
    qemu: FakeQemu, address: str, active: bool | None
) -> None:
    """A destination that has not run yet: only then QEMU loads the bitmaps."""
    qemu.bitmaps.clear()
    qemu.status, qemu.migration, qemu.nodes["disk"].active = "paused", "completed", active
    for function in (lift_vetoes, arm):
        with pytest.raises(StateError), Monitor(address) as monitor:
            function(monitor)
        with pytest.raises(StateError), Monitor(address) as monitor:
            function(monitor, ["disk"])
    assert qemu.changes() == []
    qemu.status = "running"
    if active is None:
        assert not started(address).bitmaps


@pytest.mark.spec("RESCUE-1")
def test_where_it_cannot_be_found_out(qemu: FakeQemu, address: str) -> None:
    qemu.refuse = lambda name, _: "not found" if name == "human-monitor-command" else None
    qemu.status, qemu.migration = "paused", "completed"
    with pytest.raises(StateError, match="after a migration that completed"):
        started(address)
    qemu.status = "running"
    assert started(address).bitmaps


@pytest.mark.spec("RESCUE-5")
def test_a_job_that_begins_to_use_it_meanwhile_does_no_harm(qemu: FakeQemu, address: str) -> None:
    def begin(command: str) -> None:
        qemu.bitmaps["a"].busy = command == "transaction" or qemu.bitmaps["a"].busy

    qemu.after = begin
    assert outcomes(started(address, "disk"))["a"] == ("rescued", "sha256")


@pytest.mark.spec("RESCUE-1")
def test_an_ejected_disk(qemu: FakeQemu, address: str) -> None:
    refused = {"query-named-block-nodes": "Block device disk is ejected"}
    qemu.refuse = lambda command, arguments: refused.get(command)
    with pytest.raises(StateError, match=r"without a disk \(Block device disk is ejected\)"):
        started(address)
    refused["query-named-block-nodes"] = "something else"
    with pytest.raises(QmpError, match="something else"):
        started(address)


@pytest.mark.spec("RESCUE-19")
@pytest.mark.parametrize("by_copy", [False, True])
def test_interrupted_anywhere_and_done_again_it_ends_the_same(
    qemu: FakeQemu, address: str, by_copy: bool
) -> None:
    """If a rescue is interrupted after any command, and run again, no bit may have changed."""
    if by_copy:
        qemu.refuse = no_removal_to_abort
    before = digests(qemu)
    started(address)
    commands = len(qemu.changes())
    assert commands == (6 if by_copy else 2)
    for number in range(commands):
        for bitmap in qemu.bitmaps.values():
            bitmap.vetoed = True
        qemu.hang_up_after = number
        with pytest.raises(QmpError, match="the connection is lost"):
            started(address)
        assert sorted(digests(qemu).values()) == sorted(before.values())
        assert all(one.is_safe for one in started(address).bitmaps)
        assert digests(qemu) == before
        assert not any(bitmap.vetoed for bitmap in qemu.bitmaps.values())
