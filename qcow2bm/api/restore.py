"""Putting bitmaps that were saved elsewhere into an image, if they are still true of its disk.

*Spec*: spec/lifecycle.md, "Sentinel", and spec/cli.md, "Streams".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qcow2bm.migration.sentinel import CANARY_SUFFIX, Sentinel, is_sentinel

if TYPE_CHECKING:
    from qcow2bm.api.image import Image


def why_in_doubt(image: Image) -> str:
    """What keeps the image from proving that its disk was not written to; nothing if it does.

    It proves that by a sentinel that was left in it and has nothing, with its canary. Then
    nothing was written since that was made, which was before the bitmaps were saved.

    Raises:
        ImageLockedError: somebody writes to the image.
        ChangedWhileReadingError: the image changed since it was opened.
        StorageError: reading failed.
    """
    reason = "it has no sentinel"
    for name, bitmap in image.bitmaps.items():
        if not is_sentinel(name) or name.endswith(CANARY_SUFFIX):
            continue
        sentinel = Sentinel(name, bitmap.granularity, image.virtual_size)
        canary = image.bitmaps.get(sentinel.canary_name)
        if not image.is_consistent:
            return "its bitmaps are stale"
        reason = sentinel.why_no_evidence(bitmap.entry, canary.entry if canary else None)
        if not reason and canary:
            if not canary.count():
                reason = "bitmaps were cleared, the canary too"
            elif bitmap.count():
                reason = "the sentinel has ranges that were written"
            else:
                return ""
    return reason
