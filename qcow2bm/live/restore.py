"""Puts the bitmaps of an offload file back, into a running machine or into an image.

*Spec*: spec/live.md, "Restore".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from qcow2bm.errors import QmpError, QmpRefusedError, TailError
from qcow2bm.format.offload_file import PlannedBitmap
from qcow2bm.live.offload_file import OffloadFile
from qcow2bm.live.place import fault_of, has_all, is_as_planned, node_of
from qcow2bm.live.recording import GOES_ON, MachineCounts
from qcow2bm.live.restore_report import BitmapReturn, RestoreOutcome, RestoreReport
from qcow2bm.live.tail import Tail
from qcow2bm.live.written import Written, written_on
from qcow2bm.log import logger
from qcow2bm.migration.sidecar import SavedBitmap
from qcow2bm.qmp import actions, scratch, scratch_image
from qcow2bm.qmp.commands import QmpCommands
from qcow2bm.qmp.machine import Machine, Node, NodeBitmap
from qcow2bm.qmp.names import MERGED, SCRATCH_NODE, new_copy_name
from qcow2bm.qmp.queries import query_digest, query_machine
from qcow2bm.storage import new_file
from qcow2bm.units import escape


def restore(
    monitor: QmpCommands,
    path: str,
    *,
    is_alone: bool = False,
    on_progress: Callable[[BitmapReturn], None] = lambda done: None,
) -> RestoreReport:
    """Puts bitmaps back into the machine that has the disks now; ``live restore --qmp``.

    Each bitmap gets what was written since the bitmap was taken out, unless it was disabled: what
    the recorders have, if the offload was exact and they are all there, or else what the tail has.
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
        TailError: no node has a tail that has every write; or this machine goes on after it
            migrated.
        QmpError: QEMU does not answer, or did not load a bitmap as it is in the file.
        StorageError: the file cannot be read or written.
        FormatError: the file is no offload file, or is damaged.
    """
    machine = query_machine(monitor)
    machine.require_settled()
    if machine.goes_on and not is_alone:
        raise TailError(GOES_ON, "assert-alone")
    scratch.discard_leftover(monitor)
    done: list[BitmapReturn] = []
    with new_file.held(path):
        file = OffloadFile.read(path)
        faults = [_fault(monitor, file, machine, number) for number in range(len(file.plan.nodes))]
        if all(faults):
            raise TailError(faults[0])
        for number, fault in enumerate(faults):
            for result in _put_back_node(monitor, machine, file, number, fault):
                done.append(result)
                on_progress(result)
    return RestoreReport(tuple(done))


def _fault(monitor: QmpCommands, file: OffloadFile, machine: Machine, number: int) -> str:
    """Returns why nothing can be put back on a node; "" if something can, or is there."""
    tail = file.tail(number)
    try:
        node = node_of(machine, tail)
    except TailError as error:
        return "" if file.was_restored(number) else error.reason
    reason = fault_of(file, number, node, MachineCounts(monitor, tail, node))
    return reason and f'node "{escape(node.name)}": {reason}'


def _put_back_node(
    monitor: QmpCommands, machine: Machine, file: OffloadFile, number: int, fault: str
) -> Iterator[BitmapReturn]:
    """Puts the bitmaps of a node back, unless there is a ``fault``."""
    tail = file.tail(number)
    nodes = [node for node in machine.nodes if node.find(tail.name)]
    if fault or not nodes:
        outcome, reason = _without_tail(machine, file, number)
        if file.was_restored(number) and not fault:
            _remove_leftovers(monitor, machine, tail)
        for planned in tail.planned.bitmaps:
            done = BitmapReturn(tail.planned.name, planned.name, outcome, reason)
            yield done._replace(outcome="left", reason=fault) if fault else done
        return
    (node,) = nodes
    written = written_on(monitor, machine, file, number, node)
    results = []
    for place in file.plan.numbers_of(number):
        results.append(_put_back(monitor, file, tail, place, node, written))
        yield results[-1]
    if all(result.is_safe for result in results):
        # In this order: while the tail is there, a second call does all of this again.
        file.append_restored(number)
        monitor.transaction([actions.remove(node.name, name) for name in tail.names_on(node)])
        logger.info('live restore: the tail of node "%s" is removed', escape(node.name))


def _without_tail(machine: Machine, file: OffloadFile, number: int) -> tuple[RestoreOutcome, str]:
    """What becomes of the bitmaps of a node in a machine that has no tail of it, and why."""
    is_there = any(has_all(node, file.plan.nodes[number]) for node in machine.nodes)
    if file.was_restored(number):
        if is_there:
            return "kept", "the file says that it was put back"
        return "left", "the file says that it was put back, and it is not here as it was"
    if file.has_copies_of(number):
        return "left", "a bitmap of this name is here, but not the tail: is it the right machine?"
    return "kept", "it was not taken out"


def _remove_leftovers(monitor: QmpCommands, machine: Machine, tail: Tail) -> None:
    """Removes recorders of a source that goes on after the bitmaps were put back elsewhere."""
    work = [actions.remove(node.name, n) for node in machine.nodes for n in tail.names_on(node)]
    if work:
        monitor.transaction(work)


def _put_back(
    monitor: QmpCommands, file: OffloadFile, tail: Tail, number: int, node: Node, written: Written
) -> BitmapReturn:
    _, planned = file.bitmaps[number]
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
    copy = file.read_copy(number, node.virtual_size) if file.has_copy(number) else None
    fault = tail.why_unusable(node, MachineCounts(monitor, tail, node)) if copy else ""
    if fault:  # by now another program may have changed the tail
        return result._replace(outcome="left", reason=fault)
    if found and not copy and found.is_recording == planned.enabled:
        return result  # it was never removed, and has recorded everything
    if found and copy and not planned.enabled and query_digest(monitor, found) == copy.sha256():
        return result
    if copy:  # the scratch node has no bitmap of such a name if it is that of another program
        copy = copy._replace(name=new_copy_name())
    since = written if planned.enabled else Written()
    work = list(_work(node.name, planned, found, since, copy))
    saved = [bitmap for bitmap in (copy, since.saved) if bitmap]
    try:
        if saved:
            _with_copies(monitor, saved, work)
        else:
            monitor.transaction(work)
    except QmpRefusedError as error:
        return result._replace(outcome="left", reason=f"QEMU refuses: {error.reason}")
    return result._replace(written=since.facts)


def _work(
    node: str,
    planned: PlannedBitmap,
    found: NodeBitmap | None,
    written: Written,
    copy: SavedBitmap | None,
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
    sources = written.sources(node)
    if copy:
        yield actions.merge_all(node, name, [(SCRATCH_NODE, copy.name), *sources])
    elif sources:
        yield actions.add(node, MERGED, granularity, persistent=False, enabled=False)
        yield actions.merge_all(node, MERGED, sources)
        yield actions.merge(node, name, MERGED)
        yield actions.remove(node, MERGED)


def _with_copies(
    monitor: QmpCommands, copies: list[SavedBitmap], work: list[actions.Action]
) -> None:
    """Does a transaction while QEMU has copies as bitmaps of the scratch node."""
    with (
        scratch_image.with_bitmaps(copies[0].disk_size, copies) as image,
        scratch_image.lent(monitor, image, read_only=True),
    ):
        for copy in copies:
            require_loaded(monitor, copy)
        monitor.transaction(work)


def require_loaded(monitor: QmpCommands, copy: SavedBitmap) -> None:
    """Raises unless the scratch node has the bits of a copy, where QEMU tells.

    Raises:
        QmpError: QEMU does not answer, or loaded other bits.
    """
    live = NodeBitmap(SCRATCH_NODE, copy.name, copy.granularity, 0, False, True, False, False)
    digest = query_digest(monitor, live)
    if digest not in (None, copy.sha256()):
        reason = f'QEMU did not load the bits of "{escape(copy.name)}" as they are in the file'
        raise QmpError("blockdev-add", reason)
