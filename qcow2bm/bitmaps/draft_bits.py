"""The bits of a bitmap while it is edited: the stored clusters, and those that change.

*Spec*: spec/edit.md.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

from qcow2bm.bitmaps.stored_bits import clear_tail
from qcow2bm.bits import pure_python
from qcow2bm.clusters.file import ClusterFile
from qcow2bm.errors import LimitError
from qcow2bm.units import ceil_div

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from qcow2bm.bits.algebra import Octets
    from qcow2bm.bits.operations import Op

ZEROES, ONES = 0, 1
"""The two contents of clusters that are not stored; the table entries have the same values."""

Content = int | bytes | bytearray
"""The content of one cluster of bitmap data: `ZEROES`, `ONES`, or its bytes."""

_CHUNK_BYTES = 1 << 20  # of bits worked on at once
_DENSE_RANGES = 4096  # in one cluster: for so many or more, a mask is faster

MAX_FACTOR = 1 << 22
"""QEMU's coarsest granularity divided by its finest."""


class Source(Protocol):
    """The bits of a bitmap of a disk of the same size, to be combined with others."""

    granularity: int
    bits: int

    def octets(self, first_byte: int, length: int) -> Octets:
        """Returns bytes of packed bits, uint8[length]; bits behind the disk are zero.

        The caller must not change them.
        """
        ...

    def constant(self, first_byte: int, length: int) -> int | None:
        """Returns `ZEROES` or `ONES` if all these bytes are known to be that without reading."""
        ...


class PackedSource:
    """Bits that the caller has in memory."""

    def __init__(self, octets: Octets, granularity: int, virtual_size: int) -> None:
        """``octets`` as `qcow2bm.Bitmap.packed` returns them, the rest in guest bytes."""
        self._octets = octets
        self.bits = ceil_div(virtual_size, granularity)
        self.granularity = granularity

    def octets(self, first_byte: int, length: int) -> Octets:
        """See `Source`."""
        import numpy as np

        part = self._octets[first_byte : first_byte + length]
        return np.concatenate((part, np.zeros(length - len(part), np.uint8)))

    def constant(self, first_byte: int, length: int) -> int | None:
        """See `Source`."""
        return None


class DraftBits:
    """The bits of one bitmap, changed in memory; also a `Source` for other bitmaps.

    Only the clusters that change are kept in memory.

    Attributes:
        granularity: in guest bytes.
        bits: how many bits the bitmap has.
        words: the table as it is stored, uint64[n], empty for a new bitmap.
        changed: the clusters whose content differs from what is stored, by number.
    """

    def __init__(self, file: ClusterFile, granularity: int, words: array[int] | None) -> None:
        """Begins with the stored table ``words``, or with a clean bitmap if ``words`` is None."""
        self._file = file
        self._cluster_size = file.cluster_size
        self.granularity = granularity
        self.bits = ceil_div(file.virtual_size, granularity)
        self.clusters = ceil_div(self.bits, 8 * file.cluster_size)
        self.words = array("Q") if words is None else words
        self.changed: dict[int, Content] = {}

    def _word(self, number: int) -> int:
        return self.words[number] if number < len(self.words) else ZEROES

    def _content(self, number: int) -> Content:
        """Returns the present content of a cluster; the caller must not change the bytes."""
        if number in self.changed:
            return self.changed[number]
        word = self._word(number)
        return word if word in (ZEROES, ONES) else self._stored(number)

    def _stored(self, number: int) -> bytearray:
        """Reads the bytes of a stored cluster, and clears the bits behind the disk (INV-TAIL)."""
        data = bytearray(self._cluster_size)
        self._file.read_into(self._word(number), memoryview(data))
        clear_tail(data, self._bits_in(number))
        return data

    def _bits_in(self, number: int) -> int:
        """Number of bits of a cluster that lie on the disk."""
        per_cluster = 8 * self._cluster_size
        return max(0, min(per_cluster, self.bits - number * per_cluster))

    def _bytes_of(self, number: int) -> bytearray:
        """Returns the present content of a cluster as bytes that the caller may change."""
        content = self._content(number)
        if not isinstance(content, int):
            return bytearray(content)
        data = bytearray(self._cluster_size)
        if content == ONES:
            pure_python.fill(data, 0, self._bits_in(number), is_set=True)
        return data

    def _put(self, number: int, data: bytes | bytearray) -> None:
        """Gives a cluster new bytes; the caller must not change them afterwards."""
        per_cluster = self._cluster_size
        raw = bytes(data)
        if raw.count(0) == per_cluster:
            self._put_constant(number, ZEROES)
        elif self._bits_in(number) == 8 * per_cluster and raw.count(0xFF) == per_cluster:
            self._put_constant(number, ONES)
        else:
            word = self._word(number)
            if word not in (ZEROES, ONES) and raw == self._stored(number):
                self.changed.pop(number, None)
            else:
                self.changed[number] = raw

    def _put_constant(self, number: int, value: int) -> None:
        if self._word(number) == value:
            self.changed.pop(number, None)
        elif value == ONES and self._bits_in(number) < 8 * self._cluster_size:
            data = bytearray(self._cluster_size)
            pure_python.fill(data, 0, self._bits_in(number), is_set=True)
            self._put(number, data)
        else:
            self.changed[number] = value

    def fill(self, first: int, stop: int, *, is_set: bool) -> None:
        """Sets or clears the bits from ``first`` up to, but not including, ``stop``."""
        per_cluster = 8 * self._cluster_size
        value = ONES if is_set else ZEROES
        while first < stop:
            number, inside = divmod(first, per_cluster)
            end = min(inside + stop - first, per_cluster)
            if inside == 0 and end >= self._bits_in(number):
                self._put_constant(number, value)
            elif self._content(number) != value:
                data = self._bytes_of(number)
                pure_python.fill(data, inside, end, is_set=is_set)
                self._put(number, data)
            first += end - inside

    def fit(self) -> None:
        """Makes a stored table fit the disk if it is too long or too short.

        Bits behind the disk are dropped. Bits that the table does not cover are set. All bits in
        the last cluster of the table are set as well: the disk ended somewhere there, but
        nothing says where (INV-COARSE).
        """
        if len(self.words) < self.clusters:
            first = (len(self.words) - 1) * 8 * self._cluster_size
            self.fill(first, self.bits, is_set=True)
            return
        self.changed = self.final()

    def final(self) -> dict[int, Content]:
        """Returns the clusters that differ from the stored ones once the bitmap has a new table.

        They are those in `changed`, and the last cluster if other programs left bits behind the
        disk in it (INV-TAIL).
        """
        last = self.clusters - 1
        word = self._word(last)
        if last in self.changed or word == ZEROES:
            return self.changed
        if word == ONES and self._bits_in(last) == 8 * self._cluster_size:
            return self.changed
        data = self._bytes_of(last)
        if word != ONES and data == self._file.read(word, self._cluster_size):
            return self.changed
        return self.changed | {last: data if any(data) else ZEROES}

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """Undoes all changes made inside the block if the block ends by an exception."""
        before = self.changed.copy()  # contents are replaced, never changed
        try:
            yield
        except BaseException:
            self.changed = before
            raise

    def fill_many(self, ranges: NDArray[np.int64], *, is_set: bool) -> None:
        """Does what `fill` does for many ranges of bits, int64[n, 2] of (first, stop)."""
        import numpy as np

        from qcow2bm.bits.algebra import mask_of, merged

        ranges = merged(ranges)
        per_cluster = 8 * self._cluster_size
        numbers = ranges[:, 0] // per_cluster
        is_inside = numbers == (ranges[:, 1] - 1) // per_cluster
        for first, stop in ranges[~is_inside].tolist():
            self.fill(first, stop, is_set=is_set)
        inside, numbers = ranges[is_inside], numbers[is_inside]
        bounds = np.flatnonzero(np.diff(numbers, prepend=-1, append=-1)).tolist()
        for low, high in pairwise(bounds):
            number = int(numbers[low])
            part = inside[low:high] - number * per_cluster
            data = self._bytes_of(number)
            if high - low < _DENSE_RANGES:
                for first, stop in part.tolist():
                    pure_python.fill(data, first, stop, is_set=is_set)
            else:
                octets = np.frombuffer(data, np.uint8)
                mask = mask_of(part, len(data))
                if is_set:
                    octets |= mask
                else:
                    octets &= ~mask
            self._put(number, data)

    def invert(self) -> None:
        """Inverts every bit that lies on the disk."""
        for first, count in self._chunks(1):
            value = self.constant(first * self._cluster_size, count * self._cluster_size)
            if value is None:
                old = self._load(first, count)
                self._store(first, old, ~old)
            else:
                for number in range(first, first + count):
                    self._put_constant(number, ONES - value)

    def combine(self, op: Op, source: Source) -> None:
        """Combines the bits with those of a source, which may have any granularity.

        The operation is done at the finer granularity of the two. If the source has the finer one,
        a bit is set if any bit that it covers is set (INV-COARSE).

        Raises:
            LimitError: one granularity is more than `MAX_FACTOR` times the other.
        """
        coarser = max(1, source.granularity // self.granularity)
        finer = max(1, self.granularity // source.granularity)
        if coarser * finer > MAX_FACTOR:
            raise LimitError("the ratio of the granularities", coarser * finer, MAX_FACTOR)
        for first, count in self._chunks(coarser):
            start, length = first * self._cluster_size, count * self._cluster_size
            value = source.constant(start * finer // coarser, ceil_div(length * finer, coarser))
            if value is None or (value == ONES and op == "xor"):
                old = self._load(first, count)
                self._store(first, old, self._combined(op, old, source, start, coarser, finer))
            elif (op == "and") == (value == ZEROES):  # else nothing changes
                stop = min(8 * (start + length), self.bits)
                self.fill(8 * start, stop, is_set=op == "or")

    def _combined(
        self, op: Op, old: Octets, source: Source, start: int, coarser: int, finer: int
    ) -> Octets:
        """Returns what the bytes ``old``, from ``start`` on, become when combined with a source."""
        import numpy as np

        from qcow2bm.bits.algebra import coarsen, combine, refine

        if finer == 1:
            bits = source.octets(start // coarser, ceil_div(len(old), coarser))
            return combine(op, old, refine(bits, coarser, len(old)), None)
        new = np.zeros_like(old)
        step = max(1, _CHUNK_BYTES // finer)
        for place in range(0, min(len(old), ceil_div(self.bits, 8) - start), step):
            part = slice(place, place + step)
            origin = (start + place) * finer
            bits = source.octets(origin, len(old[part]) * finer)
            clean = ~bits
            clear_tail(
                clean.data, source.bits - 8 * origin
            )  # where there is no disk nothing is clean
            new[part] = combine(op, old[part], coarsen(bits, finer), coarsen(clean, finer))
        return new

    def _chunks(self, multiple: int) -> Iterator[tuple[int, int]]:
        """Yields all clusters in chunks: the number of the first, and how many.

        Each chunk begins at a multiple of ``multiple`` bytes, which is a power of two.
        """
        step = max(1, max(_CHUNK_BYTES, multiple) // self._cluster_size)
        for first in range(0, self.clusters, step):
            yield first, min(step, self.clusters - first)

    def constant(self, first_byte: int, length: int) -> int | None:
        """See `Source`."""
        first = first_byte // self._cluster_size
        stop = min(ceil_div(first_byte + length, self._cluster_size), self.clusters)
        common: int | None = None
        for number in range(first, stop):
            content = self.changed.get(number, self._word(number))
            if not isinstance(content, int) or content > ONES or common not in (None, content):
                return None
            common = content
        return ZEROES if common is None else common

    def octets(self, first_byte: int, length: int) -> Octets:
        """See `Source`."""
        import numpy as np

        first = first_byte // self._cluster_size
        stop = min(ceil_div(first_byte + length, self._cluster_size), self.clusters)
        inside = first_byte - first * self._cluster_size
        found = self._load(first, max(0, stop - first))[inside : inside + length]
        if len(found) == length:
            return found
        return np.concatenate((found, np.zeros(length - len(found), np.uint8)))

    def _load(self, first: int, count: int) -> Octets:
        """Returns the present content of clusters, uint8[count * cluster size]."""
        import numpy as np

        size = self._cluster_size
        loaded = np.zeros(count * size, np.uint8)
        run: tuple[int, int, int] | None = None  # place, offset and length of the bytes to read
        for number in range(first, first + count):
            place = (number - first) * size
            content = self.changed.get(number, self._word(number))
            if not isinstance(content, int):
                loaded[place : place + size] = np.frombuffer(content, np.uint8)
            elif content == ONES:
                loaded[place : place + size] = 255
            elif content != ZEROES:
                if run and (run[0] + run[2], run[1] + run[2]) == (place, content):
                    run = run[0], run[1], run[2] + size
                    continue
                self._read(run, loaded)
                run = place, content, size
        self._read(run, loaded)
        clear_tail(loaded.data, self.bits - 8 * first * size)
        return loaded

    def _read(self, run: tuple[int, int, int] | None, loaded: Octets) -> None:
        if run:
            place, offset, length = run
            self._file.read_into(offset, loaded.data[place : place + length])

    def _store(self, first: int, old: Octets, new: Octets) -> None:
        """Gives clusters from ``first`` on new content; ``old`` is their present content."""
        clear_tail(new.data, self.bits - 8 * first * self._cluster_size)
        shape = -1, self._cluster_size
        rows = new.reshape(shape)
        lowest, highest = rows.min(axis=1).tolist(), rows.max(axis=1).tolist()
        for row in (old.reshape(shape) != rows).any(axis=1).nonzero()[0].tolist():
            number = first + row
            if lowest[row] == highest[row] and highest[row] in (0, 255):
                self._put_constant(number, ONES if highest[row] else ZEROES)
            elif number in self.changed:
                self._put(number, rows[row].tobytes())
            else:
                self.changed[number] = rows[row].tobytes()
