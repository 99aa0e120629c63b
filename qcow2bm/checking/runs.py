"""Runs of clusters as arrays, for images that have millions of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]
Flags = NDArray[np.bool_]


class Runs(NamedTuple):
    """Runs of clusters: the first cluster of each, and the one behind its last; int64[n] each."""

    firsts: Numbers
    stops: Numbers

    @classmethod
    def of(cls, first: int, stop: int) -> Runs:
        """Returns one run."""
        return cls(np.array([first]), np.array([stop]))

    @classmethod
    def of_clusters(cls, clusters: Numbers) -> Runs:
        """Returns clusters, int64[n], as runs in the same order; in each the number rises by 1."""
        starts, lasts = groups(np.diff(clusters, prepend=-2) != 1)
        return cls(clusters[starts], clusters[lasts] + 1)

    @classmethod
    def where(cls, is_in: Flags, first: int) -> Runs:
        """Returns where an array is true; its first element stands for the cluster ``first``."""
        edges = first + np.flatnonzero(np.diff(is_in.astype(np.int8), prepend=0, append=0))
        return cls(edges[::2], edges[1::2])

    @classmethod
    def chained(cls, parts: Iterable[Runs]) -> Runs:
        """Returns all runs together, in the order in which they come."""
        none = np.zeros(0, np.int64)
        columns = zip((none, none), *parts, strict=True)
        return cls(*(np.concatenate(column) for column in columns))

    @classmethod
    def joined(cls, parts: Iterable[Runs]) -> Runs:
        """Returns all runs together in ascending order; runs that touch or overlap become one."""
        firsts, stops = cls.chained(parts)
        order = np.argsort(firsts, kind="stable")
        firsts, reach = firsts[order], np.maximum.accumulate(stops[order])
        starts, lasts = groups(np.append(True, firsts[1:] > reach[:-1])[: len(firsts)])
        return cls(firsts[starts], reach[lasts])

    @property
    def clusters(self) -> int:
        """How many clusters they have."""
        return int((self.stops - self.firsts).sum())

    def contain(self, clusters: Numbers) -> Flags:
        """Returns which clusters, int64[n], are in these runs, bool[n].

        The runs are in ascending order, and no two overlap.
        """
        places = np.searchsorted(self.firsts, clusters, "right")
        is_inside: Flags = np.append(0, self.stops)[places] > clusters
        return is_inside

    def first_shared(self, others: Runs) -> Numbers:
        """Returns the first cluster of each run that others have, too, int64[n]; -1 if none.

        The others are in ascending order, and no two of them overlap.
        """
        place = np.searchsorted(others.stops, self.firsts, "right")
        first = np.append(others.firsts, np.iinfo(np.int64).max)[place]
        return np.where(first < self.stops, np.maximum(first, self.firsts), -1)

    def overlaps(self, others: Runs) -> Runs:
        """Returns what each run has in common with others, in the order of these runs.

        The others are in ascending order, and no two of them overlap.
        """
        low = np.searchsorted(others.stops, self.firsts, "right")
        high = np.searchsorted(others.firsts, self.stops, "left")
        counts = np.maximum(high - low, 0)
        mine = np.repeat(np.arange(len(counts)), counts)
        number = np.arange(len(mine)) - np.repeat(np.cumsum(counts) - counts, counts)
        other = low[mine] + number
        firsts = np.maximum(self.firsts[mine], others.firsts[other])
        return Runs(firsts, np.minimum(self.stops[mine], others.stops[other]))


def groups(is_first: Flags) -> tuple[Numbers, Numbers]:
    """Returns the places of the first and of the last element of each group, int64[m] each.

    ``is_first`` says of each element whether it begins a group; the first one does.
    """
    starts = np.flatnonzero(is_first)
    return starts, np.append(starts[1:], len(is_first))[: len(starts)] - 1
