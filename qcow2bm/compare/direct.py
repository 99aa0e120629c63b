"""Reads a qcow2 image: from the file what the file holds as it is, and the rest from qemu-nbd.

qemu-nbd serves one request at a time, and copies the data through a socket. To read them from the
file takes less than half the time.

*Spec*: spec/repair.md, "Comparing".
"""

from __future__ import annotations

from qcow2bm.clusters.file import ClusterFile
from qcow2bm.clusters.plain_clusters import PlainClusters
from qcow2bm.compare.nbd import NbdReader


class DirectReader:
    """A `qcow2bm.compare.content.Reader` of a qcow2 image."""

    def __init__(self, served: NbdReader, file: ClusterFile) -> None:
        """Takes a connection to qemu-nbd, and the file, which no program writes to meanwhile."""
        self._served = served
        self._file = file
        self._clusters = PlainClusters(file)

    def read_into(self, start: int, buffer: memoryview) -> None:
        """See `qcow2bm.compare.content.Reader`."""
        runs = self._clusters.runs(start, len(buffer))
        if runs is None:
            self._served.read_into(start, buffer)
            return
        for offset, length in runs:
            self._file.read_into(offset, buffer[:length])
            buffer = buffer[length:]

    def next_data(self, start: int) -> int:
        """See `qcow2bm.compare.content.Reader`."""
        return self._served.next_data(start)
