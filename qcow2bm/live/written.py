"""What was written to the disk of a node since its bitmaps were taken out.

The tail has every write, and marks a wide range for each. If the offload was exact, recorders have
the same writes in fine granules: one where the offload was begun, and one at the destination of a
migration. They are taken if they are all there, and if everything that the tail has is in them.

*Spec*: spec/live.md, "Exact".
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from qcow2bm.live.offload_file import OffloadFile
from qcow2bm.live.restore_report import WrittenFacts
from qcow2bm.live.tail import Tail
from qcow2bm.migration.sidecar import SavedBitmap
from qcow2bm.qmp import actions, scratch_image
from qcow2bm.qmp.commands import QmpCommands
from qcow2bm.qmp.machine import Node
from qcow2bm.qmp.names import SCRATCH_NODE
from qcow2bm.qmp.queries import query_scratch_bitmaps

_RECORDED, _ALL, _FINE = "recorded", "all", "fine"
"""Bitmaps of the scratch node, by which the recorders are compared with the tail."""


class Written(NamedTuple):
    """What was written since the bitmaps of a node were taken out.

    Attributes:
        live: the names of bitmaps on the node that have it.
        saved: what is in the offload file of it.
        facts: what is said about it; None if there is nothing.
    """

    live: tuple[str, ...] = ()
    saved: SavedBitmap | None = None
    facts: WrittenFacts | None = None

    def sources(self, node: str) -> list[tuple[str, str]]:
        """Returns the nodes and names of the bitmaps that have it, once `saved` is lent."""
        lent = [(SCRATCH_NODE, self.saved.name)] if self.saved else []
        return [*((node, name) for name in self.live), *lent]


def written_on(monitor: QmpCommands, file: OffloadFile, number: int, node: Node) -> Written:
    """Returns what was written to a node, whose tail is sound.

    Args:
        monitor: the machine.
        file: of the offload.
        number: of the node in the plan.
        node: the node as it is now.

    Raises:
        QmpError: QEMU does not answer, or refuses.
        StorageError: the file cannot be read.
        FormatError: a record is damaged.
    """
    tail = file.tail(number)
    former = former_tails(file, number)
    found = node.find(tail.name)
    dirty_bytes = (found.dirty_bytes if found else 0) + (former.dirty_bytes if former else 0)
    coarse = Written((tail.name,), former, WrittenFacts(False, dirty_bytes))
    if not tail.planned.recorder_granularity:
        return coarse
    recorded, reason = _recorded(file, number, node)
    if recorded:
        dirty = _dirty_if_complete(monitor, tail, node, recorded)
        if dirty is not None:
            return recorded._replace(facts=WrittenFacts(True, dirty))
        reason = "the recorders lack something that the tail has"
    return coarse._replace(facts=WrittenFacts(False, dirty_bytes, reason))


def former_tails(file: OffloadFile, number: int) -> SavedBitmap | None:
    """Returns what the former tails of a node have together; None if there are none.

    Raises:
        StorageError: the file cannot be read.
        FormatError: a record is damaged.
    """
    bitmaps = file.read_rolled(number)
    if not bitmaps:
        return None
    octets = np.bitwise_or.reduce([np.frombuffer(b.octets, np.uint8) for b in bitmaps])
    return bitmaps[0]._replace(octets=octets.tobytes())


def _recorded(file: OffloadFile, number: int, node: Node) -> tuple[Written | None, str]:
    """The recorders of a node; None, and why, if one of them is missing."""
    tail = file.tail(number)
    if tail.recorder_on(node, tail.recorder_name):
        return Written((tail.recorder_name,)), ""
    if not tail.recorder_on(node, tail.arrival_name):
        return None, "no recorder has recorded here from the start"
    if not file.has_collected(number):
        return None, "the recorder of the source was not collected"
    return Written((tail.arrival_name,), file.read_collected(number)), ""


def _dirty_if_complete(
    monitor: QmpCommands, tail: Tail, node: Node, recorded: Written
) -> int | None:
    """How many bytes the recorders mark; None if the tail has a bit which none of them has.

    All merging is one transaction, so writes of the guest make no difference. What is counted is
    in granules of the tail first, and then as fine as the recorders.
    """
    saved = [recorded.saved] if recorded.saved else []
    granularity = tail.planned.recorder_granularity
    with (
        scratch_image.with_bitmaps(node.virtual_size, saved) as image,
        scratch_image.lent(monitor, image),
    ):
        sources = recorded.sources(node.name)
        work = [
            actions.add(SCRATCH_NODE, name, size, persistent=False, enabled=False)
            for name, size in (
                (_RECORDED, tail.granularity),
                (_ALL, tail.granularity),
                (_FINE, granularity),
            )
        ]
        work += [
            actions.merge_all(SCRATCH_NODE, _RECORDED, sources),
            actions.merge_all(SCRATCH_NODE, _ALL, [*sources, (node.name, tail.name)]),
            actions.merge_all(SCRATCH_NODE, _FINE, sources),
        ]
        monitor.transaction(work)
        counts = query_scratch_bitmaps(monitor) or {}
    return counts[_FINE] if counts[_RECORDED] == counts[_ALL] else None
