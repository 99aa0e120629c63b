"""The steps of an offload that let the tails record, judge them, and begin new ones.

*Spec*: spec/live.md, "Offload" and "Tail".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qcow2bm.errors import TailError
from qcow2bm.live.offload_file import OffloadFile
from qcow2bm.live.tail import Tail
from qcow2bm.log import logger
from qcow2bm.migration.sidecar import SavedBitmap
from qcow2bm.qmp import actions, scratch_image
from qcow2bm.qmp.bitmap_copies import copy_bitmaps
from qcow2bm.qmp.commands import QmpCommands
from qcow2bm.qmp.machine import Node
from qcow2bm.qmp.merged_counts import Merged, count_merged
from qcow2bm.qmp.names import SCRATCH_NODE
from qcow2bm.qmp.queries import query_machine
from qcow2bm.units import escape

GOES_ON = "this machine goes on after it migrated, and the tail may lack what the destination wrote"
"""The reason why a tail is in doubt, whatever it looks like."""


def begin(
    monitor: QmpCommands,
    tails: Sequence[Tail],
    nodes: Sequence[Node],
    *,
    with_witness: bool = False,
) -> None:
    """Adds the tails that are missing on their nodes, all in one transaction; then their canaries.

    A recorder is added together with its tail, or not at all: both have the same writes. A tail
    that follows another gets a witness instead, if ``with_witness``.

    Raises:
        QmpError: QEMU does not answer, or refuses.
        StorageError: there is no room for temporary files.
    """
    pairs = list(zip(tails, nodes, strict=True))
    missing = [(tail, node) for tail, node in pairs if not node.find(tail.name)]
    work = [
        actions.add(node.name, tail.name, tail.granularity, persistent=True, enabled=True)
        for tail, node in missing
    ]
    for tail, node in missing:
        granularity = tail.planned.recorder_granularity
        if granularity and (with_witness or not tail.number):
            name, is_recorder = tail.witness_name, not tail.number
            add = actions.add(node.name, name, granularity, persistent=False, enabled=is_recorder)
            work.append(add)
    if work:
        monitor.transaction(work)
        logger.info("live offload: the tails record")
    for tail, node in pairs:
        name = tail.canary_name
        if not node.find(name):
            with (
                scratch_image.with_bitmaps(tail.planned.disk_size, [tail.canary]) as image,
                scratch_image.lent(monitor, image, read_only=True),
            ):
                granularity = tail.canary_granularity
                add = actions.add(node.name, name, granularity, persistent=True, enabled=True)
                monitor.transaction([add, actions.merge(node.name, name, name, SCRATCH_NODE)])


def sound_node(monitor: QmpCommands, tail: Tail, name: str) -> Node:
    """Returns a node as it is now; raises if a bitmap that leaves it could not be put back.

    By now a migration may be under way, or another program may have changed the tail.

    Raises:
        StateError: the machine's state does not allow it, see `Machine.require_settled`.
        TailError: the tail is not what it was.
        QmpError: QEMU does not answer.
    """
    machine = query_machine(monitor)
    machine.require_settled()
    (node,) = machine.select([name], lambda node: True)
    fault = tail.why_unusable(node, MachineCounts(monitor, tail, node)) or tail.why_resized(node)
    if fault:
        raise TailError(f'node "{escape(name)}": {fault}')
    return node


class MachineCounts:
    """`TailCounts` of a node of a machine. QEMU counts on a scratch node.

    The methods raise:
        QmpError: QEMU does not answer, or refuses.
        StorageError: there is no room for temporary files.
    """

    def __init__(self, monitor: QmpCommands, tail: Tail, node: Node) -> None:
        self._monitor, self._tail, self._node = monitor, tail, node

    def coarsened(self) -> int:
        """See `TailCounts.coarsened`."""
        return self._count({"tail": [(self._node.name, self._tail.name)]})["tail"]

    def is_canary_full(self) -> bool:
        """See `TailCounts.is_canary_full`."""
        now = (self._node.name, self._tail.canary_name)
        made = self._tail.canary.resized(self._node.virtual_size)
        wanted = {"now": [now], "both": [now, (SCRATCH_NODE, made.name)]}
        counts = self._count(wanted, [made])
        return counts["now"] == counts["both"]

    def _count(
        self, sources: Mapping[str, Sequence[tuple[str, str]]], lent: Sequence[SavedBitmap] = ()
    ) -> dict[str, int]:
        granularity = self._tail.canary_granularity
        wanted = {name: Merged(granularity, each) for name, each in sources.items()}
        return count_merged(self._monitor, self._node.virtual_size, wanted, lent)


def roll(monitor: QmpCommands, file: OffloadFile, number: int, name: str) -> float:
    """Lets a new tail follow the tail of a node, and puts the former one into the file.

    The former tail counts until its bits are durable in the file; the new one has recorded since
    before they were copied.

    Returns the seconds that QEMU took to store a copy of the former tail.

    Raises as `sound_node` and `begin` do, and:
        StorageError: the file cannot be written.
    """
    former = file.tail(number)
    node = sound_node(monitor, former, name)
    following = (former.next.name, former.next.canary_name, former.next.witness_name)
    leftovers = [name for name in following if node.find(name)]
    if leftovers:  # of a roll that was interrupted
        monitor.transaction([actions.remove(node.name, name) for name in leftovers])
        node = sound_node(monitor, former, name)
    begin(monitor, [former.next], [node], with_witness=not former.was_loaded_anew(node))
    bitmaps = [bitmap for bitmap in node.bitmaps if bitmap.name == former.name]
    (copy,), seconds = copy_bitmaps(monitor, node, bitmaps)
    sound_node(monitor, former, name)
    file.append_rolled(number, copy)
    sound_node(monitor, file.tail(number), name)
    gone = [former.name, former.canary_name]
    if former.number and node.find(former.witness_name):
        gone.append(former.witness_name)
    monitor.transaction([actions.remove(node.name, name) for name in gone])
    logger.info('live offload: a new tail records on node "%s"', escape(node.name))
    return seconds
