"""Reading many ranges of a file, without what lies in holes, a few at a time.

*Spec*: spec/check.md, CHECK-6; spec/data.md, MAP-10.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from qcow2bm.clusters.file import ClusterFile
from qcow2bm.clusters.stored_extents import stored_extents

Numbers = NDArray[np.int64]

BATCH_BYTES = 1 << 17
"""About as much is read at once: so little that the arrays stay in the processor's cache."""


class Parts(NamedTuple):
    """Parts of ranges of a file, in the order of the ranges; each of them int64[n].

    Attributes:
        ranges: the number of the range of which each is a part.
        starts: the first host byte of each.
        ends: the host byte behind each.
    """

    ranges: Numbers
    starts: Numbers
    ends: Numbers

    @property
    def lengths(self) -> Numbers:
        """The lengths in bytes, int64[n]."""
        return self.ends - self.starts

    def batches(self, batch_bytes: int | None = None) -> Iterator[Parts]:
        """Yields the same parts, of which those longer than ``batch_bytes`` are cut, in batches.

        A batch has about ``batch_bytes``, by default `BATCH_BYTES`.
        """
        most = batch_bytes or BATCH_BYTES
        pieces = -(-self.lengths // most)
        cut = np.repeat(np.arange(len(pieces)), pieces)
        number = np.arange(len(cut)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        starts = self.starts[cut] + number * most
        ends = np.minimum(starts + most, self.ends[cut])
        places = np.cumsum(ends - starts) // (most + 1)
        edges = np.flatnonzero(np.diff(places, prepend=-1, append=-1)).tolist()
        for first, stop in pairwise(edges):
            here = slice(first, stop)
            yield Parts(self.ranges[cut[here]], starts[here], ends[here])

    def read(self, file: ClusterFile) -> bytearray:
        """Returns the bytes of all parts, one behind the other.

        Raises:
            StorageError: reading failed.
        """
        data = bytearray(int(self.lengths.sum()))
        view, done = memoryview(data), 0
        is_next = np.append(self.starts[1:] == self.ends[:-1], False)
        begin = None
        for start, end, goes_on in zip(
            self.starts.tolist(), self.ends.tolist(), is_next.tolist(), strict=True
        ):
            begin = start if begin is None else begin
            if not goes_on:
                file.read_into(begin, view[done : done + end - begin])
                done += end - begin
                begin = None
        return data

    def places(self, positions: Numbers) -> tuple[Numbers, Numbers]:
        """Returns for positions in the bytes that `read` returns the ranges, and the host offsets.

        ``positions`` and both results are int64[n].
        """
        behind = np.cumsum(self.lengths)
        part = np.searchsorted(behind, positions, "right")
        return self.ranges[part], self.ends[part] - (behind[part] - positions)


def disjoint_pieces(starts: Numbers, ends: Numbers) -> tuple[Numbers, Numbers, Numbers]:
    """Cuts ranges, which may overlap, into pieces that do not.

    ``starts`` and ``ends`` are host bytes, int64[n]. Returns the start and the end of each piece,
    and in how many ranges it lies, int64[m] each.
    """
    places, which = np.unique(np.concatenate((starts, ends)), return_inverse=True)
    rises, falls = (
        np.bincount(edges, minlength=len(places)) for edges in np.split(which, [len(starts)])
    )
    times = np.cumsum(rises - falls)[:-1]
    is_used = times > 0
    return places[:-1][is_used], places[1:][is_used], times[is_used]


class Holes:
    """What is done with the holes of a file.

    Attributes:
        are_read: whether they are read, because the storage may be wrong about them.
        nb_bytes: how many bytes of ranges were not read so far, because they are in holes.
    """

    def __init__(self, *, are_read: bool = False) -> None:
        self.are_read = are_read
        self.nb_bytes = 0


def stored_parts(file: ClusterFile, starts: Numbers, ends: Numbers, holes: Holes) -> Parts:
    """Returns the parts of ranges that are in no hole of the file, in whole sectors.

    ``starts`` and ``ends`` are host bytes, int64[n], in any order. No two ranges overlap, and they
    begin in the file.

    Raises:
        StorageError: the storage could not be asked.
    """
    if holes.are_read:
        return Parts(np.arange(len(starts)), starts, ends)
    found = _outside_of_holes(file, starts, ends)
    holes.nb_bytes += int((ends - starts).sum() - found.lengths.sum())
    return found


def _outside_of_holes(file: ClusterFile, starts: Numbers, ends: Numbers) -> Parts:
    order = np.argsort(starts, kind="stable")
    starts, ends = starts[order], ends[order]
    found = []
    for extent in stored_extents(file, starts.tolist(), ends.tolist()):
        here = slice(extent.first, extent.stop)
        inside = np.maximum(starts[here], extent.start), np.minimum(ends[here], extent.end)
        found.append((order[here], *inside))
    if not found:
        return Parts(*np.zeros((3, 0), np.int64))
    ranges, starts, ends = (np.concatenate(columns) for columns in zip(*found, strict=True))
    order = np.argsort(ranges, kind="stable")
    return Parts(ranges[order], starts[order], ends[order])
