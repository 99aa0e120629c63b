"""The names of what a rescue adds beside the bitmaps of others.

*Spec*: spec/rescue.md, "Names".
"""

from __future__ import annotations

from qcow2bm.migration.sentinel import PREFIX, is_sentinel

COPY_PREFIX = "qcow2bm-rescue-"
TWIN_PREFIX = "qcow2bm-twin-"
SCRATCH_NODE = "qcow2bm-scratch"
COMPARED = tuple(f"qcow2bm-compared-{number}" for number in range(4))


def copy_of(name: str) -> str:
    """What the copy of a bitmap is called until it has the bitmap's name."""
    return COPY_PREFIX + name


def original_of(name: str) -> str:
    """What a copy is a copy of; nothing if this is no copy's name."""
    return name.removeprefix(COPY_PREFIX) if name.startswith(COPY_PREFIX) else ""


def twin_of(sentinel: str) -> str:
    """The name of a sentinel's twin."""
    return TWIN_PREFIX + sentinel.removeprefix(PREFIX)


def sentinel_of(name: str) -> str:
    """The name of a twin's sentinel; nothing if this is no twin's name."""
    sentinel = PREFIX + name.removeprefix(TWIN_PREFIX)
    return sentinel if name.startswith(TWIN_PREFIX) and is_sentinel(sentinel) else ""


def is_evidence(name: str) -> bool:
    """Whether it names a sentinel, a twin or a copy of one, and no bitmap to back up by."""
    return is_sentinel(name) or bool(sentinel_of(name)) or name in COMPARED
