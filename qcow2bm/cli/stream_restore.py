"""The command ``stream restore``: bitmaps from a migration stream into an image.

*Spec*: spec/cli.md, "Streams".
"""

from __future__ import annotations

import argparse

from qcow2bm.api import Edit, Image
from qcow2bm.api.restore import why_in_doubt
from qcow2bm.cli import report
from qcow2bm.cli.console import fail, say
from qcow2bm.cli.edit import open_to_edit, print_plan
from qcow2bm.clusters.plan import Plan
from qcow2bm.migration.sentinel import is_sentinel
from qcow2bm.migration.stream_bitmaps import StreamBitmap, StreamBitmaps
from qcow2bm.units import escape


def restore(arguments: argparse.Namespace, bitmaps: StreamBitmaps) -> int:
    """Puts the complete bitmaps of a stream into an image, in one edit; the exit status."""
    try:
        chosen = _by_name(arguments, bitmaps)
    except ValueError as error:
        return fail(arguments.file, str(error))
    try:
        with open_to_edit(arguments) as image:
            doubt = "" if arguments.is_unchanged or arguments.is_all_dirty else why_in_doubt(image)
            if doubt:
                return fail(image.name, f"{_UNPROVEN}: {doubt}; {_CURES}")
            with image.edit(dry_run=arguments.dry_run) as edit:
                _load(image, edit, chosen, is_all_dirty=arguments.is_all_dirty)
                plan = edit.plan() if arguments.dry_run else Plan()
    except ValueError as error:
        return fail(arguments.image, str(error))
    if arguments.dry_run:
        print_plan(arguments, plan)
    lost = [bitmap for bitmap in bitmaps.all if not bitmap.is_complete]
    for bitmap in lost:
        name = escape(bitmap.bitmap_alias)
        say(f'warning: {escape(arguments.file)}: bitmap "{name}" is not complete, and left out')
    return report.PROBLEMS_FOUND if lost or bitmaps.fault else 0


_UNPROVEN = "nothing proves that the disk was not written to since the bitmaps were sent"
_CURES = "give --assert-unchanged if you know it, or --as-dirty-ranges-unknown"


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
    for alias in names:
        if alias not in found:
            raise ValueError(f'has no complete bitmap "{escape(alias)}" of that node')
    if not found:
        raise ValueError("has no complete bitmap of that node")
    named = {names.get(alias, alias): bitmap for alias, bitmap in found.items()}
    if len(named) < len(found):
        raise ValueError("is given two bitmaps of one name by --map")
    return named


def _load(
    image: Image, edit: Edit, bitmaps: dict[str, StreamBitmap], *, is_all_dirty: bool
) -> None:
    size = image.virtual_size
    for name, bitmap in bitmaps.items():
        if bitmap.disk_size != size:
            reason = f"is of a disk of {bitmap.disk_size} bytes, but this one has {size}"
            raise ValueError(f'bitmap "{escape(name)}" of the stream {reason}')
        edit.load(name, bitmap.granularity, bitmap.packed(), bitmap.enabled)
        if is_all_dirty:
            edit.set(name, 0, size)
    if image.is_consistent:  # what was proved is proved
        for name in filter(is_sentinel, image.bitmaps):
            edit.remove(name)
