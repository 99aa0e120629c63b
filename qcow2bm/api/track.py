"""Beginning to track the bitmaps of an image."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from qcow2bm.bitmaps.status import BROKEN, VALID
from qcow2bm.bitmaps.tracked_store import TrackedStore
from qcow2bm.errors import BitmapError, CommitError, LimitError, Qcow2BmError, StorageError
from qcow2bm.migration.sentinel import is_sentinel
from qcow2bm.tracker.tracker import Tracker
from qcow2bm.units import escape

if TYPE_CHECKING:
    from qcow2bm.api.bitmap import Bitmap
    from qcow2bm.api.image import Image


_NOT_BEGUN = (
    "tracking did not begin; bitmaps may have become in use, which cannot be undone: look at the "
    "bitmaps"
)


def begin(
    image: Image,
    names: Iterable[str] | None,
    others: str,
    *,
    reserve: bool,
    generation: bool | None,
) -> Tracker:
    """See `Image.track`; the image is open for writing, and nothing else goes on."""
    storage = image._writable
    assert storage is not None
    store = TrackedStore(storage)
    names = None if names is None else list(names)
    chosen, left_out = choose(image, names, others)
    try:
        if remove_sentinels(image):
            store.reload()
            chosen, left_out = choose(image, names, others)
    except (LimitError, StorageError):  # there is no room; in_use nobody goes by them
        left_out += _recording(image, VALID, is_sentinel)
    try:
        store.begin(
            (b.entry for b in chosen),
            (b.entry for b in left_out),
            reserve=reserve,
            generation=generation,
        )
    except CommitError as error:
        image._leave("in doubt after a failed commit", "opened again")
        raise CommitError(
            error.path, error.step, error.outcome, error.reason, _NOT_BEGUN
        ) from error
    image._revision += 1  # what was read before is not so any more
    image._tracker = Tracker(storage, store, image.virtual_size, on_end=lambda: _end(image))
    return image._tracker


def remove_sentinels(image: Image) -> bool:
    """Removes what hand-overs left behind, which would keep QEMU from some things."""
    names = [name for name in image.bitmaps if is_sentinel(name)]
    if not names or not image.is_consistent:
        return False
    with image.edit() as edit:
        for name in names:
            edit.remove(name)
    return True


def choose(
    image: Image, names: Iterable[str] | None, others: str
) -> tuple[list[Bitmap], list[Bitmap]]:
    """The bitmaps to track, and those that will miss writes; see `Image.track`.

    Raises:
        BitmapError: a bitmap is not there, not valid, disabled, or must not be left out.
        ValueError: there are no names, or ``others`` is something else.
    """
    if others not in ("refuse", "mark-in-use"):
        raise ValueError(f'others is {others!r}, must be "refuse" or "mark-in-use"')
    recording = _recording(image)
    if names is None:
        chosen = recording
        if not chosen:
            raise BitmapError("", "is not there: no bitmap of the image is valid and enabled")
    else:
        chosen = [image.bitmaps[name] for name in dict.fromkeys(names)]
        if not chosen:
            raise ValueError("there are no names")
    for bitmap in chosen:
        if is_sentinel(bitmap.name):
            raise BitmapError(bitmap.name, "is a sentinel that was left behind: leave it out")
        bitmap._require_valid()
        if not bitmap.auto:
            raise BitmapError(bitmap.name, "is disabled: enable it first")
    indexes = {bitmap.index for bitmap in chosen}
    left_out = [bitmap for bitmap in recording if bitmap.index not in indexes]
    left_out += _recording(image, BROKEN)
    if left_out and others == "refuse":
        listed = ", ".join(f'"{escape(bitmap.name)}"' for bitmap in left_out[:5])
        first = left_out[0]
        cure = "track it, disable it" if first.status == VALID else "fit it to the disk, remove it"
        reason = f'would miss writes: {cure}, or give others="mark-in-use" ({listed})'
        raise BitmapError(first.name, reason)
    return chosen, left_out


def _recording(
    image: Image,
    status: str = VALID,
    has_name: Callable[[str], bool] = lambda name: not is_sentinel(name),
) -> list[Bitmap]:
    """The bitmaps that are to record all writes, and have missed none.

    Those that are broken here do not fit the disk, and would be valid once they are made to fit.
    """
    bitmaps = (image.bitmap(entry.index) for entry in image.directory)
    return [
        bitmap
        for bitmap in bitmaps
        if bitmap.auto and not bitmap.in_use and bitmap.status == status and has_name(bitmap.name)
    ]


def _end(image: Image) -> None:
    image._tracker = None
    image._file.close()
    image._revision += 1
    if image._writable and not image._writable.is_held:
        image._leave("in other hands", "opened again")
        return
    try:
        image._load()
    except Qcow2BmError:
        image._leave("unreadable after tracking", "opened again")
