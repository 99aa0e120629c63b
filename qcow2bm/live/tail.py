"""The tail: the bitmap that records on a node in the place of those that were taken out.

Every write since the first step of the offload is in the tail, if the tail is what the offload
made. Otherwise the bitmaps that were taken out miss writes.

*Spec*: spec/live.md, "Tail".
"""

from __future__ import annotations

from qcow2bm.format.offload_file import OffloadPlan, PlannedNode
from qcow2bm.qmp.machine import Node
from qcow2bm.qmp.names import tail_of

DEFAULT_GRANULARITY = 4 << 20
MAX_GRANULARITY = 128 << 20
"""A coarser bitmap makes the source of a migration with the capability dirty-bitmaps spin."""


def why_unusable(plan: OffloadPlan, planned: PlannedNode, node: Node) -> str:
    """Returns why the tail on a node may miss writes; "" if it has all of them."""
    tail = node.find(tail_of(planned.uuid))
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
    if tail.is_busy:
        return "the tail is busy: a job uses it; try again when the job has ended"
    return ""
