"""The command ``stream restore``: bitmaps from a migration stream into an image.

*Spec*: spec/cli.md, "Streams".
"""

from __future__ import annotations

import argparse

from qcow2bm.cli import report, restore
from qcow2bm.cli.console import fail, say
from qcow2bm.migration.sidecar import SavedBitmap
from qcow2bm.migration.stream_bitmaps import StreamBitmap, StreamBitmaps
from qcow2bm.units import escape


def run(arguments: argparse.Namespace, bitmaps: StreamBitmaps) -> int:
    """Puts the complete bitmaps of a node into an image, in one edit; the exit status."""
    try:
        chosen = _by_name(arguments, bitmaps)
    except ValueError as error:
        return fail(arguments.file, str(error))
    saved = [
        SavedBitmap(name, b.granularity, b.enabled, b.disk_size, b.packed().data)
        for name, b in chosen.items()
    ]
    status = restore.restore(arguments, saved)
    if status:
        return status
    lost = [bitmap for bitmap in bitmaps.all if not bitmap.is_complete]
    for bitmap in lost:
        name = escape(bitmap.bitmap_alias)
        say(f'warning: {escape(arguments.file)}: bitmap "{name}" is not complete, and left out')
    return report.PROBLEMS_FOUND if lost or bitmaps.fault else 0


def _by_name(arguments: argparse.Namespace, bitmaps: StreamBitmaps) -> dict[str, StreamBitmap]:
    """The complete bitmaps of the node that is meant, by the names they get."""
    nodes = dict.fromkeys(bitmap.node_alias for bitmap in bitmaps.all)
    listed = ", ".join(f'"{escape(node)}"' for node in nodes)
    node = arguments.node if arguments.node is not None or len(nodes) != 1 else next(iter(nodes))
    if not nodes:
        raise ValueError("has no bitmaps")
    if node is None:
        raise ValueError(f"has bitmaps of several nodes: choose one with --node ({listed})")
    if node not in nodes:
        raise ValueError(f'has no bitmaps of the node "{escape(node)}", but of {listed}')
    found = {b.bitmap_alias: b for b in bitmaps.complete if b.node_alias == node}
    names = dict(text.split("=", 1) for text in arguments.map)
    if len(names) < len(arguments.map):
        raise ValueError("is given two names for one bitmap by --map")
    for alias in names:
        if alias not in found:
            raise ValueError(f'has no complete bitmap "{escape(alias)}" of that node')
    if not found:
        raise ValueError("has no complete bitmap of that node")
    named = {names.get(alias, alias): bitmap for alias, bitmap in found.items()}
    if len(named) < len(found):
        raise ValueError("is given two bitmaps of one name by --map")
    return named
