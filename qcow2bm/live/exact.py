"""Exact offloads: what the recorders have is carried along in a migration.

A recorder is a bitmap as fine as the finest bitmap that was taken out. It is not persistent, so a
stop does not store it, and it ends with its QEMU. `record` gives the destination a recorder while
the migration is under way, before the destination can have the disk. `collect` fetches what the
recorder of the source has, once the source is stopped for good.

*Spec*: spec/live.md, "Exact".
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from qcow2bm.errors import QmpError, StateError, StorageError
from qcow2bm.format.offload_file import TOKEN_BYTES
from qcow2bm.live.offload_file import OffloadFile
from qcow2bm.live.tail import Tail
from qcow2bm.qmp import actions, scratch
from qcow2bm.qmp.bitmap_copies import copy_bitmaps
from qcow2bm.qmp.commands import QmpCommands
from qcow2bm.qmp.machine import Machine, Node
from qcow2bm.qmp.names import ARRIVAL_PREFIX, arrival_of
from qcow2bm.qmp.queries import query_machine
from qcow2bm.storage import new_file
from qcow2bm.units import escape

_NO_RECORDER = "without a recorder of this file"
_WITH_RECORDER = "the machine where this exact offload was begun"
_SENDS = ("setup", "active", "pre-switchover")
"""States of a migration in which the source has its disks."""


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
        StateError: no migration from this machine completed, the machine goes on, or it has none of
            the recorders.
        QmpError: QEMU does not answer, refuses, or did not store a bitmap.
        StorageError: the file cannot be read or written.
        FormatError: the file is no offload file, or is damaged.
    """
    machine = query_machine(monitor)
    if not machine.has_left:
        required = "migrated: collect from the source, once its migration has completed"
        raise StateError("not migrated", required, "the machine")
    if machine.status != "postmigrate":
        state = f"in state {escape(machine.status)}"
        raise StateError(state, "stopped for good: it goes on, and writes", "the machine")
    scratch.discard_leftover(monitor)
    collected = []
    with new_file.held(path):
        file = OffloadFile.read(path)
        if file.is_restored:
            raise StorageError(path, 0, 0, "is of an offload whose bitmaps were put back already")
        for number, tail in enumerate(file.tails):
            for node in machine.nodes:
                recorder = tail.recorder_on(node, tail.recorder_name)
                if recorder:
                    (copy,), _ = copy_bitmaps(monitor, node, [recorder])
                    file.append_collected(number, copy)
                    dirty_bytes = recorder.dirty_bytes
                    collected.append(RecorderFacts(node.name, recorder.granularity, dirty_bytes))
    if not collected:
        raise StateError(_NO_RECORDER, _WITH_RECORDER, "the machine")
    return tuple(collected)


def record(destination: QmpCommands, source: QmpCommands, path: str) -> tuple[RecorderFacts, ...]:
    """Gives the destination of a migration its recorders; ``live record``.

    The migration is under way: the destination receives, and the source still has the disks. So
    there is no machine, and no write, between the recorder of the source and that of the
    destination. The file says which recorder that is.

    Args:
        destination: a machine that receives a migration.
        source: the machine that migrates, where the exact offload was begun.
        path: of the offload file.

    Returns: the recorders.

    Raises:
        StateError: the destination does not receive; or the source does not migrate, has given up
            its disks, or has no recorder that has recorded every write.
        ValueError: the destination has no such disk.
        QmpError: QEMU does not answer, or refuses.
        StorageError: the file cannot be read or written.
        FormatError: the file is no offload file, or is damaged.
    """
    with new_file.held(path):
        file = OffloadFile.read(path)
        arriving = query_machine(destination)
        if (arriving.status, arriving.migration) != ("inmigrate", "active"):
            state = f"in state {escape(arriving.status)}"
            required = "receiving a migration, and not done with it"
            raise StateError(state, required, "the destination")
        leaving = _require_sending(source)
        pairs = []
        for number, tail in enumerate(file.tails):
            node = _node_with_recorder(leaving, tail)
            if node:
                _require_unbroken(node, tail)
                pairs.append((number, tail, _twin_of(node, arriving)))
        if not pairs:
            raise StateError(_NO_RECORDER, _WITH_RECORDER, "the source")
        token = secrets.token_bytes(TOKEN_BYTES)
        destination.transaction([*_arrivals(pairs, token)])
        # Only now is it sure that every write is recorded here or there. A recorder that the file
        # does not name is of no use, and does no harm.
        _require_sending(source)
        for number, _, _ in pairs:
            file.append_recorded(number, token)
    return tuple(
        RecorderFacts(node.name, tail.planned.recorder_granularity, 0) for _, tail, node in pairs
    )


def _require_sending(monitor: QmpCommands) -> Machine:
    """Returns the state of the source of a migration that is under way."""
    try:
        source = query_machine(monitor)
    except QmpError as error:
        raise QmpError(error.command, f"the source: {error.reason}", error.hint) from error
    if source.migration not in _SENDS or not source.is_source:
        state = f"in state {escape(source.status)} (query-migrate: {escape(source.migration)})"
        raise StateError(state, "migrating, and not done with it", "the source")
    return source


def _require_unbroken(node: Node, tail: Tail) -> None:
    """Raises if another machine may have written since the recorder of a node began."""
    if tail.was_loaded_anew(node):
        state = "not the only machine that had the disk (its recorder is older than its tail)"
        raise StateError(state, "the only one since the offload", "the source")


def _arrivals(pairs: Sequence[tuple[int, Tail, Node]], token: bytes) -> Iterator[actions.Action]:
    """Adds recorders with a new token, in the place of those of earlier calls."""
    for _, tail, node in pairs:
        for name in tail.names_on(node):
            if name.startswith(ARRIVAL_PREFIX):
                yield actions.remove(node.name, name)
        name, granularity = arrival_of(tail.planned.uuid, token), tail.planned.recorder_granularity
        yield actions.add(node.name, name, granularity, persistent=False, enabled=True)


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
        raise ValueError(reason)
    return found[0]
