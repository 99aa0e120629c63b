"""What was written to the disk of a node since its bitmaps were taken out.

The tail has every write, and marks a wide range for each. If the offload was exact, recorders have
the same writes in fine granules: one where the offload was begun, and one at the destination of a
migration. They are taken if they are all there, and if everything that the tail has is in them.

*Spec*: spec/live.md, "Exact".
"""

from __future__ import annotations

from typing import NamedTuple

from qcow2bm.live.offload_file import OffloadFile
from qcow2bm.live.restore_report import WrittenFacts
from qcow2bm.live.tail import Tail
from qcow2bm.migration.sidecar import SavedBitmap
from qcow2bm.qmp.commands import QmpCommands
from qcow2bm.qmp.machine import Machine, Node
from qcow2bm.qmp.merged_counts import Merged, count_merged
from qcow2bm.qmp.names import SCRATCH_NODE


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


def written_on(
    monitor: QmpCommands, machine: Machine, file: OffloadFile, number: int, node: Node
) -> Written:
    """Returns what was written to a node, whose tail is sound.

    Args:
        monitor: the machine.
        machine: its state.
        file: of the offload.
        number: of the node in the plan.
        node: the node as it is now.

    Raises:
        QmpError: QEMU does not answer, or refuses.
        StorageError: the file cannot be read.
        FormatError: a record is damaged.
    """
    tail = file.tail(number)
    former = file.read_former_tails(number, node.virtual_size)
    found = node.find(tail.name)
    dirty_bytes = (found.dirty_bytes if found else 0) + (former.dirty_bytes if former else 0)
    coarse = Written((tail.name,), former, WrittenFacts(False, dirty_bytes))
    if not tail.planned.recorder_granularity:
        return coarse
    recorded, reason = _recorded(machine, file, number, node)
    if recorded:
        dirty = _dirty_if_complete(monitor, tail, node, recorded, former)
        if dirty is not None:
            return recorded._replace(facts=WrittenFacts(True, dirty))
        reason = "the recorders lack something that the tail has"
    return coarse._replace(facts=WrittenFacts(False, dirty_bytes, reason))


def _recorded(
    machine: Machine, file: OffloadFile, number: int, node: Node
) -> tuple[Written | None, str]:
    """The recorders of a node; None, and why, if one of them is missing."""
    tail = file.tail(number)
    if tail.recorder_on(node, tail.recorder_name):
        # At a destination to which both travelled, both are new.
        if not machine.has_arrived and tail.was_loaded_anew(node):
            return None, "another machine had the disk, and the recorder is older than that"
        return Written((tail.recorder_name,)), ""
    arrival = file.arrival_name(number)
    if not tail.recorder_on(node, arrival):
        return None, "live record was not run, or not in time"
    # Its tail is always newer: QEMU loaded the tail when the disk arrived.
    if not machine.has_arrived:
        return None, "another migration began here since, and another machine may have written"
    if not file.has_collected(number):
        return None, "live collect was not run at the source"
    return Written((arrival,), file.read_collected(number, node.virtual_size)), ""


def _dirty_if_complete(
    monitor: QmpCommands, tail: Tail, node: Node, recorded: Written, former: SavedBitmap | None
) -> int | None:
    """How many bytes the recorders mark; None if a tail has a bit which none of them has.

    All is counted at one moment, so writes of the guest make no difference.
    """
    saved = [bitmap for bitmap in (recorded.saved, former) if bitmap]
    recorders = recorded.sources(node.name)
    tails = [(node.name, tail.name), *((SCRATCH_NODE, one.name) for one in (former,) if one)]
    wanted = {
        "recorders": Merged(tail.granularity, recorders),
        "all": Merged(tail.granularity, [*recorders, *tails]),
        "fine": Merged(tail.planned.recorder_granularity, recorders),
    }
    counts = count_merged(monitor, node.virtual_size, wanted, saved)
    return counts["fine"] if counts["recorders"] == counts["all"] else None
