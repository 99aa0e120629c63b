"""Sparse images that claim as much as the format allows, and hardly store anything.

    IMAGES["L2 tables in holes"](tmp_path / "vm.qcow2")

A hole of a file reads as zeros, and takes no space. `IMAGES` has images that claim most of each
table of the format: what is stored are the tables that lead to holes, or to one place all of them.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np

from qcow2bm.format.directory import (
    FLAG_AUTO,
    TYPE_DIRTY_TRACKING,
    Directory,
    DirectoryEntry,
    build_directory,
)
from qcow2bm.format.extensions import (
    BITMAPS,
    CRYPTO,
    BitmapsExtension,
    CryptoHeader,
    HeaderExtension,
    HeaderExtensions,
    build_bitmaps_extension,
    build_crypto_header,
    build_extensions,
)
from qcow2bm.format.features import AUTOCLEAR_BITMAPS
from qcow2bm.format.snapshots import SnapshotHeader, build_snapshot_table
from qcow2bm.units import align_up, ceil_div

MIB, GIB, TIB = 1 << 20, 1 << 30, 1 << 40
HOLES = GIB
"""The host offset from which on the images lead to holes."""

MAX_REFCOUNT_TABLE = 8 * MIB
MAX_L1_TABLE = 32 * MIB
MAX_SNAPSHOTS = 65536
MAX_BITMAPS = 65535
MAX_BITMAP = 512 * MIB  # a bitmap has at most so many bytes


def words(*values: int) -> bytes:
    """Builds table entries."""
    return struct.pack(f">{len(values)}Q", *values)


def every(start: int, step: int, count: int) -> bytes:
    """Builds entries that lead to ``count`` places at the same distance."""
    return (start + step * np.arange(count, dtype=np.int64)).astype(">u8").tobytes()


class SparseImage:
    """An image that is being written; its first clusters are allocated one behind the other.

    Attributes:
        size: the size of a cluster.
        end: the length of the file when it is done, if that is behind all allocated clusters.
        refcounts: the refcounts of the allocated clusters, in order.
    """

    def __init__(self, file: BinaryIO, cluster_bits: int, disk_size: int) -> None:
        self.size = 1 << cluster_bits
        self.end = 0
        self.refcounts = [1]
        self._file = file
        self._bits, self._disk_size = cluster_bits, disk_size
        self._l1_table = self._refcount_table = self._snapshots = (0, 0)  # host offset, length
        self._extensions: tuple[HeaderExtension, ...] = ()
        self._autoclear = 0

    def allocate(self, length: int, refcount: int = 1) -> int:
        """Returns the host offset of new clusters, which have this refcount."""
        first = len(self.refcounts)
        self.refcounts += [refcount] * ceil_div(length, self.size)
        return first * self.size

    def write(self, offset: int, data: bytes) -> None:
        """Writes bytes; what is never written is a hole."""
        self._file.seek(offset)
        self._file.write(data)

    def add(self, data: bytes, refcount: int = 1) -> int:
        """Writes bytes into new clusters, which have this refcount; returns their host offset."""
        offset = self.allocate(len(data), refcount)
        self.write(offset, data)
        return offset

    def l1_table(self, entries: int, data: bytes = b"") -> None:
        """Adds the L1 table of the disk, which begins with ``data``."""
        offset = self.allocate(8 * entries)
        self.write(offset, data)
        self._l1_table = offset, entries

    def refcount_table(self, data: bytes, length: int = 0) -> None:
        """Adds a refcount table instead of one that leads to the refcounts of all clusters."""
        length = max(length, len(data))
        self._refcount_table = self.allocate(length), length
        self.write(self._refcount_table[0], data)

    def snapshots(self, data: bytes, count: int) -> None:
        """Adds the snapshot table."""
        self._snapshots = self.add(data), count

    def snapshots_with(self, l1_tables: Iterable[tuple[int, int]]) -> None:
        """Adds a snapshot table; of each L1 table it takes the host offset and the entries."""
        entry = SnapshotHeader(0, 0, 0, 0, 0, 0, bytes(16), b"1", b"s", bytes(6))
        tail = build_snapshot_table((entry,))[12:]
        heads = [struct.pack(">QI", *table) for table in l1_tables]
        self.snapshots(b"".join(head + tail for head in heads), len(heads))

    def bitmaps_with(self, tables: Iterable[tuple[int, int]], granularity_bits: int = 9) -> None:
        """Adds a bitmap directory; of each table it takes the host offset and the entries."""
        entries = tuple(
            DirectoryEntry(
                *(number, 0, offset, size, FLAG_AUTO, TYPE_DIRTY_TRACKING, granularity_bits),
                *(5, 0, b"", b"%05d" % number, bytes(3)),
            )
            for number, (offset, size) in enumerate(tables)
        )
        data = build_directory(Directory(entries, b""))
        self.bitmaps(len(entries), len(data), self.add(data))

    def bitmaps(self, count: int, directory_size: int, directory_offset: int) -> None:
        """Adds the header extension that leads to a bitmap directory."""
        payload = BitmapsExtension(count, 0, directory_size, directory_offset)
        self.extension(BITMAPS, build_bitmaps_extension(payload))
        self._autoclear = AUTOCLEAR_BITMAPS

    def extension(self, type: int, data: bytes) -> None:
        """Adds a header extension."""
        self._extensions += (HeaderExtension(type, data, b""),)

    def finish(self) -> None:
        """Writes the header, and the refcounts unless there is a refcount table."""
        if not self._refcount_table[1]:
            self._count()
        l1_offset, l1_size = self._l1_table
        offset, length = self._refcount_table
        snapshots, count = self._snapshots
        header = struct.pack(
            ">4sIQIIQIIQQIIQ",
            *(b"QFI\xfb", 3, 0, 0, self._bits, self._disk_size, 0, l1_size, l1_offset),
            *(offset, ceil_div(length, self.size), count, snapshots),
        )
        header += struct.pack(">QQQII", 0, 0, self._autoclear, 4, 104)
        self.write(0, header + build_extensions(HeaderExtensions(self._extensions, bytes(8))))
        self._file.truncate(max(self.end, len(self.refcounts) * self.size))

    def _count(self) -> None:
        """Adds a refcount table, and the blocks that count all allocated clusters."""
        per_block, blocks = self.size // 2, 1
        while True:
            clusters = len(self.refcounts) + ceil_div(8 * blocks, self.size) + blocks
            if ceil_div(clusters, per_block) == blocks:
                break
            blocks = ceil_div(clusters, per_block)
        length = align_up(8 * blocks, self.size)
        self._refcount_table = self.allocate(length), length
        first = self.allocate(blocks * self.size)
        self.write(self._refcount_table[0], every(first, self.size, blocks))
        self.write(first, np.array(self.refcounts, ">u2").tobytes())


@contextmanager
def sparse_image(
    path: Path, cluster_bits: int = 16, disk_size: int = GIB, *, has_l1_table: bool = True
) -> Iterator[SparseImage]:
    """Makes an image, which the block fills; ``has_l1_table`` gives it one that is a hole."""
    with path.open("w+b") as file:
        image = SparseImage(file, cluster_bits, disk_size)
        if has_l1_table:
            image.l1_table(ceil_div(disk_size, image.size * (image.size // 8)))
        yield image
        image.finish()


# --- images that qemu-img check calls sound ------------------------------------------------------


def refcount_blocks_in_holes(path: Path, count: int = 20_000, disk_size: int = GIB) -> None:
    """A sound image whose refcount table leads to many blocks that are holes."""
    with sparse_image(path, disk_size=disk_size) as image:
        blocks = image.allocate(count * image.size)
        image.refcount_table(every(blocks, image.size, count))
        image.write(blocks, np.array(image.refcounts, ">u2").tobytes())


def one_l2_table(path: Path, entries: int = 60_000) -> None:
    """A sound image whose L1 table leads to one L2 table again and again."""
    with sparse_image(path, disk_size=entries * 512 * MIB, has_l1_table=False) as image:
        l2_table = image.allocate(image.size, entries)
        image.write(l2_table, words(image.allocate(image.size, entries)))
        image.l1_table(entries, words(l2_table) * entries)


# --- images that are not sound -------------------------------------------------------------------


def scattered_clusters(path: Path, count: int = 20_000) -> None:
    """Clusters of 512 bytes, of which the disk uses one in every 16 MiB of the file."""
    disk_size = 64 * MIB
    with sparse_image(path, 9, disk_size, has_l1_table=False) as image:
        l2_tables = ceil_div(count, 64)
        first = image.add(every(HOLES, 16 * MIB, count))
        image.l1_table(disk_size // (32 << 10), every(first, 512, l2_tables))
        image.end = HOLES + count * 16 * MIB


def refcount_table(path: Path, data: bytes = b"", end: int = 0, cluster_bits: int = 16) -> None:
    """A refcount table of 8 MiB that begins with ``data``."""
    with sparse_image(path, cluster_bits) as image:
        image.refcount_table(data, MAX_REFCOUNT_TABLE)
        image.end = end


def refcount_blocks(path: Path, step: int, cluster_bits: int) -> None:
    """A refcount table of 8 MiB; the blocks to which it leads are a number of bytes apart."""
    count = MAX_REFCOUNT_TABLE // 8
    data = every(HOLES, step, count)
    refcount_table(path, data, HOLES + count * max(step, 128 << 10), cluster_bits)


def one_refcount_block(path: Path) -> None:
    """A refcount table of 8 MiB that leads to one block, in which every second refcount is 1."""
    count = MAX_REFCOUNT_TABLE // 8
    with sparse_image(path, 9) as image:
        block = image.add(struct.pack(">HH", 1, 0) * 128)
        image.refcount_table(words(block) * count)
        image.end = count * 128 << 10


def l1_table(path: Path, data: bytes = b"", end: int = 0, cluster_bits: int = 16) -> None:
    """An L1 table of 32 MiB that begins with ``data``."""
    with sparse_image(path, cluster_bits, has_l1_table=False) as image:
        image.l1_table(MAX_L1_TABLE // 8, data)
        image.end = end


def l2_tables(path: Path, step: int, cluster_bits: int = 16) -> None:
    """An L1 table of 32 MiB; the L2 tables to which it leads are a number of bytes apart."""
    count = MAX_L1_TABLE // 8
    l1_table(path, every(HOLES, step, count), HOLES + count * step + (1 << 16), cluster_bits)


def one_l2_table_of_faults(path: Path) -> None:
    """An L1 table of 32 MiB that leads to one L2 table, all of whose entries are wrong."""
    with sparse_image(path, has_l1_table=False) as image:
        l2_table = image.add(words(1 << 55) * 8192)
        image.l1_table(MAX_L1_TABLE // 8, words(l2_table) * (MAX_L1_TABLE // 8))


def snapshot_table(path: Path) -> None:
    """A snapshot table that is a hole."""
    with sparse_image(path) as image:
        image.snapshots(b"", MAX_SNAPSHOTS)
        image.allocate(MAX_SNAPSHOTS * 40)


def snapshots(path: Path, step: int, cluster_bits: int = 16) -> None:
    """Snapshots whose L1 tables of 32 MiB are holes, a number of bytes apart."""
    with sparse_image(path, cluster_bits) as image:
        places = range(HOLES, HOLES + MAX_SNAPSHOTS * step, step) if step else [HOLES]
        places = [*places] * (MAX_SNAPSHOTS // len(places))
        image.snapshots_with((place, MAX_L1_TABLE // 8) for place in places)
        image.end = places[-1] + MAX_L1_TABLE


def snapshots_of_one_disk(path: Path) -> None:
    """Snapshots whose L1 tables overlap, and lead to one L2 table."""
    with sparse_image(path, 9) as image:
        l2_table = image.add(words(image.allocate(image.size)))
        place = image.add(words(l2_table) * (4 * MIB // 8))
        sizes = (MIB // 8 - number % 1000 for number in range(MAX_SNAPSHOTS))
        places = (place + number % 4096 * 512 for number in range(MAX_SNAPSHOTS))
        image.snapshots_with(zip(places, sizes, strict=True))


def bitmap_directory(path: Path) -> None:
    """A bitmap directory that is a hole."""
    with sparse_image(path) as image:
        length = 1024 * MAX_BITMAPS
        image.bitmaps(MAX_BITMAPS, length, image.allocate(length))


def bitmap_tables(path: Path, step: int, count: int = MAX_BITMAPS) -> None:
    """Bitmaps whose tables of 8 MiB are holes, a number of bytes apart."""
    with sparse_image(path, 9) as image:
        image.bitmaps_with((HOLES + number * step, MAX_BITMAP // 512) for number in range(count))
        image.end = HOLES + count * step + MAX_BITMAP // 512 * 8


def bitmap_data(path: Path, step: int, count: int = 1, shift: int = 0) -> None:
    """Bitmaps whose tables overlap; the data are holes, a number of bytes apart."""
    entries = MAX_BITMAP // 512
    with sparse_image(path, 9) as image:
        stored = entries + count * shift // 8
        table = image.add(every(HOLES, step, stored))
        image.bitmaps_with((table + number * shift, entries) for number in range(count))
        image.end = HOLES + stored * step + 512


def encryption_header(path: Path) -> None:
    """An encryption header of 4 TiB."""
    with sparse_image(path, 9) as image:
        image.extension(CRYPTO, build_crypto_header(CryptoHeader(HOLES, 4 * TIB)))
        image.end = HOLES + 4 * TIB


SOUND: dict[str, Callable[[Path], None]] = {
    "20,000 refcount blocks in holes": refcount_blocks_in_holes,
    "an L1 table that leads to one L2 table": one_l2_table,
}
IMAGES: dict[str, Callable[[Path], None]] = {
    **SOUND,
    "clusters of the disk that are far apart": scattered_clusters,
    "refcount table in a hole": refcount_table,
    "refcount blocks in holes": partial(refcount_blocks, step=1 << 16, cluster_bits=16),
    "small refcount blocks in holes": partial(refcount_blocks, step=512, cluster_bits=9),
    "refcount blocks far apart": partial(refcount_blocks, step=100 << 16, cluster_bits=16),
    "one refcount block in a hole": partial(refcount_blocks, step=0, cluster_bits=9),
    "one refcount block": one_refcount_block,
    "L1 table in a hole": l1_table,
    "L2 tables in holes": partial(l2_tables, step=1 << 16),
    "small L2 tables in holes": partial(l2_tables, step=512, cluster_bits=9),
    "L2 tables far apart": partial(l2_tables, step=1000 * 512, cluster_bits=9),
    "one L2 table in a hole": partial(l2_tables, step=0),
    "one L2 table of faults": one_l2_table_of_faults,
    "snapshot table in a hole": snapshot_table,
    "L1 tables of snapshots in holes": partial(snapshots, step=MAX_L1_TABLE),
    "small L1 tables of snapshots in holes": partial(snapshots, step=MAX_L1_TABLE, cluster_bits=9),
    "one L1 table of all snapshots in a hole": partial(snapshots, step=0),
    "L1 tables of snapshots that overlap": snapshots_of_one_disk,
    "bitmap directory in a hole": bitmap_directory,
    "bitmap tables in holes": partial(bitmap_tables, step=MAX_BITMAP // 512 * 8),
    "one bitmap table of all bitmaps in a hole": partial(bitmap_tables, step=0),
    "bitmap data in holes": partial(bitmap_data, step=512),
    "bitmap data far apart": partial(bitmap_data, step=1 << 15),
    "bitmap tables that overlap": partial(bitmap_data, step=1 << 15, count=100, shift=512),
    "encryption header in a hole": encryption_header,
}
"""A function for each image that takes the path at which it is made."""
