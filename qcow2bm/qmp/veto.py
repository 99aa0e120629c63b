"""Makes QEMU store again the bitmaps that a failed migration made it drop.

A migration with the capability dirty-bitmaps forbids QEMU to store the bitmaps that it carries. If
the migration ends before the disks are given away, QEMU forgets to lift this veto, and QMP does not
show it. A transaction that removes a bitmap, and is aborted, lifts the veto: the bitmap stays in
memory the whole time.

*Spec*: spec/rescue.md, "Start".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from qcow2bm.bitmaps.entries import MAX_NAME_SIZE
from qcow2bm.errors import Hint, QmpRefusedError, advise
from qcow2bm.log import logger
from qcow2bm.qmp import actions, scratch
from qcow2bm.qmp.commands import QmpCommands
from qcow2bm.qmp.machine import Node, NodeBitmap
from qcow2bm.qmp.names import copy_of, is_evidence, original_of
from qcow2bm.qmp.queries import query_bitmap, query_digest, query_machine
from qcow2bm.units import encode_name, escape

RescueOutcome = Literal["rescued", "copied", "planned", "left", "lost"]
Proof = Literal["sha256", "count"]


class BitmapRescue(NamedTuple):
    """The result for one bitmap.

    Attributes:
        bitmap: as it was before; with the outcome "lost", as it is now if it is still there.
        outcome: "rescued": QEMU stores it. "copied": QEMU stores a copy that has its name.
            "planned": a dry run. "left": nothing was done. "lost": its bits are not what they were.
        reason: why it is left or lost.
        proof: by what the bits were proved to be the same; None if they were not.
        sha256: of the bits, in hex; None where QEMU was not asked, or does not give it.
        hint: what the caller can do about the reason; None if there is no hint.
    """

    bitmap: NodeBitmap
    outcome: RescueOutcome
    reason: str = ""
    proof: Proof | None = None
    sha256: str | None = None
    hint: Hint | None = None

    @property
    def message(self) -> str:
        """The reason, and the hint in the words of this library."""
        return advise(self.reason, self.hint)

    @property
    def is_safe(self) -> bool:
        """Whether QEMU stores the bitmap; after a dry run, whether it would."""
        return self.outcome not in ("left", "lost")


class RescueReport(NamedTuple):
    """The result of `lift_vetoes`.

    ``migration`` is the status of the last migration, as query-migrate has it; "" if there was
    none.
    """

    migration: str
    bitmaps: tuple[BitmapRescue, ...]


def lift_vetoes(
    monitor: QmpCommands, nodes: Sequence[str] = (), *, dry_run: bool = False
) -> RescueReport:
    """Makes QEMU store the persistent bitmaps of these nodes, or of all; ``rescue start``.

    *Guarantees*: after every command that is sent, each bitmap is in memory, under its name or
    that of its copy, and records if it did before. A second call changes nothing, and finishes
    what an interrupted one began.

    Raises:
        StateError: the machine's state does not allow it, see `Machine.require_settled`.
        QmpError: QEMU does not answer.
        ValueError: there is no node of such a name, or it has no persistent bitmaps.
    """
    machine = query_machine(monitor)
    machine.require_settled()
    chosen = machine.select(nodes, lambda node: node.has_persistent and not node.is_read_only)
    for node in chosen:
        if not node.has_persistent:
            raise ValueError(f'the node "{escape(node.name)}" has no persistent bitmaps')
    if not dry_run:
        scratch.discard_leftover(monitor)
    found = []
    for node in chosen:
        for bitmap, left in plan(node):
            if left:
                found.append(left)
            elif dry_run:
                found.append(BitmapRescue(bitmap, "planned"))
            else:
                found.append(_rescue(monitor, node, bitmap, is_running=machine.is_running))
            _log(found[-1])
    return RescueReport(machine.migration, tuple(found))


def plan(node: Node) -> Iterator[tuple[NodeBitmap, BitmapRescue | None]]:
    """Yields each persistent bitmap of a node, and its result if it must be left as it is."""
    for bitmap in node.bitmaps:
        is_replaced = bitmap.is_inconsistent and node.find(copy_of(bitmap.name))
        if bitmap.is_persistent and not is_evidence(bitmap.name) and not is_replaced:
            yield bitmap, _left(node, bitmap)


def _left(node: Node, bitmap: NodeBitmap) -> BitmapRescue | None:
    """Returns the result for a bitmap that must be left as it is; None if it can be rescued."""
    original = node.find(original_of(bitmap.name))
    hint: Hint | None = None
    if bitmap.is_inconsistent:
        reason = "it is inconsistent: writes are missing from it; remove it, and take a full backup"
    elif node.is_read_only:
        reason = "the node is read-only: QEMU stores nothing there, and has nothing to store"
    elif bitmap.is_busy:
        reason = "it is busy: a job uses it; try again when the job has ended"
    elif node.twin:
        reason, hint = "the node is armed, and not judged: its bits may be wrong", "judge"
    elif original and not original.is_inconsistent:
        name = escape(original.name)
        reason = f'it is a copy of "{name}", which is there as well: remove one of them'
    else:
        return None
    return BitmapRescue(bitmap, "left", reason, hint=hint)


def _rescue(
    monitor: QmpCommands, node: Node, bitmap: NodeBitmap, *, is_running: bool
) -> BitmapRescue:
    digest = query_digest(monitor, bitmap)
    original = original_of(bitmap.name)
    if original:
        if node.find(original):  # the image still had it, in_use, when this machine started
            monitor.transaction([actions.remove(bitmap.node, original)])
        return _rename(monitor, bitmap, original, digest, is_running=is_running)
    try:
        monitor.transaction([actions.remove(bitmap.node, bitmap.name), actions.ABORT])
    except QmpRefusedError as error:
        # The transaction has to fail, but by the abort alone.
        if actions.ABORTED not in error.reason:
            return copy_and_rename(monitor, bitmap, digest, is_running=is_running)
    return _verified(monitor, bitmap, digest, "rescued", is_running=is_running)


def copy_and_rename(
    monitor: QmpCommands, bitmap: NodeBitmap, digest: str | None, *, is_running: bool
) -> BitmapRescue:
    """Replaces a bitmap by a new one with the same bits, which no migration has a veto on.

    It takes two transactions, since QEMU can neither rename a bitmap nor remove and add the same
    name in one transaction. Between the two the bits have the name of the copy, and are stored
    under that name if the machine ends then.
    """
    name, copy = bitmap.name, copy_of(bitmap.name)
    if len(encode_name(copy)) > MAX_NAME_SIZE:
        return BitmapRescue(bitmap, "left", "its name is too long for a copy beside it")
    try:
        monitor.transaction(_replacement(bitmap, copy))
    except QmpRefusedError as error:
        return BitmapRescue(bitmap, "left", f"QEMU refuses: {error.reason}")
    return _rename(monitor, bitmap._replace(name=copy), name, digest, is_running=is_running)


def _rename(
    monitor: QmpCommands, copy: NodeBitmap, name: str, digest: str | None, *, is_running: bool
) -> BitmapRescue:
    try:
        monitor.transaction(_replacement(copy, name))
    except QmpRefusedError as error:
        reason = f"QEMU refuses: {error.reason}"
        return BitmapRescue(copy, "left", reason, hint="rename-copies")
    bitmap = copy._replace(name=name)
    return _verified(monitor, bitmap, digest, "copied", is_running=is_running)


def _replacement(bitmap: NodeBitmap, name: str) -> list[actions.Action]:
    """The actions that replace a bitmap by a new one of another name, with the same bits.

    The new bitmap records from the moment it is added, so it misses no write in between.
    """
    node, granularity, enabled = bitmap.node, bitmap.granularity, bitmap.is_recording
    return [
        actions.add(node, name, granularity, persistent=True, enabled=enabled),
        actions.merge(node, name, bitmap.name),
        actions.remove(node, bitmap.name),
    ]


def _differ_only_in_bits(bitmap: NodeBitmap, other: NodeBitmap) -> bool:
    """Returns whether two bitmaps are alike but for their bits; a job may have begun to use one."""
    like_other = bitmap._replace(
        dirty_bytes=other.dirty_bytes, is_busy=other.is_busy, place=other.place
    )
    return like_other == other


def _verified(
    monitor: QmpCommands,
    before: NodeBitmap,
    digest: str | None,
    outcome: RescueOutcome,
    *,
    is_running: bool,
) -> BitmapRescue:
    """Returns the outcome if the bits are the same, or "lost".

    Where the guest writes and the bitmap records, the bits may have become more.
    """
    after = query_bitmap(monitor, before.node, before.name)
    if not after:
        return BitmapRescue(before, "lost", "it is gone; take a full backup", None, digest)
    now = query_digest(monitor, after)
    more = after.dirty_bytes - before.dirty_bytes
    may_grow = is_running and before.is_recording
    if _differ_only_in_bits(after, before):
        if digest and now == digest:
            return BitmapRescue(before, outcome, "", "sha256", now)
        if more > 0 if may_grow and digest else more == 0 and not digest:
            return BitmapRescue(before, outcome, "", "count", now)
    reason = f"it changed: {before.dirty_bytes} bytes were dirty, and {after.dirty_bytes} are now"
    return BitmapRescue(after, "lost", f"{reason}; take a full backup", None, now)


def _log(done: BitmapRescue) -> None:
    name, node = escape(done.bitmap.name), escape(done.bitmap.node)
    reason = f": {done.message}" if done.message else ""
    logger.info('rescue start: bitmap "%s" of node "%s" %s%s', name, node, done.outcome, reason)
