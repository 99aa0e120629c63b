"""Takes the persistent bitmaps out of a running machine, into an offload file.

*Spec*: spec/live.md, "Offload".
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple
from uuid import uuid4

from qcow2bm.errors import BitmapError, StorageError, TailError
from qcow2bm.format.offload_file import OffloadPlan, PlannedBitmap, PlannedNode
from qcow2bm.live import recording, stop, tail
from qcow2bm.live.offload_file import OffloadFile
from qcow2bm.live.place import fault_of, has_all, is_as_planned, node_of
from qcow2bm.live.stop_limit import Limited, Pace, limit_stop
from qcow2bm.qmp import actions, scratch
from qcow2bm.qmp.bitmap_copies import Omission, copy_bitmaps
from qcow2bm.qmp.commands import QmpCommands
from qcow2bm.qmp.machine import Machine, Node, NodeBitmap
from qcow2bm.qmp.names import is_of_offload
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
        limited: whether a stop keeps to ``max_stop_seconds``, and what would; None if there is no
            such limit, or in a dry run.
    """

    plan: OffloadPlan
    left: tuple[Omission, ...]
    before: int
    after: int
    seconds: float | None
    tails_travel: bool
    limited: Limited | None = None

    @property
    def stop_seconds(self) -> float | None:
        """How long QEMU takes to store bits at a stop now, by the time that it took for more."""
        if self.limited:
            return self.limited.stop_seconds
        if self.seconds is None or not self.before:
            return None
        return self.seconds * self.after / self.before


def offload(
    monitor: QmpCommands,
    path: str,
    nodes: Sequence[str] = (),
    *,
    tail_granularity: int | None = None,
    exact: bool = False,
    max_stop_seconds: float | None = None,
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
        tail_granularity: how many guest bytes a bit of the tail stands for; None for
            `DEFAULT_GRANULARITY`, or for that of the offload that goes on.
        exact: whether a second bitmap, which QEMU does not store, records as finely as the finest
            bitmap, see `collect`.
        max_stop_seconds: how long QEMU may take to store bits at a stop, by the time that it takes
            for copies. While a stop would take longer, new tails follow, which are clean.
        dry_run: whether to send only queries, and write nothing.
        on_progress: called with a node and the name of a bitmap that was taken out.

    Raises:
        StateError: the machine's state does not allow it, see `Machine.require_settled`; or a
            verdict about the last migration is due, see `rescue.judge`.
        TailError: the tail of an offload that was interrupted is not what it was.
        QmpError: QEMU does not answer, refuses, or did not store a bitmap.
        StorageError: the file cannot be read or written.
        FormatError: the file is no offload file, or is damaged.
        ValueError: there is no such node, no bitmap to take out, or no such granularity; or the
            offload that goes on was begun in another way.
    """
    _require_sensible(tail_granularity, max_stop_seconds)
    machine = query_machine(monitor)
    machine.require_settled()
    if not os.path.exists(path):
        granularity = tail_granularity or tail.DEFAULT_GRANULARITY
        plan = _planned(machine, nodes, granularity, exact=exact)
        if dry_run:
            file = OffloadFile(path, plan)
            return _report(machine, file, _places(monitor, machine, file))
        OffloadFile.create(path, plan)
    with new_file.held(path):
        file = OffloadFile.read(path)
        if file.is_restored:
            reason = "is of an offload whose bitmaps were put back: remove it, or choose another"
            raise StorageError(path, 0, 0, reason)
        places = _places(monitor, machine, file)
        _require_same(file, machine, places, nodes, tail_granularity, exact=exact)
        report = _report(machine, file, places)
        if dry_run:
            return report
        scratch.discard_leftover(monitor)
        recording.begin(monitor, file.tails, places)
        pace, is_all = Pace(), not report.left
        for place, node in enumerate(places):
            for number in file.plan.numbers_of(place):
                stored = _take_out(monitor, file, file.tail(place), number, node.name)
                pace += stored or Pace()
                is_all = is_all and stored is not None
                on_progress(node.name, file.bitmaps[number][1].name)
        report = report._replace(seconds=pace.seconds if is_all else None)
        if max_stop_seconds is None:
            return report
        limited = limit_stop(monitor, file, [node.name for node in places], pace, max_stop_seconds)
        return report._replace(after=limited.stop_bytes, limited=limited)


def _report(machine: Machine, file: OffloadFile, places: Sequence[Node]) -> OffloadReport:
    """What is going to be done on the nodes of the plan."""
    left = tuple(_left(machine, file.plan, places))
    before = stop.bytes_at_stop(machine, stop.stored_bitmaps(machine))
    after = stop.bytes_at_stop(machine, (omission.bitmap for omission in left))
    after += sum(map(stop.most_bytes_of_tail, places, file.tails))
    return OffloadReport(file.plan, left, before, after, None, machine.mapping is None)


def _require_sensible(granularity: int | None, max_stop_seconds: float | None) -> None:
    if granularity is not None and (
        granularity.bit_count() != 1 or not 512 <= granularity <= tail.MAX_GRANULARITY
    ):
        most = tail.MAX_GRANULARITY >> 20
        reason = f"must be a power of two from 512 to {most} MiB"
        raise ValueError(f"the granularity of the tail is {granularity}, {reason}")
    if max_stop_seconds is not None and not max_stop_seconds > 0:
        raise ValueError(f"the time for a stop is {max_stop_seconds}, must be more than 0 seconds")


def _planned(
    machine: Machine, names: Sequence[str], tail_granularity: int, *, exact: bool
) -> OffloadPlan:
    chosen = machine.select(names, lambda node: bool(_usable(node)))
    nodes = []
    for node in chosen:
        machine.require_judged(node)
        if tail.foreign_tail(node):
            reason = "has the tail of another offload: put the bitmaps of that one back first"
            raise ValueError(f'the node "{escape(node.name)}" {reason}')
        bitmaps = [PlannedBitmap(b.name, b.granularity, b.is_recording) for b in _usable(node)]
        if not bitmaps:
            raise ValueError(f'the node "{escape(node.name)}" has no bitmap that can be taken out')
        recorded = [bitmap.granularity for bitmap in bitmaps if bitmap.enabled]
        recorder = min(recorded, default=0) if exact else 0
        planned = PlannedNode(uuid4(), node.name, node.virtual_size, tuple(bitmaps), recorder)
        nodes.append(planned)
    if not nodes:
        found = [bitmap for node in machine.nodes for bitmap in node.subjects]
        why = (f'"{escape(b.name)}" is {b.why_unusable}' for b in found if b.why_unusable)
        reasons = "; ".join(why) or "there is no persistent one"
        raise ValueError(f"there is no bitmap that can be taken out: {reasons}")
    return OffloadPlan(tail_granularity, tuple(nodes))


def _require_same(
    file: OffloadFile,
    machine: Machine,
    places: Sequence[Node],
    names: Sequence[str],
    tail_granularity: int | None,
    *,
    exact: bool,
) -> None:
    """Raises if an offload that goes on was begun with other options than these."""
    plan = file.plan
    chosen = {node.name for node in machine.select(names, lambda node: False)}
    if names and chosen != {node.name for node in places}:
        was = ", ".join(escape(node.name) for node in places)
        raise ValueError(f"the offload that goes on was begun for other nodes, which are: {was}")
    if tail_granularity not in (None, plan.tail_granularity):
        was = str(plan.tail_granularity)
        raise ValueError(f"the offload that goes on was begun with the tail granularity {was}")
    if exact and not any(node.recorder_granularity for node in plan.nodes):
        raise ValueError("the offload that goes on was not begun as an exact one")


def _usable(node: Node) -> list[NodeBitmap]:
    """The bitmaps of a node that can be taken out."""
    if node.is_read_only:
        return []
    return [b for b in node.subjects if b.is_persistent and b.is_usable]


def _places(monitor: QmpCommands, machine: Machine, file: OffloadFile) -> list[Node]:
    """Returns the nodes of the plan, if the offload can begin or go on there."""
    tails = file.tails
    nodes = [node_of(machine, one) for one in tails]
    pairs = list(zip(nodes, tails, strict=True))
    has_begun = any(node.find(one.name) for node, one in pairs)
    if not has_begun and not file.has_copies:
        for node, one in pairs:
            if not has_all(node, one.planned) or one.why_resized(node):
                reason = "is a plan for other bitmaps than the machine has now: remove it"
                raise StorageError(file.path, 0, 0, reason)
        return nodes
    if machine.goes_on:
        raise TailError(recording.GOES_ON)
    for number, (node, one) in enumerate(pairs):
        if file.was_restored(number):
            reason = "has bitmaps that were put back: put the others back, too"
            raise StorageError(file.path, 0, 0, reason)
        counts = recording.MachineCounts(monitor, one, node)
        reason = fault_of(file, number, node, counts) or one.why_resized(node)
        if reason:
            raise TailError(f'node "{escape(node.name)}": {reason}')
        if not node.find(one.name):
            reason = "is of an offload that has begun, and the machine has no tail of it"
            raise StorageError(file.path, 0, 0, reason)
    return nodes


def _left(machine: Machine, plan: OffloadPlan, nodes: Sequence[Node]) -> Iterator[Omission]:
    planned = dict(zip((node.name for node in nodes), plan.nodes, strict=True))
    for bitmap in stop.stored_bitmaps(machine):
        ours = planned.get(bitmap.node)
        is_taken = ours is not None and (
            bitmap.name in (one.name for one in ours.bitmaps)
            or is_of_offload(bitmap.name, ours.uuid)
        )
        if not is_taken:
            yield Omission(bitmap, bitmap.why_unusable or "it was not chosen")


def _take_out(
    monitor: QmpCommands, file: OffloadFile, one: tail.Tail, number: int, name: str
) -> Pace | None:
    """Copies a bitmap of a node into the file, and removes it from the machine.

    The bitmap goes on recording until it is removed: what it records after it was copied is in the
    tail, too. So a bitmap that is still in the machine is always right. If the file has a copy
    of it already, the new copy takes its place.

    Returns how fast QEMU stored the copy; None if the bitmap was removed before.
    """
    _, planned = file.bitmaps[number]
    node = recording.sound_node(monitor, one, name)
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
    recording.sound_node(monitor, one, name)
    monitor.transaction([actions.remove(name, planned.name)])
    return Pace(stop.bytes_of(node, bitmap), seconds)
