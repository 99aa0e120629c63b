"""Settles the bitmaps of a node by a verdict, and disarms the node.

*Spec*: spec/rescue.md, "Verdict".
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Literal, NamedTuple

from qcow2bm.errors import QmpRefusedError
from qcow2bm.log import logger
from qcow2bm.qmp import actions, scratch
from qcow2bm.qmp.commands import QmpCommands
from qcow2bm.qmp.machine import NodeBitmap
from qcow2bm.qmp.names import SCRATCH_NODE, sentinel_of
from qcow2bm.qmp.verdict import Verdict
from qcow2bm.units import escape

Remedy = Literal["remove", "all-dirty"]
SettlementOutcome = Literal["kept", "in-doubt", "removed", "all-dirty", "left"]

_OUTCOMES: dict[Remedy, SettlementOutcome] = {"remove": "removed", "all-dirty": "all-dirty"}


class BitmapSettlement(NamedTuple):
    """The result for one bitmap, and the reason for it."""

    bitmap: NodeBitmap
    outcome: SettlementOutcome
    reason: str


class Settlement(NamedTuple):
    """The result of `settle`.

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


def settle(monitor: QmpCommands, verdict: Verdict, remedy: Remedy | None = None) -> Settlement:
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
