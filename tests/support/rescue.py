"""Judges and settles in one call, as the command ``rescue verdict`` does."""

from __future__ import annotations

from collections.abc import Sequence

from qcow2bm.qmp.client import Monitor
from qcow2bm.qmp.settlement import Remedy, Settlement, settle
from qcow2bm.qmp.verdict import judge


def verdict(
    monitor: Monitor, nodes: Sequence[str] = (), remedy: Remedy | None = None
) -> list[Settlement]:
    """Judges all of these nodes, then settles each of them."""
    return [settle(monitor, one, remedy) for one in judge(monitor, nodes).nodes]
