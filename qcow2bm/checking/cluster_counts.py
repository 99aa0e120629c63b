"""Counting clusters, of which most have the same count as the cluster before.

*Spec*: spec/check.md, CHECK-5 and CHECK-6.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qcow2bm.checking.runs import Numbers, Runs, groups

_CHUNK_BITS = 15
CHUNK = 1 << _CHUNK_BITS
"""The clusters that are counted in one array if their counts change often."""

_MANY_STEPS = CHUNK // 32
"""How often counts must change within a chunk before an array of counts takes less memory."""

_MAX_WAITING_BYTES = 1 << 19
_ARRAY_BYTES = 128  # what an array takes beside its elements


class ClusterCounts:
    """A count for each cluster of a file; 0 at first.

    Memory grows with how often the count changes from one cluster to the next, not with the
    numbers of the clusters.
    """

    def __init__(self) -> None:
        """Begins with 0 for each cluster."""
        # The count is the sum of three: that of the steps, that of the chunk if there is one, and
        # that of the edges, which wait until there are enough of them to be sorted into the steps.
        self._places = np.zeros(0, np.int64)
        self._heights = np.zeros(0, np.int64)  # from each place on, up to the next one
        self._chunks: dict[int, NDArray[np.integer[Any]]] = {}
        self._edges: dict[int, list[Numbers]] = {}  # by how much the count rises at these clusters
        self._weighted_edges: list[tuple[Numbers, Numbers]] = []  # clusters, and each one's rise
        self._waiting_bytes = 0

    def add_runs(self, runs: Runs, times: int | Numbers = 1) -> None:
        """Counts runs of clusters, n of them, each ``times`` times, int64[n]."""
        if not len(runs.firsts):
            return
        times = _as_one(times)
        if isinstance(times, int):
            self._edges.setdefault(times, []).append(runs.firsts)
            self._edges.setdefault(-times, []).append(runs.stops)
        else:
            self._weighted_edges += (runs.firsts, times), (runs.stops, -times)
        self._waiting_bytes += 2 * (runs.firsts.nbytes + _ARRAY_BYTES)
        if self._waiting_bytes > max(_MAX_WAITING_BYTES, self._places.nbytes):
            self._settle()

    def add(self, clusters: Numbers, times: int | Numbers = 1) -> None:
        """Counts clusters, int64[n], ``times`` times each; each time a number occurs."""
        if not len(clusters):
            return
        times = _as_one(times)
        if not isinstance(times, int):
            self._add_weighted(clusters, times)
            return
        runs = Runs.of_clusters(clusters)
        if len(runs.firsts) > min(_MANY_STEPS, len(clusters) // 8):
            runs = self._add_to_chunks(Runs.of_clusters(np.sort(clusters)), times)
        self.add_runs(runs, times)

    def _add_weighted(self, clusters: Numbers, times: Numbers) -> None:
        order = np.argsort(clusters, kind="stable")
        in_order = clusters[order]
        begins = np.flatnonzero(np.diff(in_order, prepend=-1))
        firsts = in_order[begins]
        self.add_runs(Runs(firsts, firsts + 1), np.add.reduceat(times[order], begins))

    def _add_to_chunks(self, runs: Runs, times: int) -> Runs:
        """Counts the sorted runs of which many lie in one chunk; returns the others."""
        firsts, stops = runs
        left = np.ones(len(firsts), bool)
        for number, start, stop in _chunks_of(firsts):
            end = (number + 1) << _CHUNK_BITS
            if stop - start > _MANY_STEPS and stops[stop - 1] <= end:
                part = slice(start, stop)
                inside = firsts[part] & CHUNK - 1, stops[part] - (number << _CHUNK_BITS)
                rises, falls = (np.bincount(places, minlength=CHUNK + 1) for places in inside)
                self._add_to_chunk(number, times * np.cumsum(rises - falls)[:CHUNK])
                left[part] = False
        return Runs(firsts[left], stops[left])

    def _add_to_chunk(self, number: int, counts: Numbers) -> None:
        if number in self._chunks:
            counts = counts + self._chunks[number]
        most = int(counts.max())
        self._chunks[number] = counts.astype(np.min_scalar_type(most) if most >> 32 == 0 else int)

    def _settle(self) -> None:
        """Sorts the edges that wait into the steps."""
        if not self._waiting_bytes:
            return
        places, rises = self._take_edges()
        order = np.argsort(places, kind="stable")  # quick, since its parts are sorted
        places, rises = places[order], rises[order]
        del order  # arrays of this length are what takes most memory
        heights = np.cumsum(rises, out=rises)
        is_last = np.append(places[1:] != places[:-1], True)
        self._set_steps(places[is_last], heights[is_last])
        self._condense()

    def _take_edges(self) -> tuple[Numbers, Numbers]:
        """Takes away all steps and edges; returns where and by how much the count rises."""
        edges = [(self._places, np.diff(self._heights, prepend=0)), *self._weighted_edges]
        for rise, clusters in self._edges.items():
            together = np.sort(np.concatenate(clusters))
            edges.append((together, np.broadcast_to(np.int64(rise), len(together))))
        self._set_steps(np.zeros(0, np.int64), np.zeros(0, np.int64))
        self._edges, self._weighted_edges, self._waiting_bytes = {}, [], 0
        places, rises = (np.concatenate(parts) for parts in zip(*edges, strict=True))
        return places, rises

    def _set_steps(self, places: Numbers, heights: Numbers) -> None:
        is_step = np.diff(heights, prepend=0) != 0
        self._places, self._heights = places[is_step], heights[is_step]

    def _condense(self) -> None:
        """Moves the counts of each chunk that has many steps into an array."""
        places, heights = [], []
        done = 0
        for number, start, stop in _chunks_of(self._places):
            if stop - start > _MANY_STEPS:
                first = number << _CHUNK_BITS
                self._add_to_chunk(number, self._of_steps(first, first + CHUNK))
                places += [self._places[done:start], np.array([first, first + CHUNK])]
                heights += [self._heights[done:start], np.array([0, self._heights[stop - 1]])]
                done = stop
        if done:
            places.append(self._places[done:])
            heights.append(self._heights[done:])
            together, levels = np.concatenate(places), np.concatenate(heights)
            is_last = np.append(together[1:] != together[:-1], True)
            self._set_steps(together[is_last], levels[is_last])

    def _of_steps(self, first: int, stop: int) -> Numbers:
        """The counts of the steps alone, int64[stop - first]."""
        places, heights = self._steps_between(first, stop)
        return np.repeat(heights, np.diff(places, append=stop))

    def _steps_between(self, first: int, stop: int) -> tuple[Numbers, Numbers]:
        """The steps from ``first`` to ``stop``, of which the first one is at ``first``."""
        begin = int(np.searchsorted(self._places, first, "right"))
        end = int(np.searchsorted(self._places, stop, "left"))
        height = self._heights[begin - 1] if begin else 0
        return (
            np.concatenate(([first], self._places[begin:end])).astype(np.int64),
            np.concatenate(([height], self._heights[begin:end])).astype(np.int64),
        )

    def counts(self, first: int, stop: int) -> Numbers:
        """Returns the counts of the clusters from ``first`` to ``stop``, int64[stop - first]."""
        self._settle()
        found = self._of_steps(first, stop)
        for number in self._chunks_between(first, stop):
            start = number << _CHUNK_BITS
            low, high = max(first, start), min(stop, start + CHUNK)
            found[low - first : high - first] += self._chunks[number][low - start : high - start]
        return found

    def _chunks_between(self, first: int, stop: int) -> list[int]:
        """The numbers of the chunks that have an array, ascending."""
        wanted = range(first >> _CHUNK_BITS, (stop - 1 >> _CHUNK_BITS) + 1)
        if len(wanted) < len(self._chunks):
            return [number for number in wanted if number in self._chunks]
        return sorted(number for number in self._chunks if number in wanted)

    def of(self, clusters: Numbers) -> Numbers:
        """Returns the counts of clusters in any order, int64[n] to int64[n]."""
        self._settle()
        heights = np.concatenate(([0], self._heights))
        found: Numbers = heights[np.searchsorted(self._places, clusters, "right")]
        if self._chunks:
            order = np.argsort(clusters, kind="stable")
            in_order = clusters[order]
            for number, start, stop in _chunks_of(in_order):
                if number in self._chunks:
                    found[order[start:stop]] += self._chunks[number][
                        in_order[start:stop] & CHUNK - 1
                    ]
        return found

    def runs(self, first: int, stop: int) -> Iterator[tuple[Runs, Numbers]]:
        """Yields the runs of clusters that have one count above 0, from ``first`` to ``stop``.

        Each time, n runs and their counts are yielded, int64[n]. The runs are in ascending order;
        two that touch may have the same count.
        """
        self._settle()
        position = first
        for number in (*self._chunks_between(first, stop), None):
            start = stop if number is None else max(first, number << _CHUNK_BITS)
            if position < start:
                yield _used(*self._steps_between(position, start), start)
            if number is not None:
                position = min(stop, (number + 1) << _CHUNK_BITS)
                counts = self.counts(start, position)
                places = np.flatnonzero(np.diff(counts, prepend=-1))
                yield _used(start + places, counts[places], position)

    def each(self, first: int, stop: int) -> Iterator[tuple[Numbers, Numbers]]:
        """Yields the clusters from ``first`` to ``stop`` that have a count above 0, some at a time.

        Each time, the clusters and their counts are yielded, int64[n] each.
        """
        for runs, counts in self.runs(first, stop):
            behind: Numbers = np.cumsum(runs.stops - runs.firsts)
            for done in range(0, runs.clusters, CHUNK):
                numbers = np.arange(done, min(done + CHUNK, runs.clusters))
                run = np.searchsorted(behind, numbers, "right")
                yield runs.stops[run] - (behind[run] - numbers), counts[run]


def _as_one(times: int | Numbers) -> int | Numbers:
    """Returns one number for all, if there is one."""
    if isinstance(times, int):
        return times
    return int(times[0]) if (times == times[0]).all() else times


def _used(places: Numbers, heights: Numbers, stop: int) -> tuple[Runs, Numbers]:
    is_used = heights > 0
    return Runs(places[is_used], np.append(places[1:], stop)[is_used]), heights[is_used]


def _chunks_of(clusters: Numbers) -> Iterator[tuple[int, int, int]]:
    """Yields the chunks of sorted clusters: the number, and which clusters, as (start, stop)."""
    numbers = clusters >> _CHUNK_BITS
    starts, lasts = groups(np.diff(numbers, prepend=-1) != 0)
    return zip(numbers[starts].tolist(), starts.tolist(), (lasts + 1).tolist(), strict=True)
