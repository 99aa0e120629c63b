"""A whole image as QEMU 7.2 wrote it, in hex: 4 KiB clusters, 1 MiB disk, two bitmaps."""

from __future__ import annotations

from qcow2bm.format import features
from qcow2bm.format.bitmap_table import parse_bitmap_table
from qcow2bm.format.directory import TYPE_DIRTY_TRACKING, parse_directory
from qcow2bm.format.extensions import BITMAPS, parse_bitmaps_extension, parse_extensions
from qcow2bm.format.features import FeatureNames
from qcow2bm.format.header import parse_header
from qcow2bm.format.refcounts import parse_refcount_block, parse_refcount_table

HEADER = bytes.fromhex(
    "514649fb 00000003 0000000000000000"  # magic, version, backing_file_offset
    "00000000 0000000c 0000000000100000"  # backing_file_size, cluster_bits, size
    "00000000 00000001 0000000000003000"  # crypt_method, l1_size, l1_table_offset
    "0000000000001000 00000001 00000000"  # refcount_table_offset and _clusters, nb_snapshots
    "0000000000000000 0000000000000000"  # snapshots_offset, incompatible_features
    "0000000000000000 0000000000000001"  # compatible_features, autoclear_features: bitmaps
    "00000004 00000070 0000000000000000"  # refcount_order, header_length, compression_type
)
EXTENSIONS = bytes.fromhex(
    "23852875 00000018"  # bitmaps extension, 24 bytes
    "00000002 00000000 0000000000000040 000000000000e000"
    "00000000 00000000"  # end marker
)
REFCOUNT_TABLE = bytes.fromhex("0000000000002000") + bytes(4088)
REFCOUNT_BLOCK = bytes.fromhex("0001" * 10 + "0000" * 3 + "0001" * 2 + "0000") + bytes(4064)
DAILY_TABLE = bytes.fromhex("0000000000004000")
BASE_TABLE = bytes.fromhex("0000000000000000")
DAILY_DATA = bytes.fromhex("0106") + bytes(4094)
DIRECTORY = bytes.fromhex(
    "0000000000005000 00000001 00000002"  # bitmap_table_offset and _size, flags: auto
    "01 0c 0005 00000000 6461696c79 000000"  # dirty tracking, 4 KiB, "daily"
    "000000000000d000 00000001 00000000"
    "01 10 0004 00000000 62617365 00000000"  # 64 KiB, "base"
)


def test_header() -> None:
    header = parse_header(HEADER + EXTENSIONS)
    assert (header.version, header.cluster_size, header.size) == (3, 4096, 1 << 20)
    assert (header.l1_size, header.l1_table_offset) == (1, 0x3000)
    assert (header.refcount_table_offset, header.refcount_table_clusters) == (0x1000, 1)
    assert (header.refcount_bits, header.header_length) == (16, 112)
    assert (header.compression_type, header.padding, header.additional_fields) == (0, bytes(7), b"")
    assert features.features("autoclear", header.autoclear_features, FeatureNames()) == (
        (0, "bitmaps"),
    )


def test_extensions() -> None:
    area = parse_extensions(EXTENSIONS + bytes(3952), 112)
    (bitmaps,) = area.extensions
    assert (bitmaps.type, area.end, area.fault) == (BITMAPS, bytes(8), None)
    assert area.offsets(112) == (0x70,)
    assert parse_bitmaps_extension(bitmaps.data) == (2, 0, 64, 0xE000)


def test_directory_and_tables() -> None:
    (daily, base), rest = parse_directory(DIRECTORY, 0xE000, 2)
    assert rest == b""
    assert (daily.name, daily.offset, daily.granularity) == ("daily", 0xE000, 4096)
    assert (base.name, base.offset, base.granularity) == ("base", 0xE020, 65536)
    assert [(e.type, e.auto, e.in_use) for e in (daily, base)] == [
        (TYPE_DIRTY_TRACKING, True, False),
        (TYPE_DIRTY_TRACKING, False, False),
    ]
    assert [(e.bitmap_table_offset, e.bitmap_table_size) for e in (daily, base)] == [
        (0x5000, 1),
        (0xD000, 1),
    ]
    assert list(parse_bitmap_table(DAILY_TABLE)) == [0x4000]
    assert list(parse_bitmap_table(BASE_TABLE)) == [0]


def test_the_bits_are_the_writes_that_were_made() -> None:
    bits = int.from_bytes(DAILY_DATA, "little")
    assert bits == 1 << 0 | 1 << 9 | 1 << 10  # 4 KiB at 0, 8 KiB at 36 KiB


def test_refcounts_count_what_the_other_structures_refer_to() -> None:
    table = parse_refcount_table(REFCOUNT_TABLE)
    assert (table[0], sum(table)) == (0x2000, 0x2000)
    counts = parse_refcount_block(REFCOUNT_BLOCK, 4)
    assert len(counts) == 2048
    in_use = [cluster for cluster, count in enumerate(counts) if count == 1]
    assert in_use == [*range(0x0, 0xA), 0xD, 0xE]
    assert sum(counts) == len(in_use)
    structures = {0x1000, 0x2000, 0x3000, 0x4000, 0x5000, 0xD000, 0xE000}
    assert structures <= {cluster << 12 for cluster in in_use}
