"""Finds the granules in which two contents differ.

*Spec*: spec/repair.md, "Comparing".
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from qcow2bm.bits.algebra import coarsen
from qcow2bm.compare.content import Content
from qcow2bm.compare.pieces import WORKERS, Progress, differing_bits


def find_differences(
    old: Content,
    new: Content,
    granularity: int,
    *,
    workers: int = WORKERS,
    progress: Progress | None = None,
) -> NDArray[np.uint8]:
    """Returns the bits of the granules in which ``new`` differs from ``old``.

    Every granule behind the end of ``old`` counts as different: what the backup has there is not
    known.

    Args:
        old: the content of the backup.
        new: the content of the disk now; its size is that of the disk.
        granularity: in bytes, a power of two, 512 or more.
        workers: how many threads compare.
        progress: is called with each number of bytes that were compared.

    Returns:
        uint8[ceil(bits / 8)], least significant bit first, as `qcow2bm.Edit.salvage` takes it.

    Raises:
        ChangedWhileReadingError: one of the two changed meanwhile.
        StorageError: reading failed.
    """
    octets = differing_bits(old, new, granularity, 0, new.size, workers=workers, progress=progress)
    old.require_unchanged()
    new.require_unchanged()
    return octets


def find_differences_at(
    old: Content,
    new: Content,
    granularities: Collection[int],
    *,
    workers: int = WORKERS,
    progress: Progress | None = None,
) -> dict[int, NDArray[np.uint8]]:
    """Returns for each of several granularities what `find_differences` returns.

    The contents are read once. Raises as `find_differences` does.
    """
    finest = min(granularities)
    octets = find_differences(old, new, finest, workers=workers, progress=progress)
    return {each: coarsen(octets, each // finest) for each in granularities}
