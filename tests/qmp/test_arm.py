"""Sentinels and their twins, and the mapping that leaves them out."""

from __future__ import annotations

import pytest
from support.fakeqemu import FakeBitmap, FakeNode, FakeQemu

from qcow2bm.errors import QmpError, QmpRefusedError, StateError
from qcow2bm.migration.sentinel import PREFIX, is_sentinel
from qcow2bm.qmp.arm import ArmReport, arm
from qcow2bm.qmp.client import Monitor
from qcow2bm.qmp.names import is_evidence, sentinel_of, twin_of

OLD = PREFIX + "0f0e0d0c-0b0a-4908-8706-050403020100"


def armed(address: str, *nodes: str, set_mapping: bool = True) -> ArmReport:
    with Monitor(address) as monitor:
        return arm(monitor, nodes, set_mapping=set_mapping)


def mapped(*names: str, node: str = "disk", alias: str = "") -> dict[str, object]:
    bitmaps = [{"name": name, "alias": name} for name in names]
    return {"node-name": node, "alias": alias or node, "bitmaps": bitmaps}


@pytest.mark.spec("RESCUE-9", "RESCUE-12")
def test_a_node_gets_both_or_neither(qemu: FakeQemu, address: str) -> None:
    (node,) = armed(address).nodes
    assert node.is_new
    sentinel, twin = qemu.bitmaps[node.sentinel], qemu.bitmaps[twin_of(node.sentinel)]
    assert is_sentinel(node.sentinel)
    assert sentinel_of(twin_of(node.sentinel)) == node.sentinel
    assert sentinel == FakeBitmap(node.granularity)
    assert twin == FakeBitmap(node.granularity, persistent=False)
    assert qemu.changes() == ["migrate-set-parameters", "transaction"]
    (again,) = armed(address).nodes
    assert again == node._replace(is_new=False)
    assert qemu.changes() == ["migrate-set-parameters", "transaction"]
    qemu.bitmaps.clear()
    qemu.bitmaps["a"] = FakeBitmap()
    qemu.refuse = lambda c, a: "no" if c.endswith("-add") and not a["persistent"] else None
    with pytest.raises(QmpRefusedError):
        armed(address)
    assert list(qemu.bitmaps) == ["a"]


@pytest.mark.spec("RESCUE-10")
@pytest.mark.parametrize(
    ("size", "granularities", "expected"),
    [
        (64 << 20, [65536], 512),
        (1 << 40, [65536], 65536),
        (1 << 40, [4 << 20, 65536], 65536),
        (1 << 40, [4 << 20], 2 << 20),
        (1 << 40, [], 2 << 20),
    ],
)
def test_how_fine_it_is(
    qemu: FakeQemu, address: str, size: int, granularities: list[int], expected: int
) -> None:
    bitmaps = {f"x{granularity}": FakeBitmap(granularity) for granularity in granularities}
    bitmaps["off"] = FakeBitmap(512, recording=False)
    qemu.nodes["big"] = FakeNode(bitmaps, size)
    (node,) = armed(address, "big").nodes
    assert node.granularity == expected


@pytest.mark.spec("RESCUE-11")
def test_the_mapping_is_that_of_qemu_without_one(qemu: FakeQemu, address: str) -> None:
    qemu.nodes["#block1"] = FakeNode({"c": FakeBitmap()})
    qemu.nodes["#block2"] = FakeNode({"no alias": FakeBitmap()})
    qemu.nodes["t"] = FakeNode({"t": FakeBitmap(persistent=False), "x" * 256: FakeBitmap()})
    qemu.devices["#block1"] = "drive0"
    done = armed(address, "disk", set_mapping=False)
    assert done.mapping == [
        mapped("c", node="#block1", alias="drive0"), mapped("a", "b"), mapped("t", node="t")
    ]  # fmt: skip
    assert (done.is_set, done.nodes) == (False, ())
    assert (qemu.mapping, qemu.changes()) == (None, [])
    again = armed(address, "disk")
    assert (again.mapping, again.is_set) == (done.mapping, True)
    assert qemu.mapping == done.mapping
    assert qemu.changes() == ["migrate-set-parameters", "transaction"]
    assert armed(address, "disk", set_mapping=False).is_set
    assert armed(address, "disk").is_set
    assert len(qemu.changes()) == 2


@pytest.mark.spec("RESCUE-11")
def test_a_mapping_that_the_caller_set_is_enough_for_a_sentinel(
    qemu: FakeQemu, address: str
) -> None:
    qemu.mapping = armed(address, set_mapping=False).mapping
    (node,) = armed(address, set_mapping=False).nodes
    assert node.is_new
    assert qemu.changes() == ["transaction"]


@pytest.mark.spec("RESCUE-11")
def test_a_mapping_that_is_there_stays_without_sentinels(qemu: FakeQemu, address: str) -> None:
    qemu.mapping = [mapped("a", OLD, twin_of(OLD), alias="other")]
    done = armed(address)
    assert done.mapping == qemu.mapping == [mapped("a", alias="other")]


@pytest.mark.spec("RESCUE-11")
def test_the_mapping_is_set_before_there_is_a_sentinel(qemu: FakeQemu, address: str) -> None:
    armed(address)
    assert qemu.changes() == ["migrate-set-parameters", "transaction"]


@pytest.mark.spec("RESCUE-12")
def test_sentinels_of_others_go(qemu: FakeQemu, address: str) -> None:
    qemu.bitmaps[OLD] = FakeBitmap()
    (node,) = armed(address).nodes
    assert node.is_new
    assert [name for name in qemu.bitmaps if is_sentinel(name)] == [node.sentinel]
    assert node.sentinel != OLD


@pytest.mark.spec("RESCUE-12")
@pytest.mark.parametrize("state", ["gone", "inconsistent", "frozen"])
def test_the_last_verdict_comes_first(qemu: FakeQemu, address: str, state: str) -> None:
    (node,) = armed(address).nodes
    sentinel = qemu.bitmaps[node.sentinel]
    sentinel.inconsistent, sentinel.recording = state == "inconsistent", state != "frozen"
    if state == "gone":
        del qemu.bitmaps[node.sentinel]
    qemu.commands.clear()
    with pytest.raises(StateError, match=r"not judged yet.*; call qcow2bm\.rescue\.judge"):
        armed(address)
    assert qemu.changes() == []


@pytest.mark.spec("RESCUE-12")
def test_what_tells_of_a_death_is_judged_first(qemu: FakeQemu, address: str) -> None:
    """The bitmaps beside an inconsistent sentinel may miss writes, though they look sound."""
    qemu.bitmaps[OLD] = FakeBitmap(inconsistent=True)
    with pytest.raises(StateError, match=r"not judged yet.*; call qcow2bm\.rescue\.judge"):
        armed(address)
    assert qemu.changes() == []
    for name in ("a", "b"):
        qemu.bitmaps[name].inconsistent = True
    (node,) = armed(address, "disk").nodes
    assert [name for name in qemu.bitmaps if is_sentinel(name)] == [node.sentinel]


@pytest.mark.spec("RESCUE-12")
def test_a_mapping_that_lets_the_sentinel_travel(qemu: FakeQemu, address: str) -> None:
    """If the mapping was changed, the sentinel may have travelled."""
    (node,) = armed(address).nodes
    qemu.mapping = [mapped("a", "b", node.sentinel)]
    with pytest.raises(StateError, match=r"not judged yet.*; call qcow2bm\.rescue\.judge"):
        armed(address)


@pytest.mark.spec("RESCUE-9")
def test_what_is_written_between_twin_and_sentinel_is_in_both(qemu: FakeQemu, address: str) -> None:
    (node,) = armed(address).nodes
    (work,) = (a["actions"] for command, a in qemu.commands if command == "transaction")
    names = node.sentinel, twin_of(node.sentinel)
    assert [action["data"].get("name") for action in work[:2]] == [names[1], names[0]]
    merged = {"node": "disk", "target": names[0], "bitmaps": [{"node": "disk", "name": names[1]}]}
    assert work[2]["data"] == merged


@pytest.mark.spec("RESCUE-12")
def test_a_sentinel_with_a_canary_was_not_made_by_a_rescue(qemu: FakeQemu, address: str) -> None:
    qemu.bitmaps[OLD] = FakeBitmap(inconsistent=True)
    qemu.bitmaps[f"{OLD}-canary"] = FakeBitmap(inconsistent=True)
    (node,) = armed(address).nodes
    assert [name for name in qemu.bitmaps if is_sentinel(name)] == [node.sentinel]


@pytest.mark.spec("RESCUE-11")
def test_what_the_mapping_leaves_out_is_told(qemu: FakeQemu, address: str) -> None:
    qemu.mapping = [mapped("a")]
    assert [bitmap.name for bitmap in armed(address).left_out] == ["b"]
    qemu.mapping = [mapped("a", "b")]
    assert armed(address).left_out == ()


@pytest.mark.spec("RESCUE-11")
def test_nothing_is_set_where_nothing_is_armed(qemu: FakeQemu, address: str) -> None:
    qemu.bitmaps.clear()
    done = armed(address)
    assert (done.nodes, done.is_set, qemu.mapping) == ((), False, None)


@pytest.mark.spec("RESCUE-11")
def test_read_only_nodes_stay_here(qemu: FakeQemu, address: str) -> None:
    qemu.nodes["base"] = FakeNode({"c": FakeBitmap()}, read_only=True)
    done = armed(address)
    assert (done.mapping, done.obstacles, done.left_out) == ([mapped("a", "b")], (), ())
    qemu.mapping = [mapped("a", "b"), mapped("c", node="base")]
    reasons = [obstacle.reason for obstacle in armed(address).obstacles]
    assert reasons == ["read-only: leave its node out of the mapping"]


@pytest.mark.spec("RESCUE-11")
@pytest.mark.parametrize("is_told", [True, False])
def test_a_device_whose_disk_is_below_filters(qemu: FakeQemu, address: str, is_told: bool) -> None:
    qemu.nodes["mirror"] = FakeNode(driver="mirror_top")
    qemu.nodes["slow"] = FakeNode(driver="throttle")
    qemu.devices["mirror"] = "drive0"
    qemu.below = {"mirror": ("slow", "backing"), "slow": ("disk", "file"), "disk": ("f", "file")}
    qemu.nodes["f"] = FakeNode(driver="file")
    if not is_told:
        qemu.refuse = lambda name, _: "no" if name == "x-debug-query-block-graph" else None
    expected = mapped("a", "b", alias="drive0" if is_told else "disk")
    assert armed(address, set_mapping=False).mapping == [expected]
    qemu.nodes["slow"].bitmaps["c"] = FakeBitmap(persistent=False)  # there QEMU goes no further
    expected_too = mapped("c", node="slow", alias="drive0" if is_told else "slow")
    assert armed(address, set_mapping=False).mapping == [mapped("a", "b"), expected_too]


@pytest.mark.spec("RESCUE-10")
def test_a_transient_bitmap_may_be_finer_than_a_sentinel_can_be(
    qemu: FakeQemu, address: str
) -> None:
    qemu.nodes["big"] = FakeNode({"t": FakeBitmap(512, persistent=False)}, 3 << 40)
    assert [node.granularity for node in armed(address, "big").nodes] == [1024]


@pytest.mark.spec("RESCUE-12")
def test_bitmaps_that_keep_qemu_from_migrating(qemu: FakeQemu, address: str) -> None:
    qemu.bitmaps["a"].inconsistent = True
    qemu.bitmaps["b"].busy = True
    qemu.nodes["other"] = FakeNode({"x": FakeBitmap(inconsistent=True)})
    qemu.mapping = [mapped("b")]
    found = [(one.bitmap.name, one.reason) for one in armed(address).obstacles]
    assert found == [("a", "inconsistent: remove it"), ("b", "busy: a job uses it")]


def test_by_default_nodes_with_persistent_bitmaps(qemu: FakeQemu, address: str) -> None:
    qemu.nodes["none"] = FakeNode()
    qemu.nodes["fixed"] = FakeNode({"x": FakeBitmap()}, read_only=True)
    assert [node.node for node in armed(address).nodes] == ["disk"]
    assert [node.node for node in armed(address, "none").nodes] == ["none"]


@pytest.mark.spec("RESCUE-19")
def test_interrupted_anywhere_and_done_again_it_is_armed_once(qemu: FakeQemu, address: str) -> None:
    qemu.nodes["second"] = FakeNode({"c": FakeBitmap()})
    for number in range(3):
        qemu.hang_up_after = number
        with pytest.raises(QmpError, match="the connection is lost"):
            armed(address)
        done = armed(address)
        assert [node.is_new for node in done.nodes] == [number < 1, number < 2]
        for node in qemu.nodes.values():
            evidence = [name for name in node.bitmaps if is_evidence(name)]
            assert len(evidence) == 2
            for name in evidence:
                del node.bitmaps[name]
        qemu.mapping = None
