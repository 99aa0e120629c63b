"""Making bitmaps valid again that were in use when the tracker, or the host, died.

*Spec*: spec/intent.md, "Recovery".
"""

from __future__ import annotations

from collections.abc import Iterable

from qcow2bm.api.bitmap import Bitmap, BitmapMapping
from qcow2bm.api.edit import Edit
from qcow2bm.api.open_image import OpenImage
from qcow2bm.bitmaps.status import INCONSISTENT, VALID
from qcow2bm.errors import BitmapError, IntentError, LimitError, NoRoomError
from qcow2bm.log import logger
from qcow2bm.migration.intent import Intent, find, is_intent
from qcow2bm.tracker.reports import Recovery
from qcow2bm.units import escape


def evidence(opened: OpenImage) -> tuple[Intent | None, str]:
    """Returns the intent bitmap of an image, if it has every write; otherwise None, and why.

    Raises:
        ChangedWhileReadingError: the image changed since it was opened.
        StorageError: reading failed.
    """
    directory = opened.metadata.directory
    if not directory.is_consistent:
        return None, "the bitmaps are stale: a program without bitmap support wrote to the image"
    intent, reason = find(directory.entries, opened.file.virtual_size)
    if intent is None:
        return None, reason
    bitmaps = BitmapMapping(opened)
    if bitmaps[intent.name].status != VALID or bitmaps[intent.canary_name].status != VALID:
        return None, "the intent bitmap is damaged"
    if not intent.is_alive(bitmaps[intent.canary_name].packed()):
        return None, "the canary of the intent bitmap was changed: both may have been cleared"
    return intent, ""


def recoverable(opened: OpenImage) -> list[Bitmap]:
    """Returns the bitmaps that `recover` would recover; raises as `evidence` does."""
    intent, _ = evidence(opened)
    return [] if intent is None else _covered(opened, intent)


def _covered(opened: OpenImage, intent: Intent) -> list[Bitmap]:
    return [
        bitmap
        for name, bitmap in BitmapMapping(opened).items()
        if bitmap.status == INCONSISTENT and bitmap.auto and intent.covers(name)
    ]


def recover(
    opened: OpenImage, names: Iterable[str] | None = None, *, dry_run: bool = False
) -> Recovery:
    """See `Image.recover`; the image is open for editing, or for reading in a dry run."""
    intent, reason = evidence(opened)
    if intent is None:
        bitmaps = BitmapMapping(opened).values()
        if names is None and all(bitmap.status == VALID for bitmap in bitmaps):
            return Recovery(())
        raise IntentError(reason)
    found = {bitmap.name: bitmap for bitmap in _covered(opened, intent)}
    wanted = list(found) if names is None else list(dict.fromkeys(names))
    for name in wanted:
        if name not in found:
            raise BitmapError(name, f"cannot be recovered: {_why_not(opened, intent, name)}")
    if not wanted:
        return Recovery(())
    left = found.keys() - {*wanted}
    with Edit(opened, dry_run=dry_run) as edit:
        for name in wanted:
            edit.salvage(name, trust_stored=True)
            edit.merge(name, intent.name)
        if not left:
            edit.remove(intent.name)
            edit.remove(intent.canary_name)
        plan = edit.plan() if dry_run else None
    if not dry_run:
        logger.info("%s: recovered %s", opened.name, [escape(name) for name in wanted])
    return Recovery(tuple(wanted), plan)


def _why_not(opened: OpenImage, intent: Intent, name: str) -> str:
    bitmap = BitmapMapping(opened)[name]
    if bitmap.status != INCONSISTENT:
        return f"it is {bitmap.status}"
    if not intent.covers(name):
        return "the intent bitmap does not stand for it: it was in use before"
    return "it was disabled"


def clean_up(opened: OpenImage, *, must_be_gone: bool) -> bool:
    """Recovers what can be recovered, and removes the intent bitmaps: before tracking begins.

    Returns whether there were any. Where there is no room to remove them they stay, unless they
    ``must_be_gone``.

    Raises:
        NoRoomError, LimitError: there is no room to recover a bitmap, or to remove what must be.
        Qcow2BmError: as `Image.edit` and a commit do.
    """
    directory = opened.metadata.directory
    if not directory.is_consistent or not any(is_intent(one.name) for one in directory.entries):
        return False
    for name in [bitmap.name for bitmap in recoverable(opened)]:
        try:  # one by one, so that damage to one of them does not cost the others
            recover(opened, [name])
        except BitmapError as error:
            logger.warning("%s: %s", opened.name, error)
    names = [name for name in BitmapMapping(opened) if is_intent(name)]
    try:
        if names:
            with Edit(opened, dry_run=False) as edit:
                for name in names:
                    edit.remove(name)
    except (LimitError, NoRoomError) as error:
        if must_be_gone:
            raise
        logger.warning("%s: an intent bitmap stays in the image: %s", opened.name, error)
    return True


def add_intent(opened: OpenImage, covered: Iterable[str]) -> Intent:
    """Adds an intent bitmap for bitmaps that are valid.

    Raises:
        LimitError: there are too many bitmaps.
        Qcow2BmError: as `Image.edit` and a commit do.
    """
    file = opened.file
    intent = Intent.fresh(file.virtual_size, file.cluster_size, covered)
    with Edit(opened, dry_run=False) as edit:
        edit.add(intent.canary_name, intent.granularity, enabled=False)
        for start, length in intent.canary_ranges:
            edit.set(intent.canary_name, start, length)
        edit.add(intent.name, intent.granularity)
        edit.set(intent.name, 0, 1)  # so that it has a cluster, which is written in place
    return intent
