"""Building a new image without bitmaps, whose disk is all zeros."""

from __future__ import annotations

from array import array
from typing import NamedTuple

from qcow2bm.clusters.problems import MAX_L1_BYTES
from qcow2bm.errors import LimitError
from qcow2bm.format.extensions import HeaderExtensions, build_extensions
from qcow2bm.format.header import MAX_REFCOUNT_ORDER, Header, build_header
from qcow2bm.format.refcounts import build_refcount_block, build_refcount_table
from qcow2bm.units import ceil_div

_MIN_CLUSTER_SIZE, _MAX_CLUSTER_SIZE = 512, 2 << 20
_CLUSTER_SIZE = 64 << 10


class EmptyImage(NamedTuple):
    """A new image: ``head`` is its first bytes, and zeros follow up to ``length`` bytes."""

    head: bytes
    length: int


def build_empty_image(
    virtual_size: int, cluster_size: int | None = None, refcount_bits: int = 16
) -> EmptyImage:
    """Builds an image of version 3 without bitmaps, whose disk has ``virtual_size`` bytes of zeros.

    Args:
        virtual_size: of the disk, in bytes.
        cluster_size: a power of two from 512 bytes to 2 MiB; by default 64 KiB, or 2 MiB if the L1
            table would become too large.
        refcount_bits: the width of a refcount, a power of two from 1 to 64.

    Raises:
        FormatError: an image cannot have a disk of that size.
        LimitError: the L1 table would be larger than QEMU allows.
        ValueError: an image cannot have such clusters or refcounts.
    """
    if cluster_size is None:
        is_small = virtual_size <= MAX_L1_BYTES // 8 * _CLUSTER_SIZE**2 // 8
        cluster_size = _CLUSTER_SIZE if is_small else _MAX_CLUSTER_SIZE
    _require_power(
        f"cluster_size is {cluster_size}", cluster_size, _MIN_CLUSTER_SIZE, _MAX_CLUSTER_SIZE
    )
    _require_power(f"refcount_bits is {refcount_bits}", refcount_bits, 1, 1 << MAX_REFCOUNT_ORDER)
    l1_size = ceil_div(virtual_size, cluster_size * cluster_size // 8)
    if 8 * l1_size > MAX_L1_BYTES:
        raise LimitError("the size of the L1 table in bytes", 8 * l1_size, MAX_L1_BYTES)
    per_block = 8 * cluster_size // refcount_bits
    others = 1 + ceil_div(8 * l1_size, cluster_size)
    table = blocks = 0
    while (used := others + table + blocks) > per_block * blocks:
        blocks = ceil_div(used, per_block)
        table = ceil_div(8 * blocks, cluster_size)
    first_block = 1 + table
    header = Header(
        version=3,
        backing_file_offset=0,
        backing_file_size=0,
        cluster_bits=cluster_size.bit_length() - 1,
        size=virtual_size,
        crypt_method=0,
        l1_size=l1_size,
        l1_table_offset=(first_block + blocks) * cluster_size,
        refcount_table_offset=cluster_size,
        refcount_table_clusters=table,
        nb_snapshots=0,
        snapshots_offset=0,
        refcount_order=refcount_bits.bit_length() - 1,
        header_length=112,
        compression_type=0,
        padding=bytes(7),
    )
    places = array("Q", range(first_block * cluster_size, header.l1_table_offset, cluster_size))
    counts = array("Q", [1]) * used + array("Q", [0]) * (-used % 8)  # whole bytes at every width
    parts = (
        build_header(header) + build_extensions(HeaderExtensions((), bytes(8))),
        build_refcount_table(places),
        build_refcount_block(counts, header.refcount_order),
    )
    padded = (part + bytes(-len(part) % cluster_size) for part in parts)
    return EmptyImage(b"".join(padded), used * cluster_size)


def _require_power(what: str, value: int, least: int, most: int) -> None:
    if value & (value - 1) or not least <= value <= most:
        raise ValueError(f"{what}, must be a power of two from {least} to {most}")
