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
from qcow2bm.qmp.queries import query_digest, query_machine
from qcow2bm.storage import new_file
from qcow2bm.units import align_up, escape

RestoreOutcome = Literal["restored", "kept", "left", "lost"]


class BitmapReturn(NamedTuple):
    """The result for one bitmap.

    Attributes:
        node: the node that has it, or is to have it.
        name: of the bitmap.
        outcome: "restored": it is there again, with every write. "kept": nothing was done, because
            it is there as it was planned. "left": nothing was done, because something stands in the
            way. "lost": it is neither in the machine nor in the file.
        reason: why it is kept, left or lost.
    """

    node: str
    name: str
    outcome: RestoreOutcome
    reason: str = ""

    @property
    def is_safe(self) -> bool:
        """Whether the bitmap is there."""
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
    bitmaps were taken. When all bitmaps of a node are back, its tail is removed. If that cannot be
    done on one node, it is done on the others.

    *Guarantees*: a bitmap is added together with all its bits, by one command of QEMU. A second
    call goes on, or changes nothing.

    Args:
        monitor: the machine.
        path: of the offload file.
        is_alone: whether the caller asserts that no other machine wrote to the disks, if this
            machine goes on after it migrated.
        on_progress: called with the result for each bitmap.

    Raises:
        StateError: the machine's state does not allow it, see `Machine.require_settled`.
        EvidenceError: no node has a tail that has every write; or this machine goes on after it
            migrated.
        QmpError: QEMU does not answer, or did not load a bitmap as it is in the file.
        StorageError: the file cannot be read or written.
        FormatError: the file is no offload file, or is damaged.
    """
    machine = query_machine(monitor)
    machine.require_settled()
    if machine.migration == "completed" and machine.is_source and not is_alone:
        reason = (
            "this machine goes on after it migrated, and the tail may lack what the destination "
            "wrote"
        )
        raise EvidenceError(reason, "assert-alone")
    scratch.discard_leftover(monitor)
    done: list[BitmapReturn] = []
    with new_file.held(path):
        file = OffloadFile.read(path)
        faults = [_fault(file, machine, number) for number in range(len(file.plan.nodes))]
        if all(faults):
            raise EvidenceError(faults[0], None)
        for number, fault in enumerate(faults):
            for result in _put_back_node(monitor, machine, file, number, fault):
                done.append(result)
                on_progress(result)
    return RestoreReport(tuple(done))


def _fault(file: OffloadFile, machine: Machine, number: int) -> str:
    """Returns why nothing can be put back on a node; "" if something can, or is there."""
    planned = file.plan.nodes[number]
    try:
        node = node_of(machine, planned)
    except EvidenceError as error:
        return "" if file.was_restored(number) else error.reason
    has_tail = node.find(tail_of(planned.uuid))
    if has_all(node, planned) or (file.was_restored(number) and not has_tail):
        return ""
    reason = tail.why_unusable(file.plan, planned, node)
    return reason and f'node "{escape(node.name)}": {reason}'


def _put_back_node(
    monitor: Monitor, machine: Machine, file: OffloadFile, number: int, fault: str
) -> Iterator[BitmapReturn]:
    """Puts the bitmaps of a node back, unless there is a ``fault``."""
    planned_node = file.plan.nodes[number]
    nodes = [node for node in machine.nodes if node.find(tail_of(planned_node.uuid))]
    if fault or not nodes:
        outcome: RestoreOutcome = "left" if fault else "kept"
        reason = "it is there, and the machine has no tail of this file"
        if file.was_restored(number):
            reason = "the file says that it was put back"
        for planned in planned_node.bitmaps:
            yield BitmapReturn(planned_node.name, planned.name, outcome, fault or reason)
        return
    (node,) = nodes
    names = [name for name in tail.names_of(planned_node) if node.find(name)]
    results = []
    for place in file.plan.numbers_of(number):
        results.append(_put_back(monitor, file, place, node))
        yield results[-1]
    if all(result.is_safe for result in results):
        monitor.transaction([actions.remove(node.name, name) for name in names])
        logger.info('live restore: the tail of node "%s" is removed', escape(node.name))
        file.append_restored(number)


def _put_back(monitor: Monitor, file: OffloadFile, number: int, node: Node) -> BitmapReturn:
    planned_node, planned = file.bitmaps[number]
    machine = query_machine(monitor)
    machine.require_settled()  # by now a migration may be under way
    (node,) = machine.select([node.name], lambda node: True)
    found = node.find(planned.name)
    result = BitmapReturn(node.name, planned.name, "restored")
    if not found and not file.has_copy(number):
        reason = "it is neither in the machine nor in the file: take a full backup"
        return result._replace(outcome="lost", reason=reason)
    if found and not is_as_planned(found, planned):
        reason = found.why_unusable or "another bitmap of this name is there"
        return result._replace(outcome="left", reason=reason)
    copy = file.read_copy(number) if file.has_copy(number) else None
    is_copy_there = not copy or (found and query_digest(monitor, found) == copy.sha256())
    if found and is_copy_there and found.is_recording == planned.enabled:
        return result  # it was never removed, or was put back, and has recorded everything
    tail_name = tail_of(planned_node.uuid) if planned.enabled else None
    work = list(_work(node.name, planned, found, tail_name, has_copy=copy is not None))
    try:
        if copy:
            _with_copy(monitor, copy, work)
        else:
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
    with new_file.held(path):
        return _restore_offline(OffloadFile.read(path), image, dry_run=dry_run)


def _restore_offline(file: OffloadFile, image: Image, *, dry_run: bool) -> RestoreReport:
    number = _node_of_image(file, image)
    planned_node = file.plan.nodes[number]
    names = [bitmap.name for bitmap in planned_node.bitmaps]
    if tail_of(planned_node.uuid) not in image.bitmaps:
        reason = "the file says that it was put back"
        kept = (BitmapReturn(planned_node.name, name, "kept", reason) for name in names)
        return RestoreReport(tuple(kept))
    tail_name, canary_name = tail.names_of(planned_node)
    with image.edit(dry_run=dry_run) as edit:
        for place in file.plan.numbers_of(number):
            _, planned = file.bitmaps[place]
            copy = file.read_copy(place) if file.has_copy(place) else None
            _put_into(edit, image.bitmaps.get(planned.name), planned, copy)
            if planned.enabled:
                edit.merge(planned.name, tail_name)
        edit.remove(tail_name)
        if canary_name in image.bitmaps:
            edit.remove(canary_name)
        plan = edit.plan() if dry_run else None
    if not dry_run:
        file.append_restored(number)
    restored = (BitmapReturn(planned_node.name, name, "restored") for name in names)
    return RestoreReport(tuple(restored), plan)


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


def _node_of_image(file: OffloadFile, image: Image) -> int:
    """Returns the number of the node whose disk an image is, if every write to it is known."""
    for number, planned in enumerate(file.plan.nodes):
        found, canary = map(image.bitmaps.get, tail.names_of(planned))
        if not found:
            continue
        if found.status != VALID or not found.auto:
            status = "disabled" if found.status == VALID else found.status
            raise EvidenceError(f"the tail is {status}: writes are missing from it", None)
        if found.granularity != file.plan.tail_granularity:
            raise EvidenceError("the tail has another granularity than it was made with", None)
        if image.virtual_size != planned.disk_size:
            raise EvidenceError("the disk has another size than when the tail was made", None)
        if not _are_all_there(image, planned) and not _is_alive(canary):
            reason = "the canary of the tail is gone or was changed: the tail may have been cleared"
            raise EvidenceError(reason, None)
        return number
    if file.is_restored and len(file.plan.nodes) == 1:
        return 0
    reason = "the image has no tail of this file: nothing recorded the writes since the offload"
    raise EvidenceError(reason, None)


def _are_all_there(image: Image, planned: PlannedNode) -> bool:
    found = [(image.bitmaps.get(bitmap.name), bitmap) for bitmap in planned.bitmaps]
    return all(
        bitmap and bitmap.status == VALID and bitmap.auto == wanted.enabled
        for bitmap, wanted in found
    )


def _is_alive(canary: Bitmap | None) -> bool:
    """Returns whether a canary has the one granule that it was made with."""
    if not canary or canary.status != VALID or canary.auto:
        return False
    return align_up(canary.count(), canary.granularity) == canary.granularity
