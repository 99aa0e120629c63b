"""Bitmaps that are kept outside of their image, and put into it again if they are still true.

*Spec*: spec/sidecar.md, "Evidence".
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

from qcow2bm.bitmaps.status import BROKEN, VALID
from qcow2bm.errors import BitmapError
from qcow2bm.migration.evidence import Definition, Departure, Facts, Witness, judge
from qcow2bm.migration.sentinel import CANARY_SUFFIX, Sentinel, is_sentinel
from qcow2bm.migration.sidecar import SavedBitmap, Sidecar, parse_saved_header

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from qcow2bm.api.bitmap import Bitmap
    from qcow2bm.api.edit import Edit
    from qcow2bm.api.image import Image


def save(image: Image, bitmaps: Iterable[Bitmap]) -> Sidecar:
    """These bitmaps of an image, and what tells later whether its disk is still the same.

    Raises:
        BitmapError: one is not valid.
        StorageError: reading failed.
    """
    size = image.virtual_size
    saved = [SavedBitmap(b.name, b.granularity, b.auto, size, b.packed().data) for b in bitmaps]
    return Sidecar(size, image._file.used_header, tuple(saved))


def add_sentinel(image: Image) -> None:
    """Leaves a sentinel in an image that is open for editing, unless there is one that will do.

    Raises:
        Qcow2BmError: as an edit does.
    """
    old = [name for name in image.bitmaps if is_sentinel(name)]
    valid = (bitmap for bitmap in map(image.bitmaps.get, old) if bitmap and bitmap.status == VALID)
    found = save(image, valid)
    if not why_in_doubt(image, found.bitmaps, found.header):
        return
    sentinel = Sentinel.fresh(image.virtual_size, image.cluster_size)
    with image.edit() as edit:
        for name in old:
            edit.remove(name)
        edit.add(sentinel.name, sentinel.granularity)
        edit.add(sentinel.canary_name, sentinel.granularity, enabled=False)
        edit.set_many(sentinel.canary_name, sentinel.canary_ranges)


def why_in_doubt(image: Image, saved: Collection[SavedBitmap], header: bytes = b"") -> str:
    """What keeps an image from proving that its disk is as it was; nothing if it does prove it.

    It does by a sentinel that was saved with the bitmaps without a write, and is in the image
    without a write: then nothing was written since it was made, which was before they were saved.

    Args:
        image: what the bitmaps are to be put into.
        saved: all that was saved.
        header: that of the image they were saved from, if it is known; see `Sidecar`.

    Raises:
        ImageLockedError: somebody writes to the image.
        ChangedWhileReadingError: the image changed since it was opened.
        StorageError: reading failed.
    """
    found = _facts(image)
    before = found
    if header:
        file = parse_saved_header(header)
        before = found._replace(definition=Definition.of(file), token=file.token)
    elif found.definition.backing_file is not None:
        return "of the backing file nothing is known"
    reason = "no sentinel was saved with the bitmaps"
    for bitmap in saved:
        if is_sentinel(bitmap.name) and not bitmap.name.endswith(CANARY_SUFFIX):
            if bitmap.dirty_bytes:  # the image may be an older state of the disk
                reason = "the sentinel had ranges that were written when it was saved"
                continue
            sentinel = Sentinel(bitmap.name, bitmap.granularity, bitmap.disk_size)
            witness = Witness(_bits(image, sentinel.name), _bits(image, sentinel.canary_name))
            verdict = judge(Departure(before, sentinel), found, witness)
            if verdict.outcome == "unchanged":
                return ""
            reason = verdict.reason
    return reason


def _facts(image: Image) -> Facts:
    return Facts(
        Definition.of(image._file),
        image._file.token,
        None,
        image.is_consistent,
        {name: bitmap.entry for name, bitmap in image.bitmaps.items()},
        {name for name, bitmap in image.bitmaps.items() if bitmap.status == BROKEN},
    )


def _bits(image: Image, name: str) -> NDArray[np.uint8] | None:
    bitmap = image.bitmaps.get(name)
    return bitmap.packed() if bitmap and bitmap.status == VALID else None


def load(
    image: Image, edit: Edit, saved: Iterable[SavedBitmap], *, is_all_dirty: bool = False
) -> None:
    """Adds saved bitmaps in an edit, as they are or all dirty; sentinels have served, and go.

    Bitmaps of the same names that are in_use are replaced. What a sentinel in the image has was
    written after it was made, so those that record writes get that, too: more is never wrong.

    Raises:
        BitmapError: one is there, or belongs to a disk of another size.
        ValueError: QEMU could not use such a name or granularity.
    """
    size = image.virtual_size
    sentinels = [name for name in image.bitmaps if is_sentinel(name)]
    recorded = [n for n in sentinels if image.bitmaps[n].auto and image.bitmaps[n].status == VALID]
    for name, granularity, enabled, disk_size, octets in saved:
        if disk_size != size:
            reason = f"was saved from a disk of {disk_size} bytes, but this one has {size}"
            raise BitmapError(name, reason)
        if not is_sentinel(name):
            edit.load(name, granularity, octets, enabled)
            if is_all_dirty:
                edit.set(name, 0, size)
            for sentinel in recorded if enabled else ():
                edit.merge(name, sentinel)
    if image.is_consistent:
        for name in sentinels:
            edit.remove(name)
