"""Judges, after a migration, whether another machine wrote to the disks.

*Spec*: spec/rescue.md, "Verdict".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from qcow2bm.log import logger
from qcow2bm.qmp import actions, scratch
from qcow2bm.qmp.commands import QmpCommands
from qcow2bm.qmp.machine import Machine, Node, NodeBitmap
from qcow2bm.qmp.mapping import mapped_names
from qcow2bm.qmp.names import COMPARED, sentinel_of
from qcow2bm.qmp.queries import query_digest, query_machine
from qcow2bm.units import escape

VerdictWord = Literal["untouched", "touched", "unknown", "left-over", "not-armed"]


class Verdict(NamedTuple):
    """The verdict on a node, and the reason for it; ``concerned`` are the bitmaps to be settled."""

    node: Node
    word: VerdictWord
    reason: str
    concerned: tuple[NodeBitmap, ...] = ()

    @property
    def is_bad(self) -> bool:
        """Whether bitmaps may miss writes."""
        return self.word in ("touched", "unknown")


class VerdictReport(NamedTuple):
    """The result of `judge`.

    ``migration`` is the status of the last migration, as query-migrate has it; "" if there was
    none.
    """

    migration: str
    nodes: tuple[Verdict, ...]


def judge(monitor: QmpCommands, nodes: Sequence[str] = ()) -> VerdictReport:
    """Judges these nodes, or all that were armed; the first half of ``rescue verdict``.

    *Guarantees*: the evidence stays as it is, so a second call finds the same.

    Raises:
        StateError: the machine's state does not allow it, see `Machine.require_settled`.
        QmpError: QEMU does not answer, or refuses.
        ValueError: there is no node of such a name.
    """
    machine = query_machine(monitor)
    machine.require_settled()
    scratch.discard_leftover(monitor)
    copies = [
        actions.remove(node.name, bitmap.name)
        for node in machine.nodes
        for bitmap in node.bitmaps
        if bitmap.name in COMPARED
    ]
    if copies:  # left behind by a call that was interrupted
        monitor.transaction(copies)
        machine = query_machine(monitor)
    chosen = machine.select(nodes, lambda node: bool(node.evidence))
    verdicts = tuple(_judge(monitor, machine, node) for node in chosen)
    for verdict in verdicts:
        node = escape(verdict.node.name)
        logger.info('rescue verdict: node "%s" %s: %s', node, verdict.word, verdict.reason)
    return VerdictReport(machine.migration, verdicts)


def _judge(monitor: QmpCommands, machine: Machine, node: Node) -> Verdict:
    consistent = tuple(bitmap for bitmap in node.subjects if not bitmap.is_inconsistent)
    if not node.twin:
        if node.tells_of_a_crash:
            return Verdict(node, "touched", f"{_CRASH}, before this machine started", consistent)
        if not node.evidence:
            return Verdict(node, "not-armed", "it has no sentinel")
        reason = "its sentinel was made by another machine, or before this machine started"
        return Verdict(node, "left-over", reason)
    word, reason = _word(monitor, machine, node, node.twin)
    if word != "untouched":
        # Since the disk went away each bitmap may have been enabled, disabled, or merged from
        # others, so each may miss writes.
        return Verdict(node, word, reason, consistent)
    return Verdict(node, word, reason, tuple(b for b in consistent if _travelled(machine, b)))


_CRASH = "another process opened the disk for writing, and did not close it properly"


def _word(
    monitor: QmpCommands, machine: Machine, node: Node, twin: NodeBitmap
) -> tuple[VerdictWord, str]:
    """Returns the verdict on a node that is armed, and the reason for it."""
    sentinel = node.find(sentinel_of(twin.name))
    if not sentinel:
        reason = "the sentinel is gone: a program that does not know bitmaps wrote to the disk"
        return "touched", reason
    if sentinel.is_inconsistent:
        return "touched", _CRASH
    if not (sentinel.is_recording and twin.is_recording):
        return "unknown", "the sentinel or its twin was disabled, so writes are missing from it"
    if machine.migration not in ("", "none") and not _stayed_here(machine, sentinel):
        return "unknown", "the sentinel travelled: the block-bitmap-mapping does not leave it out"
    is_equal = _are_equal(monitor, node, sentinel, twin)
    if is_equal is None:
        return "unknown", "QEMU gives no digests of bitmaps"
    if not is_equal:
        reason = (
            "the sentinel has writes that this machine did not make, or lacks writes that it made"
        )
        return "touched", reason
    return "untouched", "this machine wrote to every place that was written to"


def _are_equal(
    monitor: QmpCommands, node: Node, sentinel: NodeBitmap, twin: NodeBitmap
) -> bool | None:
    """Returns whether a sentinel and its twin have the same bits, though the guest may write.

    They are copied in the order sentinel, twin, sentinel. The bits of the first copy must lie
    within the second copy, and those of the second within the third. Bits lie within a copy if
    merging them into it leaves its digest as it is. Returns None where QEMU gives no digests.
    """
    first, second, last, union = (twin._replace(name=name) for name in COMPARED)
    copied = (first, sentinel), (second, twin), (last, sentinel)
    work = [
        actions.add(node.name, name, twin.granularity, persistent=False, enabled=False)
        for name in COMPARED
    ]
    work += [actions.merge(node.name, copy.name, source.name) for copy, source in copied]
    work += [actions.merge(node.name, union.name, copy.name) for copy in (second, last)]
    work += [actions.merge(node.name, first.name, second.name)]
    monitor.transaction(work)
    digests = [query_digest(monitor, copy) for copy in (first, second, union, last)]
    monitor.transaction([actions.remove(node.name, name) for name in COMPARED])
    if None in digests:
        return None
    return digests[0] == digests[1] and digests[2] == digests[3]


def _stayed_here(machine: Machine, sentinel: NodeBitmap) -> bool:
    mapping = machine.mapping
    return mapping is not None and sentinel.name not in mapped_names(mapping, sentinel.node)


def _travelled(machine: Machine, bitmap: NodeBitmap) -> bool:
    """Returns whether a bitmap recorded here, and may miss what another machine wrote.

    A persistent bitmap that the mapping leaves out was stored in the image, where the other machine
    went on recording in it.
    """
    mapping = machine.mapping
    is_stored = (
        bitmap.is_persistent
        and mapping is not None
        and bitmap.name not in mapped_names(mapping, bitmap.node)
    )
    return bitmap.is_recording and not is_stored
