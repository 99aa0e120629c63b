"""The names of the bitmaps and nodes that this library adds to a running machine.

*Spec*: spec/rescue.md, "Names"; spec/live.md, "Names".
"""

from __future__ import annotations

from uuid import UUID, uuid4

from qcow2bm.migration.sentinel import PREFIX, is_sentinel

COPY_PREFIX = "qcow2bm-rescue-"
TWIN_PREFIX = "qcow2bm-twin-"
SCRATCH_NODE = "qcow2bm-scratch"
MERGED = "qcow2bm-merged"
"""A bitmap that is there inside a transaction only."""
TAIL_PREFIX = "qcow2bm-tail-"
CANARY_PREFIX = "qcow2bm-canary-"
RECORDER_PREFIX = "qcow2bm-recorder-"
ARRIVAL_PREFIX = "qcow2bm-arrival-"
WITNESS_PREFIX = "qcow2bm-witness-"
LENT_PREFIX = "qcow2bm-copy-"
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


def tail_of(uuid: UUID, number: int = 0) -> str:
    """Returns the name of the tail that an offload leaves on a node.

    ``number`` is how many tails this one follows.
    """
    return _numbered(TAIL_PREFIX, uuid, number)


def canary_of(uuid: UUID, number: int = 0) -> str:
    """Returns the name of the canary that an offload leaves beside the tail of that number."""
    return _numbered(CANARY_PREFIX, uuid, number)


def recorder_of(uuid: UUID) -> str:
    """Returns the name of the recorder that an exact offload leaves on a node."""
    return f"{RECORDER_PREFIX}{uuid}"


def witness_of(uuid: UUID, number: int) -> str:
    """Returns the name of the bitmap that an exact offload adds after the tail of that number."""
    return _numbered(WITNESS_PREFIX, uuid, number)


def arrival_of(uuid: UUID, token: bytes) -> str:
    """Returns the name of the recorder that a call of `record` adds at a destination."""
    return f"{ARRIVAL_PREFIX}{uuid}-{token.hex()}"


def new_copy_name() -> str:
    """Returns a name for a bitmap of the scratch node that no other program gives to one."""
    return f"{LENT_PREFIX}{uuid4()}"


def is_of_offload(name: str, uuid: UUID) -> bool:
    """Returns whether it names a bitmap that an offload added to the node of this UUID."""
    prefixes = (TAIL_PREFIX, CANARY_PREFIX, RECORDER_PREFIX, ARRIVAL_PREFIX, WITNESS_PREFIX)
    return name.startswith(tuple(f"{prefix}{uuid}" for prefix in prefixes))


def _numbered(prefix: str, uuid: UUID, number: int) -> str:
    return f"{prefix}{uuid}-{number}" if number else f"{prefix}{uuid}"


def is_evidence(name: str) -> bool:
    """Returns whether it names a sentinel, a twin, or a copy of one of them.

    Such a bitmap is there to find out whether another machine wrote: no backup goes by it.
    """
    return is_sentinel(name) or bool(sentinel_of(name)) or name in COMPARED
