"""``rescue start``: makes QEMU store again what a migration that failed made it drop.

A migration with dirty-bitmaps vetoes the storing of every bitmap it carries, and forgets to lift
the veto if it ends before the disks were given away. QMP does not show it. Removing a bitmap in
a transaction that is aborted lifts it: the bitmap is never gone, and comes back without it.

*Spec*: spec/rescue.md, "Start".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from qcow2bm.bitmaps.entries import MAX_NAME_SIZE
from qcow2bm.errors import QmpRefusedError
from qcow2bm.qmp import actions, scratch
from qcow2bm.qmp.client import Monitor
from qcow2bm.qmp.names import copy_of, is_evidence, original_of
from qcow2bm.qmp.nodes import Node, NodeBitmap, query_bitmap, query_machine
from qcow2bm.units import encode_name, escape

RescueOutcome = Literal["rescued", "copied", "planned", "left", "lost"]
Proof = Literal["sha256", "count"]


class BitmapRescue(NamedTuple):
    """What became of one bitmap, and by what it was verified that its bits are the same.

    ``bitmap`` is as it was before, ``sha256`` that of its bits, None where it was not asked for.
    """

    bitmap: NodeBitmap
    outcome: RescueOutcome
    reason: str = ""
    proof: Proof | None = None
    sha256: str | None = None

    @property
    def is_safe(self) -> bool:
        """Whether QEMU stores it, or will after what is planned."""
        return self.outcome not in ("left", "lost")


class RescueReport(NamedTuple):
    """What ``rescue start`` did; ``migration`` is the last word of query-migrate, if any."""

    migration: str
    bitmaps: tuple[BitmapRescue, ...]


def lift_vetoes(
    monitor: Monitor, nodes: Sequence[str] = (), *, dry_run: bool = False
) -> RescueReport:
    """Rescues the persistent bitmaps of these nodes, or of all.

    *Guarantees*: every command leaves each bitmap in memory, under its name or that of its copy,
    and recording if it was. Doing it again does no harm and ends what was interrupted.

    Raises:
        StateError: it is not the time, see `Machine.require_settled`.
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
    done = []
    for node in chosen:
        for bitmap, why_left in plan(node):
            if why_left:
                done.append(BitmapRescue(bitmap, "left", why_left))
            elif dry_run:
                done.append(BitmapRescue(bitmap, "planned"))
            else:
                done.append(_rescue(monitor, node, bitmap, is_running=machine.is_running))
    return RescueReport(machine.migration, tuple(done))


def plan(node: Node) -> Iterator[tuple[NodeBitmap, str]]:
    """Each persistent bitmap of a node, with why it has to be left as it is, if it has to."""
    for bitmap in node.bitmaps:
        is_replaced = bitmap.is_inconsistent and node.find(copy_of(bitmap.name))
        if bitmap.is_persistent and not is_evidence(bitmap.name) and not is_replaced:
            yield bitmap, _why_left(node, bitmap)


def _why_left(node: Node, bitmap: NodeBitmap) -> str:
    if bitmap.is_inconsistent:
        return "it is inconsistent: writes are missing from it; remove it, and take a full backup"
    if node.is_read_only:
        return "the node is read-only: QEMU stores nothing there, and has nothing to store"
    if bitmap.is_busy:
        return "it is busy: a job uses it; try again when that has ended"
    if node.twin:
        return "the node is armed: run rescue verdict first, which says if its bits are right"
    original = node.find(original_of(bitmap.name))
    if original and not original.is_inconsistent:
        name = escape(original.name)
        return f'it is a copy of "{name}", which is there as well: remove one of them'
    return ""


def _rescue(monitor: Monitor, node: Node, bitmap: NodeBitmap, *, is_running: bool) -> BitmapRescue:
    digest = sha256(monitor, bitmap)
    original = original_of(bitmap.name)
    if original:
        if node.find(original):  # what the image still had of it when another machine started
            monitor.transaction([actions.remove(bitmap.node, original)])
        return _rename(monitor, bitmap, original, digest, is_running=is_running)
    try:
        monitor.transaction([actions.remove(bitmap.node, bitmap.name), actions.ABORT])
    except QmpRefusedError as error:
        # It is to fail, but by the abort and nothing else.
        if actions.ABORTED not in error.reason:
            return copy_and_rename(monitor, bitmap, digest, is_running=is_running)
    return _verified(monitor, bitmap, digest, "rescued", is_running=is_running)


def copy_and_rename(
    monitor: Monitor, bitmap: NodeBitmap, digest: str | None, *, is_running: bool
) -> BitmapRescue:
    """Puts a new bitmap, which no migration vetoed, in the place of one, in two transactions.

    QEMU cannot rename, and cannot remove and add one name in one transaction. In between the
    bits have another name, under which they are stored if the machine ends then.
    """
    name, copy = bitmap.name, copy_of(bitmap.name)
    if len(encode_name(copy)) > MAX_NAME_SIZE:
        return BitmapRescue(bitmap, "left", "its name is too long for a copy beside it")
    try:
        monitor.transaction(_replace(bitmap, copy))
    except QmpRefusedError as error:
        return BitmapRescue(bitmap, "left", f"QEMU refuses: {error.reason}")
    return _rename(monitor, bitmap._replace(name=copy), name, digest, is_running=is_running)


def _rename(
    monitor: Monitor, copy: NodeBitmap, name: str, digest: str | None, *, is_running: bool
) -> BitmapRescue:
    try:
        monitor.transaction(_replace(copy, name))
    except QmpRefusedError as error:
        return BitmapRescue(
            copy, "left", f"QEMU refuses: {error.reason}; try again, or rescue finish"
        )
    bitmap = copy._replace(name=name)
    return _verified(monitor, bitmap, digest, "copied", is_running=is_running)


def _replace(bitmap: NodeBitmap, name: str) -> list[actions.Action]:
    """A new bitmap of another name, with the same bits, in the place of one.

    It records from the moment it is added: it misses nothing that is written meanwhile.
    """
    node, granularity, enabled = bitmap.node, bitmap.granularity, bitmap.is_recording
    return [
        actions.add(node, name, granularity, persistent=True, enabled=enabled),
        actions.merge(node, name, bitmap.name),
        actions.remove(node, bitmap.name),
    ]


def sha256(monitor: Monitor, bitmap: NodeBitmap) -> str | None:
    """The digest of its bits; None where QEMU does not give it, which is a command for debugging.

    Raises:
        QmpError: QEMU does not answer.
    """
    where = {"node": bitmap.node, "name": bitmap.name}
    try:
        return str(monitor.execute("x-debug-block-dirty-bitmap-sha256", where)["sha256"])
    except QmpRefusedError:
        return None


def _same(bitmap: NodeBitmap, other: NodeBitmap) -> bool:
    """Whether only their bits may differ; a job may have begun to use it meanwhile."""
    return bitmap._replace(dirty_bytes=0, is_busy=other.is_busy) == other._replace(dirty_bytes=0)


def _verified(
    monitor: Monitor,
    before: NodeBitmap,
    digest: str | None,
    outcome: RescueOutcome,
    *,
    is_running: bool,
) -> BitmapRescue:
    """The outcome, if the bits are what they were; where the guest writes, they may be more."""
    after = query_bitmap(monitor, before.node, before.name)
    if not after:
        return BitmapRescue(before, "lost", "it is gone; take a full backup", None, digest)
    now = sha256(monitor, after)
    more = after.dirty_bytes - before.dirty_bytes
    may_grow = is_running and before.is_recording
    if _same(after, before):
        if digest and now == digest:
            return BitmapRescue(before, outcome, "", "sha256", now)
        if more > 0 if may_grow and digest else more == 0 and not digest:
            return BitmapRescue(before, outcome, "", "count", now)
    reason = f"it changed: {before.dirty_bytes} bytes were dirty, and {after.dirty_bytes} are now"
    return BitmapRescue(after, "lost", f"{reason}; take a full backup", None, now)
