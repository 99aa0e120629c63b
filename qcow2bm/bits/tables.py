"""Classifying bitmap tables with numpy."""

from __future__ import annotations

from array import array

import numpy as np
from numpy.typing import NDArray

from qcow2bm.bits.runs import ALL_ONES, ALL_ZEROES, ALLOCATED, INVALID


def table_runs(words: array[int], offset_mask: int, cluster_size: int) -> NDArray[np.int64]:
    """The entries of a bitmap table, uint64[n], as runs in order: int64[m, 4].

    The columns are those of `qcow2bm.bits.runs.Run`: kind, first, entries, offset.

    *Twin*: `qcow2bm.bits.plain.table_runs`.
    """
    table = np.frombuffer(words, np.uint64) if words else np.zeros(0, np.uint64)
    aligned = np.uint64(offset_mask & ~(cluster_size - 1))
    kinds = np.full(len(table), ALLOCATED, np.uint8)
    kinds[table & ~aligned != 0] = INVALID
    kinds[table == 0] = ALL_ZEROES
    kinds[table == 1] = ALL_ONES
    starts = np.empty(len(table), np.bool_)
    starts[:1] = True
    follows = (kinds[1:] != ALLOCATED) | (table[1:] - table[:-1] == cluster_size)
    starts[1:] = (kinds[1:] != kinds[:-1]) | ~follows
    first = np.flatnonzero(starts)
    runs = np.empty((len(first), 4), np.int64)
    runs[:, 0] = kinds[first]
    runs[:, 1] = first
    runs[:, 2] = np.diff(first, append=len(table))
    runs[:, 3] = np.where(runs[:, 0] == ALLOCATED, table[first], 0)
    return runs
