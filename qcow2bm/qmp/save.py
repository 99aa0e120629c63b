"""Saves the bitmaps that a running QEMU has in memory.

*Spec*: spec/sidecar.md, "A running machine".
"""

from __future__ import annotations

from typing import NamedTuple

from qcow2bm.log import logger
from qcow2bm.migration.sidecar import Sidecar
from qcow2bm.qmp import scratch
from qcow2bm.qmp.bitmap_copies import Omission, copy_bitmaps
from qcow2bm.qmp.commands import QmpCommands
from qcow2bm.qmp.machine import Machine, Node, NodeChoiceError
from qcow2bm.qmp.queries import query_machine
from qcow2bm.units import escape


class MachineSidecar(NamedTuple):
    """The bitmaps of a node of a running machine; ``left_out`` are those that cannot be saved."""

    sidecar: Sidecar
    left_out: tuple[Omission, ...]


def save_sidecar(monitor: QmpCommands, name: str | None = None) -> MachineSidecar:
    """Copies the persistent bitmaps of a node, as they are now, into a `Sidecar`.

    All bitmaps are of one moment, unless an iothread serves the disk: then each bitmap is of some
    moment during the transaction.

    *Guarantees*: the machine's own nodes and bitmaps do not change. The scratch node that is added
    is removed at the end; after an interruption, by the next call of this or another function of
    `qcow2bm.qmp.rescue`.

    Args:
        monitor: the machine.
        name: the node or device; not needed if only one node has persistent bitmaps.

    Raises:
        NodeChoiceError: ``name`` is needed.
        StateError: the machine's state does not allow it, see `Machine.require_settled`; or the
            verdict about the last migration is due.
        QmpError: QEMU does not answer, refuses, or did not store the bitmaps.
        StorageError: there is no room for temporary files.
        ValueError: there is no such node, or it has no bitmaps that can be saved.
    """
    machine = query_machine(monitor)
    machine.require_settled()
    scratch.discard_leftover(monitor)
    node = _chosen(machine, name)
    machine.require_judged(node)
    persistent = [bitmap for bitmap in node.bitmaps if bitmap.is_persistent]
    usable = [bitmap for bitmap in persistent if bitmap.is_usable]
    left_out = tuple(Omission(b, b.why_unusable) for b in persistent if not b.is_usable)
    if not usable:
        reasons = (f'bitmap "{escape(b.name)}" is {reason}' for b, reason in left_out)
        raise ValueError("; ".join(reasons) or "has no persistent bitmaps")
    bitmaps = copy_bitmaps(monitor, node, usable).bitmaps
    logger.info('saved %d bitmaps of node "%s"', len(bitmaps), escape(node.name))
    return MachineSidecar(Sidecar(node.virtual_size, b"", bitmaps), left_out)


def _chosen(machine: Machine, name: str | None) -> Node:
    nodes = machine.select([] if name is None else [name], lambda node: node.has_persistent)
    if not nodes:
        raise ValueError("no node has persistent bitmaps")
    if len(nodes) > 1:
        raise NodeChoiceError([node.name for node in nodes])
    return nodes[0]
