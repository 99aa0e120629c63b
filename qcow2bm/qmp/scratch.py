"""A bitmap that has every bit, to merge from: QMP cannot set bits.

It lies on a null node, which keeps no data. A bitmap that is as coarse as can be needs one write
there for each 2 GiB of the disk, by the monitor's command qemu-io.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from qcow2bm.errors import QmpError
from qcow2bm.qmp.client import LENT, Monitor
from qcow2bm.qmp.names import SCRATCH_NODE
from qcow2bm.units import align_up, escape

NAME = "all"
_COARSEST = 2 << 30
_QEMU_IO = "human-monitor-command"


@contextmanager
def all_dirty(monitor: Monitor, virtual_size: int) -> Iterator[None]:
    """Meanwhile there is the bitmap `NAME` of `SCRATCH_NODE`, all dirty, for a disk of this size.

    Raises:
        QmpError: QEMU does not answer, or cannot make it.
    """
    node: dict[str, Any] = {"driver": "null-co", "node-name": SCRATCH_NODE, "size": virtual_size}
    monitor.execute("blockdev-add", node)
    try:
        bitmap = {"node": SCRATCH_NODE, "name": NAME, "granularity": _COARSEST}
        monitor.execute("block-dirty-bitmap-add", bitmap)
        for start in range(0, virtual_size, _COARSEST):
            line = f'qemu-io {SCRATCH_NODE} "write -q {start} 512"'
            said = monitor.execute(_QEMU_IO, {"command-line": line})
            if said:
                raise QmpError(_QEMU_IO, escape(" ".join(str(said).split())))
        _require_all(monitor, virtual_size)
        yield
    except BaseException:
        with suppress(QmpError):  # the one that is under way says more
            discard(monitor)
        raise
    discard(monitor)


def discard(monitor: Monitor) -> None:
    """Removes the node, and with it the bitmap; raises as any command does."""
    monitor.execute("blockdev-del", {"node-name": SCRATCH_NODE})


def discard_leftover(monitor: Monitor) -> None:
    """Removes the node, and files that were lent, if somebody who was interrupted left them."""
    if _scratch(monitor):
        discard(monitor)
    for fdset in monitor.execute("query-fdsets"):
        if any(fd.get("opaque") == LENT for fd in fdset["fds"]):
            monitor.take_back(fdset["fdset-id"])


def _require_all(monitor: Monitor, virtual_size: int) -> None:
    found = _scratch(monitor)
    counts = [one["count"] for one in (found or {}).get("dirty-bitmaps", [])]
    if counts != [align_up(virtual_size, _COARSEST)]:
        raise QmpError(_QEMU_IO, "writing to a scratch node did not set the bits of its bitmap")


def _scratch(monitor: Monitor) -> dict[str, Any] | None:
    nodes = monitor.execute("query-named-block-nodes", {"flat": True})
    return next((node for node in nodes if node.get("node-name") == SCRATCH_NODE), None)
