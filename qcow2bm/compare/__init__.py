"""Comparing the contents of two disks: the public functions and types.

`open_disks` opens the last backup of a disk and what the disk holds now, after it has checked that
the two can be these. Each is a `Content`: `RawContent` for a raw file or block device,
`ServedContent` for a qcow2 image, which `served` gives. `find_differences` compares the two, and
returns the bits that `qcow2bm.salvage` takes; `find_differences_at` does so for several
granularities. `find_missing` finds where the two differ although a bitmap is clean.

*Spec*: spec/repair.md, "Comparing"; spec/verify.md.
"""

from __future__ import annotations

from qcow2bm.compare.backup import ComparedDisk, DiskFormat, OpenDisks, open_disks
from qcow2bm.compare.content import Content, Identity, RawContent, Reader, identity
from qcow2bm.compare.differences import find_differences, find_differences_at
from qcow2bm.compare.missing import find_missing
from qcow2bm.compare.pieces import WORKERS, Progress
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
    "find_differences_at",
    "find_missing",
    "identity",
    "open_disks",
    "served",
]
