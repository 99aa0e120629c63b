"""Removes bitmaps from a running machine.

*Spec*: spec/live.md, "Remove".
"""

from __future__ import annotations

from collections.abc import Sequence

from qcow2bm.errors import BitmapError, BitmapNotFoundError
from qcow2bm.qmp import actions
from qcow2bm.qmp.commands import QmpCommands
from qcow2bm.qmp.machine import NodeBitmap, NodeChoiceError
from qcow2bm.qmp.names import CANARY_PREFIX, TAIL_PREFIX
from qcow2bm.qmp.queries import query_machine


def remove(
    monitor: QmpCommands, names: Sequence[str], node: str | None = None, *, is_lost: bool = False
) -> tuple[NodeBitmap, ...]:
    """Removes bitmaps of a running machine, all of them or none; ``live remove``.

    QEMU removes a persistent bitmap from the image as well.

    Args:
        monitor: the machine.
        names: of the bitmaps.
        node: the node or device that has them; not needed if each name is on one node alone.
        is_lost: whether the caller asserts that the bitmaps of an offload need not be put back, if
            one of these bitmaps is its tail or its canary.

    Returns: the bitmaps, as they were.

    Raises:
        StateError: the machine's state does not allow it, see `Machine.require_settled`.
        BitmapNotFoundError: there is no such bitmap.
        BitmapError: the bitmaps of an offload could not be put back without this one.
        NodeChoiceError: several nodes have a bitmap of a name.
        QmpError: QEMU does not answer, or refuses: a job uses a bitmap.
        ValueError: there is no such node.
    """
    machine = query_machine(monitor)
    machine.require_settled()
    chosen = machine.select([] if node is None else [node], lambda one: bool(one.bitmaps))
    bitmaps = []
    for name in dict.fromkeys(names):
        found = [bitmap for one in chosen for bitmap in one.bitmaps if bitmap.name == name]
        if not found:
            raise BitmapNotFoundError(name)
        if len(found) > 1:
            raise NodeChoiceError([bitmap.node for bitmap in found])
        if name.startswith((TAIL_PREFIX, CANARY_PREFIX)) and not is_lost:
            reason = "belongs to an offload, whose bitmaps cannot be put back without it"
            raise BitmapError(name, reason, "assert-lost")
        bitmaps += found
    monitor.transaction([actions.remove(bitmap.node, bitmap.name) for bitmap in bitmaps])
    return tuple(bitmaps)
