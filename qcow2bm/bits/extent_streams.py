"""Set operations on streams of extents, in memory that does not grow with the streams.

An edge is a position where an extent begins or ends. The operands' edges are merged in ascending
order, a stretch of the disk at a time, and at each edge it is known in how many operands the bytes
behind it are dirty.

*Spec*: spec/algebra.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from qcow2bm.bits.operations import Op

Extents = NDArray[np.int64]
"""Extents, int64[n, 2] of (start, length) in guest bytes: ascending, and none touches another."""

STRETCH_EDGES = 1 << 16
"""The number of edges of one operand that are merged at once, at most."""

_Keys = NDArray[np.uint64]
"""Edges as numbers that sort by position: twice the position, plus 1 if what follows is dirty."""

_END = (1 << 64) - 1


def combine(op: Op, operands: Sequence[Iterator[Extents]]) -> Iterator[Extents]:
    """Yields the extents of the operands combined with ``op``, the first one with each other one.

    All operands and the result are in pieces: `Extents` that ascend from piece to piece, and do not
    touch over pieces either. No piece of the result is empty. Positions are at most 2^62.

    *Guarantees*: one piece of each operand is in memory at most, and besides these only what
    `STRETCH_EDGES` edges of each operand take.
    """
    streams = [
        _EdgeStream(operand, is_inverted=op == "subtract" and number > 0)
        for number, operand in enumerate(operands)
    ]
    count = len(streams) - 1 if op == "subtract" else 0  # operands that are dirty at the beginning
    needed = 1 if op == "or" else len(streams)  # to make the result dirty
    begun: NDArray[np.int64] = np.zeros(0, np.int64)  # the start of an extent that has not ended
    while (reach := min(stream.reach() for stream in streams)) < _END or any(streams):
        keys = np.sort(np.concatenate([stream.take(reach) for stream in streams]))
        counts = count + np.cumsum((keys & np.uint64(1)).astype(np.int64) * 2 - 1)
        positions = (keys >> np.uint64(1)).astype(np.int64)
        last = np.append(np.flatnonzero(np.diff(positions)), len(keys) - 1)  # of each position
        is_dirty = (counts[last] & 1 == 1) if op == "xor" else counts[last] >= needed
        is_edge = np.diff(is_dirty, prepend=bool(len(begun)))
        edges = np.concatenate((begun, positions[last][is_edge]))
        count = int(counts[-1])
        whole = len(edges) // 2 * 2
        begun = edges[whole:]
        extents = edges[:whole].reshape(-1, 2)
        if whole:
            extents[:, 1] -= extents[:, 0]
            yield extents


class _EdgeStream:
    """The edges of one operand; true as long as edges are waiting to be taken.

    If the stream is inverted, clean and dirty are swapped. The edges are the same.
    """

    def __init__(self, pieces: Iterator[Extents], *, is_inverted: bool) -> None:
        self._pieces = pieces
        self._first_bit = np.uint64(0 if is_inverted else 1)
        self._waiting: _Keys = np.zeros(0, np.uint64)
        self._has_more = True

    def __bool__(self) -> bool:
        return len(self._waiting) > 0

    def reach(self) -> int:
        """Returns a key such that all edges up to it are known, `_END` if all edges are known."""
        while self._has_more and not len(self._waiting):
            piece = next(self._pieces, None)
            if piece is None:
                self._has_more = False
            else:
                self._waiting = self._keys(piece)
        if len(self._waiting) > STRETCH_EDGES:
            return int(self._waiting[STRETCH_EDGES - 1]) | 1
        return int(self._waiting[-1]) | 1 if self._has_more else _END

    def take(self, reach: int) -> _Keys:
        """Returns the edges up to a key, which then do not wait any more."""
        place = np.searchsorted(self._waiting, np.uint64(reach), side="right")
        taken, self._waiting = self._waiting[:place], self._waiting[place:]
        return taken

    def _keys(self, piece: Extents) -> _Keys:
        keys = np.empty(piece.shape, np.uint64)
        keys[:, 0] = piece[:, 0]
        keys[:, 1] = piece[:, 0] + piece[:, 1]
        keys <<= np.uint64(1)
        keys[:, 0] |= self._first_bit
        keys[:, 1] |= self._first_bit ^ np.uint64(1)
        return keys.reshape(-1)
