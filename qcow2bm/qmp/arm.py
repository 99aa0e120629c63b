"""``rescue arm``: before a migration, a sentinel is added that tells afterwards who wrote.

The sentinel is stored when the machine gives its disks away, and every QEMU that opens the image
keeps it. Its twin, with the same bits, is in no image and stays in memory here: what the
sentinel has and the twin has not was written elsewhere.

*Spec*: spec/rescue.md, "Arm".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from qcow2bm.bitmaps.entries import MAX_BITMAP_BYTES
from qcow2bm.errors import StateError
from qcow2bm.format.stream import MAX_NAME
from qcow2bm.migration.sentinel import Sentinel
from qcow2bm.qmp import actions, scratch
from qcow2bm.qmp.client import Monitor
from qcow2bm.qmp.names import is_evidence, sentinel_of, twin_of
from qcow2bm.qmp.nodes import Machine, Node, NodeBitmap, query_machine
from qcow2bm.units import ceil_div, encode_name, escape

_WELL_FORMED = re.compile(r"[A-Za-z][A-Za-z0-9\-._]*")  # what QEMU takes as an alias
_CLUSTER_SIZE = 64 << 10  # where QEMU does not say

Mapping = list[dict[str, Any]]


class ArmedNode(NamedTuple):
    """A node that has a sentinel; ``is_new`` unless it had it before."""

    node: str
    sentinel: str
    granularity: int
    is_new: bool


class Obstacle(NamedTuple):
    """A bitmap for which QEMU will refuse to migrate, and why."""

    bitmap: NodeBitmap
    reason: str


class ArmReport(NamedTuple):
    """What ``rescue arm`` did.

    ``mapping`` is the block-bitmap-mapping that leaves the sentinels out; ``is_set`` whether QEMU
    has it. ``left_out`` are bitmaps that it leaves out as well: they stay in the image they are in.
    """

    nodes: tuple[ArmedNode, ...]
    mapping: Mapping
    is_set: bool
    obstacles: tuple[Obstacle, ...]
    left_out: tuple[NodeBitmap, ...]


def arm(monitor: Monitor, nodes: Sequence[str] = (), *, set_mapping: bool = False) -> ArmReport:
    """Adds a sentinel to each of these nodes, or to all with persistent bitmaps.

    Only where QEMU has the mapping that leaves sentinels out: what is made before that may travel,
    and the verdict could not tell.

    *Guarantees*: a node has a sentinel and its twin or neither. Doing it again changes nothing.

    Args:
        monitor: the source of the migration to come.
        nodes: their names.
        set_mapping: set the mapping first, if it is not.

    Raises:
        StateError: it is not the time, or the verdict about the last migration is due.
        QmpError: QEMU does not answer, or refuses.
        ValueError: there is no node of such a name.
    """
    machine = query_machine(monitor)
    machine.require_settled()
    scratch.discard_leftover(monitor)
    chosen = machine.select(nodes, lambda node: node.has_persistent and not node.is_read_only)
    mapping = mapping_of(machine)
    is_set = mapping == machine.mapping
    for node in chosen:
        _require_decided(node, is_set=is_set)
    if set_mapping and chosen and not is_set:
        monitor.execute("migrate-set-parameters", {"block-bitmap-mapping": mapping})
        is_set = True
    armed = tuple(_arm(monitor, node) for node in chosen) if is_set else ()
    obstacles = tuple(_obstacles(machine, mapping))
    return ArmReport(armed, mapping, is_set, obstacles, tuple(_left_out(machine, mapping)))


def _require_decided(node: Node, *, is_set: bool) -> None:
    """Raises if what is there may have to tell yet what became of the last migration."""
    twin = node.twin
    if twin:
        sentinel = node.find(sentinel_of(twin.name))
        is_undecided = not (is_set and sentinel and sentinel.is_recording and twin.is_recording)
    else:
        is_undecided = node.tells_of_a_death
    if is_undecided:
        subject = f'the sentinel of the node "{escape(node.name)}"'
        raise StateError("not judged yet", "judged by rescue verdict", subject)


def _arm(monitor: Monitor, node: Node) -> ArmedNode:
    if node.twin:
        return ArmedNode(node.name, sentinel_of(node.twin.name), node.twin.granularity, False)
    sentinel = fresh_sentinel(node)
    name, granularity = sentinel.name, sentinel.granularity
    monitor.transaction(
        [
            *(actions.remove(node.name, leftover) for leftover in node.evidence),
            # What is written in between, in an iothread, is in both by the merge.
            actions.add(node.name, twin_of(name), granularity, persistent=False, enabled=True),
            actions.add(node.name, name, granularity, persistent=True, enabled=True),
            actions.merge(node.name, name, twin_of(name)),
        ]
    )
    return ArmedNode(node.name, name, granularity, True)


def fresh_sentinel(node: Node) -> Sentinel:
    """One as fine as the finest bitmap: then what it has can be merged and makes nothing coarser.

    What is all zeros takes no room in the image, however fine it is.
    """
    sentinel = Sentinel.fresh(node.virtual_size, node.cluster_size or _CLUSTER_SIZE)
    recording = [bitmap for bitmap in node.subjects if bitmap.is_recording]
    finest = min((bitmap.granularity for bitmap in recording), default=sentinel.granularity)
    while ceil_div(node.virtual_size, finest) > 8 * MAX_BITMAP_BYTES:
        finest *= 2  # a transient bitmap may be finer than any that is stored
    return sentinel._replace(granularity=min(sentinel.granularity, finest))


def mapping_of(machine: Machine) -> Mapping:
    """The block-bitmap-mapping that is set, or else what QEMU does by default; no sentinel."""
    if machine.mapping is not None:
        return [
            {**node, "bitmaps": [b for b in node["bitmaps"] if not is_evidence(b["name"])]}
            for node in machine.mapping
        ]
    return [
        {"node-name": node.name, "alias": node.alias, "bitmaps": names}
        for node in machine.nodes
        if not node.is_read_only
        and (names := [{"name": b.name, "alias": b.name} for b in _travelling(node)])
    ]


def _travelling(node: Node) -> list[NodeBitmap]:
    """What QEMU would carry without a mapping, and can."""
    if not _WELL_FORMED.fullmatch(node.alias):
        return []
    return [bitmap for bitmap in node.subjects if _fits(bitmap)]


def _fits(bitmap: NodeBitmap) -> bool:
    return len(encode_name(bitmap.name)) <= MAX_NAME


def _obstacles(machine: Machine, mapping: Mapping) -> list[Obstacle]:
    """QEMU looks at all bitmaps of a node of which any is to travel."""
    listed = {node["node-name"] for node in mapping}
    return [
        Obstacle(bitmap, reason)
        for node in machine.nodes
        for bitmap in node.subjects
        if node.name in listed and (reason := _why_not(node, bitmap))
    ]


def _why_not(node: Node, bitmap: NodeBitmap) -> str:
    if bitmap.is_inconsistent:
        return "inconsistent: remove it"
    if node.is_read_only:
        return "read-only: leave its node out of the mapping"
    return "busy: a job" if bitmap.is_busy else ""


def _left_out(machine: Machine, mapping: Mapping) -> list[NodeBitmap]:
    listed = {(node["node-name"], one["name"]) for node in mapping for one in node["bitmaps"]}
    return [
        bitmap
        for node in machine.nodes
        for bitmap in node.subjects
        if not node.is_read_only and (node.name, bitmap.name) not in listed
    ]
