"""Comparing the number of references with the refcounts, and reporting where they differ.

*Spec*: spec/check.md.
"""

from __future__ import annotations

import numpy as np

from qcow2bm.checking.listing import MAX_LISTED, Listing
from qcow2bm.checking.references import References
from qcow2bm.checking.runs import Runs
from qcow2bm.checking.stored_refcounts import StoredRefcounts
from qcow2bm.clusters.cluster_runs import Run


class _Stretches:
    """Clusters whose refcounts are all too low, or all too high.

    What is reported is a stretch: clusters in a row that one refcount block counts.

    Attributes:
        clusters: how many clusters they are.
        count: how many stretches they are.
        listed: the first stretches, as (first, stop).
        blocks: the numbers of their refcount blocks, as runs for each `add`.
    """

    def __init__(self, per_block: int) -> None:
        self._per_block = per_block
        self._end = 0  # the cluster behind the last stretch
        self.clusters = self.count = 0
        self.listed: list[Run] = []
        self.blocks: list[Runs] = []

    def add(self, runs: Runs) -> None:
        """Adds runs of clusters behind all earlier ones, in order."""
        firsts, stops = runs
        if not len(firsts):
            return
        per_block, start, before = self._per_block, int(firsts[0]), self.count
        blocks = Runs(firsts // per_block, (stops - 1) // per_block + 1)
        self.blocks.append(Runs.joined([blocks]))
        self.clusters += runs.clusters
        self.count += blocks.clusters
        if start == self._end and start % per_block:  # the last stretch goes on
            self.count -= 1
            if before <= MAX_LISTED:
                start = self.listed.pop()[0]
        self._end = int(stops[-1])
        firsts, stops = firsts[:MAX_LISTED], stops[:MAX_LISTED]
        for first, stop in zip([start, *firsts[1:].tolist()], stops.tolist(), strict=True):
            while first < stop:
                if len(self.listed) == MAX_LISTED:
                    return
                end = min(stop, (first // per_block + 1) * per_block)
                self.listed.append((first, end))
                first = end


class Differences:
    """The clusters whose refcounts differ from the number of references.

    Attributes:
        leaked_clusters: how many clusters have a refcount that is too high.
        too_low: the clusters whose refcount is too low, in ascending order.
        blocks: the numbers of the refcount blocks that count such clusters, existing or not;
            joined as if they were clusters.
    """

    def __init__(self, disk: References, others: References, stored: StoredRefcounts) -> None:
        """Compares the refcounts with the references of the disk and all others together."""
        self._references = disk, others
        self._stored = stored
        self._low = _Stretches(stored.per_block)
        self._leaks = _Stretches(stored.per_block)
        self._low_runs: list[Runs] = []
        end = max(disk.clusters, others.clusters)
        done = 0
        for first, refcounts in stored.windows(end):
            self._compare_with_zero(done, first)
            done = first + len(refcounts)
            used = (disk.counts(first, done) + others.counts(first, done)).astype(np.uint64)
            if not np.array_equal(used, refcounts):
                self._add_low(Runs.where(refcounts < used, first))
                self._leaks.add(Runs.where(refcounts > used, first))
        self._compare_with_zero(done, end)
        self.leaked_clusters = self._leaks.clusters
        self.too_low = Runs.chained(self._low_runs)
        self.blocks = Runs.joined(self._low.blocks + self._leaks.blocks)

    def _add_low(self, runs: Runs) -> None:
        self._low.add(runs)
        self._low_runs.append(runs)

    def _compare_with_zero(self, first: int, stop: int) -> None:
        """Compares clusters with the refcount 0."""
        parts = (part for each in self._references for part in each.counted.runs(first, stop))
        self._add_low(Runs.joined(runs for runs, _ in parts))

    def report(self, listing: Listing, cluster_size: int) -> None:
        """Reports each stretch with the place and the counts of its first cluster."""
        found = [("cluster.refcount.too-low", self._low), ("cluster.refcount.leak", self._leaks)]
        found = [(id, stretches) for id, stretches in found if stretches.listed]
        found.sort(key=lambda each: each[1].listed[0][0] // self._stored.per_block)
        for id, stretches in found:
            for first, stop in stretches.listed:
                listing.add(id, first * cluster_size, self._describe(first, stop - first))
            listing.add_many(id, stretches.count - len(stretches.listed), ())

    def _describe(self, cluster: int, count: int) -> str:
        where = np.array([cluster])
        refcount = int(self._stored.of(where)[0])
        references = sum(int(each.counted.of(where)[0]) for each in self._references)
        what = f"has refcount {refcount}, and {references} references"
        if count == 1:
            return what
        return f"{what}, and so {'does' if count == 2 else 'do'} the next {count - 1}"
