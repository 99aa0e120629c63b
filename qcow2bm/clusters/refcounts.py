"""The refcounts of an image, with the changes that are planned.

Which clusters to allocate is decided in ``allocator``.

*Spec*: spec/refcounts.md.
"""

from __future__ import annotations

import re
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence

from qcow2bm.clusters.file import ClusterFile
from qcow2bm.clusters.plan import SECTOR_SIZE, Write
from qcow2bm.clusters.stored_extents import stored_extents
from qcow2bm.errors import FormatError
from qcow2bm.format.refcounts import (
    ENTRY_LENGTH,
    TABLE_OFFSET_MASK,
    build_refcount_block,
    build_refcount_table,
    parse_refcount_block,
    parse_refcount_table,
)
from qcow2bm.units import align_up, ceil_div

_ZEROES = {width: re.compile(rb"\0{%d,}" % width) for width in (1, 2, 4, 8)}
"""Patterns for at least one refcount of 0, by the size of a refcount in bytes."""


class Refcounts:
    """The refcount table, and refcount blocks that are read when they are needed.

    Changes are made in RAM. The ``take_`` methods return the writes for them.

    Attributes:
        per_block: the number of clusters that one refcount block counts.
        table_offset: the host offset of the refcount table after all planned writes.
        table_clusters: the size of the refcount table in clusters after all planned writes.
    """

    def __init__(self, file: ClusterFile) -> None:
        """Reads the refcount table.

        Raises:
            FormatError: an entry of the table has reserved bits, or is not the start of a cluster.
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
        stray = ~TABLE_OFFSET_MASK | (file.cluster_size - 1)
        for number in (n for n, word in enumerate(self._table) if word & stray):
            offset = self.table_offset + ENTRY_LENGTH * number
            reason = f"is {self._table[number]:#x}: {_ADVICE}"
            raise FormatError("refcount table", f"entry {number}", offset, reason)
        self._blocks: dict[int, array[int]] = {}
        self._changed: dict[int, set[int]] = {}  # sectors to write, by block
        self._new_blocks: list[int] = []
        self._is_moved = False

    @property
    def capacity(self) -> int:
        """The number of blocks that the refcount table has room for."""
        return len(self._table)

    def has_block(self, index: int) -> bool:
        """Whether the refcount block with the number ``index`` exists."""
        return index < len(self._table) and self._table[index] != 0

    def place(self, index: int) -> int:
        """Returns the host offset of a block that exists."""
        return self._table[index]

    def blocks(self) -> list[int]:
        """Returns the numbers of all refcount blocks, ascending."""
        return [number for number, word in enumerate(self._table) if word]

    def stored_blocks(self) -> list[int]:
        """Returns the numbers of the blocks that are no holes of the file, ascending.

        The refcounts of all other blocks are 0, but for planned changes. A block behind the end of
        the file is among these, too: it cannot be read.

        Raises:
            StorageError: the storage could not be asked.
        """
        size = self._file.cluster_size
        end = align_up(self._file.file_size, size)
        starts = sorted(word for word in self._table if 0 < word < end)
        extents = list(stored_extents(self._file, starts, [start + size for start in starts]))
        ends = [extent.end for extent in extents]

        def is_stored(word: int) -> bool:
            place = bisect_right(ends, word)
            return word >= end or (place < len(ends) and extents[place].start < word + size)

        return [number for number, word in enumerate(self._table) if word and is_stored(word)]

    def __getitem__(self, cluster: int) -> int:
        """Returns the refcount of the cluster with the number ``cluster``."""
        index, entry = divmod(cluster, self.per_block)
        return self._block(index)[entry] if self.has_block(index) else 0

    def read_block(self, index: int) -> array[int]:
        """Reads a block that exists, without planned changes, and without keeping it.

        Raises:
            FormatError: the block lies beyond the end of the file.
            StorageError: reading failed.
        """
        offset = self._table[index]
        if not self._file.contains(offset, self._file.cluster_size):
            place = self.table_offset + ENTRY_LENGTH * index
            raise FormatError(
                "refcount table",
                f"entry {index}",
                place,
                f"is {offset:#x}, beyond the end of the file: {_ADVICE}",
            )
        return parse_refcount_block(self._file.read(offset, self._file.cluster_size), self._order)

    def _block(self, index: int) -> array[int]:
        if index not in self._blocks:
            self._blocks[index] = self.read_block(index)
        return self._blocks[index]

    def change(self, cluster: int, count: int, before: int, after: int) -> None:
        """Changes the refcounts of ``count`` clusters from ``before`` to ``after``.

        ``cluster`` is the number of the first cluster.

        Raises:
            FormatError: a cluster does not have the refcount ``before``.
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
        """The error for a cluster whose refcount is ``found`` instead of ``expected``."""
        index, entry = divmod(cluster, self.per_block)
        block = self._table[index] if self.has_block(index) else 0
        offset = block + (entry << self._order) // 8
        what = f"refcount of the cluster at {cluster * self._file.cluster_size:#x}"
        return FormatError(
            "refcount block", what, offset, f"is {found}, must be {expected}: {_ADVICE}"
        )

    def free_runs(self, blocks: Iterable[int]) -> Iterator[tuple[int, int]]:
        """Yields runs of clusters with refcount 0, as (first, stop), in the order of ``blocks``.

        A run never goes beyond its block, so two runs may touch.
        """
        for index in blocks:
            block = self._blocks[index] if index in self._blocks else self.read_block(index)
            base = index * self.per_block
            width = block.itemsize
            for zeroes in _ZEROES[width].finditer(block.tobytes()):
                first, stop = -(-zeroes.start() // width), zeroes.end() // width
                if first < stop:
                    yield base + first, base + stop

    def end(self) -> int:
        """Returns the number of the cluster behind the last cluster whose refcount is not 0.

        Raises:
            FormatError: a block lies beyond the end of the file.
            StorageError: reading failed.
        """
        blocks = self.blocks()
        # The last block is hardly ever a hole.
        return self._end(blocks[-1:]) or self._end(sorted({*self.stored_blocks(), *self._blocks}))

    def _end(self, blocks: Sequence[int]) -> int:
        """Returns what `end` returns, if only some blocks, which are ascending, are looked at."""
        zeroes: set[int] = set()  # the host offsets of blocks, to which several entries may lead
        for index in reversed(blocks):
            if self._table[index] in zeroes and index not in self._blocks:
                continue
            block = self._blocks[index] if index in self._blocks else self.read_block(index)
            if data := block.tobytes().rstrip(b"\0"):
                return index * self.per_block + ceil_div(len(data), block.itemsize)
            if index not in self._blocks:
                zeroes.add(self._table[index])
        return 0

    def add_block(self, index: int, cluster: int) -> None:
        """Adds the refcount block with the number ``index``, stored in ``cluster``."""
        self._table[index] = cluster * self._file.cluster_size
        self._blocks[index] = parse_refcount_block(bytes(self._file.cluster_size), self._order)
        self._new_blocks.append(index)

    def move_table(self, cluster: int, clusters: int) -> None:
        """Moves the refcount table to ``cluster`` and enlarges it to ``clusters`` clusters."""
        self.table_offset, self.table_clusters = cluster * self._file.cluster_size, clusters
        room = clusters * self._file.cluster_size // ENTRY_LENGTH
        self._table.extend([0] * (room - len(self._table)))
        self._is_moved = True

    def take_block_writes(self) -> list[Write]:
        """Returns the writes of whole new refcount blocks, with all changes planned so far."""
        writes = []
        for index in self._new_blocks:
            data = build_refcount_block(self._blocks[index], self._order)
            writes.append(Write(self._table[index], (data,), "new refcount block", True))
            self._changed.pop(index, None)
        return writes

    def take_table_writes(self) -> list[Write]:
        """Returns the writes of table entries for new blocks, or of the whole table if it moves."""
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
        """Returns the writes of all sectors that changed since the last call, called ``what``."""
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
