"""Judges, after a migration, whether another machine wrote to the disks, and settles the bitmaps.

*Spec*: spec/rescue.md, "Verdict".
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Literal, NamedTuple

from qcow2bm.errors import QmpRefusedError
from qcow2bm.log import logger
from qcow2bm.qmp import actions, scratch
from qcow2bm.qmp.client import Monitor
from qcow2bm.qmp.machine import Machine, Node, NodeBitmap
from qcow2bm.qmp.mapping import mapped_names
from qcow2bm.qmp.names import COMPARED, SCRATCH_NODE, sentinel_of
from qcow2bm.qmp.queries import query_digest, query_machine
from qcow2bm.units import escape

VerdictWord = Literal["untouched", "touched", "unknown", "left-over", "not-armed"]
Remedy = Literal["remove", "all-dirty"]
SettlementOutcome = Literal["kept", "in-doubt", "removed", "all-dirty", "left"]

_OUTCOMES: dict[Remedy, SettlementOutcome] = {"remove": "removed", "all-dirty": "all-dirty"}


class Verdict(NamedTuple):
    """What the sentinel of a node says, and why; ``concerned`` are the bitmaps to be settled."""

    node: Node
    word: VerdictWord
    reason: str
    concerned: tuple[NodeBitmap, ...] = ()

    @property
    def is_bad(self) -> bool:
        """Whether bitmaps may miss writes."""
        return self.word in ("touched", "unknown")


class BitmapSettlement(NamedTuple):
    """What became of one bitmap, and why."""

    bitmap: NodeBitmap
    outcome: SettlementOutcome
    reason: str


class Settlement(NamedTuple):
    """What `settle` did.

    Attributes:
        verdict: the verdict that was settled.
        is_armed: whether the node is still armed, because something is left to decide.
        bitmaps: what became of each bitmap.
        obstacle: why nothing could be done; "" if nothing stood in the way.
    """

    verdict: Verdict
    is_armed: bool
    bitmaps: tuple[BitmapSettlement, ...]
    obstacle: str = ""

    @property
    def is_safe(self) -> bool:
        """Whether no bitmap is lost or in doubt, and nothing is left to do."""
        return not self.is_armed and not self.verdict.is_bad


class VerdictReport(NamedTuple):
    """What `judge` found.

    ``migration`` is the status of the last migration, as query-migrate has it; "" if there was
    none.
    """

    migration: str
    nodes: tuple[Verdict, ...]


def judge(monitor: Monitor, nodes: Sequence[str] = ()) -> VerdictReport:
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


def settle(monitor: Monitor, verdict: Verdict, remedy: Remedy | None = None) -> Settlement:
    """Does to the bitmaps of a node what a verdict calls for, and disarms the node.

    *Guarantees*: one transaction both changes the bitmaps and disarms the node. Until then `judge`
    finds the same.

    Args:
        monitor: the source of the migration, which goes on.
        verdict: what `judge` found.
        remedy: for bitmaps that may miss writes of another machine: "remove" removes them,
            "all-dirty" sets all their bits. Without a remedy they stay, and the node stays armed.

    Raises:
        QmpError: QEMU does not answer.
    """
    if verdict.is_bad and not remedy:
        return _settlement(verdict, "in-doubt", is_armed=True)
    busy = next((bitmap for bitmap in verdict.concerned if bitmap.is_busy), None)
    if busy:
        obstacle = f'"{escape(busy.name)}" is busy: try again when the job that uses it has ended'
        return _settlement(verdict, "left", is_armed=True, obstacle=obstacle)
    node = verdict.node
    outcome: SettlementOutcome = _OUTCOMES[remedy] if remedy and verdict.is_bad else "kept"
    is_scratch_needed = outcome == "all-dirty" and verdict.concerned
    try:
        with scratch.all_dirty(monitor, node.virtual_size) if is_scratch_needed else nullcontext():
            work = _due(verdict, outcome)
            work += [actions.remove(node.name, name) for name in node.evidence]
            if work:
                monitor.transaction(work)
    except QmpRefusedError as error:
        obstacle = f"QEMU refuses: {error.reason}"
        return _settlement(verdict, "left", is_armed=True, obstacle=obstacle)
    logger.info('rescue verdict: node "%s" is disarmed, bitmaps %s', escape(node.name), outcome)
    return _settlement(verdict, outcome, is_armed=False)


def _due(verdict: Verdict, outcome: SettlementOutcome) -> list[actions.Action]:
    """The actions that give the bitmaps that are concerned this outcome."""
    node = verdict.node.name
    names = [bitmap.name for bitmap in verdict.concerned]
    if outcome == "removed":
        return [actions.remove(node, name) for name in names]
    if outcome == "all-dirty":
        return [actions.merge(node, name, scratch.NAME, SCRATCH_NODE) for name in names]
    sentinel = sentinel_of(verdict.node.twin.name) if verdict.node.twin else ""
    return [actions.merge(node, name, sentinel) for name in names]


def _settlement(
    verdict: Verdict, outcome: SettlementOutcome, *, is_armed: bool, obstacle: str = ""
) -> Settlement:
    """A settlement that gives the bitmaps that are concerned this outcome, and keeps the others."""
    bitmaps = tuple(
        BitmapSettlement(
            bitmap,
            outcome if bitmap in verdict.concerned else "kept",
            "inconsistent already" if bitmap.is_inconsistent else "",
        )
        for bitmap in verdict.node.subjects
    )
    return Settlement(verdict, is_armed, bitmaps, obstacle)


def _judge(monitor: Monitor, machine: Machine, node: Node) -> Verdict:
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
    monitor: Monitor, machine: Machine, node: Node, twin: NodeBitmap
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


def _are_equal(monitor: Monitor, node: Node, sentinel: NodeBitmap, twin: NodeBitmap) -> bool | None:
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
