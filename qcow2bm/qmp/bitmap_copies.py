"""Copies bitmaps that a running QEMU has in memory.

QMP does not give bits. So the bitmaps are merged, in one transaction, into bitmaps of a scratch
image, which QEMU stores when the image is closed. The image is a file without a name, which QEMU
is lent over the socket: QEMU needs access to no folder.

*Spec*: spec/sidecar.md, "A running machine"; spec/live.md, "Offload".
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import BinaryIO, NamedTuple

from qcow2bm.api import open, sidecar
from qcow2bm.errors import BitmapError, QmpError
from qcow2bm.migration.sidecar import SavedBitmap
from qcow2bm.qmp import actions, scratch_image
from qcow2bm.qmp.commands import QmpCommands
from qcow2bm.qmp.machine import Node, NodeBitmap
from qcow2bm.qmp.names import SCRATCH_NODE
from qcow2bm.qmp.queries import query_digest
from qcow2bm.units import escape


class Omission(NamedTuple):
    """A persistent bitmap that is left where it is, and why."""

    bitmap: NodeBitmap
    reason: str


class Copies(NamedTuple):
    """Copies of bitmaps, and how many ``seconds`` QEMU took to store them."""

    bitmaps: tuple[SavedBitmap, ...]
    seconds: float


def copy_bitmaps(monitor: QmpCommands, node: Node, bitmaps: Sequence[NodeBitmap]) -> Copies:
    """Returns copies of bitmaps of a node, as they are now; QEMU's own do not change.

    Raises:
        QmpError: QEMU does not answer, refuses, or did not store a bitmap.
        StorageError: there is no room for temporary files.
    """
    with scratch_image.blank(node.virtual_size) as file:
        with scratch_image.lent(monitor, file):
            monitor.transaction([*map(_added, bitmaps), *(_merged(node, b) for b in bitmaps)])
            digests = [query_digest(monitor, b._replace(node=SCRATCH_NODE)) for b in bitmaps]
            began = time.monotonic()  # QEMU stores when the node is removed
        seconds = time.monotonic() - began
        return Copies(tuple(_read(file, bitmaps, digests)), seconds)


def _added(bitmap: NodeBitmap) -> actions.Action:
    name, granularity = bitmap.name, bitmap.granularity
    return actions.add(SCRATCH_NODE, name, granularity, persistent=True, enabled=False)


def _merged(node: Node, bitmap: NodeBitmap) -> actions.Action:
    return actions.merge(SCRATCH_NODE, bitmap.name, bitmap.name, node.name)


def _read(
    file: BinaryIO, bitmaps: Sequence[NodeBitmap], digests: Sequence[str | None]
) -> list[SavedBitmap]:
    """Reads what QEMU stored, and compares it with the digests that QEMU gave."""
    found = []
    with open(file) as image:
        for live, digest in zip(bitmaps, digests, strict=True):
            try:
                (bitmap,) = sidecar.collect(image, [image.bitmaps[live.name]]).bitmaps
            except BitmapError as error:
                raise QmpError("blockdev-del", f"QEMU did not store a bitmap: {error}") from error
            if digest not in (None, bitmap.sha256()):
                reason = f'the bits of "{escape(live.name)}" are not what QEMU said they were'
                raise QmpError("blockdev-del", reason)
            found.append(bitmap._replace(enabled=live.is_recording))
    return found
