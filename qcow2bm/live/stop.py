"""What QEMU stores when a machine stops: every cluster of a persistent bitmap that is not clear.

*Spec*: spec/live.md, "Stop".
"""

from __future__ import annotations

from collections.abc import Iterable

from qcow2bm.live.tail import Tail
from qcow2bm.qmp.machine import Machine, Node, NodeBitmap
from qcow2bm.units import ceil_div

_CLUSTER_SIZE = 64 << 10  # where QEMU does not tell


def most_bytes(node: Node, granularity: int, dirty_bytes: int | None = None) -> int:
    """Returns how many bytes a bitmap of a node takes to store, at most.

    Args:
        node: the node.
        granularity: of the bitmap, in bytes.
        dirty_bytes: how many bytes of the disk are dirty; None if all may be.
    """
    cluster_size = node.cluster_size or _CLUSTER_SIZE
    clusters = ceil_div(ceil_div(node.virtual_size, granularity), 8 * cluster_size)
    if dirty_bytes is not None:
        clusters = min(clusters, dirty_bytes // granularity)
    return clusters * cluster_size


def most_bytes_of_tail(node: Node, tail: Tail) -> int:
    """Returns how many bytes a tail and its canary take to store, at most."""
    return most_bytes(node, tail.granularity) + most_bytes(node, tail.canary_granularity)


def bytes_of(node: Node, bitmap: NodeBitmap) -> int:
    """Returns how many bytes a bitmap of a node takes to store as it is now, at most."""
    if bitmap.is_inconsistent:
        return 0
    return most_bytes(node, bitmap.granularity, bitmap.dirty_bytes)


def bytes_at_stop(machine: Machine, bitmaps: Iterable[NodeBitmap]) -> int:
    """Returns how many bytes QEMU stores of these bitmaps if the machine stops now, at most."""
    by_name = {node.name: node for node in machine.nodes}
    return sum(bytes_of(by_name[bitmap.node], bitmap) for bitmap in bitmaps)


def stored_bitmaps(machine: Machine) -> list[NodeBitmap]:
    """Returns the bitmaps that QEMU stores when the machine stops."""
    return [
        bitmap
        for node in machine.nodes
        if not node.is_read_only
        for bitmap in node.bitmaps
        if bitmap.is_persistent
    ]
