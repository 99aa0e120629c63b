"""The verdict by a sentinel and its twin, and what is done to the bitmaps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext

import pytest
from support.fakeqemu import SIZE, FakeBitmap, FakeNode, FakeQemu
from support.rescue import verdict
from support.specreader import page

from qcow2bm.errors import QmpError
from qcow2bm.migration.sentinel import PREFIX
from qcow2bm.qmp.arm import arm
from qcow2bm.qmp.client import Monitor
from qcow2bm.qmp.names import COMPARED, SCRATCH_NODE, is_evidence, twin_of
from qcow2bm.qmp.settlement import Remedy, Settlement

SENTINEL = PREFIX + "0f0e0d0c-0b0a-4908-8706-050403020100"
TWIN = twin_of(SENTINEL)


def judged(address: str, remedy: Remedy | None = None) -> list[Settlement]:
    with Monitor(address) as monitor:
        return verdict(monitor, remedy=remedy)


def one(address: str, remedy: Remedy | None = None) -> Settlement:
    (found,) = judged(address, remedy)
    return found


@pytest.fixture
def armed(qemu: FakeQemu) -> FakeQemu:
    """Armed, with a bitmap more that is transient, and back from a migration that completed."""
    qemu.bitmaps["t"] = FakeBitmap(persistent=False)
    qemu.bitmaps[SENTINEL] = FakeBitmap(4096, {3, 4})
    qemu.bitmaps[TWIN] = FakeBitmap(4096, {3, 4}, persistent=False)
    bitmaps = [{"name": name, "alias": name} for name in ("a", "b", "t")]
    qemu.mapping = [{"node-name": "disk", "alias": "disk", "bitmaps": bitmaps}]
    qemu.migration = "completed"
    return qemu


def gone(*names: str) -> Callable[[FakeQemu], None]:
    def change(qemu: FakeQemu) -> None:
        for name in names:
            del qemu.bitmaps[name]

    return change


def set_to(name: str, **values: object) -> Callable[[FakeQemu], None]:
    def change(qemu: FakeQemu) -> None:
        for key, value in values.items():
            setattr(qemu.bitmaps[name], key, value)

    return change


def also(*changes: Callable[[FakeQemu], None]) -> Callable[[FakeQemu], None]:
    def change(qemu: FakeQemu) -> None:
        for one in changes:
            one(qemu)

    return change


def travelled(qemu: FakeQemu) -> None:
    qemu.mapping = None


def travelled_by_name(qemu: FakeQemu) -> None:
    one = {"name": SENTINEL, "alias": SENTINEL}
    qemu.mapping = [{"node-name": "disk", "alias": "disk", "bitmaps": [one]}]


def no_digests(qemu: FakeQemu) -> None:
    qemu.refuse = lambda command, arguments: "no" if command.startswith("x-debug") else None


FOUND: dict[str, list[Callable[[FakeQemu], None]]] = {
    "neither sentinel nor twin": [gone(SENTINEL, TWIN)],
    "a sentinel without a twin, inconsistent, beside bitmaps that are not": [
        also(gone(TWIN), set_to(SENTINEL, inconsistent=True))
    ],
    "any other sentinel without a twin": [
        gone(TWIN),
        also(gone(TWIN), *(set_to(n, inconsistent=True) for n in (SENTINEL, "a", "b", "t"))),
    ],
    "a twin without a sentinel": [gone(SENTINEL)],
    "the sentinel is inconsistent": [set_to(SENTINEL, inconsistent=True)],
    "sentinel or twin is disabled": [
        set_to(SENTINEL, recording=False), set_to(TWIN, recording=False)
    ],
    "there was a migration, and no mapping that leaves the sentinel out": [
        travelled, travelled_by_name
    ],
    "QEMU gives no digests": [no_digests],
    "sentinel and twin differ": [set_to(SENTINEL, bits={3, 4, 9}), set_to(SENTINEL, bits={3})],
    "sentinel and twin are equal": [lambda qemu: None],
}  # fmt: skip


@pytest.mark.spec("RESCUE-13")
@pytest.mark.parametrize("row", page("rescue.md").table("Verdict").rows, ids=lambda r: r["found"])
def test_what_is_found_decides(armed: FakeQemu, address: str, row: dict[str, str]) -> None:
    before = copy.deepcopy(armed.nodes)
    for change in FOUND[row["found"]]:
        armed.nodes = copy.deepcopy(before)
        change(armed)
        with Monitor(address) as monitor:
            (found,) = verdict(monitor, ["disk"])
        assert found.verdict.word == row["verdict"]
        is_armed = row["verdict"] in ("touched", "unknown")
        assert found.is_armed == is_armed
        assert any(map(is_evidence, armed.bitmaps)) == is_armed
        assert {"a", "b", "t"} <= armed.bitmaps.keys()


def test_every_line_is_tried() -> None:
    assert list(FOUND) == page("rescue.md").table("Verdict").column("found")


@pytest.mark.spec("RESCUE-13")
def test_without_a_migration_no_machine_can_have_touched_it(armed: FakeQemu, address: str) -> None:
    armed.migration, armed.mapping = "", None
    assert one(address).verdict.word == "untouched"


@pytest.mark.spec("RESCUE-13")
def test_a_guest_that_writes_between_two_queries_is_no_other_machine(
    armed: FakeQemu, address: str
) -> None:
    def write(command: str) -> None:
        for bitmap in armed.bitmaps.values():
            if bitmap.recording:
                bitmap.bits.add(len(armed.commands))

    armed.after = write
    assert one(address).verdict.word == "untouched"
    assert len(armed.bitmaps["a"].bits) > 5  # it goes on recording


@pytest.mark.spec("RESCUE-13")
@pytest.mark.parametrize("bits", [{3, 4, 9}, {3}])
def test_what_the_guest_writes_between_the_copies_changes_no_verdict(
    armed: FakeQemu, address: str, bits: set[int]
) -> None:
    """A write of an iothread in the middle of a transaction must not change the verdict."""
    armed.bitmaps[SENTINEL].bits = set(bits)

    def write(kind: str, data: dict[str, object]) -> None:
        if kind.endswith("-merge"):
            for name in (SENTINEL, TWIN):
                armed.bitmaps[name].bits.add(100 + len(armed.bitmaps[TWIN].bits))

    armed.during = write
    assert one(address).verdict.word == "touched"
    armed.bitmaps[SENTINEL].bits = set(armed.bitmaps[TWIN].bits)
    assert one(address).verdict.word == "untouched"


@pytest.mark.spec("RESCUE-14", "RESCUE-16")
def test_which_bitmaps_are_concerned(armed: FakeQemu, address: str) -> None:
    armed.bitmaps["stored"] = FakeBitmap()
    armed.bitmaps["bad"] = FakeBitmap(inconsistent=True)
    armed.bitmaps["late"] = FakeBitmap(persistent=False)
    armed.bitmaps[SENTINEL].bits = {9}
    before = {name: bitmap.digest(SIZE) for name, bitmap in armed.bitmaps.items()}
    for _ in range(2):
        found = one(address)
        assert not found.is_safe
        assert {judged.bitmap.name: judged.outcome for judged in found.bitmaps} == {
            "a": "in-doubt", "b": "in-doubt", "bad": "kept", "late": "in-doubt",
            "stored": "in-doubt", "t": "in-doubt",
        }  # fmt: skip
        assert {name: bitmap.digest(SIZE) for name, bitmap in armed.bitmaps.items()} == before
    assert not one(address, "remove").is_armed
    assert sorted(armed.bitmaps) == ["bad"]
    assert judged(address) == []


@pytest.mark.spec("RESCUE-15")
def test_untouched_has_what_the_sentinel_has(armed: FakeQemu, address: str) -> None:
    found = one(address)
    assert (found.verdict.word, found.is_safe, found.is_armed) == ("untouched", True, False)
    assert armed.bitmaps["a"].bits == {0, 1, 2, 3}
    assert armed.bitmaps["b"].bits == {7}
    assert armed.bitmaps["t"].bits == {0}
    assert armed.changes() == ["transaction", "transaction", "transaction"]


@pytest.mark.spec("RESCUE-16")
@pytest.mark.parametrize("size", [SIZE, 2 << 30, (2 << 30) + 512, 1 << 40])
def test_all_dirty_is_all_of_any_disk(armed: FakeQemu, address: str, size: int) -> None:
    armed.nodes["disk"].size = size
    for bitmap in armed.bitmaps.values():
        bitmap.granularity = 1 << 30
        bitmap.bits = set()
    armed.bitmaps[SENTINEL].inconsistent = True
    found = one(address, "all-dirty")
    assert {judged.outcome for judged in found.bitmaps} == {"all-dirty"}
    everything = set(range(-(-size >> 30)))
    assert all(armed.bitmaps[name].bits == everything for name in ("a", "b", "t"))
    assert list(armed.nodes) == ["disk"]


@pytest.mark.spec("RESCUE-16")
@pytest.mark.parametrize("said", ["", "Error: no such command"])
def test_bits_that_cannot_be_made_are_not_claimed(armed: FakeQemu, address: str, said: str) -> None:
    armed.bitmaps[SENTINEL].inconsistent = True
    armed.answers["human-monitor-command"] = said
    with pytest.raises(QmpError, match=said or "did not set the bits"):
        judged(address, "all-dirty")
    assert armed.bitmaps["a"].bits == {1, 2, 3}
    assert SENTINEL in armed.bitmaps
    assert list(armed.nodes) == ["disk"]


@pytest.mark.spec("RESCUE-16")
def test_where_nothing_is_concerned_it_is_only_disarmed(armed: FakeQemu, address: str) -> None:
    for name in ("a", "t"):
        del armed.bitmaps[name]
    armed.bitmaps["b"].inconsistent = True
    armed.bitmaps[SENTINEL].inconsistent = True
    one(address, "all-dirty")
    assert list(armed.bitmaps) == ["b"]
    assert "blockdev-add" not in armed.changes()


@pytest.mark.spec("RESCUE-17")
@pytest.mark.parametrize("remedy", ["remove", "all-dirty", None])
@pytest.mark.parametrize("is_touched", [True, False])
def test_a_busy_bitmap_holds_it_up(
    armed: FakeQemu, address: str, remedy: Remedy | None, is_touched: bool
) -> None:
    armed.bitmaps["a"].busy = True
    armed.bitmaps[SENTINEL].inconsistent = is_touched
    found = one(address, remedy)
    assert found.is_armed
    assert not found.is_safe
    assert bool(found.obstacle) == (remedy is not None or not is_touched)
    assert {"a", "t", SENTINEL, TWIN} <= armed.bitmaps.keys()
    armed.bitmaps["a"].busy = False
    assert not one(address, remedy or "remove").is_armed


@pytest.mark.spec("RESCUE-19")
@pytest.mark.parametrize("remedy", ["remove", "all-dirty"])
@pytest.mark.parametrize("bits", [{3, 4}, {9}])
def test_interrupted_anywhere_and_done_again_it_ends_the_same(
    armed: FakeQemu, address: str, remedy: Remedy, bits: set[int]
) -> None:
    armed.bitmaps[SENTINEL].bits = bits
    before = copy.deepcopy(armed.nodes)
    judged(address, remedy)
    expected, count = copy.deepcopy(armed.nodes), len(armed.changes())
    assert count == (3 if remedy == "remove" or bits == {3, 4} else 7)
    for number in range(count):
        armed.nodes = copy.deepcopy(before)
        armed.hang_up_after = number
        with pytest.raises(QmpError, match="the connection is lost"):
            judged(address, remedy)
        judged(address, remedy)
        assert armed.nodes == expected
        assert SCRATCH_NODE not in armed.nodes


def test_each_node_has_its_own_verdict(qemu: FakeQemu, address: str) -> None:
    qemu.nodes["second"] = FakeNode({"c": FakeBitmap()})
    with Monitor(address) as monitor:
        done = arm(monitor, set_mapping=True)
        qemu.migration = "completed"
        second = next(node for node in done.nodes if node.node == "second")
        qemu.nodes["second"].bitmaps[second.sentinel].inconsistent = True
        found = {one.verdict.node.name: one.verdict.word for one in verdict(monitor)}
        assert found == {"disk": "untouched", "second": "touched"}
        assert [one.verdict.node.name for one in verdict(monitor)] == ["second"]
        assert [one.verdict.word for one in verdict(monitor, ["disk"])] == ["not-armed"]


@pytest.mark.spec("RESCUE-13")
def test_judging_changes_nothing_even_if_it_is_interrupted(armed: FakeQemu, address: str) -> None:
    armed.bitmaps[SENTINEL].bits = {9}
    before = copy.deepcopy(armed.nodes)
    for number in (None, 0, 1):
        armed.hang_up_after = number
        with nullcontext() if number is None else pytest.raises(QmpError):
            one(address)
        for name in COMPARED:
            armed.bitmaps.pop(name, None)
        assert armed.nodes == before


@pytest.mark.spec("RESCUE-17")
def test_a_node_that_cannot_be_settled_does_not_hide_the_others(
    qemu: FakeQemu, address: str
) -> None:
    qemu.nodes["zfixed"] = FakeNode({"c": FakeBitmap()})
    with Monitor(address) as monitor:
        for node in arm(monitor, set_mapping=True).nodes:
            qemu.nodes[node.node].bitmaps[node.sentinel].inconsistent = True
    qemu.refuse = lambda name, data: "Bitmap 'c' is readonly" if data.get("name") == "c" else None
    found = {one.verdict.node.name: one for one in judged(address, "remove")}
    assert not found["disk"].is_armed
    assert found["zfixed"].is_armed
    assert "readonly" in found["zfixed"].obstacle
    assert {judged.outcome for judged in found["zfixed"].bitmaps} == {"left"}
    assert not found["zfixed"].is_safe
