"""Building a new image without bitmaps, whose disk is all zeros."""

from __future__ import annotations

from array import array
from typing import NamedTuple

from qcow2bm.format.extensions import HeaderExtensions, build_extensions
from qcow2bm.format.header import Header, build_header
from qcow2bm.format.refcounts import build_refcount_block, build_refcount_table
from qcow2bm.units import ceil_div

_CLUSTER_BITS, _HUGE_CLUSTER_BITS = 16, 21
_MAX_L1_BYTES = 32 << 20  # the largest L1 table that QEMU accepts


class EmptyImage(NamedTuple):
    """A new image: ``head`` is its first bytes, and zeros follow up to ``length`` bytes."""

    head: bytes
    length: int


def build_empty_image(virtual_size: int) -> EmptyImage:
    """Builds an image of version 3 without bitmaps, whose disk has ``virtual_size`` bytes of zeros.

    A cluster has 64 KiB, or 2 MiB if the L1 table would become too large.

    Raises:
        FormatError: an image cannot have a disk of that size.
    """
    cluster_bits = _CLUSTER_BITS
    if virtual_size > _MAX_L1_BYTES // 8 << 2 * _CLUSTER_BITS - 3:
        cluster_bits = _HUGE_CLUSTER_BITS
    cluster = 1 << cluster_bits
    l1_size = ceil_div(virtual_size, cluster * cluster // 8)
    used = 3 + ceil_div(l1_size * 8, cluster)
    header = Header(
        version=3,
        backing_file_offset=0,
        backing_file_size=0,
        cluster_bits=cluster_bits,
        size=virtual_size,
        crypt_method=0,
        l1_size=l1_size,
        l1_table_offset=3 * cluster,
        refcount_table_offset=cluster,
        refcount_table_clusters=1,
        nb_snapshots=0,
        snapshots_offset=0,
        header_length=112,
        compression_type=0,
        padding=bytes(7),
    )
    parts = (
        build_header(header) + build_extensions(HeaderExtensions((), bytes(8))),
        build_refcount_table(array("Q", [2 * cluster])),
        build_refcount_block(array("H", [1] * used), header.refcount_order),
    )
    return EmptyImage(b"".join(part.ljust(cluster, b"\0") for part in parts), used * cluster)
