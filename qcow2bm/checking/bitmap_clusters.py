"""The clusters that bitmaps use.

*Spec*: spec/check.md, "References".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from qcow2bm.bitmaps.directory import BitmapDirectory
from qcow2bm.bitmaps.tables import readable_entries, used_by_tables
from qcow2bm.checking.references import References
from qcow2bm.checking.runs import Numbers, Runs
from qcow2bm.clusters.file import ClusterFile
from qcow2bm.clusters.parts import Holes, disjoint_pieces, stored_parts
from qcow2bm.format.bitmap_table import ENTRY_LENGTH, MASKS
from qcow2bm.problems import DATA

_OFFSET = np.uint64(MASKS.offset)


class SharedCluster(NamedTuple):
    """A cluster of a bitmap, or of the directory, that something else uses as well."""

    structure: str
    bitmap_index: int | None
    cluster: int


class BitmapClusters:
    """All clusters of the file that bitmaps use, also broken, used or stale ones.

    Bitmap tables may overlap, by mistake. Each entry is read once, in whatever tables it lies.
    """

    def __init__(self, file: ClusterFile, directory: BitmapDirectory, holes: Holes) -> None:
        """Reads nothing yet."""
        self._file = file
        self._holes = holes
        self._tables = list(used_by_tables(file, directory))
        runs = [part.clusters(file.cluster_size) for part in self._tables]
        self._table_runs = Runs(*np.array(runs, np.int64).reshape(-1, 2).T)
        self._readable = list(readable_entries(file, directory))
        self._starts = np.array([entry.bitmap_table_offset for entry in self._readable], np.int64)
        sizes = np.array([entry.bitmap_table_size for entry in self._readable], np.int64)
        self._ends = self._starts + ENTRY_LENGTH * sizes

    def count(self, references: References) -> None:
        """Counts the directory, the tables, and the data.

        Raises:
            StorageError: reading failed.
        """
        references.add_runs(self._table_runs)
        for clusters, _, times in self._data():
            references.add_clusters(clusters, times)

    def shared_with(self, others: Runs) -> Iterator[SharedCluster]:
        """Yields what bitmaps share with others, which are in ascending order and do not overlap.

        Of each structure only the first cluster that it shares is yielded.

        Raises:
            StorageError: reading failed.
        """
        if not others.clusters:
            return
        first_shared = self._table_runs.first_shared(others)
        for number in np.flatnonzero(first_shared >= 0).tolist():
            part = self._tables[number]
            yield SharedCluster(part.structure, part.bitmap_index, int(first_shared[number]))
        shared = [(np.zeros(0, np.int64), np.zeros(0, np.int64))]
        for clusters, places, _ in self._data():
            is_shared = others.contain(clusters)
            shared.append((places[is_shared], clusters[is_shared]))
        places, clusters = (np.concatenate(column) for column in zip(*shared, strict=True))
        order = np.argsort(places, kind="stable")
        places, clusters = places[order], clusters[order]
        firsts = np.searchsorted(places, self._starts)
        stops = np.searchsorted(places, self._ends)
        for number in np.flatnonzero(firsts < stops).tolist():
            yield SharedCluster(DATA, self._readable[number].index, int(clusters[firsts[number]]))

    def _data(self) -> Iterator[tuple[Numbers, Numbers, Numbers]]:
        """Yields the clusters of bitmap data in the file, some at a time.

        With each cluster come the host offset of the entry that leads to it, and in how many tables
        this entry lies: int64[n] each.
        """
        file, size = self._file, np.uint64(self._file.cluster_size)
        starts, ends, times = disjoint_pieces(self._starts, self._ends)
        for batch in stored_parts(file, starts, ends, self._holes).batches():
            words = np.frombuffer(batch.read(file), ">u8").astype(np.uint64)
            is_allocated = (words > 1) & (words & _OFFSET == words) & (words % size == 0)
            used = np.flatnonzero(is_allocated & (words < file.file_size))
            pieces, places = batch.places(ENTRY_LENGTH * used)
            yield (words[used] // size).astype(np.int64), places, times[pieces]
