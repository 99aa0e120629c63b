"""Finds in a machine, or in an image, the node that the bitmaps of an offload file belong to.

*Spec*: spec/live.md, "Tail".
"""

from __future__ import annotations

from qcow2bm.api import Bitmap, Image
from qcow2bm.bitmaps.status import VALID
from qcow2bm.errors import TailError
from qcow2bm.format.offload_file import PlannedBitmap, PlannedNode
from qcow2bm.live.offload_file import OffloadFile
from qcow2bm.live.tail import Tail, TailCounts
from qcow2bm.qmp.machine import Machine, Node, NodeBitmap
from qcow2bm.qmp.names import is_of_offload
from qcow2bm.units import align_up, escape


def node_of(machine: Machine, tail: Tail) -> Node:
    """Returns the node that has the tail; without a tail, the node that has the name.

    Another machine may have another name for the node of the same disk.

    Raises:
        TailError: there is no such node, or there are several.
    """
    nodes = [node for node in machine.nodes if node.find(tail.name)]
    nodes = nodes or [node for node in machine.nodes if node.name == tail.planned.name]
    if len(nodes) != 1:
        names = ", ".join(escape(node.name) for node in nodes)
        number = f"several nodes ({names}) have" if nodes else "no node of the machine has"
        advice = ": commit the overlay into the disk first" if nodes else ""
        reason = f'{number} the tail for the bitmaps of node "{escape(tail.planned.name)}"{advice}'
        raise TailError(reason)
    return nodes[0]


def node_of_image(image: Image, tail: Tail) -> Node:
    """Returns an image of a machine that is off as the node that a QEMU would have of it.

    Only the bits of the bitmaps that the offload added are counted.
    """
    bitmaps = [
        NodeBitmap(
            node=tail.planned.name,
            name=name,
            granularity=bitmap.granularity,
            dirty_bytes=_granules(bitmap) if is_of_offload(name, tail.planned.uuid) else 0,
            is_recording=bitmap.auto,
            is_persistent=True,
            is_busy=False,
            is_inconsistent=bitmap.status != VALID,
        )
        for name, bitmap in image.bitmaps.items()
    ]
    return Node(
        name=tail.planned.name,
        alias=tail.planned.name,
        driver="qcow2",
        virtual_size=image.virtual_size,
        cluster_size=image.cluster_size,
        is_read_only=False,
        is_active=None,
        bitmaps=tuple(bitmaps),
    )


def _granules(bitmap: Bitmap) -> int:
    """How many bytes the dirty granules have; as for QEMU, the last one counts as a whole."""
    return align_up(bitmap.count(), bitmap.granularity) if bitmap.status == VALID else 0


def fault_of(file: OffloadFile, number: int, node: Node, counts: TailCounts) -> str:
    """Returns why the bitmaps of a node cannot be put back; "" if they can, or are there.

    Args:
        file: of the offload.
        number: of the node in the plan.
        node: the node as it is now.
        counts: of its tail.
    """
    tail = file.tail(number)
    is_complete = has_all(node, tail.planned)
    if not node.find(tail.name) and (is_complete or file.was_restored(number)):
        return ""
    if is_complete and not file.has_copies_of(number):
        return ""  # no bitmap has left the machine yet
    return tail.why_unusable(node, counts)


def has_all(node: Node, planned: PlannedNode) -> bool:
    """Returns whether a node has all bitmaps as before they were taken out.

    The disk may have grown.
    """
    if node.virtual_size < planned.disk_size or node.is_read_only:
        return False
    found = [(node.find(bitmap.name), bitmap) for bitmap in planned.bitmaps]
    return all(
        bitmap and is_as_planned(bitmap, wanted) and bitmap.is_recording == wanted.enabled
        for bitmap, wanted in found
    )


def is_as_planned(found: NodeBitmap, planned: PlannedBitmap) -> bool:
    """Returns whether a bitmap can be the planned one, whether it records or not."""
    return found.is_usable and found.is_persistent and found.granularity == planned.granularity
