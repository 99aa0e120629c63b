"""What bitmaps a running machine has, what a stop would store, and how far an offload is.

*Spec*: spec/live.md, "Status".
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from qcow2bm.errors import StateError, TailError
from qcow2bm.format.offload_file import PlannedNode
from qcow2bm.live.offload_file import OffloadFile
from qcow2bm.live.place import fault_of, node_of
from qcow2bm.live.recording import GOES_ON, MachineCounts
from qcow2bm.live.stop import bytes_of
from qcow2bm.qmp.commands import QmpCommands
from qcow2bm.qmp.machine import Machine, NodeBitmap
from qcow2bm.qmp.queries import query_machine

OffloadStep = Literal["planned", "begun", "offloaded", "restored", "no-tail", "away", "in-doubt"]
BitmapPlace = Literal["machine", "file", "elsewhere", "lost"]


class BitmapStatus(NamedTuple):
    """A bitmap in QEMU's memory; a stop stores at most ``stop_bytes`` of its bits."""

    bitmap: NodeBitmap
    stop_bytes: int


class OffloadedBitmap(NamedTuple):
    """A bitmap of an offload file, and where its bits are.

    "elsewhere": the file says that it was put back, and it is not in this machine.
    """

    node: str
    name: str
    where: BitmapPlace


class NodeStatus(NamedTuple):
    """How far the offload of a node is.

    Attributes:
        node: the name of the node in the file.
        step: "planned": nothing was done. "begun": an offload or a restore was interrupted: the
            tail records, and bitmaps are in the machine. "offloaded": all bitmaps are in the file
            alone. "restored": the file says that all bitmaps were put back. "no-tail": the machine
            has such bitmaps, and no tail of this file. "away": the machine does not have its disks
            now. "in-doubt": writes may be missing from the tail.
        reason: why it is away or in doubt; "" at any other step.
        bitmaps: the bitmaps of the node, in the order of the file.
    """

    node: str
    step: OffloadStep
    reason: str
    bitmaps: tuple[OffloadedBitmap, ...]


class LiveStatus(NamedTuple):
    """The result of `status`.

    Attributes:
        machine: as query-status has it, such as ``running``.
        migration: as query-migrate has it; "" if there was none.
        bitmaps: all bitmaps that have a name.
        nodes: the nodes of the offload file; none without a file.
        can_collect: whether this is the source of a migration, with a recorder of the file that was
            not collected yet.
    """

    machine: str
    migration: str
    bitmaps: tuple[BitmapStatus, ...]
    nodes: tuple[NodeStatus, ...]
    can_collect: bool = False

    @property
    def stop_bytes(self) -> int:
        """How many bytes of bits a stop stores now, at most."""
        return sum(one.stop_bytes for one in self.bitmaps)


def status(monitor: QmpCommands, path: str | None = None) -> LiveStatus:
    """Returns what a machine has, and how far the offload of a file is; ``live status``.

    It sends only queries, unless the tail of a very large disk has very many bits: then QEMU counts
    them on a scratch node. If there was a migration, and QEMU does not tell whether its disks are
    active, one of them is an empty write; see `Machine.require_settled`.

    Args:
        monitor: the machine.
        path: of the offload file; None for the machine alone.

    Raises:
        StateError: QEMU has ejected a disk.
        QmpError: QEMU does not answer.
        StorageError: the file cannot be read.
        FormatError: the file is no offload file, or is damaged.
    """
    machine = query_machine(monitor)
    file = None if path is None else OffloadFile.read(path)
    bitmaps = tuple(
        BitmapStatus(
            bitmap,
            bytes_of(node, bitmap) if bitmap.is_persistent and not node.is_read_only else 0,
        )
        for node in machine.nodes
        for bitmap in node.bitmaps
    )
    try:
        machine.require_settled()
        away = ""
    except StateError as error:
        away = error.facts
    nodes = range(len(file.plan.nodes)) if file else ()
    return LiveStatus(
        machine.status,
        machine.migration,
        bitmaps,
        tuple(_status(monitor, file, machine, number, away) for number in nodes if file),
        file is not None and _can_collect(file, machine),
    )


def _can_collect(file: OffloadFile, machine: Machine) -> bool:
    return machine.status == "postmigrate" and any(
        not file.has_collected(number) and tail.recorder_on(node, tail.recorder_name)
        for number, tail in enumerate(file.tails)
        for node in machine.nodes
    )


def _status(
    monitor: QmpCommands, file: OffloadFile, machine: Machine, number: int, away: str
) -> NodeStatus:
    tail = file.tail(number)
    planned = tail.planned
    copied = {
        file.bitmaps[place][1].name
        for place in file.plan.numbers_of(number)
        if file.has_copy(place)
    }
    is_back = file.was_restored(number)
    step: OffloadStep
    try:
        node = node_of(machine, tail)
    except TailError as error:
        step, reason = _step_without_node(file, number, away, error)
        return NodeStatus(
            planned.name, step, reason, _bitmaps(planned, {}, copied, is_back=is_back)
        )
    there = {bitmap.name: bitmap for bitmap in node.bitmaps}
    bitmaps = _bitmaps(planned, there, copied, is_back=is_back)
    has_tail = node.find(tail.name) is not None
    reason = away or fault_of(file, number, node, MachineCounts(monitor, tail, node))
    if is_back and not has_tail:
        step, reason = "restored", ""
    elif away:
        step, reason = "away", away
    elif machine.goes_on and has_tail:
        step, reason = "in-doubt", f"{GOES_ON}; live restore needs --assert-alone"
    elif reason:
        step = "in-doubt"
    elif not has_tail:
        step = "no-tail" if copied else "planned"
    else:
        step = "begun" if any(one.where == "machine" for one in bitmaps) else "offloaded"
    return NodeStatus(planned.name, step, reason, bitmaps)


def _step_without_node(
    file: OffloadFile, number: int, away: str, error: TailError
) -> tuple[OffloadStep, str]:
    if file.was_restored(number):
        return "restored", ""
    return "away", away or error.reason


def _bitmaps(
    planned: PlannedNode, there: dict[str, NodeBitmap], copied: set[str], *, is_back: bool
) -> tuple[OffloadedBitmap, ...]:
    def where(name: str) -> BitmapPlace:
        if name in there:
            return "machine"
        if is_back:
            return "elsewhere"
        return "file" if name in copied else "lost"

    return tuple(OffloadedBitmap(planned.name, b.name, where(b.name)) for b in planned.bitmaps)
