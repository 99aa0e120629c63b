"""Runs of clusters: joining them, and placing requested runs in free clusters."""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence

Run = tuple[int, int]
"""A run of clusters by their numbers: (first, stop)."""

_NUMPY_PAYS = 1 << 16  # runs: to join fewer takes less time than to load numpy


class JoinedRuns:
    """Runs of clusters in ascending order, of which no two touch or overlap.

    There can be millions, so the runs are kept as bare numbers.
    """

    def __init__(self, firsts: array[int], stops: array[int]) -> None:
        """Takes the first cluster of each run and the one behind its last, uint64[n] each."""
        self._firsts = firsts
        self._stops = stops

    @classmethod
    def of(cls, runs: Iterable[Run]) -> JoinedRuns:
        """Sorts and joins runs."""
        joined = join_runs(runs)
        firsts, stops = (array("Q", (run[side] for run in joined)) for side in (0, 1))
        return cls(firsts, stops)

    @classmethod
    def of_ranges(cls, starts: array[int], ends: array[int], cluster_size: int) -> JoinedRuns:
        """Returns the clusters of ranges of host bytes, uint64[n], that are whole clusters."""
        if len(starts) < _NUMPY_PAYS:
            ranges = zip(starts, ends, strict=True)
            return cls.of((start // cluster_size, end // cluster_size) for start, end in ranges)
        import numpy as np

        order = np.argsort(np.frombuffer(starts, np.uint64), kind="stable")
        firsts, stops = (np.frombuffer(side, np.uint64)[order] for side in (starts, ends))
        reach = np.maximum.accumulate(stops)
        is_first = np.append(True, firsts[1:] > reach[:-1])
        sides = firsts[is_first], reach[np.append(is_first[1:], True)]
        size = np.uint64(cluster_size)
        return cls(*(array("Q", (side // size).tobytes()) for side in sides))

    def __iter__(self) -> Iterator[Run]:
        """Yields the runs."""
        return zip(self._firsts, self._stops, strict=True)

    def __contains__(self, cluster: int) -> bool:
        """Whether a cluster is in one of the runs."""
        place = bisect_right(self._firsts, cluster) - 1
        return place >= 0 and cluster < self._stops[place]

    @property
    def clusters(self) -> int:
        """How many clusters the runs have."""
        return sum(self._stops) - sum(self._firsts)

    @property
    def end(self) -> int:
        """The number of the cluster behind the last one; 0 if there is none."""
        return self._stops[-1] if self._stops else 0

    def within(self, first: int, stop: int) -> Iterator[Run]:
        """Yields the parts of the runs that lie between two clusters."""
        place = bisect_right(self._stops, first)
        while place < len(self._firsts) and self._firsts[place] < stop:
            yield max(first, self._firsts[place]), min(stop, self._stops[place])
            place += 1


def join_runs(runs: Iterable[Run]) -> list[Run]:
    """Sorts runs, and joins runs that touch or overlap."""
    merged: list[Run] = []
    for first, stop in sorted(run for run in runs if run[0] < run[1]):
        if merged and first <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], stop)
        else:
            merged.append((first, stop))
    return merged


def subtract_runs(runs: Iterable[Run], others: Sequence[Run]) -> list[Run]:
    """Returns the parts of ``runs`` that are in none of the ``others``, which are joined."""
    left: list[Run] = []
    for first, stop in runs:
        number = bisect_left(others, (first, first))
        if number and others[number - 1][1] > first:
            number -= 1
        while number < len(others) and others[number][0] < stop:
            left.append((first, others[number][0]))
            first = others[number][1]
            number += 1
        left.append((first, stop))
    return [run for run in left if run[0] < run[1]]


def place_runs(
    free: list[Run], runs: Sequence[int], loose: int
) -> tuple[list[Run | None], list[Run], int]:
    """Places runs and loose clusters in the free clusters, as far as they fit.

    ``runs`` are lengths, and ``loose`` is a number of clusters that may lie anywhere. The function
    shortens the runs in ``free`` in which it places runs.

    Returns:
        The place of each run, None if it does not fit; the places of loose clusters; and the
        number of clusters that are missing.
    """
    placed: list[Run | None] = []
    left = 0
    fits: dict[int, int] = {}  # by length: the first free run that may be long enough
    for length in runs:
        number = fits.get(length, 0)
        while number < len(free) and free[number][1] - free[number][0] < length:
            number += 1
        fits[length] = number
        if number == len(free):
            placed.append(None)
            left += length
            continue
        first, stop = free[number]
        placed.append((first, first + length))
        free[number] = first + length, stop
    pieces = []
    for first, stop in free:
        count = min(loose, stop - first)
        if count:
            pieces.append((first, first + count))
            loose -= count
    return placed, pieces, left + loose
