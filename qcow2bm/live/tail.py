"""The tail: the bitmap that records on a node in the place of those that were taken out.

Every write since the first step of the offload is in the tail, if the tail is what the offload
made. Beside it is its canary, a bitmap that records nothing and has one granule: a program that
clears the bitmaps of a disk clears the canary as well, and a program that begins new bitmaps for
those that record, such as libvirt for an overlay, makes none for the canary.

*Spec*: spec/live.md, "Tail".
"""

from __future__ import annotations

from qcow2bm.format.offload_file import OffloadPlan, PlannedNode
from qcow2bm.migration.sidecar import SavedBitmap
from qcow2bm.qmp.machine import Node
from qcow2bm.qmp.names import TAIL_PREFIX, canary_of, tail_of
from qcow2bm.units import ceil_div

DEFAULT_GRANULARITY = 4 << 20
MAX_GRANULARITY = 128 << 20
"""A coarser bitmap makes the source of a migration with the capability dirty-bitmaps spin."""


def names_of(planned: PlannedNode) -> tuple[str, str]:
    """Returns the names of the tail and of its canary."""
    return tail_of(planned.uuid), canary_of(planned.uuid)


def canary(plan: OffloadPlan, planned: PlannedNode) -> SavedBitmap:
    """Returns the canary of a node; its first granule is dirty."""
    granularity, size = plan.tail_granularity, planned.disk_size
    octets = bytearray(ceil_div(ceil_div(size, granularity), 8))
    octets[0] = 1
    return SavedBitmap(canary_of(planned.uuid), granularity, False, size, octets)


def foreign_tail(node: Node, planned: PlannedNode | None = None) -> str:
    """Returns the name of a tail of another offload on a node; "" if there is none."""
    ours = tail_of(planned.uuid) if planned else ""
    names = (bitmap.name for bitmap in node.bitmaps)
    return next((n for n in names if n.startswith(TAIL_PREFIX) and n != ours), "")


def why_unusable(plan: OffloadPlan, planned: PlannedNode, node: Node) -> str:
    """Returns why the tail on a node may miss writes; "" if it has all of them."""
    tail, canary = map(node.find, names_of(planned))
    if not tail:
        return "the tail is gone: nothing recorded the writes since the bitmaps were taken out"
    if tail.is_inconsistent:
        return "the tail is inconsistent: a QEMU that had the disk did not store it"
    if not tail.is_recording:
        return "the tail is disabled: writes are missing from it"
    if tail.granularity != plan.tail_granularity or not tail.is_persistent:
        return "the tail is not the one that was made: it has another granularity or persistence"
    if node.virtual_size != planned.disk_size:
        return (
            f"the disk has {node.virtual_size} bytes, and had {planned.disk_size} when the bitmaps "
            "were taken out"
        )
    if not canary or canary.is_recording or canary.dirty_bytes != plan.tail_granularity:
        return "the canary of the tail is gone or was changed: the tail may have been cleared"
    if node.is_read_only:
        return "the node is read-only: QEMU would not store the bitmaps"
    if tail.is_busy:
        return "the tail is busy: a job uses it; try again when the job has ended"
    return ""
