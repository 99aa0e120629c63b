"""The refcounts of an image as they are stored.

*Spec*: spec/check.md and spec/refcounts.md.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qcow2bm.checking.listing import Listing
from qcow2bm.checking.references import References
from qcow2bm.clusters.file import ClusterFile
from qcow2bm.clusters.problems import MAX_REFCOUNT_TABLE_BYTES
from qcow2bm.errors import LimitError
from qcow2bm.format.header import MAX_REFCOUNT_ORDER
from qcow2bm.format.refcounts import (
    ENTRY_LENGTH,
    TABLE_OFFSET_MASK,
    parse_refcount_block,
    parse_refcount_table,
)

Counts = NDArray[np.unsignedinteger[Any]]


class StoredRefcounts:
    """The refcount blocks of an image.

    Attributes:
        order: the base-2 logarithm of the width of a refcount in bits.
        per_block: how many refcounts a block has.
        blocks: the refcounts of each block by the number of the block in the refcount table.
        places: the host offset of each block by the same number.
    """

    def __init__(self, file: ClusterFile, references: References, listing: Listing) -> None:
        """Reads the refcount table and all blocks, and counts them among ``references``.

        Faulty entries of the refcount table are added to ``listing``. A refcount table whose
        place or size is wrong is not read: its fault is a problem of the header.

        Raises:
            StorageError: reading failed.
        """
        self._file = file
        self._references = references
        self._listing = listing
        self._by_offset: dict[int, Counts] = {}
        self.order = min(file.header.refcount_order, MAX_REFCOUNT_ORDER)
        self.per_block = 8 * file.cluster_size >> self.order
        self.blocks: dict[int, Counts] = {}
        self.places: dict[int, int] = {}
        self._read_table()

    def _read_table(self) -> None:
        header, size = self._file.header, self._file.cluster_size
        length = header.refcount_table_clusters * size
        offset = header.refcount_table_offset
        if not length or length > MAX_REFCOUNT_TABLE_BYTES or offset % size:
            return
        try:
            data = self._file.read(offset, length)
        except LimitError:
            return
        self._references.add(offset, length)
        words = parse_refcount_table(data)
        for number, word in enumerate(words) if any(data) else ():
            if word:
                self._read_entry(offset + ENTRY_LENGTH * number, number, word)

    def _read_entry(self, place: int, number: int, word: int) -> None:
        size = self._file.cluster_size
        offset = word & TABLE_OFFSET_MASK
        if word != offset or offset % size:
            self._listing.add("refcount-table.entry.invalid", place, f"is {word:#x}", number)
        elif offset >= self._file.file_size:
            reason = f"leads to {offset:#x}, past the end of the file"
            self._listing.add("refcount-table.entry.past-eof", place, reason, number)
        elif offset:
            self._references.add(offset, size)
            self.blocks[number] = self._read_block(offset)
            self.places[number] = offset

    def _read_block(self, offset: int) -> Counts:
        """Reads a block once, even if several table entries lead to it, which is a fault."""
        if offset not in self._by_offset:
            data = self._file.read(offset, self._file.cluster_size)
            self._by_offset[offset] = np.asarray(parse_refcount_block(data, self.order))
        return self._by_offset[offset]

    def report_shared_blocks(self, *references: References) -> None:
        """Adds a problem for each block whose cluster is referred to more than once.

        The refcounts in such a block cannot be believed.
        """
        for number, offset in self.places.items():
            cluster = offset // self._file.cluster_size
            used = (each.counts(cluster, cluster + 1) for each in references)
            if sum(int(count[0]) for count in used) > 1:
                place = self._file.header.refcount_table_offset + ENTRY_LENGTH * number
                reason = f"leads to {offset:#x}, which something else uses as well"
                self._listing.add("refcount-table.entry.shared", place, reason, number)

    def of(self, clusters: NDArray[np.int64]) -> NDArray[np.uint64]:
        """Returns the refcounts of clusters, int64[n] to uint64[n]; 0 where no block has one."""
        found = np.zeros(len(clusters), np.uint64)
        numbers = clusters // self.per_block
        for number in np.unique(numbers).tolist():
            if number in self.blocks:
                here = numbers == number
                found[here] = self.blocks[number][clusters[here] - number * self.per_block]
        return found

    @property
    def end(self) -> int:
        """The number of the cluster behind the last one with a refcount above 0; 0 if none."""
        return max(
            (
                number * self.per_block + int(used[-1]) + 1
                for number, counts in self.blocks.items()
                if len(used := np.flatnonzero(counts))
            ),
            default=0,
        )
