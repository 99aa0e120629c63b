"""The order in which pieces are stored, and the number of pieces at a time.

*Spec*: spec/tracking.md, "Flushing".
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator

from qcow2bm.bitmaps.tracked_bitmap import TrackedBitmap

BATCH_PIECES = 2048  # copied, written and made durable at once

Batch = list[tuple[TrackedBitmap, list[int]]]
"""Bitmaps, and the numbers of their pieces, ascending."""


class Batches:
    """Hands out the pieces that are due, each time from behind the last one of the time before.

    So pieces that are touched again and again keep no others from being stored.
    """

    def __init__(self) -> None:
        self._last = ("", -1)  # the bitmap and the piece that came last

    def due(self, bitmaps: Iterable[TrackedBitmap], limit: int) -> Iterator[Batch]:
        """The pieces that are due now, each once, but at most ``limit`` of them."""
        tracked = list(bitmaps)
        due = [(bitmap, bitmap.due().tolist()) for bitmap in tracked]
        name, last = self._last
        place = next((n for n, bitmap in enumerate(tracked) if bitmap.name == name), None)
        if place is not None:
            bitmap, numbers = due[place]
            cut = bisect_right(numbers, last)
            due = [
                (bitmap, numbers[cut:]),
                *due[place + 1 :],
                *due[:place],
                (bitmap, numbers[:cut]),
            ]
        batch: Batch = []
        room = min(limit, BATCH_PIECES)
        for bitmap, numbers in due:
            while numbers and limit:
                part, numbers = numbers[:room], numbers[room:]
                batch.append((bitmap, part))
                room, limit = room - len(part), limit - len(part)
                if not room:
                    self._last = bitmap.name, part[-1]
                    yield batch
                    batch, room = [], min(limit, BATCH_PIECES)
        if batch:
            yield batch
