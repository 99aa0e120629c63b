"""Adds a sentinel to each node before a migration, to tell afterwards if another machine wrote.

The sentinel is stored when the machine gives its disks away, and every QEMU that opens the image
keeps it. The sentinel's twin, with the same bits, is in no image and stays in memory here. What
the sentinel has then and the twin has not was written by another machine.

*Spec*: spec/rescue.md, "Arm".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from qcow2bm.bitmaps.entries import MAX_BITMAP_BYTES
from qcow2bm.errors import StateError
from qcow2bm.log import logger
from qcow2bm.migration.sentinel import Sentinel
from qcow2bm.qmp import actions, scratch
from qcow2bm.qmp.commands import QmpCommands
from qcow2bm.qmp.machine import BitmapMapping, Machine, Node, NodeBitmap
from qcow2bm.qmp.mapping import left_out, mapping_without_evidence
from qcow2bm.qmp.names import sentinel_of, twin_of
from qcow2bm.qmp.queries import query_machine
from qcow2bm.units import ceil_div, escape

_CLUSTER_SIZE = 64 << 10  # where QEMU does not tell


class ArmedNode(NamedTuple):
    """A node that has a sentinel, and the sentinel's name and granularity.

    ``is_new`` is False if the node was armed before.
    """

    node: str
    sentinel: str
    granularity: int
    is_new: bool


class Obstacle(NamedTuple):
    """A bitmap for which QEMU will refuse to migrate, and why."""

    bitmap: NodeBitmap
    reason: str


class ArmReport(NamedTuple):
    """The result of `arm`.

    Attributes:
        nodes: the nodes that are armed.
        mapping: the block-bitmap-mapping that leaves the sentinels out.
        is_set: whether QEMU has this mapping.
        obstacles: bitmaps for which QEMU will refuse to migrate.
        left_out: bitmaps of writable nodes that do not travel by the mapping: they stay in the
            image that they are in.
    """

    nodes: tuple[ArmedNode, ...]
    mapping: BitmapMapping
    is_set: bool
    obstacles: tuple[Obstacle, ...]
    left_out: tuple[NodeBitmap, ...]


def arm(monitor: QmpCommands, nodes: Sequence[str] = (), *, set_mapping: bool = False) -> ArmReport:
    """Adds a sentinel to each of these nodes, or to all with persistent bitmaps; ``rescue arm``.

    A sentinel is added only once QEMU has a mapping that leaves sentinels out. One that was added
    earlier might travel, and then no verdict would be possible.

    *Guarantees*: a node has both a sentinel and its twin, or neither. A second call changes
    nothing.

    Args:
        monitor: the source of the migration to come.
        nodes: the names of nodes or devices.
        set_mapping: whether to set the mapping first, if QEMU does not have it.

    Raises:
        StateError: the machine's state does not allow it, see `Machine.require_settled`; or the
            verdict about the last migration is due.
        QmpError: QEMU does not answer, or refuses.
        ValueError: there is no node of such a name.
    """
    machine = query_machine(monitor)
    machine.require_settled()
    scratch.discard_leftover(monitor)
    chosen = machine.select(nodes, lambda node: node.has_persistent and not node.is_read_only)
    mapping = mapping_without_evidence(machine)
    is_set = mapping == machine.mapping
    for node in chosen:
        _require_judged(node, is_set=is_set)
    if set_mapping and chosen and not is_set:
        monitor.execute("migrate-set-parameters", {"block-bitmap-mapping": mapping})
        logger.info("rescue arm: the block-bitmap-mapping is set")
        is_set = True
    armed = tuple(_arm(monitor, node) for node in chosen) if is_set else ()
    obstacles = tuple(_obstacles(machine, mapping))
    return ArmReport(armed, mapping, is_set, obstacles, tuple(left_out(machine, mapping)))


def _require_judged(node: Node, *, is_set: bool) -> None:
    """Raises `StateError` if the evidence on a node may still tell about the last migration."""
    twin = node.twin
    if twin:
        sentinel = node.find(sentinel_of(twin.name))
        is_judged = is_set and sentinel and sentinel.is_recording and twin.is_recording
    else:
        is_judged = not node.tells_of_a_crash
    if not is_judged:
        subject = f'the sentinel of the node "{escape(node.name)}"'
        raise StateError("not judged yet", "judged first", subject, "judge")


def _arm(monitor: QmpCommands, node: Node) -> ArmedNode:
    if node.twin:
        return ArmedNode(node.name, sentinel_of(node.twin.name), node.twin.granularity, False)
    sentinel = fresh_sentinel(node)
    name, granularity = sentinel.name, sentinel.granularity
    monitor.transaction(
        [
            *(actions.remove(node.name, leftover) for leftover in node.evidence),
            # An iothread may write in between: the merge gives the sentinel what the twin has.
            actions.add(node.name, twin_of(name), granularity, persistent=False, enabled=True),
            actions.add(node.name, name, granularity, persistent=True, enabled=True),
            actions.merge(node.name, name, twin_of(name)),
        ]
    )
    logger.info('rescue arm: node "%s" is armed with %s', escape(node.name), name)
    return ArmedNode(node.name, name, granularity, True)


def fresh_sentinel(node: Node) -> Sentinel:
    """Returns a new sentinel for a node, as fine as the finest bitmap that records there.

    Then merging the sentinel into a bitmap makes nothing coarser. Bits that are all clear take no
    room in the image, however fine the sentinel is.
    """
    sentinel = Sentinel.fresh(node.virtual_size, node.cluster_size or _CLUSTER_SIZE)
    recording = [bitmap for bitmap in node.subjects if bitmap.is_recording]
    finest = min((bitmap.granularity for bitmap in recording), default=sentinel.granularity)
    while ceil_div(node.virtual_size, finest) > 8 * MAX_BITMAP_BYTES:
        finest *= 2  # a transient bitmap may be finer than any bitmap in an image can be
    return sentinel._replace(granularity=min(sentinel.granularity, finest))


def _obstacles(machine: Machine, mapping: BitmapMapping) -> list[Obstacle]:
    """The bitmaps for which QEMU refuses: it checks all bitmaps of a node that the mapping has."""
    listed = {node["node-name"] for node in mapping}
    return [
        Obstacle(bitmap, reason)
        for node in machine.nodes
        for bitmap in node.subjects
        if node.name in listed and (reason := _why_refused(node, bitmap))
    ]


def _why_refused(node: Node, bitmap: NodeBitmap) -> str:
    if bitmap.is_inconsistent:
        return f"{bitmap.why_unusable}: remove it"
    if node.is_read_only:
        return "read-only: leave its node out of the mapping"
    return bitmap.why_unusable
