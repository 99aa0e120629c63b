"""Choosing the bitmaps of an image to track, and beginning to track them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress

from qcow2bm.api import recover
from qcow2bm.api.bitmap import Bitmap, BitmapMapping
from qcow2bm.api.edit import Edit
from qcow2bm.api.open_image import TRACKED, OpenImage
from qcow2bm.bitmaps.status import BROKEN, VALID
from qcow2bm.bitmaps.tracked_store import TrackedStore
from qcow2bm.errors import BitmapError, CommitError, LimitError, Qcow2BmError, StorageError
from qcow2bm.log import logger
from qcow2bm.migration.intent import is_intent
from qcow2bm.migration.sentinel import is_sentinel
from qcow2bm.tracker.recorder import require_global_lock
from qcow2bm.tracker.tracker import Tracker
from qcow2bm.units import escape

_NOT_BEGUN = (
    "tracking did not begin; bitmaps may have become in use, which cannot be undone: look at the "
    "bitmaps"
)


def begin(
    opened: OpenImage,
    names: Iterable[str] | None,
    others: str,
    *,
    reserve: bool,
    generation: bool | None,
    intent: bool,
) -> Tracker:
    """See `Image.track`; the image is open for writing, and nothing else goes on."""
    require_global_lock()
    storage = opened.guard
    assert storage is not None
    store = TrackedStore(storage, is_shared=intent)
    names = None if names is None else list(names)
    if recover.clean_up(opened, must_be_gone=intent):
        store.reload()
    chosen, left_out = choose(opened, names, others)
    added = recover.add_intent(opened, [b.name for b in chosen]) if intent else None
    is_distrusted = bool(added)
    try:
        if added:
            store.reload()
            chosen, left_out = choose(opened, names, others)
        try:
            if remove_sentinels(opened):
                store.reload()
                chosen, left_out = choose(opened, names, others)
        except (LimitError, StorageError):  # there is no room; no program trusts them while in_use
            left_out += _recording(opened, VALID, is_sentinel)
        if not added:  # the same is true of an intent bitmap
            left_out += _recording(opened, VALID, is_intent)
        is_distrusted = any(is_intent(entry.name) for entry in store.metadata.directory.entries)
        store.begin(
            (b.entry for b in chosen),
            (b.entry for b in left_out),
            reserve=reserve,
            generation=generation,
        )
        opened.outdate()
        tracker = Tracker(storage, store, on_end=lambda: _end(opened, tracker), intent=added)
    except Exception as error:
        if is_distrusted:  # bitmaps may be in_use, and the program may go on without tracking
            with suppress(Qcow2BmError):
                store.distrust(is_intent)
                storage.barrier_anew()
        if isinstance(error, CommitError):
            opened.leave("in doubt after a failed commit", "opened again")
            raise CommitError(
                error.path, error.step, error.outcome, error.reason, _NOT_BEGUN
            ) from error
        raise
    opened.begin(TRACKED, tracker.give_up)
    return tracker


def remove_sentinels(opened: OpenImage) -> bool:
    """Removes the sentinels that a hand-over left behind, which keep QEMU from some operations.

    Returns:
        Whether there were any.
    """
    names = [name for name in BitmapMapping(opened) if is_sentinel(name)]
    if not names or not opened.metadata.directory.is_consistent:
        return False
    with Edit(opened, dry_run=False) as edit:
        for name in names:
            edit.remove(name)
    return True


def choose(
    opened: OpenImage, names: Iterable[str] | None, others: str
) -> tuple[list[Bitmap], list[Bitmap]]:
    """Returns the bitmaps to track, and those that will miss writes; see `Image.track`.

    *Guarantees*: each bitmap that should record writes is in one of the two lists (INV-AUTO).

    Raises:
        BitmapError: a bitmap does not exist, is not valid, is disabled, or must not be left out.
        ValueError: there are no names, or ``others`` is not one of its two values.
    """
    if others not in ("refuse", "mark-in-use"):
        raise ValueError(f'others is {others!r}, must be "refuse" or "mark-in-use"')
    recording = _recording(opened)
    if names is None:
        chosen = recording
        if not chosen:
            raise BitmapError("", "is not there: no bitmap of the image is valid and enabled")
    else:
        bitmaps = BitmapMapping(opened)
        chosen = [bitmaps[name] for name in dict.fromkeys(names)]
        if not chosen:
            raise ValueError("there are no names")
    for bitmap in chosen:
        if is_intent(bitmap.name):
            raise BitmapError(bitmap.name, "is an intent bitmap: leave it out")
        if is_sentinel(bitmap.name):
            raise BitmapError(bitmap.name, "is a sentinel that was left behind: leave it out")
        bitmap.require_valid()
        if not bitmap.auto:
            raise BitmapError(bitmap.name, "is disabled: enable it first")
    indexes = {bitmap.index for bitmap in chosen}
    left_out = [bitmap for bitmap in recording if bitmap.index not in indexes]
    left_out += _recording(opened, BROKEN)
    if left_out and others == "refuse":
        listed = ", ".join(f'"{escape(bitmap.name)}"' for bitmap in left_out[:5])
        first = left_out[0]
        cure = "track it, disable it" if first.status == VALID else "fit it to the disk, remove it"
        reason = f'would miss writes: {cure}, or give others="mark-in-use" ({listed})'
        raise BitmapError(first.name, reason)
    return chosen, left_out


def _recording(
    opened: OpenImage,
    status: str = VALID,
    has_name: Callable[[str], bool] = lambda name: not (is_sentinel(name) or is_intent(name)),
) -> list[Bitmap]:
    """Returns the bitmaps that are to record all writes, and have missed none.

    The broken ones among them do not fit the disk, and would be valid once they are made to fit.
    """
    entries = opened.metadata.directory.entries
    bitmaps = (Bitmap(opened, entry, opened.revision) for entry in entries)
    return [
        bitmap
        for bitmap in bitmaps
        if bitmap.auto and not bitmap.in_use and bitmap.status == status and has_name(bitmap.name)
    ]


def _end(opened: OpenImage, tracker: Tracker) -> None:
    """Lets the image be used again after tracking, unless another process may use it by now.

    The intent bitmap is removed if all bitmaps are stored. It does no harm where that fails.
    """
    opened.end()
    if opened.guard and not opened.guard.is_held:
        opened.outdate()
        opened.leave("in other hands", "opened again")
    else:
        opened.reload("unreadable after tracking")
        if tracker.state == "stopped" and tracker.intent:
            try:
                recover.clean_up(opened, must_be_gone=False)
            except Qcow2BmError as error:
                logger.warning("%s: the intent bitmap stays in the image: %s", opened.name, error)
