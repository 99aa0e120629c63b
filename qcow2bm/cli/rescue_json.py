"""What the commands ``rescue`` print with ``--output=json``.

*Spec*: spec/json.md, "rescue start", "rescue arm", "rescue verdict" and "rescue finish".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qcow2bm.cli.facts import json_text

if TYPE_CHECKING:
    from qcow2bm.qmp.rescue import ArmReport, CopyRename, NodeBitmap, RescueReport, Settlement

SCHEMA = 1

Document = dict[str, object]


def of_start(address: str, done: RescueReport, *, dry_run: bool) -> Document:
    """What ``rescue start`` did."""
    bitmaps = [
        {
            **_place(one.bitmap),
            "granularity": one.bitmap.granularity,
            "dirty-bytes": one.bitmap.dirty_bytes,
            "outcome": one.outcome,
            "verified-by": one.proof,
            "sha256": one.sha256,
            "reason": one.reason or None,
        }
        for one in done.bitmaps
    ]
    migration = done.migration or None
    return {**_head("qmp", address), "dry-run": dry_run, "migration": migration, "bitmaps": bitmaps}


def of_arming(address: str, done: ArmReport) -> Document:
    """What ``rescue arm`` did."""
    nodes = [
        {
            "node": node.node,
            "sentinel": node.sentinel,
            "granularity": node.granularity,
            "new": node.is_new,
        }
        for node in done.nodes
    ]
    obstacles = [{**_place(bitmap), "reason": reason} for bitmap, reason in done.obstacles]
    return {
        **_head("qmp", address),
        "nodes": nodes,
        "block-bitmap-mapping": done.mapping,
        "set": done.is_set,
        "obstacles": obstacles,
        "left-out": [_place(bitmap) for bitmap in done.left_out],
    }


def of_verdicts(address: str, migration: str, found: Sequence[Settlement]) -> Document:
    """What ``rescue verdict`` found."""
    nodes = [
        {
            "node": done.verdict.node.name,
            "verdict": done.verdict.word,
            "reason": done.verdict.reason,
            "armed": done.is_armed,
            "obstacle": done.obstacle or None,
            "bitmaps": [
                {"name": bitmap.name, "outcome": fate, "reason": reason or None}
                for bitmap, fate, reason in done.bitmaps
            ],
        }
        for done in found
    ]
    return {**_head("qmp", address), "migration": migration or None, "nodes": nodes}


def of_finish(name: str, done: Sequence[CopyRename], *, dry_run: bool) -> Document:
    """What ``rescue finish`` did."""
    bitmaps = [
        {
            "copy": json_text(one.copy),
            "name": json_text(one.name),
            "outcome": one.outcome,
            "reason": one.reason or None,
        }
        for one in done
    ]
    return {**_head("filename", name), "dry-run": dry_run, "bitmaps": bitmaps}


def _head(key: str, subject: str) -> Document:
    return {"schema": SCHEMA, key: json_text(subject)}


def _place(bitmap: NodeBitmap) -> Document:
    return {"node": bitmap.node, "name": bitmap.name}
