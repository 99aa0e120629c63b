"""Finds where two contents differ although a bitmap is clean.

*Spec*: spec/verify.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qcow2bm.bitmaps.entries import MAX_GRANULARITY_BITS, MIN_GRANULARITY_BITS
from qcow2bm.bits.algebra import mask_of
from qcow2bm.bits.extents import ExtentFinder
from qcow2bm.compare.content import Content
from qcow2bm.compare.pieces import WORKERS, Progress, differing_bits
from qcow2bm.errors import BitmapBrokenError
from qcow2bm.units import align_up

if TYPE_CHECKING:
    from qcow2bm.api import Bitmap

_PART_BITS = 1 << 18
"""The disk is compared in parts of so many granules, which are whole words of bits."""

_LEAST_SKIP_BYTES = 64 << 10
"""To read past a shorter dirty range takes less time than one more read."""

_WORD_BYTES = 8


def find_missing(
    old: Content,
    new: Content,
    bitmap: Bitmap,
    *,
    trust_stored: bool = False,
    workers: int = WORKERS,
    progress: Progress | None = None,
) -> Iterator[NDArray[np.int64]]:
    """Yields the ranges in which two contents differ although a bitmap is clean there.

    If there is none, the dirty ranges of the bitmap together with ``old`` make up ``new``: the
    bitmap misses no write. The ranges are whole granules of the bitmap.

    *Guarantees*: the ranges ascend, do not touch, and lie on the disk. Everything behind the end of
    ``old`` counts as different. Memory does not grow with the disk.

    Args:
        old: the content of the backup.
        new: the content of the disk now; its size is that of the disk.
        bitmap: a bitmap of that disk.
        trust_stored: compare with the bits that are stored even if the bitmap is not valid.
        workers: how many threads compare.
        progress: is called with each number of bytes that were compared or skipped.

    Yields:
        int64[n, 2] of (start, length) in guest bytes.

    Raises:
        BitmapError: the bitmap is not valid, or its table cannot be read.
        ChangedWhileReadingError: a disk or the image changed meanwhile. Ranges that were yielded
            before are of no use then.
        ImageLockedError: another process writes to the image.
        StorageError: reading failed.
    """
    is_trusted = trust_stored and bitmap.status in ("inconsistent", "stale")
    extents = bitmap.stale_extents() if is_trusted else bitmap.extents()
    granularity, size = bitmap.granularity, new.size
    if not MIN_GRANULARITY_BITS <= bitmap.entry.granularity_bits <= MAX_GRANULARITY_BITS:
        reason = f"has a granularity of {granularity} bytes, which QEMU cannot use"
        raise BitmapBrokenError(bitmap.name, reason)
    finder = ExtentFinder(granularity, size)
    for start, stop, dirty in _parts(extents, granularity * _PART_BITS, size):
        octets = differing_bits(
            old,
            new,
            granularity,
            start,
            stop,
            skipped=dirty[dirty[:, 1] - dirty[:, 0] >= _LEAST_SKIP_BYTES],
            workers=workers,
            progress=progress,
        )
        granules = (dirty - start + np.array([0, granularity - 1])) // granularity
        octets &= ~mask_of(granules, len(octets))
        found = finder.bits(np.pad(octets, (0, align_up(len(octets), _WORD_BYTES) - len(octets))))
        if len(found):
            yield found
    found = finder.finish()
    old.require_unchanged()
    new.require_unchanged()
    if len(found):
        yield found


def _parts(
    extents: Iterator[NDArray[np.int64]], length: int, size: int
) -> Iterator[tuple[int, int, NDArray[np.int64]]]:
    """Yields the parts of a disk, each with the ranges in it: int64[n, 2] of (start, stop)."""
    ranges = np.zeros((0, 2), np.int64)
    for start in range(0, size, length):
        stop = min(start + length, size)
        while not len(ranges) or ranges[-1, 0] < stop:
            more = next(extents, None)
            if more is None:
                break
            ranges = np.concatenate((ranges, np.cumsum(more, axis=1)))
        yield start, stop, ranges[ranges[:, 0] < stop].clip(start, stop)
        ranges = ranges[ranges[:, 1] > stop]
