"""The scratch node: a block node that is added for the time of one command.

On a null node, which keeps no data, it has a bitmap with every bit set, to merge from: QMP cannot
set bits. The bitmap is as coarse as QEMU allows, so that one write for each 2 GiB of the disk,
by the monitor's command qemu-io, sets all of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from qcow2bm.errors import QmpError
from qcow2bm.qmp.commands import QmpCommands
from qcow2bm.qmp.names import SCRATCH_NODE
from qcow2bm.qmp.queries import (
    HUMAN_MONITOR_COMMAND,
    query_lent_files,
    query_scratch_bitmaps,
    run_qemu_io,
)
from qcow2bm.units import align_up

NAME = "all"
"""The name of the bitmap that has every bit."""

_COARSEST = 2 << 30


@contextmanager
def scratch_node(monitor: QmpCommands, options: dict[str, Any]) -> Iterator[None]:
    """Adds the node `SCRATCH_NODE` for the duration of the block, and removes it afterwards.

    After an interruption, `discard_leftover` removes the node.

    Raises:
        QmpError: QEMU does not answer, or refuses.
    """
    monitor.execute("blockdev-add", {**options, "node-name": SCRATCH_NODE})
    try:
        yield
    except BaseException:
        with suppress(QmpError):  # the error under way says more
            _remove(monitor)
        raise
    _remove(monitor)


@contextmanager
def all_dirty(monitor: QmpCommands, virtual_size: int) -> Iterator[None]:
    """Has the bitmap `NAME` on `SCRATCH_NODE` for the duration of the block, with every bit set.

    ``virtual_size`` is that of the disk, in bytes.

    Raises:
        QmpError: QEMU does not answer, or cannot make the bitmap.
    """
    with scratch_node(monitor, {"driver": "null-co", "size": virtual_size}):
        bitmap = {"node": SCRATCH_NODE, "name": NAME, "granularity": _COARSEST}
        monitor.execute("block-dirty-bitmap-add", bitmap)
        for start in range(0, virtual_size, _COARSEST):
            printed = run_qemu_io(monitor, SCRATCH_NODE, f"write -q {start} 512")
            if printed:
                raise QmpError(HUMAN_MONITOR_COMMAND, printed)
        _require_every_bit(monitor, virtual_size)
        yield


def discard_leftover(monitor: QmpCommands) -> None:
    """Removes the scratch node and the lent files that an interrupted command left behind."""
    if query_scratch_bitmaps(monitor) is not None:
        _remove(monitor)
    for fdset in query_lent_files(monitor):
        monitor.take_back(fdset)


def _remove(monitor: QmpCommands) -> None:
    monitor.execute("blockdev-del", {"node-name": SCRATCH_NODE})


def _require_every_bit(monitor: QmpCommands, virtual_size: int) -> None:
    if query_scratch_bitmaps(monitor) != {NAME: align_up(virtual_size, _COARSEST)}:
        reason = "writing to a scratch node did not set the bits of its bitmap"
        raise QmpError(HUMAN_MONITOR_COMMAND, reason)
