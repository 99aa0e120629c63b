"""Reading the bits of one bitmap: lazily, in chunks, and always of one state of the image.

*Spec*: spec/bitmaps.md, "Bitmap data", and spec/locking.md, "Readers".
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from qcow2bm.bitmaps.directory import verify_entry
from qcow2bm.bitmaps.entries import MAX_BITMAP_BYTES
from qcow2bm.bitmaps.stored_bits import (
    ONE_BYTES,
    ZERO_BYTES,
    Piece,
    clear_tail,
    fill,
    pieces,
    read_bits,
)
from qcow2bm.bitmaps.tables import fingerprint, read_words
from qcow2bm.bits import pure_python
from qcow2bm.bits.runs import ALL_ONES, ALLOCATED
from qcow2bm.clusters.file import ClusterFile
from qcow2bm.errors import ChangedWhileReadingError, LimitError
from qcow2bm.format.bitmap_table import ENTRY_LENGTH, build_bitmap_table
from qcow2bm.format.directory import DirectoryEntry
from qcow2bm.units import align_up, ceil_div

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from qcow2bm.bits.coarser import GranularityTotals

_CountBits = Callable[[memoryview], int]
_CountEdges = Callable[[memoryview, int], int]

CHUNK_BYTES = 1 << 20
"""The number of bytes of bits that are read at a time."""

_NUMPY_PAYS = 64 << 20  # bytes: to count fewer takes less time than to load numpy
_FEW_BYTES = 8 << 20  # counted so fast that numpy is not worth loading in any case
_STEP_BYTES = 64 << 10  # counted at a time: the fastest size for Python's integers
_MANY_EXTENTS = 4096  # collected before they are returned, if there are so many
_LONG_BYTES = 64 << 10  # stretches of one value that are at least so long are not spelled out


class Chunk(NamedTuple):
    """The next ``length_bytes`` of the bits of a bitmap.

    ``data`` is None if all of them have one value. Otherwise ``data`` is valid until the next
    chunk is requested, and is followed by zeros up to a multiple of 8 bytes.
    """

    kind: int
    length_bytes: int
    data: memoryview | None


class Totals(NamedTuple):
    """The number of dirty guest bytes, clipped to the disk, and the number of extents."""

    dirty_bytes: int
    extents: int


class BitReader:
    """The stored bits of one bitmap.

    Every read holds the locks of a reader (unless sharing is forced). Before and after the read,
    the header, the directory entry and the table entries that lead to the bits are compared with
    what was read first. Bits behind the end of the disk are zero in everything that is returned
    (INV-TAIL).

    With ``dirty_where_unknown``, bits that cannot be read are set (INV-COARSE): bits whose table
    entry is invalid or leads out of the file, and bits that the table does not cover. Without it,
    the caller vouches that the table is sound.
    """

    def __init__(
        self,
        file: ClusterFile,
        entry: DirectoryEntry,
        expected: int | None,
        *,
        dirty_where_unknown: bool = False,
    ) -> None:
        """``expected`` is the fingerprint of the table when it was found sound; None if unknown."""
        self._file = file
        self._entry = entry
        self._expected = expected
        self._dirty_where_unknown = dirty_where_unknown
        self.bits = ceil_div(file.virtual_size, entry.granularity)
        self.length_bytes = ceil_div(self.bits, 8)

    def table(self) -> array[int]:
        """Returns the bitmap table, uint64[bitmap_table_size]."""
        with self._file.lock():
            words = self._read_table()
            self._require_unchanged(words, 0, 0)
        return words

    def packed(self) -> NDArray[np.uint8]:
        """Returns all bits, uint8[ceil(bits / 8)], least significant bit first.

        Raises:
            LimitError: there are more bits than QEMU allows a bitmap to have, 512 MiB.
        """
        if self.length_bytes > MAX_BITMAP_BYTES:
            raise LimitError("the length of the bits", self.length_bytes, MAX_BITMAP_BYTES)
        import numpy as np

        out = np.zeros(self.length_bytes, np.uint8)
        with self._file.lock():
            words = self._read_table()
            read_bits(
                self._file,
                words,
                self.bits,
                out.data,
                dirty_where_unknown=self._dirty_where_unknown,
                vectorize=True,
            )
            self._require_unchanged(words, 0, len(words))
        return out

    def extents(self) -> Iterator[NDArray[np.int64]]:
        """Yields the dirty extents: arrays int64[n, 2] of (start, length) in guest bytes."""
        import numpy as np

        # Each array costs the caller some time, so the extents of sparse bitmaps are collected.
        waiting: list[NDArray[np.int64]] = []
        count = 0
        for found in self._found_extents():
            if len(found):
                waiting.append(found)
                count += len(found)
            if count >= _MANY_EXTENTS:
                yield np.concatenate(waiting) if len(waiting) > 1 else found
                waiting, count = [], 0
        if waiting:
            yield np.concatenate(waiting)

    def _found_extents(self) -> Iterator[NDArray[np.int64]]:
        import numpy as np

        from qcow2bm.bits.extents import WINDOW_BYTES, ExtentFinder

        finder = ExtentFinder(self._entry.granularity, self._file.virtual_size)
        for chunk in self.chunks(vectorize=True):
            if chunk.data is None:
                yield finder.constant(chunk.kind == ALL_ONES, chunk.length_bytes)
                continue
            data = np.frombuffer(chunk.data, np.uint8)
            for start in range(0, len(data), WINDOW_BYTES):
                yield finder.bits(data[start : start + WINDOW_BYTES])
        yield finder.finish()

    def totals(self, *, with_extents: bool = True, vectorize: bool = False) -> Totals:
        """Counts dirty bytes and extents.

        Without ``with_extents``, the number of extents is 0. With ``vectorize`` the caller says
        that it needs numpy anyway, so that the time to load numpy does not count.
        """
        count_bits, count_edges = self._counters(vectorize=vectorize)
        bits = edges = carry = last_byte = 0
        for chunk in self.chunks():
            if chunk.data is None:
                is_one = int(chunk.kind == ALL_ONES)
                bits += 8 * chunk.length_bytes * is_one
                edges += is_one ^ carry
                carry, last_byte = is_one, 255 * is_one
                continue
            for start in range(0, chunk.length_bytes, _STEP_BYTES):
                part = chunk.data[start : min(start + _STEP_BYTES, chunk.length_bytes)]
                bits += count_bits(part)
                last_byte = part[-1]
                if with_extents:
                    edges += count_edges(part, carry)
                    carry = last_byte >> 7
        dirty = bits * self._entry.granularity
        if self.bits and last_byte >> (self.bits - 1) % 8 & 1:
            dirty -= self.bits * self._entry.granularity - self._file.virtual_size
        return Totals(dirty, (edges + 1) // 2 if with_extents else 0)

    def _counters(self, *, vectorize: bool) -> tuple[_CountBits, _CountEdges]:
        if self.length_bytes < (_FEW_BYTES if vectorize else _NUMPY_PAYS):
            return pure_python.count_bits, pure_python.count_edges
        from qcow2bm.bits import counting

        return counting.count_bits, counting.count_edges

    def coarser_totals(self, coarsest: int) -> tuple[GranularityTotals, ...]:
        """Counts what would be dirty at this granularity and at coarser ones, in one pass.

        The granularities double, up to ``coarsest``, or to one at which nothing or all is dirty.
        """
        import numpy as np

        from qcow2bm.bits.coarser import CoarserCounter

        counter = CoarserCounter(self._entry.granularity, coarsest, self._file.virtual_size)
        for chunk in self.chunks(vectorize=True):
            if chunk.data is None:
                counter.constant(chunk.kind == ALL_ONES, chunk.length_bytes)
            else:
                counter.bits(np.frombuffer(chunk.data, np.uint8)[: chunk.length_bytes])
        return counter.finish()

    def sha256(self) -> str:
        """Returns the SHA-256 of the bits as 64-bit little-endian words, at least one, in hex."""
        from qcow2bm.bits.digest import sha256

        return sha256(self._contents(), self.bits)

    def _contents(self) -> Iterator[memoryview | bytes]:
        """Yields the packed bits in pieces."""
        for chunk in self.chunks():
            if chunk.data is not None:
                yield chunk.data[: chunk.length_bytes]
                continue
            constant = ONE_BYTES if chunk.kind == ALL_ONES else ZERO_BYTES
            for start in range(0, chunk.length_bytes, len(constant)):
                yield constant[: chunk.length_bytes - start]

    def chunks(self, *, vectorize: bool = False) -> Iterator[Chunk]:
        """Yields the bits from first to last; a long stretch of one value comes as one chunk.

        For ``vectorize`` see `table_runs`.
        """
        words = self.table()
        buffer = memoryview(bytearray(min(CHUNK_BYTES, align_up(self.length_bytes, 8))))
        batch: list[Piece] = []
        used = 0
        found = pieces(
            self._file,
            words,
            self.length_bytes,
            dirty_where_unknown=self._dirty_where_unknown,
            vectorize=vectorize,
        )
        for piece in found:
            if piece.kind != ALLOCATED and piece.end - piece.start >= _LONG_BYTES:
                if used:
                    yield self._read_batch(batch, words, buffer)
                    batch, used = [], 0
                stop = piece.end
                if stop == self.length_bytes:  # the tail may have to be cleared (INV-TAIL)
                    stop = (stop - 1) // 8 * 8
                yield Chunk(piece.kind, stop - piece.start, None)
                piece = piece.cut(stop)
            while piece.start < piece.end:
                stop = min(piece.end, piece.start + CHUNK_BYTES - used)
                batch.append(piece._replace(end=stop))
                used += stop - piece.start
                piece = piece.cut(stop)
                if used == CHUNK_BYTES:
                    yield self._read_batch(batch, words, buffer)
                    batch, used = [], 0
        if used:
            yield self._read_batch(batch, words, buffer)
        # Each chunk was compared with its own part of the table. All of them must be one state.
        with self._file.lock():
            self._require_unchanged(words, 0, len(words))

    def _read_batch(self, batch: list[Piece], words: array[int], buffer: memoryview) -> Chunk:
        start, end = batch[0].start, batch[-1].end
        if any(piece.kind == ALLOCATED for piece in batch):
            cluster_size = self._file.cluster_size
            entries = words, start // cluster_size, ceil_div(end, cluster_size)
            with self._file.lock():
                self._require_unchanged(*entries)
                fill(self._file, batch, buffer, start)
                self._require_unchanged(*entries)
        else:
            fill(self._file, batch, buffer, start)
        length = end - start
        data = buffer[: align_up(length, 8)]
        if end == self.length_bytes:
            clear_tail(data, self.bits - 8 * start)
        return Chunk(ALLOCATED, length, data)

    def _read_table(self) -> array[int]:
        words = read_words(self._file, self._entry)
        if self._expected is not None and fingerprint(words) != self._expected:
            raise ChangedWhileReadingError(self._file.storage.name, "bitmap table")
        return words

    def _require_unchanged(self, words: array[int], first: int, stop: int) -> None:
        """Raises if header, directory entry or table entries ``first`` to ``stop`` changed."""
        file, entry = self._file, self._entry
        verify_entry(file, entry)
        offset = entry.bitmap_table_offset + ENTRY_LENGTH * first
        expected = build_bitmap_table(words[first:stop])
        if file.read(offset, len(expected)) != expected:
            raise ChangedWhileReadingError(file.storage.name, "bitmap table")
        file.verify_untouched()
