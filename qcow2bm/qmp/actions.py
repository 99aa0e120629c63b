"""The actions of a QMP transaction, as values.

QEMU does all the actions of a transaction or none of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Action = dict[str, Any]
"""An action as it is sent: its type and its data."""

ABORT: Action = {"type": "abort", "data": {}}
"""Fails once all other actions of the transaction are prepared: QEMU undoes them."""

ABORTED = "aborted using Abort action"
"""A part of what QEMU says when `ABORT`, and no other action, failed."""


def add(node: str, name: str, granularity: int, *, persistent: bool, enabled: bool) -> Action:
    """Adds a clean bitmap."""
    options = {"granularity": granularity, "persistent": persistent, "disabled": not enabled}
    return _action("add", node, name, **options)


def remove(node: str, name: str) -> Action:
    """Removes a bitmap; a persistent one is removed from the image as well."""
    return _action("remove", node, name)


def enable(node: str, name: str) -> Action:
    """Lets a bitmap record writes."""
    return _action("enable", node, name)


def merge(node: str, target: str, source: str, source_node: str | None = None) -> Action:
    """Sets in ``target`` what is set in ``source``, which may have another granularity."""
    return merge_all(node, target, [(source_node or node, source)])


def merge_all(node: str, target: str, sources: Sequence[tuple[str, str]]) -> Action:
    """Sets in ``target`` what is set in any of the ``sources``, which are nodes and names."""
    bitmaps = [{"node": source_node, "name": name} for source_node, name in sources]
    data = {"node": node, "target": target, "bitmaps": bitmaps}
    return {"type": "block-dirty-bitmap-merge", "data": data}


def _action(verb: str, node: str, name: str, **options: object) -> Action:
    return {"type": f"block-dirty-bitmap-{verb}", "data": {"node": node, "name": name, **options}}
