"""Takes the persistent bitmaps out of a running machine, into an offload file.

*Spec*: spec/live.md, "Offload".
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple
from uuid import uuid4

from qcow2bm.api import open, sidecar
from qcow2bm.errors import BitmapError, EvidenceError, QmpError, StorageError
from qcow2bm.format.offload_file import OffloadPlan, PlannedBitmap, PlannedNode
from qcow2bm.live import tail
from qcow2bm.live.offload_file import OffloadFile
from qcow2bm.live.place import has_all
from qcow2bm.live.stop import bytes_at_stop, most_bytes, stored_bitmaps
from qcow2bm.log import logger
from qcow2bm.migration.sidecar import SavedBitmap
from qcow2bm.qmp import actions, scratch, scratch_image
from qcow2bm.qmp.client import Monitor
from qcow2bm.qmp.machine import Machine, Node, NodeBitmap
from qcow2bm.qmp.names import SCRATCH_NODE, tail_of
from qcow2bm.qmp.queries import query_bitmap, query_digest, query_machine
from qcow2bm.units import escape


class Omission(NamedTuple):
    """A persistent bitmap that stays in the machine, and why."""

    bitmap: NodeBitmap
    reason: str


class OffloadReport(NamedTuple):
    """The result of `offload`.

    Attributes:
        plan: what was, or would be, taken out.
        left: the persistent bitmaps that stay, and are stored at the stop.
        before: how many bytes of bits QEMU had to store at a stop, at most.
        after: how many it has to store now, at most, or would have to.
        seconds: how long QEMU took to store copies of all these bitmaps; None if this call did not
            copy all of them.
        is_mapped: whether the tails travel in a migration with the capability dirty-bitmaps: True
            if no block-bitmap-mapping is set, which would leave them out.
    """

    plan: OffloadPlan
    left: tuple[Omission, ...]
    before: int
    after: int
    seconds: float | None
    is_mapped: bool

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

    *Guarantees*: a bitmap leaves the machine only when its bits are durable in the file. After
    every command that is sent, `restore` can give each bitmap all its bits, and at least every
    write since.

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
    if os.path.exists(path):
        file = OffloadFile.read(path)
        plan = file.plan
    else:
        plan = _planned(machine, nodes, tail_granularity)
        file = OffloadFile(path, plan, {}, 0) if dry_run else OffloadFile.create(path, plan)
    left = tuple(_left(machine, plan))
    by_name = {node.name: node for node in machine.nodes}
    for planned in plan.nodes:
        if planned.name not in by_name:
            raise ValueError(f'the machine has no node "{escape(planned.name)}"')
    before = bytes_at_stop(machine, stored_bitmaps(machine))
    after = bytes_at_stop(machine, (omission.bitmap for omission in left))
    after += sum(most_bytes(by_name[node.name], plan.tail_granularity) for node in plan.nodes)
    times: list[float | None] = [None]
    if not dry_run:
        scratch.discard_leftover(monitor)
        _begin(monitor, machine, file)
        times.clear()
        for number in range(len(plan.bitmaps)):
            times.append(_take_out(monitor, file, number))
            on_progress(*(one.name for one in plan.bitmaps[number]))
    seconds = None if None in times else sum(filter(None, times))
    return OffloadReport(plan, left, before, after, seconds, machine.mapping is None)


def _require_granularity(granularity: int) -> None:
    if granularity.bit_count() != 1 or not 512 <= granularity <= tail.MAX_GRANULARITY:
        most = tail.MAX_GRANULARITY >> 20
        reason = f"must be a power of two from 512 to {most} MiB"
        raise ValueError(f"the granularity of the tail is {granularity}, {reason}")


def _planned(machine: Machine, names: Sequence[str], tail_granularity: int) -> OffloadPlan:
    chosen = machine.select(names, lambda node: bool(_usable(node)))
    nodes = []
    for node in chosen:
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


def _left(machine: Machine, plan: OffloadPlan) -> Iterator[Omission]:
    taken = {(node.name, bitmap.name) for node, bitmap in plan.bitmaps}
    taken |= {(node.name, tail_of(node.uuid)) for node in plan.nodes}
    for bitmap in stored_bitmaps(machine):
        if (bitmap.node, bitmap.name) not in taken:
            yield Omission(bitmap, bitmap.why_unusable or "it was not chosen")


def _begin(monitor: Monitor, machine: Machine, file: OffloadFile) -> None:
    """Adds the tails, and disables the bitmaps that record, if that was not done before."""
    plan = file.plan
    by_name = {node.name: node for node in machine.nodes}
    has_copies = any(map(file.has_copy, range(len(plan.bitmaps))))
    found = [by_name[planned.name].find(tail_of(planned.uuid)) for planned in plan.nodes]
    if has_copies and not any(found):
        are_back = all(has_all(by_name[planned.name], planned) for planned in plan.nodes)
        if are_back:
            reason = "is of an offload whose bitmaps were put back: remove it, or choose another"
            raise StorageError(file.path, 0, 0, reason)
    if has_copies or any(found):
        for planned in plan.nodes:
            reason = tail.why_unusable(plan, planned, by_name[planned.name])
            if reason:
                raise EvidenceError(f'node "{escape(planned.name)}": {reason}', None)
        return
    granularity = plan.tail_granularity
    work = [
        actions.add(node.name, tail_of(node.uuid), granularity, persistent=True, enabled=True)
        for node in plan.nodes
    ]
    work += [actions.disable(node.name, b.name) for node, b in plan.bitmaps if b.enabled]
    monitor.transaction(work)
    logger.info("live offload: the tails record")


def _take_out(monitor: Monitor, file: OffloadFile, number: int) -> float | None:
    """Copies a bitmap into the file, and removes it from the machine.

    Returns the seconds that QEMU took to store the copy; None if the file had the copy before.
    """
    node, planned = file.plan.bitmaps[number]
    seconds = None
    bitmap = query_bitmap(monitor, node.name, planned.name)
    if not file.has_copy(number):
        if not bitmap:
            raise BitmapError(planned.name, f'is gone from the node "{escape(node.name)}"')
        _require_frozen(bitmap, planned)
        saved, seconds = _copied(monitor, bitmap, planned, node.disk_size)
        file.append_copy(number, saved)
    elif bitmap:
        _require_frozen(bitmap, planned)
        digest = query_digest(monitor, bitmap)
        if digest not in (None, file.read_copy(number).sha256()):
            raise BitmapError(planned.name, "has other bits than its copy in the file")
    if bitmap:
        monitor.transaction([actions.remove(node.name, planned.name)])
    return seconds


def _require_frozen(bitmap: NodeBitmap, planned: PlannedBitmap) -> None:
    if bitmap.is_recording or bitmap.granularity != planned.granularity:
        raise BitmapError(planned.name, "was enabled or replaced since the offload began")
    if not bitmap.is_usable:
        raise BitmapError(planned.name, f"cannot be taken out now: it is {bitmap.why_unusable}")


def _copied(
    monitor: Monitor, bitmap: NodeBitmap, planned: PlannedBitmap, disk_size: int
) -> tuple[SavedBitmap, float]:
    """Returns a bitmap that does not record, as QEMU stores it, and the seconds for storing it."""
    digest = query_digest(monitor, bitmap)
    name, granularity = bitmap.name, bitmap.granularity
    with scratch_image.blank(disk_size) as file:
        with scratch_image.lent(monitor, file):
            monitor.transaction(
                [
                    actions.add(SCRATCH_NODE, name, granularity, persistent=True, enabled=False),
                    actions.merge(SCRATCH_NODE, name, name, bitmap.node),
                ]
            )
            began = time.monotonic()  # QEMU stores when the node is removed
        seconds = time.monotonic() - began
        with open(file) as image:
            try:
                (saved,) = sidecar.collect(image, [image.bitmaps[name]]).bitmaps
            except (BitmapError, KeyError) as error:
                raise QmpError("blockdev-del", f"QEMU did not store a bitmap: {error}") from error
    if digest not in (None, saved.sha256()):
        reason = f'the bits of "{escape(name)}" are not what QEMU said they were'
        raise QmpError("blockdev-del", reason)
    return saved._replace(enabled=planned.enabled), seconds
