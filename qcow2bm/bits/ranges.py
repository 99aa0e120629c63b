"""Checking ranges of guest bytes that callers give."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def outside(start: int, length: int, size: int) -> ValueError:
    """The error for a range that does not lie on a disk of ``size`` bytes."""
    return ValueError(f"range {start}:{length} does not lie on the disk, which has {size} bytes")


def checked(ranges: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Checks ranges and returns them as int64[n, 2] of (start, length).

    ``ranges`` may have any type of integers.

    Raises:
        ValueError: ``ranges`` has another shape or another type, or a range does not lie on the
            disk of ``size`` bytes.
    """
    import numpy as np

    ranges = np.asarray(ranges)
    if not ranges.size:  # an empty list has one dimension only
        return np.zeros((0, 2), np.int64)
    if ranges.ndim != 2 or ranges.shape[1] != 2 or ranges.dtype.kind not in "iu":
        shape = f"{ranges.dtype}{list(ranges.shape)}"
        raise ValueError(f"ranges are {shape}, must be int64[n, 2]")
    # First: if a type cannot hold ``size``, comparing may damage memory (numpy 2.0 to 2.2). What is
    # too large for int64 becomes negative.
    signed = ranges.astype(np.int64, copy=False)
    bad = ((signed < 0) | (signed > size)).any(axis=1)
    bad |= signed.sum(axis=1) > size  # an overflow does no harm: such a range is bad already
    if bad.any():
        start, length = ranges[bad][0].tolist()
        raise outside(start, length, size)
    return signed
