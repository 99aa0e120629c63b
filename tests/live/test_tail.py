"""Which tail has every write: a table of what can have become of it."""

from __future__ import annotations

from typing import Any, NamedTuple
from uuid import UUID

import pytest

from qcow2bm.format.offload_file import PlannedBitmap, PlannedNode
from qcow2bm.live.tail import Tail, foreign_tail
from qcow2bm.qmp.machine import Node, NodeBitmap

GiB, TiB, MiB = 1 << 30, 1 << 40, 1 << 20


def tail_of_disk(disk_size: int, granularity: int = 4 * MiB) -> Tail:
    bitmaps = (PlannedBitmap("daily", 65536, True),)
    return Tail(PlannedNode(UUID(int=7), "disk", disk_size, bitmaps, 65536), granularity)


class Counts(NamedTuple):
    """What is counted; None where the tail is judged without it."""

    coarse: int | None = None
    is_full: bool | None = None

    def coarsened(self) -> int:
        assert self.coarse is not None
        return self.coarse

    def is_canary_full(self) -> bool:
        assert self.is_full is not None
        return self.is_full


never = Counts()


def node_with(tail: Tail, marked: int = 0, **changes: Any) -> Node:
    """A node with a tail and its canary as they were made; ``changes`` are of the canary."""
    every = -(-tail.planned.disk_size // tail.canary_granularity) * tail.canary_granularity
    ours = NodeBitmap("disk", tail.name, tail.granularity, marked, True, True, False, False)
    canary = ours._replace(
        name=tail.canary_name, granularity=tail.canary_granularity, dirty_bytes=every
    )._replace(**changes)
    size = tail.planned.disk_size
    return Node("disk", "disk", "qcow2", size, 65536, False, None, (ours, canary))


@pytest.mark.spec("LIVE-6")
@pytest.mark.parametrize("disk_size", [512, GiB, 2 * TiB, 16 * TiB, 100 * TiB])
def test_a_tail_as_it_was_made(disk_size: int) -> None:
    tail = tail_of_disk(disk_size)
    assert tail.why_unusable(node_with(tail), never) == ""
    assert len(tail.canary.octets) <= 64 << 10 or tail.canary_granularity == 128 * MiB
    assert tail.canary_granularity == tail.granularity or disk_size > 2 * TiB
    node = node_with(tail)
    assert tail.canary.dirty_bytes == min(disk_size, node.bitmaps[1].dirty_bytes)


@pytest.mark.spec("LIVE-6")
@pytest.mark.parametrize(
    "changes",
    [
        {"dirty_bytes": 0},
        {"dirty_bytes": GiB - 4 * MiB},
        {"is_recording": False},
        {"is_inconsistent": True},
        {"granularity": 8 * MiB},
        {"name": "another"},
    ],
    ids=str,
)
def test_a_canary_that_was_changed(changes: dict[str, Any]) -> None:
    tail = tail_of_disk(GiB)
    assert "canary" in tail.why_unusable(node_with(tail, **changes), never)


@pytest.mark.spec("LIVE-6")
def test_a_canary_that_is_coarser_counts_while_the_tail_leaves_something_out() -> None:
    """If both were cleared, the canary is what the tail is in its granularity."""
    tail = tail_of_disk(16 * TiB)
    granules = 16 * TiB // tail.canary_granularity
    assert tail.canary_granularity == 32 * MiB
    few, many = (granules - 1) * tail.granularity, granules * tail.granularity
    assert tail.why_unusable(node_with(tail, few), never) == ""
    assert tail.why_unusable(node_with(tail, many), Counts(16 * TiB - 32 * MiB)) == ""
    assert "cleared" in tail.why_unusable(node_with(tail, many), Counts(16 * TiB))
    assert "cleared" in tail.why_unusable(node_with(tail, few, dirty_bytes=few), never)


@pytest.mark.spec("LIVE-6")
def test_where_both_are_as_fine_a_full_tail_is_right() -> None:
    tail = tail_of_disk(GiB)
    assert tail.why_unusable(node_with(tail, GiB), never) == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "another"}, "has no tail of this file"),
        ({"is_inconsistent": True}, "inconsistent"),
        ({"is_recording": False}, "disabled"),
        ({"granularity": MiB}, "not the one that was made"),
        ({"is_persistent": False}, "not the one that was made"),
        ({"is_busy": True}, "busy"),
    ],
    ids=str,
)
@pytest.mark.spec("LIVE-6")
def test_a_tail_that_was_changed(changes: dict[str, Any], message: str) -> None:
    tail = tail_of_disk(GiB)
    node = node_with(tail)
    changed = node.bitmaps[0]._replace(**changes)
    assert message in tail.why_unusable(node._replace(bitmaps=(changed, node.bitmaps[1])), never)
    assert "read-only" in tail.why_unusable(node._replace(is_read_only=True), never)
    assert "had 1073741824" in tail.why_unusable(node._replace(virtual_size=GiB - 512), never)


@pytest.mark.spec("LIVE-24")
def test_a_disk_that_has_grown() -> None:
    tail = tail_of_disk(GiB)
    grown = node_with(tail)._replace(virtual_size=2 * GiB)
    assert tail.why_unusable(grown, Counts(is_full=True)) == ""
    assert "canary" in tail.why_unusable(grown, Counts(is_full=False))
    assert "canary" in tail.why_unusable(node_with(tail, dirty_bytes=GiB - 4 * MiB), never)
    assert "had 1073741824" in tail.why_resized(grown)
    assert not tail.why_resized(node_with(tail))


def test_the_names_of_an_offload() -> None:
    tail = tail_of_disk(GiB)
    other = Tail(tail.planned._replace(uuid=UUID(int=8)), tail.granularity)
    node = node_with(tail)
    following = node_with(tail.next).bitmaps
    recorder = node.bitmaps[0]._replace(
        name=tail.recorder_name, is_persistent=False, granularity=65536
    )
    node = node._replace(bitmaps=(*node.bitmaps, *following, recorder))
    assert tail.names_on(node) == [bitmap.name for bitmap in node.bitmaps]
    assert other.names_on(node) == []
    assert foreign_tail(node) == tail.name
    assert foreign_tail(node._replace(bitmaps=())) == ""
    assert tail.recorder_on(node, tail.recorder_name) == recorder
    assert tail.recorder_on(node, tail.name) is None
    assert tail.recorder_on(node, "") is None
