"""A cluster file in memory, and what a plan makes of it."""

from __future__ import annotations

from collections.abc import Iterable

from qcow2bm.clusters.file import ClusterFile
from qcow2bm.clusters.plan import Plan, Step, execute
from qcow2bm.storage.memory import MemoryStorage


def opened(data: bytes | bytearray) -> ClusterFile:
    """The image as the layers below the API have it."""
    return ClusterFile(MemoryStorage(data), force_share=False)


def after(data: bytes | bytearray, steps: Iterable[Step]) -> bytearray:
    """A copy of the image with these steps done."""
    copy = bytearray(data)
    execute(Plan(tuple(steps)), MemoryStorage(copy), len(copy))
    return copy
