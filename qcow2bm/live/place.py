"""Finds in a machine the node that the bitmaps of an offload file belong to.

*Spec*: spec/live.md, "Tail".
"""

from __future__ import annotations

from qcow2bm.errors import EvidenceError
from qcow2bm.format.offload_file import PlannedBitmap, PlannedNode
from qcow2bm.qmp.machine import Machine, Node, NodeBitmap
from qcow2bm.qmp.names import tail_of
from qcow2bm.units import escape


def node_of(machine: Machine, planned: PlannedNode) -> Node:
    """Returns the node that has the tail; without a tail, the node that has the name.

    Another machine may have another name for the node of the same disk.

    Raises:
        EvidenceError: there is no such node, or there are several.
    """
    tails = [node for node in machine.nodes if node.find(tail_of(planned.uuid))]
    nodes = tails or [node for node in machine.nodes if node.name == planned.name]
    if len(nodes) != 1:
        number = "several nodes of the machine have" if nodes else "no node of the machine has"
        reason = f'{number} the tail for the bitmaps of node "{escape(planned.name)}"'
        raise EvidenceError(reason, None)
    return nodes[0]


def has_all(node: Node, planned: PlannedNode) -> bool:
    """Returns whether a node has the disk and all bitmaps as before they were taken out."""
    if node.virtual_size != planned.disk_size or node.is_read_only:
        return False
    found = [(node.find(bitmap.name), bitmap) for bitmap in planned.bitmaps]
    return all(
        bitmap and is_as_planned(bitmap, wanted) and bitmap.is_recording == wanted.enabled
        for bitmap, wanted in found
    )


def is_as_planned(found: NodeBitmap, planned: PlannedBitmap) -> bool:
    """Returns whether a bitmap can be the planned one, whether it records or not."""
    return found.is_usable and found.is_persistent and found.granularity == planned.granularity
