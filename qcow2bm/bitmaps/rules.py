"""The rules of QEMU for the granularity and the name of a new bitmap.

*Spec*: spec/edit.md, EDIT-9 and EDIT-10.
"""

from __future__ import annotations

from operator import index

from qcow2bm.bitmaps.entries import (
    MAX_BITMAP_BYTES,
    MAX_GRANULARITY_BITS,
    MAX_NAME_SIZE,
    MIN_GRANULARITY_BITS,
)
from qcow2bm.errors import LimitError, UnsupportedError
from qcow2bm.units import ceil_div, encode_name

RESERVED_PREFIX = "qcow2bm-"
"""How the name of each bitmap begins that this library adds for itself."""

_MIN_DEFAULT_GRANULARITY, _MAX_DEFAULT_GRANULARITY = 4 << 10, 64 << 10


def default_granularity(cluster_size: int) -> int:
    """Returns QEMU's default granularity for an image with this cluster size, in bytes."""
    return max(_MIN_DEFAULT_GRANULARITY, min(cluster_size, _MAX_DEFAULT_GRANULARITY))


def require_granularity(granularity: int, virtual_size: int) -> None:
    """Returns if QEMU could use a bitmap of this granularity for a disk of this size.

    Raises:
        ValueError: QEMU could not use such a granularity for any disk.
        UnsupportedError: the disk has 0 bytes.
        LimitError: the bitmap would be larger than QEMU allows.
    """
    low, high = 1 << MIN_GRANULARITY_BITS, 1 << MAX_GRANULARITY_BITS
    granularity = index(granularity)
    if granularity & (granularity - 1) or not low <= granularity <= high:
        raise ValueError(
            f"granularity is {granularity}, must be a power of two from {low} to {high}"
        )
    if not virtual_size:
        raise UnsupportedError("a bitmap of a disk of 0 bytes")
    length = ceil_div(ceil_div(virtual_size, granularity), 8)
    if length > MAX_BITMAP_BYTES:
        what = f"the size of a bitmap of granularity {granularity} in bytes"
        raise LimitError(what, length, MAX_BITMAP_BYTES)


def require_name(name: str) -> bytes:
    """Returns the stored form of a name.

    Raises:
        ValueError: QEMU could not use such a name.
    """
    key = encode_name(name)
    if not 0 < len(key) <= MAX_NAME_SIZE:
        raise ValueError(f"a name has 1 to {MAX_NAME_SIZE} bytes, not {len(key)}")
    if b"\0" in key:
        raise ValueError("a name has no NUL character")
    return key
