"""Finding extents in packed bits, chunk by chunk, in memory that does not grow with the bitmap.

An edge is a bit that differs from the bit before it. Over the whole sequence of bits, the edges are
the start, end, start, end, ... of the extents. So only the start of an unfinished extent is carried
from one chunk to the next.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

WINDOW_BYTES = 64 << 10
"""The number of bytes to unpack at once; it bounds the memory needed for bits of any density."""

_DENSE = 3  # if more than one byte in three has an edge, all bytes are unpacked


def edges(words: NDArray[np.uint64], carry: int) -> NDArray[np.int64]:
    """Finds all bits that differ from the bit before them: int64[m] of their numbers, ascending.

    ``words`` is uint64[n]; bit 0 is the least significant bit of the first word, and ``carry``, 0
    or 1, comes before bit 0.

    *Twin*: `qcow2bm.bits.pure_python.count_edges`, which only counts.
    """
    before = words << np.uint64(1)
    before[1:] |= words[:-1] >> np.uint64(63)
    before[:1] |= np.uint64(carry)
    before ^= words
    words_marked = np.flatnonzero(before != 0)
    if not len(words_marked):
        return np.zeros(0, np.int64)
    octets = before[words_marked].astype("<u8", copy=False).view(np.uint8)
    marked = np.flatnonzero(octets != 0)
    if len(marked) * _DENSE > 8 * len(words):
        return _set_bits(before.astype("<u8", copy=False).view(np.uint8))
    found = _set_bits(octets[marked])
    byte = marked[found >> 3]
    positions: NDArray[np.int64] = (words_marked[byte >> 3] << 6) + ((byte & 7) << 3) + (found & 7)
    return positions


def _set_bits(octets: NDArray[np.uint8]) -> NDArray[np.int64]:
    is_set = np.unpackbits(octets, bitorder="little").view(np.bool_)
    found: NDArray[np.int64] = np.flatnonzero(is_set)
    return found


class ExtentFinder:
    """Finds the extents in a sequence of bits that is fed chunk by chunk.

    The caller feeds the bits in order with `bits` and `constant`, and calls `finish` at the end.
    Each call returns the extents that it completes: int64[n, 2] of (start, length) in guest bytes.

    *Guarantees*: over all calls the extents ascend, do not touch, and lie on the disk.
    """

    def __init__(self, granularity: int, virtual_size: int) -> None:
        """Takes ``granularity`` and ``virtual_size`` in guest bytes; a disk has at most 2^62."""
        # No disk is larger than 2^62 bytes, so a coarser granularity is clipped to the disk anyway.
        self._granularity = min(granularity, 1 << 62)
        self._virtual_size = virtual_size
        self._position = 0  # bits fed so far
        self._open: int | None = None  # the bit at which an extent began that has not ended

    def bits(self, data: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Feeds packed bits, uint8[n], where ``n`` is a multiple of 8."""
        # The stored words are little-endian. On a big-endian machine they are swapped twice.
        words = data.view("<u8").astype(np.uint64, copy=False)
        found = edges(words, int(self._open is not None))
        if len(found):
            found += self._position
        self._position += 8 * len(data)
        return self._extents(found)

    def constant(self, value: bool, length_bytes: int) -> NDArray[np.int64]:
        """Feeds ``8 * length_bytes`` bits that are all set or all clear."""
        position = self._position
        self._position += 8 * length_bytes
        if not length_bytes or value == (self._open is not None):
            return np.zeros((0, 2), np.int64)
        return self._extents(np.array([position], np.int64))

    def finish(self) -> NDArray[np.int64]:
        """Ends the sequence of bits; an unfinished extent ends here."""
        if self._open is None:
            return np.zeros((0, 2), np.int64)
        return self._extents(np.array([self._position], np.int64))

    def _extents(self, found: NDArray[np.int64]) -> NDArray[np.int64]:
        carried = int(self._open is not None)
        count, odd = divmod(len(found) + carried, 2)
        extents = np.empty((count, 2), np.int64)
        flat = extents.reshape(-1)
        if self._open is not None and count:
            flat[0] = self._open
        flat[carried:] = found[: len(flat) - carried]
        if odd:
            self._open = int(found[-1]) if len(found) else self._open
        elif len(found):
            self._open = None
        extents *= self._granularity
        if count and extents[-1, 1] > self._virtual_size:
            extents[-1, 1] = self._virtual_size
        extents[:, 1] -= extents[:, 0]
        return extents
