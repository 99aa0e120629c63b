"""Counting how many references each cluster of a file has.

*Spec*: spec/check.md, "References".
"""

from __future__ import annotations

from qcow2bm.checking.cluster_counts import ClusterCounts
from qcow2bm.checking.runs import Numbers, Runs
from qcow2bm.clusters.file import ClusterFile
from qcow2bm.units import ceil_div


class References:
    """Counts references to clusters, as QEMU does when it checks an image.

    Attributes:
        counted: the number of references of each cluster.
        clusters: how many clusters are counted: those of the file, of which the last may be a
            part, and one more if a reference reaches there.
        reach: the number of the cluster behind the last one that has a reference, even behind the
            end of the file.
    """

    def __init__(self, file: ClusterFile) -> None:
        """Begins without any reference."""
        self._bits = file.header.cluster_bits
        self._file_size = file.file_size
        self.counted = ClusterCounts()
        self.clusters = ceil_div(file.file_size, file.cluster_size)
        self.reach = 0

    def add(self, offset: int, length: int) -> bool:
        """Counts a range of bytes, in whole clusters; returns whether it was counted.

        A range that ends a cluster or more behind the end of the file is not counted.
        """
        if not length:
            return True
        self.note(offset + length)
        if offset + length - self._file_size >= 1 << self._bits:
            return False
        stop = (offset + length - 1 >> self._bits) + 1
        self.add_runs(Runs.of(offset >> self._bits, stop))
        return True

    def note(self, end: int) -> None:
        """Extends `reach` to the cluster before host byte ``end``, without counting anything."""
        self.reach = max(self.reach, (end - 1 >> self._bits) + 1)

    def add_clusters(self, clusters: Numbers, times: int | Numbers = 1) -> None:
        """Counts clusters of the file, n numbers, ``times`` times each, int64[n]."""
        if len(clusters):
            self._extend(int(clusters.max()) + 1)
            self.counted.add(clusters, times)

    def add_runs(self, runs: Runs, times: int | Numbers = 1) -> None:
        """Counts runs of clusters of the file, n of them, ``times`` times each, int64[n]."""
        if len(runs.stops):
            self._extend(int(runs.stops.max()))
            self.counted.add_runs(runs, times)

    def _extend(self, stop: int) -> None:
        self.reach = max(self.reach, stop)
        self.clusters = max(self.clusters, stop)

    def counts(self, first: int, stop: int) -> Numbers:
        """Returns the numbers of references to clusters, int64[stop - first]."""
        return self.counted.counts(first, stop)
