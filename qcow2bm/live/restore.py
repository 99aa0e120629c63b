"""Puts the bitmaps of an offload file back, into a running machine or into an image.

*Spec*: spec/live.md, "Restore".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple
from uuid import uuid4

from qcow2bm.api import Bitmap, Edit, Image
from qcow2bm.bitmaps.status import VALID
from qcow2bm.clusters.plan import Plan
from qcow2bm.errors import BitmapError, EvidenceError, QmpError, QmpRefusedError
from qcow2bm.format.offload_file import PlannedBitmap, PlannedNode
from qcow2bm.live import tail
from qcow2bm.live.offload_file import OffloadFile
from qcow2bm.live.place import has_all, is_as_planned, node_of
from qcow2bm.log import logger
from qcow2bm.migration.sidecar import SavedBitmap
from qcow2bm.qmp import actions, scratch, scratch_image
from qcow2bm.qmp.client import Monitor
from qcow2bm.qmp.machine import Machine, Node, NodeBitmap
from qcow2bm.qmp.names import MERGED, SCRATCH_NODE, tail_of
from qcow2bm.qmp.queries import has_capability, query_digest, query_machine
from qcow2bm.units import escape

RestoreOutcome = Literal["restored", "kept", "left", "lost"]


class BitmapReturn(NamedTuple):
    """The result for one bitmap.

    Attributes:
        node: the node that has it, or had it.
        name: of the bitmap.
        outcome: "restored": it is there again, with every write. "kept": it was there, and is as
            it was planned. "left": it is as it was before, and something stands in the way.
            "lost": it is neither in the machine nor in the file.
        reason: why it is left or lost.
    """

    node: str
    name: str
    outcome: RestoreOutcome
    reason: str = ""

    @property
    def is_safe(self) -> bool:
        """Whether the bitmap is there, with every write."""
        return self.outcome in ("restored", "kept")


class RestoreReport(NamedTuple):
    """The result of `restore` or `restore_offline`.

    ``bitmaps`` is what became of each bitmap, or would become of it. ``plan`` is what would be
    written in a dry run; else it is None.
    """

    bitmaps: tuple[BitmapReturn, ...]
    plan: Plan | None = None


def restore(
    monitor: Monitor,
    path: str,
    *,
    is_alone: bool = False,
    on_progress: Callable[[BitmapReturn], None] = lambda done: None,
) -> RestoreReport:
    """Puts bitmaps back into the machine that has the disks now; ``live restore --qmp``.

    Each bitmap gets what the tail recorded since the bitmap was taken out, unless it was disabled.
    The nodes are found by their tails, and may have other names than on the machine from which the
    bitmaps were taken. When all bitmaps of a node are back, its tail is removed.

    *Guarantees*: a bitmap is added together with all its bits, by one command of QEMU. All tails
    are judged before anything is changed. A second call goes on, or changes nothing.

    Args:
        monitor: the machine.
        path: of the offload file.
        is_alone: whether the caller asserts that no other machine wrote to the disks, if this
            machine goes on after it migrated with the capability dirty-bitmaps.
        on_progress: called with the result for each bitmap.

    Raises:
        StateError: the machine's state does not allow it, see `Machine.require_settled`.
        EvidenceError: a tail is missing, or may miss writes.
        QmpError: QEMU does not answer, or did not load a bitmap as it is in the file.
        StorageError: the file cannot be read.
        FormatError: the file is no offload file, or is damaged.
    """
    file = OffloadFile.read(path)
    machine = query_machine(monitor)
    machine.require_settled()
    if not is_alone:
        _require_alone(monitor, machine)
    scratch.discard_leftover(monitor)
    places = [_judged(file, machine, planned) for planned in file.plan.nodes]
    done: list[BitmapReturn] = []
    number = 0
    for node, planned in zip(places, file.plan.nodes, strict=True):
        returned = []
        for bitmap in planned.bitmaps:
            if node.find(tail_of(planned.uuid)):
                returned.append(_put_back(monitor, file, number, node))
            else:
                returned.append(BitmapReturn(node.name, bitmap.name, "kept"))
            on_progress(returned[-1])
            number += 1
        if node.find(tail_of(planned.uuid)) and all(one.is_safe for one in returned):
            monitor.transaction([actions.remove(node.name, tail_of(planned.uuid))])
            logger.info('live restore: the tail of node "%s" is removed', escape(node.name))
        done += returned
    return RestoreReport(tuple(done))


def _require_alone(monitor: Monitor, machine: Machine) -> None:
    """Raises where the tails are as this machine has them, and another may have written since.

    With the capability, QEMU keeps its bitmaps in memory when it gives the disks away. Without it,
    QEMU loads what the image has when the disks come back.
    """
    has_left = machine.migration == "completed" and machine.is_source
    if has_left and has_capability(monitor, "dirty-bitmaps"):
        reason = (
            "this machine migrated with the capability dirty-bitmaps, and goes on: its tail lacks "
            "what the destination wrote, if the destination ran"
        )
        raise EvidenceError(reason, "assert-alone")


def _judged(file: OffloadFile, machine: Machine, planned: PlannedNode) -> Node:
    """Returns the node that the bitmaps belong to, if every write to it is known."""
    node = node_of(machine, planned)
    if not node.find(tail_of(planned.uuid)) and has_all(node, planned):
        return node
    reason = tail.why_unusable(file.plan, planned, node)
    if reason:
        raise EvidenceError(f'node "{escape(node.name)}": {reason}', None)
    return node


def _put_back(monitor: Monitor, file: OffloadFile, number: int, node: Node) -> BitmapReturn:
    planned_node, planned = file.plan.bitmaps[number]
    found = node.find(planned.name)
    result = BitmapReturn(node.name, planned.name, "restored")
    if not found and not file.has_copy(number):
        reason = "it is neither in the machine nor in the file: take a full backup"
        return result._replace(outcome="lost", reason=reason)
    if found and not is_as_planned(found, planned):
        reason = found.why_unusable or "another bitmap of this name is there"
        return result._replace(outcome="left", reason=reason)
    tail_name = tail_of(planned_node.uuid) if planned.enabled else None
    copy = file.read_copy(number) if file.has_copy(number) else None
    if found and (not copy or query_digest(monitor, found) == copy.sha256()):
        copy = None  # the machine has its bits
    work = list(_work(node.name, planned, found, tail_name, has_copy=copy is not None))
    try:
        if copy:
            _with_copy(monitor, copy, work)
        elif work:
            monitor.transaction(work)
    except QmpRefusedError as error:
        return result._replace(outcome="left", reason=f"QEMU refuses: {error.reason}")
    return result


def _work(
    node: str,
    planned: PlannedBitmap,
    found: NodeBitmap | None,
    tail_name: str | None,
    *,
    has_copy: bool,
) -> Iterator[actions.Action]:
    """The actions of the transaction that completes a bitmap.

    The bitmap records from the first of them on, so it misses no write in between. QEMU takes
    seconds to merge a coarser bitmap into one that is full of bits, and milliseconds to merge it
    together with one of the same granularity.
    """
    name, granularity, enabled = planned
    if not found:
        yield actions.add(node, name, granularity, persistent=True, enabled=enabled)
    elif enabled and not found.is_recording:
        yield actions.enable(node, name)
    if has_copy:
        tails = [(node, tail_name)] if tail_name else []
        yield actions.merge_all(node, name, [(SCRATCH_NODE, name), *tails])
    elif tail_name:
        yield actions.add(node, MERGED, granularity, persistent=False, enabled=False)
        yield actions.merge(node, MERGED, tail_name)
        yield actions.merge(node, name, MERGED)
        yield actions.remove(node, MERGED)


def _with_copy(monitor: Monitor, copy: SavedBitmap, work: list[actions.Action]) -> None:
    """Does a transaction while QEMU has a copy as the bitmap of that name on the scratch node."""
    with (
        scratch_image.with_bitmap(copy) as image,
        scratch_image.lent(monitor, image, read_only=True),
    ):
        live = NodeBitmap(SCRATCH_NODE, copy.name, copy.granularity, 0, False, True, False, False)
        digest = query_digest(monitor, live)
        if digest not in (None, copy.sha256()):
            reason = f'QEMU did not load the bits of "{escape(copy.name)}" as they are in the file'
            raise QmpError("blockdev-add", reason)
        monitor.transaction(work)


def restore_offline(path: str, image: Image, *, dry_run: bool = False) -> RestoreReport:
    """Puts bitmaps back into the image of a machine that is off, in one edit; ``live restore``.

    Args:
        path: of the offload file. The tail in the image tells which bitmaps of the file are those
            of this image.
        image: the image; it is open for editing, or for reading in a dry run.
        dry_run: write nothing.

    Raises:
        EvidenceError: the tail is missing, or may miss writes.
        BitmapError: a bitmap is neither in the image nor in the file, or another one is there.
        StorageError, FormatError: as `restore` does.
        Qcow2BmError: as `Image.edit` and a commit do.
    """
    file = OffloadFile.read(path)
    planned_node = _planned_for(file, image)
    tail_name = tail_of(planned_node.uuid)
    with image.edit(dry_run=dry_run) as edit:
        for number, (node, planned) in enumerate(file.plan.bitmaps):
            if node is planned_node:
                copy = file.read_copy(number) if file.has_copy(number) else None
                _put_into(edit, image.bitmaps.get(planned.name), planned, copy)
                if planned.enabled:
                    edit.merge(planned.name, tail_name)
        edit.remove(tail_name)
        plan = edit.plan() if dry_run else None
    names = (bitmap.name for bitmap in planned_node.bitmaps)
    bitmaps = tuple(BitmapReturn(planned_node.name, name, "restored") for name in names)
    return RestoreReport(bitmaps, plan)


def _put_into(
    edit: Edit, found: Bitmap | None, planned: PlannedBitmap, copy: SavedBitmap | None
) -> None:
    """Gives the edit a bitmap with the bits of its copy, whatever the image has of it."""
    name, granularity, enabled = planned
    if not found:
        if not copy:
            raise BitmapError(name, "is neither in the image nor in the file")
        edit.load(name, granularity, copy.octets, enabled)
        return
    if found.status != VALID or found.granularity != granularity:
        raise BitmapError(name, f"is {found.status} in the image, with other properties")
    if copy and found.sha256() != copy.sha256():
        if not enabled:
            raise BitmapError(name, "has other bits than its copy in the file")
        # It was put back into the machine, and has recorded since.
        second = tail_of(uuid4())  # which no bitmap is called
        edit.load(second, granularity, copy.octets, enabled=False)
        edit.merge(name, second)
        edit.remove(second)
    if enabled:
        edit.enable(name)


def _planned_for(file: OffloadFile, image: Image) -> PlannedNode:
    """Returns the node of the plan whose disk an image is, if every write to it is known."""
    for planned in file.plan.nodes:
        found = image.bitmaps.get(tail_of(planned.uuid))
        if not found:
            continue
        if found.status != VALID or not found.auto:
            raise EvidenceError(f"the tail is {found.status}, or disabled", None)
        if found.granularity != file.plan.tail_granularity:
            raise EvidenceError("the tail has another granularity than it was made with", None)
        if image.virtual_size != planned.disk_size:
            raise EvidenceError("the disk has another size than when the tail was made", None)
        return planned
    reason = "the image has no tail of this file: nothing recorded the writes since the offload"
    raise EvidenceError(reason, None)
