"""Comparing the contents of two disks: the public functions and types.

`open_disks` opens the last backup of a disk and what the disk holds now, after it has checked that
the two can be these. Each is a `Content`: `RawContent` for a raw file or block device,
`ServedContent` for a qcow2 image, which `served` gives. `find_differences` compares the two, and
returns the bits that `qcow2bm.salvage` takes.

*Spec*: spec/repair.md, "Comparing".
"""

from __future__ import annotations

from qcow2bm.compare.backup import ComparedDisk, DiskFormat, OpenDisks, open_disks
from qcow2bm.compare.content import Content, Identity, RawContent, Reader, identity
from qcow2bm.compare.differences import WORKERS, Progress, find_differences
from qcow2bm.compare.qemu_nbd import ServedContent, served

__all__ = [
    "WORKERS",
    "ComparedDisk",
    "Content",
    "DiskFormat",
    "Identity",
    "OpenDisks",
    "Progress",
    "RawContent",
    "Reader",
    "ServedContent",
    "find_differences",
    "identity",
    "open_disks",
    "served",
]
