"""Exact offloads: what the recorders have is carried along in a migration.

A recorder is a bitmap as fine as the finest bitmap that was taken out. It is not persistent, so a
stop does not store it, and it ends with its QEMU. `record` gives the destination a recorder before
the destination can have the disk. `collect` fetches what the recorder of the source has, once the
source is stopped for good.

*Spec*: spec/live.md, "Exact".
"""

from __future__ import annotations

from typing import NamedTuple

from qcow2bm.errors import EvidenceError, StateError
from qcow2bm.live.offload_file import OffloadFile
from qcow2bm.live.tail import Tail
from qcow2bm.qmp import actions, scratch
from qcow2bm.qmp.bitmap_copies import copy_bitmaps
from qcow2bm.qmp.commands import QmpCommands
from qcow2bm.qmp.machine import Machine, Node
from qcow2bm.qmp.queries import query_machine
from qcow2bm.storage import new_file
from qcow2bm.units import escape

_HAS_GIVEN_UP = ("finish-migrate", "inmigrate", "postmigrate")  # its disks


class RecorderFacts(NamedTuple):
    """A recorder: its ``node``, its ``granularity`` and what it marks, both in bytes."""

    node: str
    granularity: int
    dirty_bytes: int


def collect(monitor: QmpCommands, path: str) -> tuple[RecorderFacts, ...]:
    """Copies what the recorders of the source have into the file; ``live collect``.

    Args:
        monitor: the source of a migration that completed. It must not have gone on since.
        path: of the offload file.

    Returns: the recorders.

    Raises:
        StateError: no migration from this machine completed, or the machine goes on.
        EvidenceError: the machine has none of the recorders.
        QmpError: QEMU does not answer, refuses, or did not store a bitmap.
        StorageError: the file cannot be read or written.
        FormatError: the file is no offload file, or is damaged.
    """
    machine = query_machine(monitor)
    if not (machine.migration == "completed" and machine.is_source):
        required = "migrated: collect from the source, once its migration has completed"
        raise StateError("not migrated", required, "the machine")
    if machine.status != "postmigrate":
        state = f"in state {escape(machine.status)}"
        raise StateError(state, "stopped for good: it goes on, and writes", "the machine")
    scratch.discard_leftover(monitor)
    collected = []
    with new_file.held(path):
        file = OffloadFile.read(path)
        for number, tail in enumerate(file.tails):
            for node in machine.nodes:
                recorder = tail.recorder_on(node, tail.recorder_name)
                if recorder:
                    (copy,), _ = copy_bitmaps(monitor, node, [recorder])
                    file.append_collected(number, copy)
                    dirty_bytes = recorder.dirty_bytes
                    collected.append(RecorderFacts(node.name, recorder.granularity, dirty_bytes))
    if not collected:
        raise EvidenceError("the machine has no recorder of this file", None)
    return tuple(collected)


def record(destination: QmpCommands, source: QmpCommands, path: str) -> tuple[RecorderFacts, ...]:
    """Gives the destination of a migration its recorders; ``live record``.

    The destination waits for the migration: it has not had the disks, and the source has them. So
    there is no write between the recorder of the source and that of the destination.

    Args:
        destination: a machine that waits for a migration.
        source: the machine where the exact offload was begun.
        path: of the offload file.

    Returns: the recorders.

    Raises:
        StateError: the destination does not wait, or the source has given up its disks.
        EvidenceError: the source has no recorder, or the destination no such disk.
        QmpError: QEMU does not answer, or refuses.
        StorageError: the file cannot be read.
        FormatError: the file is no offload file, or is damaged.
    """
    file = OffloadFile.read(path)
    arriving = query_machine(destination)
    if arriving.status != "inmigrate":
        state = f"in state {escape(arriving.status)}"
        required = "waiting for the migration, as with -incoming defer"
        raise StateError(state, required, "the destination")
    leaving = query_machine(source)
    pairs = []
    for tail in file.tails:
        node = _node_with_recorder(leaving, tail)
        if node:
            pairs.append((tail, _twin_of(node, arriving)))
    if not pairs:
        raise EvidenceError("the source has no recorder of this file", None)
    missing = [(tail, node) for tail, node in pairs if not node.find(tail.arrival_name)]
    added = [
        actions.add(
            node.name,
            tail.arrival_name,
            tail.planned.recorder_granularity,
            persistent=False,
            enabled=True,
        )
        for tail, node in missing
    ]
    if added:
        destination.transaction(added)
    # Only now is it sure that every write is recorded here or there.
    leaving = query_machine(source)
    if leaving.status in _HAS_GIVEN_UP or leaving.migration == "completed":
        destination.transaction([actions.remove(n.name, t.arrival_name) for t, n in missing])
        state = f"in state {escape(leaving.status)}"
        required = "in possession of its disks: the tail is taken instead of recorders"
        raise StateError(state, required, "the source")
    return tuple(
        RecorderFacts(node.name, tail.planned.recorder_granularity, 0) for tail, node in pairs
    )


def _node_with_recorder(machine: Machine, tail: Tail) -> Node | None:
    nodes = (node for node in machine.nodes if tail.recorder_on(node, tail.recorder_name))
    return next(nodes, None)


def _twin_of(node: Node, machine: Machine) -> Node:
    """The node of the same disk in another machine: that of the same name, or device."""
    by_name = [one for one in machine.nodes if one.name == node.name]
    found = by_name or [one for one in machine.nodes if one.alias == node.alias]
    if len(found) != 1 or found[0].virtual_size != node.virtual_size:
        reason = (
            f'the destination has no node "{escape(node.name)}", or device '
            f'"{escape(node.alias)}", of {node.virtual_size} bytes'
        )
        raise EvidenceError(reason, None)
    return found[0]
