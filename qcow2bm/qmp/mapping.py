"""The block-bitmap-mapping, which tells QEMU the bitmaps that travel in a migration.

*Spec*: spec/rescue.md, "Arm".
"""

from __future__ import annotations

import re

from qcow2bm.format.stream import MAX_NAME
from qcow2bm.qmp.machine import BitmapMapping, Machine, Node, NodeBitmap
from qcow2bm.qmp.names import is_evidence
from qcow2bm.units import encode_name

_WELL_FORMED = re.compile(r"[A-Za-z][A-Za-z0-9\-._]*")  # what QEMU takes as an alias


def mapping_without_evidence(machine: Machine) -> BitmapMapping:
    """Returns the mapping that is set, or else what QEMU does without one; never a sentinel."""
    if machine.mapping is not None:
        return [
            {**node, "bitmaps": [b for b in node["bitmaps"] if not is_evidence(b["name"])]}
            for node in machine.mapping
        ]
    return [
        {"node-name": node.name, "alias": node.alias, "bitmaps": names}
        for node in machine.nodes
        if not node.is_read_only
        and (names := [{"name": b.name, "alias": b.name} for b in _travelling_by_default(node)])
    ]


def mapped_names(mapping: BitmapMapping, node: str) -> set[str]:
    """Returns the names of the bitmaps of a node that travel by a mapping."""
    listed = [one for one in mapping if one["node-name"] == node]
    return {bitmap["name"] for one in listed for bitmap in one["bitmaps"]}


def left_out(machine: Machine, mapping: BitmapMapping) -> list[NodeBitmap]:
    """Returns the bitmaps that do not travel by a mapping, though their nodes are writable."""
    return [
        bitmap
        for node in machine.nodes
        if not node.is_read_only
        for mapped in [mapped_names(mapping, node.name)]
        for bitmap in node.subjects
        if bitmap.name not in mapped
    ]


def _travelling_by_default(node: Node) -> list[NodeBitmap]:
    """The bitmaps that QEMU sends without a mapping, and for which it does not fail."""
    if not _WELL_FORMED.fullmatch(node.alias):
        return []
    return [b for b in node.subjects if len(encode_name(b.name)) <= MAX_NAME]
