"""Removes bitmaps from a running machine.

*Spec*: spec/live.md, "Remove".
"""

from __future__ import annotations

from collections.abc import Sequence

from qcow2bm.errors import BitmapNotFoundError
from qcow2bm.qmp import actions
from qcow2bm.qmp.commands import QmpCommands
from qcow2bm.qmp.queries import query_machine
from qcow2bm.units import escape


def remove(monitor: QmpCommands, names: Sequence[str], node: str | None = None) -> None:
    """Removes bitmaps of a running machine, all of them or none; ``live remove``.

    QEMU removes a persistent bitmap from the image as well.

    Args:
        monitor: the machine.
        names: of the bitmaps.
        node: the node or device that has them; not needed if each name is on one node alone.

    Raises:
        StateError: the machine's state does not allow it, see `Machine.require_settled`.
        BitmapNotFoundError: there is no such bitmap.
        QmpError: QEMU does not answer, or refuses: a job uses a bitmap.
        ValueError: there is no such node, or several nodes have a bitmap of a name.
    """
    machine = query_machine(monitor)
    machine.require_settled()
    chosen = machine.select([] if node is None else [node], lambda one: bool(one.bitmaps))
    work = []
    for name in dict.fromkeys(names):
        nodes = [one.name for one in chosen if one.find(name)]
        if not nodes:
            raise BitmapNotFoundError(name)
        if len(nodes) > 1:
            listed = ", ".join(map(escape, nodes))
            raise ValueError(f'several nodes have a bitmap "{escape(name)}": {listed}')
        work.append(actions.remove(nodes[0], name))
    monitor.transaction(work)
