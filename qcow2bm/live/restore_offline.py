"""Puts the bitmaps of an offload file back into the image of a machine that is off.

*Spec*: spec/live.md, "Restore".
"""

from __future__ import annotations

import numpy as np

from qcow2bm.api import Bitmap, Edit, Image
from qcow2bm.bitmaps.status import VALID
from qcow2bm.errors import BitmapError, TailError
from qcow2bm.format.offload_file import PlannedBitmap
from qcow2bm.live.offload_file import OffloadFile
from qcow2bm.live.place import fault_of, has_all, node_of_image
from qcow2bm.live.restore_report import BitmapReturn, RestoreReport, WrittenFacts
from qcow2bm.live.tail import Tail
from qcow2bm.migration.sidecar import SavedBitmap
from qcow2bm.qmp.names import new_copy_name
from qcow2bm.storage import new_file


def restore_offline(path: str, image: Image, *, dry_run: bool = False) -> RestoreReport:
    """Puts bitmaps back into the image of a machine that is off, in one edit; ``live restore``.

    Each bitmap that records gets what the tail has: recorders ended with the machine.

    Args:
        path: of the offload file. The tail in the image tells which bitmaps of the file are those
            of this image.
        image: the image; it is open for editing, or for reading in a dry run.
        dry_run: write nothing.

    Raises:
        TailError: the tail is missing, or may miss writes.
        BitmapError: a bitmap is neither in the image nor in the file, or another one is there.
        StorageError, FormatError: as `restore` does.
        Qcow2BmError: as `Image.edit` and a commit do.
    """
    with new_file.held(path):
        return _restore(OffloadFile.read(path), image, dry_run=dry_run)


def _restore(file: OffloadFile, image: Image, *, dry_run: bool) -> RestoreReport:
    number = _node_of(file, image)
    tail = file.tail(number)
    planned_node = tail.planned
    names = [bitmap.name for bitmap in planned_node.bitmaps]
    if tail.name not in image.bitmaps:
        reason = "it is there, and the image has no tail of this file"
        if file.was_restored(number):
            reason = "the file says that it was put back"
        kept = (BitmapReturn(planned_node.name, name, "kept", reason) for name in names)
        return RestoreReport(tuple(kept))
    node = node_of_image(image, tail)
    former = file.read_former_tails(number, image.virtual_size)
    dirty_bytes = image.bitmaps[tail.name].count() + (former.dirty_bytes if former else 0)
    restored = []
    with image.edit(dry_run=dry_run) as edit:
        if former:
            _merge_into(edit, tail.name, former)
        for place in file.plan.numbers_of(number):
            _, planned = file.bitmaps[place]
            copy = file.read_copy(place, image.virtual_size) if file.has_copy(place) else None
            _put_into(edit, image.bitmaps.get(planned.name), planned, copy)
            if planned.enabled:
                edit.merge(planned.name, tail.name)
            written = WrittenFacts(False, dirty_bytes) if planned.enabled else None
            done = BitmapReturn(planned_node.name, planned.name, "restored", written=written)
            restored.append(done)
        for name in tail.names_on(node):
            edit.remove(name)
        plan = edit.plan() if dry_run else None
    if not dry_run:
        file.append_restored(number)
    return RestoreReport(tuple(restored), plan)


def _merge_into(edit: Edit, target: str, bitmap: SavedBitmap) -> None:
    """Sets in a bitmap of the edit what is set in another that is not in the image."""
    name = new_copy_name()
    edit.load(name, bitmap.granularity, bitmap.octets, enabled=False)
    edit.merge(target, name)
    edit.remove(name)


class _ImageCounts:
    """`TailCounts` of an image."""

    def __init__(self, image: Image, tail: Tail) -> None:
        self._image, self._tail = image, tail

    def coarsened(self) -> int:
        """See `TailCounts.coarsened`."""
        tail = self._tail
        bits = np.unpackbits(self._image.bitmaps[tail.name].packed(), bitorder="little")
        granules = np.flatnonzero(bits) * tail.granularity // tail.canary_granularity
        return len(np.unique(granules)) * tail.canary_granularity

    def is_canary_full(self) -> bool:
        """See `TailCounts.is_canary_full`."""
        now = self._image.bitmaps[self._tail.canary_name].packed()
        made = np.frombuffer(self._tail.canary.octets, np.uint8)
        return len(now) >= len(made) and bool(np.all(now[: len(made)] & made == made))


def _put_into(
    edit: Edit, found: Bitmap | None, planned: PlannedBitmap, copy: SavedBitmap | None
) -> None:
    """Gives the edit a bitmap with the bits of its copy, whatever the image has of it."""
    name, granularity, enabled = planned
    if not found:
        if not copy:
            raise BitmapError(name, "is neither in the image nor in the file")
        edit.load(name, granularity, copy.octets, enabled)
        return
    if found.status != VALID or found.granularity != granularity:
        raise BitmapError(name, f"is {found.status} in the image, with other properties")
    if copy and found.sha256() != copy.sha256():
        if not enabled:
            raise BitmapError(name, "has other bits than its copy in the file")
        # It was put back into the machine, and has recorded since.
        _merge_into(edit, name, copy)
    if enabled:
        edit.enable(name)


def _node_of(file: OffloadFile, image: Image) -> int:
    """Returns the number of the node whose disk an image is, if every write to it is known.

    If the bitmaps were put back, the image has no tail any more.
    """
    complete = []
    for number, tail in enumerate(file.tails):
        node = node_of_image(image, tail)
        fault = fault_of(file, number, node, _ImageCounts(image, tail))
        if tail.name in image.bitmaps:
            if fault:
                raise TailError(fault)
            return number
        if not fault and has_all(node, tail.planned):
            complete.append(number)
    if complete:
        return complete[0]
    why = "nothing recorded the writes since the offload"
    if file.is_restored:
        why = "the file says that its bitmaps were put back, and they are not here as they were"
    raise TailError(f"the image has no tail of this file: {why}")
