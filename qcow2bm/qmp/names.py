"""The names of the bitmaps and nodes that this library adds to a running machine.

*Spec*: spec/rescue.md, "Names"; spec/live.md, "Names".
"""

from __future__ import annotations

from uuid import UUID

from qcow2bm.migration.sentinel import PREFIX, is_sentinel

COPY_PREFIX = "qcow2bm-rescue-"
TWIN_PREFIX = "qcow2bm-twin-"
SCRATCH_NODE = "qcow2bm-scratch"
MERGED = "qcow2bm-merged"
"""A bitmap that is there inside a transaction only."""
TAIL_PREFIX = "qcow2bm-tail-"
CANARY_PREFIX = "qcow2bm-canary-"
COMPARED = tuple(f"qcow2bm-compared-{number}" for number in range(4))
"""Copies of a sentinel and its twin, while the two are compared."""


def copy_of(name: str) -> str:
    """Returns the name of the copy that is to replace the bitmap ``name``."""
    return COPY_PREFIX + name


def original_of(name: str) -> str:
    """Returns the name of the bitmap that the copy ``name`` is to replace; "" if it is no copy."""
    return name.removeprefix(COPY_PREFIX) if name.startswith(COPY_PREFIX) else ""


def twin_of(sentinel: str) -> str:
    """Returns the name of a sentinel's twin."""
    return TWIN_PREFIX + sentinel.removeprefix(PREFIX)


def sentinel_of(name: str) -> str:
    """Returns the name of the sentinel whose twin is ``name``; "" if it is no twin."""
    sentinel = PREFIX + name.removeprefix(TWIN_PREFIX)
    return sentinel if name.startswith(TWIN_PREFIX) and is_sentinel(sentinel) else ""


def tail_of(uuid: UUID) -> str:
    """Returns the name of the tail that an offload leaves on each node."""
    return f"{TAIL_PREFIX}{uuid}"


def canary_of(uuid: UUID) -> str:
    """Returns the name of the canary that an offload leaves beside its tail."""
    return f"{CANARY_PREFIX}{uuid}"


def is_evidence(name: str) -> bool:
    """Returns whether it names a sentinel, a twin, or a copy of one of them.

    Such a bitmap is there to find out whether another machine wrote: no backup goes by it.
    """
    return is_sentinel(name) or bool(sentinel_of(name)) or name in COMPARED
