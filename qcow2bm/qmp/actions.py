"""What can be part of a QMP transaction, as values.

QEMU does all the actions of a transaction or none.
"""

from __future__ import annotations

from typing import Any

Action = dict[str, Any]
"""As it is sent: its type, and its data."""

ABORT: Action = {"type": "abort", "data": {}}
"""Makes the transaction fail when all else is prepared, so that it is undone."""

ABORTED = "aborted using Abort action"
"""What QEMU then says, among other things."""


def add(node: str, name: str, granularity: int, *, persistent: bool, enabled: bool) -> Action:
    """Adds a clean bitmap."""
    options = {"granularity": granularity, "persistent": persistent, "disabled": not enabled}
    return _action("add", node, name, **options)


def remove(node: str, name: str) -> Action:
    """Removes a bitmap, from the image as well."""
    return _action("remove", node, name)


def merge(node: str, target: str, source: str, source_node: str | None = None) -> Action:
    """Makes dirty in a bitmap what is dirty in another, also at another granularity."""
    sources = [{"node": source_node or node, "name": source}]
    data = {"node": node, "target": target, "bitmaps": sources}
    return {"type": "block-dirty-bitmap-merge", "data": data}


def _action(verb: str, node: str, name: str, **options: object) -> Action:
    return {"type": f"block-dirty-bitmap-{verb}", "data": {"node": node, "name": name, **options}}
