"""Sidecars: the bitmaps of a disk in a file of their own.

A bitmap goes back into the image only if nothing was written to the disk since the bitmap was
saved. A sentinel in the image is the evidence for that.

>>> from qcow2bm import sidecar
>>> with qcow2bm.open("vm.qcow2", "r+") as image:                # doctest: +SKIP
...     sidecar.add_sentinel(image)
...     saved = sidecar.collect(image, image.bitmaps.values())
...     pieces = sidecar.write(saved)                            # the bytes of the file

*Spec*: spec/sidecar.md, "Evidence".
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import TYPE_CHECKING

from qcow2bm.bitmaps.status import BROKEN, VALID
from qcow2bm.errors import BitmapError, EvidenceError
from qcow2bm.migration.evidence import Definition, Departure, Facts, Witness, judge
from qcow2bm.migration.sentinel import CANARY_SUFFIX, Sentinel, is_sentinel
from qcow2bm.migration.sidecar import (
    MAX_BYTES,
    SavedBitmap,
    Sidecar,
    parse_saved_header,
    read_sidecar,
    write_sidecar,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from qcow2bm.api.bitmap import Bitmap
    from qcow2bm.api.edit import Edit
    from qcow2bm.api.image import Image
    from qcow2bm.clusters.plan import Plan


__all__ = [
    "MAX_BYTES",
    "SavedBitmap",
    "Sidecar",
    "add_sentinel",
    "collect",
    "is_sentinel",
    "read",
    "reason_for_doubt",
    "restore",
    "write",
]


def read(pieces: Iterable[bytes], limit_bytes: int = MAX_BYTES) -> Sidecar:
    """Reads a sidecar.

    Args:
        pieces: the bytes of the whole file, in pieces of any size.
        limit_bytes: how many bytes of bits the bitmaps may have together.

    Raises:
        FormatError: the file is no sidecar, is damaged, or is cut off.
        UnsupportedError: the version of the sidecar, or of the header in it, is unknown here.
        LimitError: there are too many bits.
    """
    return read_sidecar(pieces, limit_bytes)


def write(sidecar: Sidecar) -> Iterator[bytes]:
    """Returns the bytes of a sidecar, in pieces; memory grows with one bitmap, compressed.

    Raises:
        BitmapError: two bitmaps have one name, or a bitmap belongs to a disk of another size.
        FormatError: a value does not fit its field.
        LimitError: there are too many bits, or the header is too long.
    """
    return write_sidecar(sidecar.disk_size, sidecar.header, sidecar.bitmaps)


def collect(image: Image, bitmaps: Iterable[Bitmap]) -> Sidecar:
    """Returns bitmaps of an image, with the evidence of what its disk is now.

    Args:
        image: the image that has the bitmaps.
        bitmaps: the bitmaps; sentinels among them are the evidence.

    Raises:
        BitmapError: a bitmap is not valid.
        ImageLockedError, ChangedWhileReadingError, StorageError: as `Bitmap.packed` does.
    """
    size = image.virtual_size
    saved = [SavedBitmap(b.name, b.granularity, b.auto, size, b.packed().data) for b in bitmaps]
    return Sidecar(size, image.used_header, tuple(saved))


def add_sentinel(image: Image) -> None:
    """Adds a sentinel to an image, unless the image has a sentinel that recorded no write.

    Args:
        image: an image that is open for editing.

    Raises:
        Qcow2BmError: as `Image.edit` and a commit do.
    """
    old = [name for name in image.bitmaps if is_sentinel(name)]
    valid = (bitmap for bitmap in map(image.bitmaps.get, old) if bitmap and bitmap.status == VALID)
    found = collect(image, valid)
    if not reason_for_doubt(image, found.bitmaps, found.header):
        return
    sentinel = Sentinel.fresh(image.virtual_size, image.cluster_size)
    with image.edit() as edit:
        for name in old:
            edit.remove(name)
        edit.add(sentinel.name, sentinel.granularity)
        edit.add(sentinel.canary_name, sentinel.granularity, enabled=False)
        edit.set_many(sentinel.canary_name, sentinel.canary_ranges)


def reason_for_doubt(image: Image, saved: Collection[SavedBitmap], header: bytes = b"") -> str:
    """Returns why a disk may have changed since bitmaps were saved; "" if it has not changed.

    A sentinel proves that the disk has not changed if it was saved with the bitmaps, recorded no
    write until then, and has recorded no write in the image since.

    Args:
        image: the image that is to get the bitmaps.
        saved: everything that was saved, sentinels included.
        header: the header of the image they were saved from, if it is known; see `Sidecar`.

    Raises:
        ImageLockedError: another process writes to the image.
        ChangedWhileReadingError: the image changed since it was opened.
        StorageError: reading failed.
    """
    found = _facts(image)
    before = found
    if header:
        file = parse_saved_header(header)
        before = found._replace(definition=Definition.of(file), token=file.token)
    elif found.definition.backing_file is not None:
        return "nothing is known of the backing file"
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
    file = parse_saved_header(image.used_header)
    return Facts(
        Definition.of(file),
        file.token,
        None,
        image.is_consistent,
        {name: bitmap.entry for name, bitmap in image.bitmaps.items()},
        {name for name, bitmap in image.bitmaps.items() if bitmap.status == BROKEN},
    )


def _bits(image: Image, name: str) -> NDArray[np.uint8] | None:
    bitmap = image.bitmaps.get(name)
    return bitmap.packed() if bitmap and bitmap.status == VALID else None


def restore(
    image: Image,
    saved: Collection[SavedBitmap],
    header: bytes = b"",
    *,
    is_asserted: bool = False,
    is_all_dirty: bool = False,
    dry_run: bool = False,
) -> Plan | None:
    """Adds saved bitmaps to an image in one edit, and removes all sentinels from the image.

    The bitmaps must still be true of the disk: a sentinel has to prove that (`reason_for_doubt`),
    or the caller asserts it, or every bit becomes dirty.

    A bitmap of the same name that is in_use is replaced. A sentinel in the image has recorded
    the writes since it was added: each restored bitmap that is enabled gets them, too, since a
    bit too many is never wrong.

    Args:
        image: the image; it is open for editing, or for reading in a dry run.
        saved: the bitmaps; sentinels among them are evidence, and are not added.
        header: the header of the image they were saved from, if it is known; see `Sidecar`.
        is_asserted: True if the caller asserts that nothing was written to the disk since the
            bitmaps were saved.
        is_all_dirty: make every bit of every bitmap dirty.
        dry_run: write nothing.

    Returns:
        In a dry run, what would be written; else None.

    Raises:
        EvidenceError: nothing proves that the disk is unchanged.
        BitmapError: a bitmap of that name is there, or belongs to a disk of another size.
        ValueError: QEMU could not use such a name or granularity.
        Qcow2BmError: as `reason_for_doubt`, `Image.edit` and a commit do.
    """
    if not (is_asserted or is_all_dirty):
        reason = reason_for_doubt(image, saved, header)
        if reason:
            raise EvidenceError(reason)
    with image.edit(dry_run=dry_run) as edit:
        _add(image, edit, saved, is_all_dirty=is_all_dirty)
        return edit.plan() if dry_run else None


def _add(image: Image, edit: Edit, saved: Iterable[SavedBitmap], *, is_all_dirty: bool) -> None:
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
