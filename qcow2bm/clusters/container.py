"""A new image that keeps the bitmaps of an existing raw disk, its external data file.

*Spec*: spec/image.md, "Containers".
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterator

from qcow2bm.errors import LimitError
from qcow2bm.format.extensions import (
    DATA_FILE,
    HeaderExtension,
    HeaderExtensions,
    build_extensions,
)
from qcow2bm.format.features import AUTOCLEAR_RAW_DATA_FILE, INCOMPATIBLE_DATA_FILE
from qcow2bm.format.header import Header, build_header
from qcow2bm.format.l1_l2 import L1_ENTRY_LENGTH, L2_ENTRY_LENGTH, L2_MASKS
from qcow2bm.format.refcounts import build_refcount_block, build_refcount_table
from qcow2bm.units import align_up, ceil_div

MIN_CLUSTER_BITS, MAX_CLUSTER_BITS = 9, 21
_DEFAULT_CLUSTER_BITS = 16
_MOST_L2_BYTES = 32 << 20  # QEMU's default limit of its cache of L2 tables
_MAX_L1_BYTES = 32 << 20  # QEMU's limit
_MAX_REFCOUNT_TABLE_BYTES = 8 << 20  # QEMU's limit
_MAX_NAME_BYTES = 1023


def default_cluster_size(virtual_size: int) -> int:
    """The smallest cluster size from 64 KiB to 2 MiB whose L2 tables fit QEMU's cache, 32 MiB.

    A larger disk gets 2 MiB.
    """
    bits = _DEFAULT_CLUSTER_BITS
    while bits < MAX_CLUSTER_BITS and ceil_div(virtual_size, 1 << bits) * 8 > _MOST_L2_BYTES:
        bits += 1
    return 1 << bits


class ContainerLayout:
    """The places of the structures of a container, in clusters from the start of the file.

    Header, refcount table, refcount blocks, L1 table and L2 tables follow each other in this
    order. Every guest cluster is allocated at its own offset in the data file, so that QEMU reads
    the disk exactly as it stands there.
    """

    def __init__(self, virtual_size: int, cluster_size: int, data_file: bytes) -> None:
        """Computes the layout of a container for a disk of ``virtual_size`` bytes.

        Args:
            virtual_size: whole sectors of 512 bytes.
            cluster_size: a power of two from 512 bytes to 2 MiB.
            data_file: the name of the raw disk as it is stored in the header.

        Raises:
            ValueError: an argument is not as said above.
            LimitError: the L1 table would be larger than QEMU allows, or the name too long.
        """
        is_possible = 1 << MIN_CLUSTER_BITS <= cluster_size <= 1 << MAX_CLUSTER_BITS
        if not is_possible or cluster_size & (cluster_size - 1):
            raise ValueError(
                f"cluster_size is {cluster_size}, must be a power of two from 512 to 2097152"
            )
        if virtual_size <= 0 or virtual_size % 512:
            raise ValueError(f"virtual_size is {virtual_size}, must be whole sectors of 512 bytes")
        most = min(_MAX_NAME_BYTES, cluster_size - 112 - 16)
        if len(data_file) > most:
            raise LimitError("the length of the data file's name in bytes", len(data_file), most)
        self.virtual_size, self.cluster_size, self.data_file = virtual_size, cluster_size, data_file
        self.guest_clusters = ceil_div(virtual_size, cluster_size)
        self.l2_tables = ceil_div(self.guest_clusters, cluster_size // L2_ENTRY_LENGTH)
        l1_bytes = self.l2_tables * L1_ENTRY_LENGTH
        if l1_bytes > _MAX_L1_BYTES:
            raise LimitError("the size of the L1 table in bytes", l1_bytes, _MAX_L1_BYTES)
        self.l1_clusters = ceil_div(l1_bytes, cluster_size)
        per_block = cluster_size // 2  # refcounts have 16 bits
        others = 1 + self.l1_clusters + self.l2_tables
        self.refcount_blocks = self.refcount_table_clusters = 1
        while True:
            total = others + self.refcount_blocks + self.refcount_table_clusters
            blocks = ceil_div(total, per_block)
            table = ceil_div(blocks * 8, cluster_size)
            if (blocks, table) == (self.refcount_blocks, self.refcount_table_clusters):
                break
            self.refcount_blocks, self.refcount_table_clusters = blocks, table
        if table * cluster_size > _MAX_REFCOUNT_TABLE_BYTES:
            size = table * cluster_size
            raise LimitError("the size of the refcount table in bytes", size, 8 << 20)
        self.clusters = total

    @property
    def length(self) -> int:
        """The length of the image file in bytes."""
        return self.clusters * self.cluster_size

    def pieces(self) -> Iterator[bytes]:
        """The content of the file from its first byte to its last, in pieces of whole clusters."""
        size = self.cluster_size
        table = 1
        blocks = table + self.refcount_table_clusters
        l1 = blocks + self.refcount_blocks
        l2 = l1 + self.l1_clusters
        yield self._header(table, l1).ljust(size, b"\0")
        offsets = array("Q", (n * size for n in range(blocks, l1)))
        yield _padded(build_refcount_table(offsets), size)
        ones = array("H", [1]) * self.clusters
        yield _padded(build_refcount_block(ones, 4), size)
        copied = L2_MASKS["copied"]
        entries = array("Q", (n * size | copied for n in range(l2, l2 + self.l2_tables)))
        yield _padded(_big_endian(entries), size)
        per_table = size // L2_ENTRY_LENGTH
        for first in range(0, self.guest_clusters, per_table):
            stop = min(first + per_table, self.guest_clusters)
            words = array("Q", range(first * size | copied, (stop - 1) * size + 1 | copied, size))
            yield _padded(_big_endian(words), size)

    def _header(self, refcount_table: int, l1_table: int) -> bytes:
        size = self.cluster_size
        header = Header(
            version=3,
            backing_file_offset=0,
            backing_file_size=0,
            cluster_bits=size.bit_length() - 1,
            size=self.virtual_size,
            crypt_method=0,
            l1_size=self.l2_tables,
            l1_table_offset=l1_table * size,
            refcount_table_offset=refcount_table * size,
            refcount_table_clusters=self.refcount_table_clusters,
            nb_snapshots=0,
            snapshots_offset=0,
            incompatible_features=INCOMPATIBLE_DATA_FILE,
            autoclear_features=AUTOCLEAR_RAW_DATA_FILE,
            header_length=112,
            compression_type=0,
            padding=bytes(7),
        )
        name = HeaderExtension(DATA_FILE, self.data_file, bytes(-len(self.data_file) % 8))
        return build_header(header) + build_extensions(HeaderExtensions((name,), bytes(8)))


def _padded(data: bytes, size: int) -> bytes:
    return data.ljust(align_up(len(data), size), b"\0")


def _big_endian(words: array[int]) -> bytes:
    if sys.byteorder == "little":
        words.byteswap()
    return words.tobytes()
