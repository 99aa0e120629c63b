"""Takes the persistent bitmaps out of a running machine, into an offload file.

*Spec*: spec/live.md, "Offload".
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple
from uuid import uuid4

from qcow2bm.errors import BitmapError, EvidenceError, StorageError
from qcow2bm.format.offload_file import OffloadPlan, PlannedBitmap, PlannedNode
from qcow2bm.live import stop, tail
from qcow2bm.live.offload_file import OffloadFile
from qcow2bm.live.place import has_all, is_as_planned, node_of
from qcow2bm.log import logger
from qcow2bm.qmp import actions, scratch, scratch_image
from qcow2bm.qmp.bitmap_copies import Omission, copy_bitmaps
from qcow2bm.qmp.client import Monitor
from qcow2bm.qmp.machine import Machine, Node, NodeBitmap
from qcow2bm.qmp.names import SCRATCH_NODE, canary_of, tail_of
from qcow2bm.qmp.queries import query_machine
from qcow2bm.storage import new_file
from qcow2bm.units import escape


class OffloadReport(NamedTuple):
    """The result of `offload`.

    Attributes:
        plan: what was, or would be, taken out.
        left: the persistent bitmaps that stay, and are stored at the stop.
        before: how many bytes of bits QEMU had to store at a stop, at most.
        after: how many it has to store now, at most, or would have to.
        seconds: how long QEMU took to store copies of what ``before`` counts; None if this call did
            not copy all of it.
        tails_travel: whether the tails travel in a migration with the capability dirty-bitmaps; a
            block-bitmap-mapping that is set leaves them out.
    """

    plan: OffloadPlan
    left: tuple[Omission, ...]
    before: int
    after: int
    seconds: float | None
    tails_travel: bool

    @property
    def stop_seconds(self) -> float | None:
        """How long QEMU takes to store bits at a stop now, by the time that it took for more."""
        if self.seconds is None or not self.before:
            return None
        return self.seconds * self.after / self.before


def offload(
    monitor: Monitor,
    path: str,
    nodes: Sequence[str] = (),
    *,
    tail_granularity: int = tail.DEFAULT_GRANULARITY,
    dry_run: bool = False,
    on_progress: Callable[[str, str], None] = lambda node, name: None,
) -> OffloadReport:
    """Takes the persistent bitmaps of these nodes, or of all, out of a machine; ``live offload``.

    If ``path`` has an offload that was interrupted, that offload goes on. QEMU answers nothing
    else, and the guest's requests wait, while it copies one bitmap.

    *Guarantees*: a bitmap records until it leaves the machine, and leaves the machine only when its
    bits are durable in the file. After every command that is sent, `restore` can give each bitmap
    all its bits, and at least every write since.

    Args:
        monitor: the machine.
        path: of the offload file; it is made if there is none.
        nodes: the names of nodes or devices.
        tail_granularity: how many guest bytes a bit of the tail stands for.
        dry_run: whether to send only queries, and write nothing.
        on_progress: called with a node and the name of a bitmap that was taken out.

    Raises:
        StateError: the machine's state does not allow it, see `Machine.require_settled`.
        EvidenceError: the tail of an offload that was interrupted is not what it was.
        QmpError: QEMU does not answer, refuses, or did not store a bitmap.
        StorageError: the file cannot be read or written.
        FormatError: the file is no offload file, or is damaged.
        ValueError: there is no such node, no bitmap to take out, or no such granularity.
    """
    _require_granularity(tail_granularity)
    machine = query_machine(monitor)
    machine.require_settled()
    if not os.path.exists(path):
        plan = _planned(machine, nodes, tail_granularity)
        if dry_run:
            file = OffloadFile(path, plan)
            return _report(machine, plan, _places(machine, file))
        OffloadFile.create(path, plan)
    with new_file.held(path):
        file = OffloadFile.read(path)
        if file.is_restored:
            reason = "is of an offload whose bitmaps were put back: remove it, or choose another"
            raise StorageError(path, 0, 0, reason)
        places = _places(machine, file)
        report = _report(machine, file.plan, places)
        if dry_run:
            return report
        scratch.discard_leftover(monitor)
        _begin(monitor, file, places)
        times = []
        for place, node in enumerate(places):
            for number in file.plan.numbers_of(place):
                times.append(_take_out(monitor, file, number, node.name))
                on_progress(node.name, file.bitmaps[number][1].name)
    is_all = None not in times and not report.left
    return report._replace(seconds=sum(filter(None, times)) if is_all else None)


def _report(machine: Machine, plan: OffloadPlan, places: Sequence[Node]) -> OffloadReport:
    """What is going to be done on the nodes of the plan."""
    left = tuple(_left(machine, plan, places))
    before = stop.bytes_at_stop(machine, stop.stored_bitmaps(machine))
    after = stop.bytes_at_stop(machine, (omission.bitmap for omission in left))
    for node in places:
        canary = stop.cluster_size_of(node)
        after += stop.most_bytes(node, plan.tail_granularity) + canary
    return OffloadReport(plan, left, before, after, None, machine.mapping is None)


def _require_granularity(granularity: int) -> None:
    if granularity.bit_count() != 1 or not 512 <= granularity <= tail.MAX_GRANULARITY:
        most = tail.MAX_GRANULARITY >> 20
        reason = f"must be a power of two from 512 to {most} MiB"
        raise ValueError(f"the granularity of the tail is {granularity}, {reason}")


def _planned(machine: Machine, names: Sequence[str], tail_granularity: int) -> OffloadPlan:
    chosen = machine.select(names, lambda node: bool(_usable(node)))
    nodes = []
    for node in chosen:
        if tail.foreign_tail(node):
            reason = "has the tail of another offload: put the bitmaps of that one back first"
            raise ValueError(f'the node "{escape(node.name)}" {reason}')
        bitmaps = [PlannedBitmap(b.name, b.granularity, b.is_recording) for b in _usable(node)]
        if not bitmaps:
            raise ValueError(f'the node "{escape(node.name)}" has no bitmap that can be taken out')
        nodes.append(PlannedNode(uuid4(), node.name, node.virtual_size, tuple(bitmaps)))
    if not nodes:
        raise ValueError("there is no persistent bitmap that can be taken out")
    return OffloadPlan(tail_granularity, tuple(nodes))


def _usable(node: Node) -> list[NodeBitmap]:
    """The bitmaps of a node that can be taken out."""
    if node.is_read_only:
        return []
    return [b for b in node.subjects if b.is_persistent and b.is_usable]


def _places(machine: Machine, file: OffloadFile) -> list[Node]:
    """Returns the nodes of the plan, if the offload can begin or go on there."""
    plan = file.plan
    nodes = [node_of(machine, planned) for planned in plan.nodes]
    pairs = list(zip(nodes, plan.nodes, strict=True))
    has_begun = any(node.find(tail_of(planned.uuid)) for node, planned in pairs)
    if not has_begun and not file.has_copies:
        for node, planned in pairs:
            if not has_all(node, planned):
                reason = "is a plan for other bitmaps than the machine has now: remove it"
                raise StorageError(file.path, 0, 0, reason)
        return nodes
    for node, planned in pairs:
        reason = tail.why_unusable(plan, planned, node)
        # An interruption right after the first step leaves the tail without its canary.
        if reason and not (node.find(tail_of(planned.uuid)) and has_all(node, planned)):
            raise EvidenceError(f'node "{escape(node.name)}": {reason}', None)
    return nodes


def _left(machine: Machine, plan: OffloadPlan, nodes: Sequence[Node]) -> Iterator[Omission]:
    taken = {
        (node.name, name)
        for node, planned in zip(nodes, plan.nodes, strict=True)
        for name in (*(bitmap.name for bitmap in planned.bitmaps), *tail.names_of(planned))
    }
    for bitmap in stop.stored_bitmaps(machine):
        if (bitmap.node, bitmap.name) not in taken:
            yield Omission(bitmap, bitmap.why_unusable or "it was not chosen")


def _begin(monitor: Monitor, file: OffloadFile, nodes: Sequence[Node]) -> None:
    """Adds the tails, and then their canaries, where that was not done before."""
    plan, granularity = file.plan, file.plan.tail_granularity
    pairs = list(zip(nodes, plan.nodes, strict=True))
    missing = [
        actions.add(node.name, tail_of(planned.uuid), granularity, persistent=True, enabled=True)
        for node, planned in pairs
        if not node.find(tail_of(planned.uuid))
    ]
    if missing:
        monitor.transaction(missing)
        logger.info("live offload: the tails record")
    for node, planned in pairs:
        name = canary_of(planned.uuid)
        if not node.find(name):
            canary = tail.canary(plan, planned)
            with (
                scratch_image.with_bitmap(canary) as image,
                scratch_image.lent(monitor, image, read_only=True),
            ):
                add = actions.add(node.name, name, granularity, persistent=True, enabled=False)
                monitor.transaction([add, actions.merge(node.name, name, name, SCRATCH_NODE)])


def _take_out(monitor: Monitor, file: OffloadFile, number: int, name: str) -> float | None:
    """Copies a bitmap of a node into the file, and removes it from the machine.

    The bitmap goes on recording until it is removed: what it records after it was copied is in the
    tail, too. So a bitmap that is still in the machine is always right. If the file has a copy
    of it already, the new copy takes its place.

    Returns the seconds that QEMU took to store the copy; None if the bitmap was removed before.
    """
    planned_node, planned = file.bitmaps[number]
    node = _sound_node(monitor, file, planned_node, name)
    bitmap = node.find(planned.name)
    if not bitmap:
        if not file.has_copy(number):
            raise BitmapError(planned.name, f'is gone from the node "{escape(name)}"')
        return None
    if not is_as_planned(bitmap, planned):
        reason = bitmap.why_unusable or "it is not the bitmap that was there when this began"
        raise BitmapError(planned.name, f"cannot be taken out now: {reason}")
    (copy,), seconds = copy_bitmaps(monitor, node, [bitmap])
    file.append_copy(number, copy._replace(enabled=planned.enabled))
    _sound_node(monitor, file, planned_node, name)
    monitor.transaction([actions.remove(name, planned.name)])
    return seconds


def _sound_node(monitor: Monitor, file: OffloadFile, planned: PlannedNode, name: str) -> Node:
    """Returns a node as it is now; raises if a bitmap that leaves it could not be put back.

    By now a migration may be under way, or another program may have changed the tail.
    """
    machine = query_machine(monitor)
    machine.require_settled()
    (node,) = machine.select([name], lambda node: True)
    fault = tail.why_unusable(file.plan, planned, node)
    if fault:
        raise EvidenceError(f'node "{escape(name)}": {fault}', None)
    return node
