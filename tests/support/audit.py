"""Takes an image apart without the library, with nothing but struct.

`Audit` counts the references to each cluster and compares them with the refcounts, so it finds
every leak and every cluster counted too low. It is for images whose disk is empty, as `build_image`
makes them.
"""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

_OFFSET = 0x00FFFFFFFFFFFE00
_BITMAPS = 0x23852875
_NOT_ZERO = re.compile(rb"[^\0]")


class AuditedBitmap(NamedTuple):
    """A directory entry and the table it leads to, as they stand there."""

    name: bytes
    flags: int
    type: int
    granularity_bits: int
    extra_data: bytes
    padding: bytes
    table_offset: int
    words: tuple[int, ...]

    @property
    def data_offsets(self) -> list[int]:
        """The host offsets of the clusters with data."""
        return [word & _OFFSET for word in self.words if word & _OFFSET]


class Audit:
    """An image taken apart.

    Attributes:
        extensions: (host offset of the head, type, data) of each header extension.
        end: the host offset of the end marker.
    """

    def __init__(self, data: bytes | bytearray) -> None:
        self.data = bytes(data)
        head = struct.unpack_from(">8xQIIQ4xIQQII", self.data)
        self.backing_offset, self.backing_size, cluster_bits, size = head[:4]
        l1_size, self.l1_offset, self.table_offset, self.table_clusters, snapshots = head[4:]
        features = struct.unpack_from(">QQQII", self.data, 72)
        self.incompatible, self.compatible, self.autoclear, self.order, start = features
        self.size: int = size & ~511
        assert snapshots == 0
        self.cluster_size = 1 << cluster_bits
        self.l1_length = 8 * l1_size
        assert not any(self.data[self.l1_offset : self.l1_offset + self.l1_length])
        self.additional_fields = self.data[112:start]
        self.extensions: list[tuple[int, int, bytes]] = []
        while (head := struct.unpack_from(">II", self.data, start))[0]:
            content = self.data[start + 8 : start + 8 + head[1]]
            self.extensions.append((start, head[0], content))
            start += 8 + (head[1] + 7) // 8 * 8
        self.end = start

    @property
    def backing_name(self) -> bytes:
        """The name of the backing file."""
        if not self.backing_offset:
            return b""
        assert self.backing_offset >= self.end + 8
        assert self.backing_offset + self.backing_size <= self.cluster_size
        return self.data[self.backing_offset : self.backing_offset + self.backing_size]

    @property
    def other_extensions(self) -> list[tuple[int, bytes]]:
        """Type and data of the header extensions but that of the bitmaps."""
        return [(kind, data) for _, kind, data in self.extensions if kind != _BITMAPS]

    @property
    def unknown(self) -> tuple[object, ...]:
        """All in the header that no change of bitmaps may touch (INV-UNKNOWN)."""
        features = self.incompatible, self.compatible, self.autoclear & 2
        listed = self.backing_name, self.additional_fields, self.other_extensions
        return self.data[:8], self.data[16:48], self.data[60:72], features, *listed

    @cached_property
    def payload(self) -> tuple[int, int, int, int] | None:
        """The bitmaps extension, None where there is none; never one without its bit set."""
        found = [data for _, kind, data in self.extensions if kind == _BITMAPS]
        assert len(found) <= 1
        assert found or not self.autoclear & 1
        return struct.unpack(">IIQQ", found[0]) if found else None

    @cached_property
    def bitmaps(self) -> list[AuditedBitmap]:
        """The bitmaps in order, none where they are stale."""
        if not self.payload or not self.autoclear & 1:
            return []
        count, reserved, size, place = self.payload
        assert count > 0
        assert reserved == 0
        bitmaps, end = [], place + size
        for _ in range(count):
            table, entries, flags, kind, granularity_bits, name, extra = struct.unpack_from(
                ">QIIBBHI", self.data, place
            )
            start = place + 24 + extra
            place += (24 + extra + name + 7) // 8 * 8
            words = struct.unpack_from(f">{entries}Q", self.data, table)
            bitmaps.append(
                AuditedBitmap(
                    *(self.data[start : start + name], flags, kind, granularity_bits),
                    *(self.data[start - extra : start], self.data[start + name : place]),
                    *(table, words),
                )
            )
        assert place == end
        return bitmaps

    @cached_property
    def refcounts(self) -> Counter[int]:
        """The refcounts that are not 0, by the number of the cluster."""
        counts: Counter[int] = Counter()
        width = 1 << self.order
        per_block = 8 * self.cluster_size // width
        for index, block in self._blocks():
            content = self.data[block : block + self.cluster_size]
            for at in (match.start() for match in _NOT_ZERO.finditer(content)):
                if width >= 8:
                    entry = at * 8 // width
                    start = entry * width // 8
                    number = int.from_bytes(content[start : start + width // 8], "big")
                    counts[index * per_block + entry] = number
                    continue
                for place in range(8 // width):
                    if number := content[at] >> place * width & (1 << width) - 1:
                        counts[index * per_block + at * 8 // width + place] = number
        return counts

    def _blocks(self) -> Iterator[tuple[int, int]]:
        length = self.table_clusters * self.cluster_size // 8
        table = struct.unpack_from(f">{length}Q", self.data, self.table_offset)
        return ((index, offset) for index, offset in enumerate(table) if offset)

    @cached_property
    def references(self) -> Counter[int]:
        """The number of references to each cluster, by the number of the cluster."""
        counts: Counter[int] = Counter()
        ranges = [
            (0, 1),
            (self.l1_offset, self.l1_length),
            (self.table_offset, self.table_clusters * self.cluster_size),
            *((offset, 1) for _, offset in self._blocks()),
        ]
        if self.bitmaps and self.payload:
            ranges.append((self.payload[3], self.payload[2]))
        for bitmap in self.bitmaps:
            ranges.append((bitmap.table_offset, 8 * len(bitmap.words)))
            ranges += [(offset, 1) for offset in bitmap.data_offsets]
        for offset, length in ranges:
            assert offset % self.cluster_size == 0
            first = offset // self.cluster_size
            counts.update(range(first, first - (-length // self.cluster_size)))
        return counts

    @property
    def miscounted(self) -> dict[int, tuple[int, int]]:
        """(refcount, references) by cluster, where they differ: empty in a sound image."""
        wrong = self.refcounts.keys() | self.references.keys()
        pairs = {n: (self.refcounts[n], self.references[n]) for n in sorted(wrong)}
        return {n: pair for n, pair in pairs.items() if pair[0] != pair[1]}

    def dirty(self, bitmap: AuditedBitmap) -> set[int]:
        """The numbers of the bits that are set."""
        per_cluster = 8 * self.cluster_size
        bits = -(-self.size >> bitmap.granularity_bits)
        assert len(bitmap.words) == -(-bits // per_cluster)
        dirty: set[int] = set()
        for number, word in enumerate(bitmap.words):
            base = number * per_cluster
            if offset := word & _OFFSET:
                content = self.data[offset : offset + self.cluster_size]
                for at in (match.start() for match in _NOT_ZERO.finditer(content)):
                    dirty.update(base + 8 * at + n for n in range(8) if content[at] >> n & 1)
            elif word:
                dirty.update(range(base, base + per_cluster))
        return dirty

    def check(self) -> None:
        """Asserts that the refcounts are right, and what this library stores is as it should be.

        No bit past the disk is set, neither in bytes nor by an all-ones entry (INV-TAIL), and no
        cluster is stored of which all bits are the same.
        """
        assert self.miscounted == {}
        for bitmap in self.bitmaps:
            bits = -(-self.size >> bitmap.granularity_bits)
            assert max(self.dirty(bitmap), default=0) < bits
            for offset in bitmap.data_offsets:
                content = self.data[offset : offset + self.cluster_size]
                assert content.strip(content[:1]) or content[:1] not in b"\0\xff"
