"""The refcounts of an image, and the changes to them that are planned.

*Spec*: spec/refcounts.md.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Iterator

from qcow2bm.clusters.file import ClusterFile
from qcow2bm.clusters.plan import SECTOR_SIZE, Write
from qcow2bm.errors import FormatError
from qcow2bm.format.refcounts import (
    ENTRY_LENGTH,
    TABLE_OFFSET_MASK,
    build_refcount_block,
    build_refcount_table,
    parse_refcount_block,
    parse_refcount_table,
)

_ZEROES = re.compile(rb"\0+")


class Refcounts:
    """Refcount table and blocks, read as they are needed, with the changes made here in RAM.

    Attributes:
        per_block: how many clusters one refcount block counts.
        table_offset, table_clusters: where the refcount table is once all is written.
    """

    def __init__(self, file: ClusterFile) -> None:
        """Reads the refcount table.

        Raises:
            FormatError: an entry of the table cannot be right.
            StorageError: reading failed.
        """
        header = file.header
        self._file = file
        self._order = header.refcount_order
        self.per_block = 8 * file.cluster_size >> self._order
        self._per_sector = 8 * SECTOR_SIZE >> self._order
        self.table_offset = header.refcount_table_offset
        self.table_clusters = header.refcount_table_clusters
        size = self.table_clusters * file.cluster_size
        self._table = parse_refcount_table(file.read(self.table_offset, size))
        for number, word in enumerate(self._table):
            if word & ~TABLE_OFFSET_MASK or word % file.cluster_size:
                offset = self.table_offset + ENTRY_LENGTH * number
                raise FormatError(
                    "refcount table", f"entry {number}", offset, f"is {word:#x}: {_ADVICE}"
                )
        self._blocks: dict[int, array[int]] = {}
        self._changed: dict[int, set[int]] = {}  # sectors to write, by block
        self._new_blocks: list[int] = []
        self._is_moved = False

    @property
    def capacity(self) -> int:
        """How many blocks the refcount table has room for."""
        return len(self._table)

    def has_block(self, index: int) -> bool:
        """Whether there is a refcount block of that number."""
        return index < len(self._table) and self._table[index] != 0

    def blocks(self) -> list[int]:
        """The numbers of all refcount blocks, ascending."""
        return [number for number, word in enumerate(self._table) if word]

    def __getitem__(self, cluster: int) -> int:
        """The refcount of a cluster by its number."""
        index, entry = divmod(cluster, self.per_block)
        return self._block(index)[entry] if self.has_block(index) else 0

    def _block(self, index: int) -> array[int]:
        if index not in self._blocks:
            offset = self._table[index]
            if not self._file.contains(offset, self._file.cluster_size):
                place = self.table_offset + ENTRY_LENGTH * index
                raise FormatError(
                    "refcount table",
                    f"entry {index}",
                    place,
                    f"is {offset:#x}, beyond the end of the file: {_ADVICE}",
                )
            data = self._file.read(offset, self._file.cluster_size)
            self._blocks[index] = parse_refcount_block(data, self._order)
        return self._blocks[index]

    def change(self, cluster: int, count: int, before: int, after: int) -> None:
        """Turns the refcount of ``count`` clusters from ``cluster`` on from one into another.

        Raises:
            FormatError: a cluster has not the refcount it must have.
            StorageError: reading failed.
        """
        while count:
            index, entry = divmod(cluster, self.per_block)
            stop = min(entry + count, self.per_block)
            if not self.has_block(index):
                raise self.wrong(cluster, 0, before)
            block = self._block(index)
            for place in range(entry, stop):
                if block[place] != before:
                    raise self.wrong(index * self.per_block + place, block[place], before)
                block[place] = after
            sectors = range(entry // self._per_sector, (stop - 1) // self._per_sector + 1)
            self._changed.setdefault(index, set()).update(sectors)
            cluster += stop - entry
            count -= stop - entry

    def wrong(self, cluster: int, found: int, expected: int) -> FormatError:
        """The error for a cluster whose refcount is ``found``."""
        index, entry = divmod(cluster, self.per_block)
        block = self._table[index] if self.has_block(index) else 0
        offset = block + (entry << self._order) // 8
        what = f"refcount of the cluster at {cluster * self._file.cluster_size:#x}"
        return FormatError(
            "refcount block", what, offset, f"is {found}, must be {expected}: {_ADVICE}"
        )

    def free_runs(self, blocks: Iterable[int]) -> Iterator[tuple[int, int]]:
        """Clusters of refcount 0 that these blocks count: (first, stop), in their order.

        A run may end where its block does and go on in the next.
        """
        for index in blocks:
            block = self._block(index)
            base = index * self.per_block
            width = block.itemsize
            for zeroes in _ZEROES.finditer(block.tobytes()):
                first, stop = -(-zeroes.start() // width), zeroes.end() // width
                if first < stop:
                    yield base + first, base + stop

    def end(self) -> int:
        """The number of the cluster behind the last one that has a refcount."""
        for index in reversed(self.blocks()):
            data = self._block(index).tobytes().rstrip(b"\0")
            if data:
                return index * self.per_block + -(-len(data) // self._block(index).itemsize)
        return 0

    def add_block(self, index: int, cluster: int) -> None:
        """Gives the clusters of block ``index`` a new refcount block, at ``cluster``."""
        self._table[index] = cluster * self._file.cluster_size
        self._blocks[index] = parse_refcount_block(bytes(self._file.cluster_size), self._order)
        self._new_blocks.append(index)

    def move_table(self, cluster: int, clusters: int) -> None:
        """Puts a larger refcount table at ``cluster``."""
        self.table_offset, self.table_clusters = cluster * self._file.cluster_size, clusters
        room = clusters * self._file.cluster_size // ENTRY_LENGTH
        self._table.extend([0] * (room - len(self._table)))
        self._is_moved = True

    def take_block_writes(self) -> list[Write]:
        """The new refcount blocks, whole, as they are now; they count as written then."""
        writes = []
        for index in self._new_blocks:
            data = build_refcount_block(self._blocks[index], self._order)
            writes.append(Write(self._table[index], (data,), "new refcount block", True))
            self._changed.pop(index, None)
        return writes

    def take_table_writes(self) -> list[Write]:
        """The table entries of new blocks, or the whole table where it moves."""
        indexes, self._new_blocks = self._new_blocks, []
        if self._is_moved:
            data = build_refcount_table(self._table)
            return [Write(self.table_offset, (data,), "larger refcount table", True)]
        return [
            Write(
                self.table_offset + ENTRY_LENGTH * index,
                (build_refcount_table(self._table[index : index + 1]),),
                "refcount table entries of new blocks",
            )
            for index in indexes
        ]

    def take_count_writes(self, what: str) -> list[Write]:
        """The sectors of refcount blocks changed since this was last asked for."""
        writes = []
        for index, sectors in sorted(self._changed.items()):
            block, offset = self._blocks[index], self._table[index]
            for sector in sorted(sectors):
                start = sector * self._per_sector
                part = block[start : start + self._per_sector]
                place = offset + sector * SECTOR_SIZE
                writes.append(Write(place, (build_refcount_block(part, self._order),), what))
        self._changed = {}
        return writes


_ADVICE = "repair the image first (qemu-img check -r all)"
