"""Comparing the contents of two disks: the public functions and types.

A disk is a `Content`: `RawContent` for a raw file or block device, `ServedContent` for a qcow2
image, which `served` gives. `find_differences` compares two of them, and returns the bits that
`qcow2bm.salvage` takes.

*Spec*: spec/repair.md, "Comparing".
"""

from __future__ import annotations

from qcow2bm.compare.content import Content, Identity, RawContent, Reader, identity
from qcow2bm.compare.differences import WORKERS, Progress, find_differences
from qcow2bm.compare.qemu_nbd import ServedContent, served

__all__ = [
    "WORKERS",
    "Content",
    "Identity",
    "Progress",
    "RawContent",
    "Reader",
    "ServedContent",
    "find_differences",
    "identity",
    "served",
]
