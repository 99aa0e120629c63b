"""``rescue verdict``: says whether somebody else touched the disks, and what bitmaps miss it.

*Spec*: spec/rescue.md, "Verdict".
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Literal, NamedTuple

from qcow2bm.errors import QmpRefusedError
from qcow2bm.qmp import actions, scratch
from qcow2bm.qmp.client import Monitor
from qcow2bm.qmp.names import COMPARED, SCRATCH_NODE, sentinel_of
from qcow2bm.qmp.nodes import Machine, Node, NodeBitmap, query_machine
from qcow2bm.qmp.veto import sha256
from qcow2bm.units import escape

VerdictWord = Literal["untouched", "touched", "unknown", "left-over", "not-armed"]
Remedy = Literal["remove", "all-dirty"]
SettlementOutcome = Literal["kept", "in-doubt", "removed", "all-dirty", "left"]

_OUTCOMES: dict[Remedy, SettlementOutcome] = {"remove": "removed", "all-dirty": "all-dirty"}


class Verdict(NamedTuple):
    """What was found on a node, and why; ``concerned`` are the bitmaps that something is due to."""

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
    """What was done by a verdict.

    ``is_armed`` is whether the node still is, because something is left to decide; ``obstacle``
    why nothing could be done, if that is so.
    """

    verdict: Verdict
    is_armed: bool
    bitmaps: tuple[BitmapSettlement, ...]
    obstacle: str = ""

    @property
    def is_safe(self) -> bool:
        """Whether nothing is lost, in doubt, or left to do."""
        return not self.is_armed and not self.verdict.is_bad


class VerdictReport(NamedTuple):
    """All that was found; ``migration`` is the last word of query-migrate, if any."""

    migration: str
    nodes: tuple[Verdict, ...]


def judge(monitor: Monitor, nodes: Sequence[str] = ()) -> VerdictReport:
    """Judges these nodes, or all that were armed.

    *Guarantees*: nothing is changed that matters to what is found when this is done again.

    Raises:
        StateError: it is not the time, see `Machine.require_settled`.
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
    if copies:  # of somebody who was interrupted
        monitor.transaction(copies)
        machine = query_machine(monitor)
    chosen = machine.select(nodes, lambda node: bool(node.evidence))
    return VerdictReport(
        machine.migration, tuple(_judge(monitor, machine, node) for node in chosen)
    )


def settle(monitor: Monitor, verdict: Verdict, remedy: Remedy | None = None) -> Settlement:
    """Disarms a node if there is nothing to decide, or does what was decided.

    *Guarantees*: a node is disarmed by the same transaction that does what is due to its bitmaps.
    Until then judging it again finds the same.

    Args:
        monitor: the source of the migration, which goes on.
        verdict: what `judge` found.
        remedy: what to do with bitmaps that may miss writes of somebody else: remove them, or
            make them dirty all over. Without it they stay, and the node stays armed.

    Raises:
        QmpError: QEMU does not answer.
    """
    node = verdict.node.name
    if verdict.is_bad and not remedy:
        return Settlement(verdict, True, _bitmap_settlements(verdict, "in-doubt"))
    busy = next((bitmap for bitmap in verdict.concerned if bitmap.is_busy), None)
    if busy:
        obstacle = f'"{escape(busy.name)}" is busy: try again when that has ended'
        return Settlement(verdict, True, _bitmap_settlements(verdict, "left"), obstacle)
    outcome: SettlementOutcome = _OUTCOMES[remedy] if remedy and verdict.is_bad else "kept"
    is_scratch_needed = outcome == "all-dirty" and verdict.concerned
    size = verdict.node.virtual_size
    try:
        with scratch.all_dirty(monitor, size) if is_scratch_needed else nullcontext():
            work = [
                *_due(verdict, outcome),
                *(actions.remove(node, n) for n in verdict.node.evidence),
            ]
            if work:
                monitor.transaction(work)
    except QmpRefusedError as error:
        return Settlement(
            verdict, True, _bitmap_settlements(verdict, "left"), f"QEMU refuses: {error.reason}"
        )
    return Settlement(verdict, False, _bitmap_settlements(verdict, outcome))


def _due(verdict: Verdict, outcome: SettlementOutcome) -> list[actions.Action]:
    """What is to be done with the bitmaps that are concerned."""
    node = verdict.node.name
    names = [bitmap.name for bitmap in verdict.concerned]
    if outcome == "removed":
        return [actions.remove(node, name) for name in names]
    if outcome == "all-dirty":
        return [actions.merge(node, name, scratch.NAME, SCRATCH_NODE) for name in names]
    sentinel = sentinel_of(verdict.node.twin.name) if verdict.node.twin else ""
    return [actions.merge(node, name, sentinel) for name in names]


def _judge(monitor: Monitor, machine: Machine, node: Node) -> Verdict:
    sound = tuple(bitmap for bitmap in node.subjects if not bitmap.is_inconsistent)
    if not node.twin:
        if node.tells_of_a_death:
            return Verdict(node, "touched", f"{_DEATH}, before this machine was started", sound)
        if not node.evidence:
            return Verdict(node, "not-armed", "it has no sentinel")
        reason = "its sentinel is of another machine, or of before this one was started"
        return Verdict(node, "left-over", reason)
    word, reason = _evidence(monitor, machine, node, node.twin)
    if word != "untouched":
        # What they were when the disk went away, nobody knows: they may have been enabled, or made
        # out of others, since then.
        return Verdict(node, word, reason, sound)
    return Verdict(node, word, reason, tuple(b for b in sound if _travelled(machine, b)))


_DEATH = "somebody opened the disk for writing, and did not end properly"


def _evidence(
    monitor: Monitor, machine: Machine, node: Node, twin: NodeBitmap
) -> tuple[VerdictWord, str]:
    sentinel = node.find(sentinel_of(twin.name))
    if not sentinel:
        return "touched", "the sentinel is gone: a program wrote that does not know bitmaps"
    if sentinel.is_inconsistent:
        return "touched", _DEATH
    if not (sentinel.is_recording and twin.is_recording):
        return "unknown", "the sentinel or its twin was disabled: writes are missing from it"
    if machine.migration not in ("", "none") and not _stayed_here(machine, sentinel):
        return "unknown", "the sentinel travelled: the block-bitmap-mapping does not leave it out"
    is_equal = _are_equal(monitor, node, sentinel, twin)
    if is_equal is None:
        return "unknown", "QEMU does not give digests of bitmaps"
    if not is_equal:
        return "touched", "the sentinel has writes that this machine did not make, or misses some"
    return "untouched", "nobody wrote anywhere that this machine did not write, too"


def _are_equal(monitor: Monitor, node: Node, sentinel: NodeBitmap, twin: NodeBitmap) -> bool | None:
    """Whether sentinel and twin have the same, though the guest may write meanwhile.

    Copies are made in the order sentinel, twin, sentinel. The first must lie within the second,
    and that within the third: then merging it changes no digest. None without digests.
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
    digests = [sha256(monitor, copy) for copy in (first, second, union, last)]
    monitor.transaction([actions.remove(node.name, name) for name in COMPARED])
    if None in digests:
        return None
    return digests[0] == digests[1] and digests[2] == digests[3]


def _stayed_here(machine: Machine, sentinel: NodeBitmap) -> bool:
    return machine.mapping is not None and sentinel.name not in _mapped(machine, sentinel.node)


def _mapped(machine: Machine, node: str) -> set[str]:
    """The bitmaps of a node that travel by the mapping."""
    listed = [one for one in machine.mapping or [] if one["node-name"] == node]
    return {bitmap["name"] for one in listed for bitmap in one["bitmaps"]}


def _travelled(machine: Machine, bitmap: NodeBitmap) -> bool:
    """Whether it recorded here, and nobody carried it on for us in the image."""
    is_stored = bitmap.is_persistent and machine.mapping is not None
    is_stored = is_stored and bitmap.name not in _mapped(machine, bitmap.node)
    return bitmap.is_recording and not is_stored


def _bitmap_settlements(
    verdict: Verdict, outcome: SettlementOutcome
) -> tuple[BitmapSettlement, ...]:
    return tuple(
        BitmapSettlement(
            bitmap,
            outcome if bitmap in verdict.concerned else "kept",
            "inconsistent already" if bitmap.is_inconsistent else "",
        )
        for bitmap in verdict.node.subjects
    )
