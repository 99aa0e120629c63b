"""Counting what packed bits would be at coarser granularities, with numpy, in one pass."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from qcow2bm.bits.algebra import coarsen
from qcow2bm.bits.counting import count_bits, count_edges
from qcow2bm.units import ceil_div

_BLOCK_BYTES = 1 << 20
"""The least size of a block: the fastest one."""


class GranularityTotals(NamedTuple):
    """What is dirty if one bit stands for ``granularity`` guest bytes.

    Attributes:
        granularity: in guest bytes.
        dirty_bytes: the dirty guest bytes, clipped to the disk.
        extents: the number of extents.
    """

    granularity: int
    dirty_bytes: int
    extents: int


class CoarserCounter:
    """Counts dirty bytes and extents at a granularity, at twice that, and so on.

    The caller feeds the bits in order with `bits` and `constant`, and calls `finish` at the end.
    Memory does not grow with the bits: they are gathered in blocks, each of which has whole
    granules of every granularity.
    """

    def __init__(self, granularity: int, coarsest: int, virtual_size: int) -> None:
        """Takes powers of two and the size of the disk, all in guest bytes; the disk is not empty.

        Granularities coarser than ``coarsest`` are left out.
        """
        self._virtual_size = virtual_size
        steps = range(max(0, coarsest.bit_length() - granularity.bit_length()) + 1)
        self._levels = [_Level(granularity << step, virtual_size) for step in steps]
        self._block = np.zeros(max(_BLOCK_BYTES, 1 << (len(self._levels) - 1)), np.uint8)
        self._used = 0  # bytes of the block

    def bits(self, data: NDArray[np.uint8]) -> None:
        """Feeds packed bits, uint8[n], which are clear behind the end of the disk."""
        while len(data):
            part = data[: len(self._block) - self._used]
            self._block[self._used : self._used + len(part)] = part
            self._advance(len(part))
            data = data[len(part) :]

    def constant(self, value: bool, length_bytes: int) -> None:
        """Feeds ``8 * length_bytes`` bits that are all set or all clear."""
        while length_bytes:
            if not self._used and length_bytes >= len(self._block):
                blocks, length_bytes = divmod(length_bytes, len(self._block))
                self._count_constant(value, blocks)
                continue
            part = min(length_bytes, len(self._block) - self._used)
            self._block[self._used : self._used + part] = 255 * value
            self._advance(part)
            length_bytes -= part

    def finish(self) -> tuple[GranularityTotals, ...]:
        """Returns the totals at each granularity, up to one at which nothing, or all, is dirty.

        At all coarser granularities the dirty bytes and extents are the same.
        """
        if self._used:
            self._block[self._used :] = 0
            self._count()
        found = []
        for level in self._levels:
            found.append(level.totals)
            if level.totals.dirty_bytes in (0, self._virtual_size):
                break
        return tuple(found)

    def _advance(self, length_bytes: int) -> None:
        self._used += length_bytes
        if self._used == len(self._block):
            self._count()

    def _count(self) -> None:
        """Counts the block, which becomes empty."""
        self._used = 0
        if not self._block.any():
            self._count_constant(False, 1)
            return
        bits = self._block
        for level in self._levels:
            level.count(bits)
            bits = coarsen(bits, 2)

    def _count_constant(self, value: bool, blocks: int) -> None:
        length_bits = 8 * len(self._block) * blocks
        for step, level in enumerate(self._levels):
            level.count_constant(value, length_bits >> step)


class _Level:
    """The counts at one granularity."""

    def __init__(self, granularity: int, virtual_size: int) -> None:
        self._granularity = granularity
        self._virtual_size = virtual_size
        self._last = ceil_div(virtual_size, granularity) - 1  # the number of the last granule
        self._position = 0  # bits counted so far
        self._bits = 0
        self._edges = 0
        self._carry = 0
        self._is_last_set = False

    def count(self, octets: NDArray[np.uint8]) -> None:
        """Counts packed bits, uint8[n]."""
        data = octets.data
        self._bits += count_bits(data)
        self._edges += count_edges(data, self._carry)
        self._carry = int(octets[-1]) >> 7
        place = self._last - self._position
        if 0 <= place < 8 * len(octets):
            self._is_last_set = bool(octets[place >> 3] >> (place & 7) & 1)
        self._position += 8 * len(octets)

    def count_constant(self, value: bool, length_bits: int) -> None:
        """Counts bits that are all set or all clear."""
        self._bits += length_bits * value
        self._edges += value ^ self._carry
        self._carry = int(value)
        if 0 <= self._last - self._position < length_bits:
            self._is_last_set = value
        self._position += length_bits

    @property
    def totals(self) -> GranularityTotals:
        dirty = self._bits * self._granularity
        if self._is_last_set:
            dirty -= (self._last + 1) * self._granularity - self._virtual_size
        return GranularityTotals(self._granularity, dirty, (self._edges + 1) // 2)
