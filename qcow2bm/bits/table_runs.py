"""Classifying the entries of bitmap tables, with numpy."""

from __future__ import annotations

from array import array

import numpy as np
from numpy.typing import NDArray

from qcow2bm.bits.runs import ALLOCATED, INVALID

_MAX = (1 << 64) - 1
_BLOCK = 16384  # entries processed at once, so that intermediate arrays stay in the cache


def table_runs(words: array[int], offset_mask: int, cluster_size: int) -> NDArray[np.int64]:
    """Splits the entries of a bitmap table, uint64[n], into runs, in order: int64[m, 4].

    The columns are the fields of `qcow2bm.bits.runs.Run`: kind, first, entries, offset.
    ``offset_mask`` has the bits of an entry that hold the host offset.

    *Twin*: `qcow2bm.bits.pure_python.table_runs`.
    """
    table = np.frombuffer(words, np.uint64) if words else np.zeros(0, np.uint64)
    stray = np.uint64(~(offset_mask & -cluster_size) & _MAX)
    step = np.uint64(cluster_size)
    kinds = np.empty(len(table), np.uint8)
    starts = np.empty(len(table), np.bool_)
    for place in range(0, len(table), _BLOCK):
        here = slice(place, place + _BLOCK)
        np.minimum(table[here], ALLOCATED, out=kinds[here], casting="unsafe")
        invalid = (table[here] & stray) != 0
        invalid &= kinds[here] == ALLOCATED
        kinds[here][invalid] = INVALID
    starts[:1] = True
    np.not_equal(kinds[1:], kinds[:-1], out=starts[1:])
    for place in range(1, len(table), _BLOCK):
        here = slice(place, place + _BLOCK)
        before = slice(place - 1, place - 1 + len(table[here]))
        gap = table[here] - table[before] != step
        gap &= kinds[here] == ALLOCATED
        starts[here] |= gap
    first = np.flatnonzero(starts)
    runs = np.empty((len(first), 4), np.int64)
    runs[:, 0] = kinds[first]
    runs[:, 1] = first
    runs[:-1, 2] = first[1:]
    runs[-1:, 2] = len(table)
    runs[:, 2] -= first
    runs[:, 3] = table[first]
    runs[runs[:, 0] != ALLOCATED, 3] = 0
    return runs
