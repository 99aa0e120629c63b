"""The image of spec/image.md, broken in every way that spec/problems.md lists."""

from __future__ import annotations

import struct
from collections.abc import Callable

from support.spec_image import (
    BEHIND,
    BEYOND,
    CLUSTER,
    CRASHED,
    DAILY,
    DIRECTORY,
    END,
    EXTENSION,
    LONGEST,
    PAST_EOF,
    TABLES,
    WEEKLY,
    Patch,
    after_head,
    crypto,
    extension,
    fields,
    image,
    in_entry,
    in_header,
    in_payload,
    in_table,
    patched,
    places,
)

from qcow2bm.bitmaps import tables
from qcow2bm.format import extensions, header, snapshots

_SNAPSHOT = places(snapshots._HEAD)


def snapshot_table(*extra_data_sizes: int) -> list[Patch]:
    """Snapshots behind everything else that have so many bytes of extra data."""
    table = b""
    for size in extra_data_sizes:
        head = bytearray(snapshots.HEAD_LENGTH)
        for offset, content in fields(_SNAPSHOT, 0, extra_data_size=size):
            head[offset : offset + len(content)] = content
        table += head + bytes(size + -size % 8)
    count = len(extra_data_sizes)
    return [*in_header(nb_snapshots=count, snapshots_offset=BEHIND), (BEHIND, table)]


def long_snapshot_table() -> list[Patch]:
    """One snapshot more, with names of the greatest length, than fit into 64 MiB."""
    sizes = fields(_SNAPSHOT, 0, id_str_size=65535, name_size=65535)
    length = snapshots.HEAD_LENGTH + 2 * 65535 + 2
    count = snapshots.MAX_TABLE_SIZE // length + 1
    return [
        *in_header(nb_snapshots=count, snapshots_offset=BEHIND),
        *((BEHIND + length * n + at, size) for n in range(count) for at, size in sizes),
        (BEHIND + length * count, b""),
    ]


def many_tables() -> list[Patch]:
    """Returns patches that make more entries, which share one table of 8 MiB, than are read."""
    size = (512 << 20) // CLUSTER
    count = tables.MAX_TABLES_BYTES // (8 * size) + 1
    start = BEHIND + 8 * size
    entries = [
        struct.pack(">QIIBBHI", BEHIND, size, 1, 1, 16, 3, 0) + b"%03d" % number + bytes(5)
        for number in range(count)
    ]
    return [
        *in_payload(
            nb_bitmaps=count, bitmap_directory_size=32 * count, bitmap_directory_offset=start
        ),
        (start, b"".join(entries)),
    ]


def in_version_2() -> list[Patch]:
    """The header of version 2, the extensions directly behind it."""
    return [*in_header(version=2), (header.V2_LENGTH, image()[EXTENSION : END + 8])]


def repeated(*flags: int) -> list[Patch]:
    """Entries of these flags, all named "daily"."""
    return [
        patch
        for index, value in enumerate(flags)
        for patch in (*in_entry(index, name_size=5, flags=value), after_head(index, b"daily"))
    ]


def cut_directory(length: int) -> bytes:
    """The image with its directory at the end of the file, and so many bytes left of that."""
    moved = BEHIND, image()[DIRECTORY : DIRECTORY + 96]
    return patched(image(), *in_payload(bitmap_directory_offset=BEHIND), moved)[: BEHIND + length]


def _long_name() -> list[Patch]:
    """The directory behind everything else, its last name 1024 bytes long and valid."""
    entries = image()[DIRECTORY : DIRECTORY + 64]
    last = struct.pack(">QIIBBHI", TABLES[CRASHED], 1, 0, 1, 16, 1024, 0) + b"n" * 1024
    offset = in_payload(bitmap_directory_offset=BEHIND, bitmap_directory_size=64 + len(last))
    return [*offset, (BEHIND, entries + last)]


def _unaligned_data() -> list[Patch]:
    """Clusters of 1 KiB, the smallest within which an offset can be unaligned; one bitmap."""
    return [
        *in_header(cluster_bits=10, l1_table_offset=0x1800, refcount_table_offset=0x400),
        *in_payload(nb_bitmaps=1, bitmap_directory_size=32),
        (0x400, struct.pack(">Q", 0x800)),
        (DIRECTORY, struct.pack(">QIIBBHI", 0x1000, 1, 0, 1, 16, 5, 0) + b"daily\0\0\0"),
        (0x1000, struct.pack(">Q", 0x1600)),
        (0x1800, bytes(0x800)),
    ]


_DUPLICATE = image()[EXTENSION:END]
_OUTSIDE = [PAST_EOF] * 20

_FAULTS: dict[str, Callable[[], list[Patch]] | list[Patch]] = {
    "header.backing_file_offset.invalid": in_header(backing_file_offset=513),
    "header.backing_file_size.too-large": in_header(backing_file_offset=200, backing_file_size=400),
    "header.size.unaligned": in_header(size=(5 << 20) - 511),
    "header.size.too-large": in_header(size=1 << 62),
    "header.crypt_method.unknown": in_header(crypt_method=3),
    "header.l1_size.too-small": in_header(l1_size=159),
    "header.l1_size.too-large": in_header(l1_size=1 << 23),
    "header.l1_table_offset.invalid": in_header(l1_table_offset=0x608),
    "header.l1_table_offset.unreadable": in_header(l1_table_offset=LONGEST),
    "header.l1_table_offset.past-eof": in_header(l1_table_offset=PAST_EOF),
    "header.refcount_table_offset.invalid": in_header(refcount_table_offset=0x208),
    "header.refcount_table_offset.unreadable": in_header(refcount_table_offset=LONGEST),
    "header.refcount_table_offset.past-eof": in_header(refcount_table_offset=PAST_EOF),
    "header.refcount_table_clusters.zero": in_header(refcount_table_clusters=0),
    "header.refcount_table_clusters.too-large": in_header(refcount_table_clusters=16385),
    "header.nb_snapshots.too-large": in_header(nb_snapshots=65537),
    "header.snapshots_offset.invalid": in_header(snapshots_offset=8, nb_snapshots=1),
    "header.snapshots_offset.unreadable": in_header(snapshots_offset=LONGEST, nb_snapshots=1),
    "snapshot-table.size.too-large": long_snapshot_table,
    "header.snapshots_offset.past-eof": in_header(snapshots_offset=PAST_EOF, nb_snapshots=1),
    "snapshot-table.extra_data_size.too-large": snapshot_table(1025),
    "header.incompatible_features.unknown": in_header(incompatible_features=1 << 5),
    "header.incompatible_features.dirty": in_header(incompatible_features=1 << 0),
    "header.incompatible_features.corrupt": in_header(incompatible_features=1 << 1),
    "header.incompatible_features.extended-l2": in_header(incompatible_features=1 << 4),
    "header.autoclear_features.unknown": in_header(autoclear_features=0b101),
    "header.autoclear_features.no-bitmaps": [(EXTENSION, bytes(8))],
    "header.autoclear_features.no-data-file": in_header(autoclear_features=0b11),
    "header.refcount_order.too-large": in_header(refcount_order=7),
    "header.header_length.too-small": in_header(header_length=96),
    "header.header_length.too-large": in_header(header_length=520),
    "header.header_length.unaligned": [
        *in_header(header_length=116),
        (EXTENSION, bytes(4) + _DUPLICATE),
    ],
    "header.compression_type.unknown": in_header(compression_type=2, incompatible_features=8),
    "header.compression_type.bit-missing": in_header(compression_type=1),
    "header.compression_type.bit-unexpected": in_header(incompatible_features=8),
    "header.padding.nonzero": in_header(padding=1),
    "header-extension.length.too-large": [(END, extension(1, 512, b""))],
    "header-extension.end.missing": [(END, extension(1, CLUSTER - END - 8, b""))],
    "header-extension.padding.nonzero": [(END, extension(1, 1, b"x\1"))],
    "header-extension.backing-format.too-long": [
        (END, extension(extensions.BACKING_FORMAT, 16, b"f" * 16))
    ],
    "header-extension.crypto.missing": in_header(crypt_method=2),
    "header-extension.crypto.unexpected": [crypto(BEHIND)],
    "header-extension.crypto.length": [*in_header(crypt_method=2), crypto(BEHIND, 8)],
    "header-extension.crypto.unaligned": [*in_header(crypt_method=2), crypto(BEHIND + 8)],
    "header-extension.bitmaps.duplicate": [(END, _DUPLICATE)],
    "header-extension.bitmaps.length": [(EXTENSION + 4, bytes([0, 0, 0, 16]))],
    "bitmaps-extension.autoclear.off": in_header(autoclear_features=0),
    "bitmaps-extension.version.too-old": in_version_2(),
    "bitmaps-extension.nb_bitmaps.zero": in_payload(nb_bitmaps=0),
    "bitmaps-extension.nb_bitmaps.too-large": in_payload(nb_bitmaps=65536),
    "bitmaps-extension.nb_bitmaps.less": in_payload(nb_bitmaps=2),
    "bitmaps-extension.nb_bitmaps.more": in_payload(nb_bitmaps=4),
    "bitmaps-extension.reserved.nonzero": in_payload(reserved=1),
    "bitmaps-extension.bitmap_directory_size.zero": in_payload(bitmap_directory_size=0),
    "bitmaps-extension.bitmap_directory_size.too-large": in_payload(
        bitmap_directory_size=1024 * 65535 + 1
    ),
    "bitmaps-extension.bitmap_directory_offset.unaligned": in_payload(
        bitmap_directory_offset=0xC08
    ),
    "bitmaps-extension.bitmap_directory_offset.zero": in_payload(bitmap_directory_offset=0),
    "bitmaps-extension.bitmap_directory_offset.past-eof": in_payload(
        bitmap_directory_offset=PAST_EOF
    ),
    "bitmaps-extension.bitmap_directory_size.past-eof": in_payload(bitmap_directory_size=96 + 4096),
    "bitmaps-extension.bitmap_directory_offset.unreadable": in_payload(
        bitmap_directory_offset=BEYOND
    ),
    "bitmap-directory.overlap": in_entry(DAILY, bitmap_table_offset=DIRECTORY),
    "bitmap-directory.rest": [*in_payload(bitmap_directory_size=104), (DIRECTORY + 96, b"rest")],
    "bitmap-directory.zeroes": in_payload(bitmap_directory_size=128),
    "bitmap-directory.zero-entries": in_payload(bitmap_directory_size=128, nb_bitmaps=4),
    "directory-entry.surplus": in_payload(nb_bitmaps=2),
    "directory-entry.truncated": in_entry(CRASHED, name_size=200),
    "directory-entry.bitmap_table_offset.zero": in_entry(DAILY, bitmap_table_offset=0),
    "directory-entry.bitmap_table_offset.unaligned": in_entry(DAILY, bitmap_table_offset=0xE08),
    "directory-entry.bitmap_table_offset.past-eof": in_entry(DAILY, bitmap_table_offset=PAST_EOF),
    "directory-entry.bitmap_table_offset.unreadable": in_entry(DAILY, bitmap_table_offset=BEYOND),
    "directory-entry.bitmap_table_size.zero": in_entry(DAILY, bitmap_table_size=0),
    "directory-entry.bitmap_table_size.too-large": in_entry(DAILY, bitmap_table_size=1048577),
    "directory-entry.bitmap_table_size.less": in_entry(WEEKLY, bitmap_table_size=2),
    "directory-entry.bitmap_table_size.more": in_entry(WEEKLY, bitmap_table_size=4),
    "directory-entry.bitmap_table_size.outdated": [
        *in_entry(CRASHED, bitmap_table_size=2),
        in_table(CRASHED, 0, 0),
    ],
    "directory-entry.flags.reserved": in_entry(DAILY, flags=8),
    "directory-entry.flags.extra-data-compatible": in_entry(DAILY, flags=4),
    "directory-entry.type.unknown": in_entry(DAILY, type=2),
    "directory-entry.granularity_bits.too-large": in_entry(DAILY, granularity_bits=64),
    "directory-entry.granularity_bits.unsupported": in_entry(DAILY, granularity_bits=32),
    "directory-entry.extra_data.compatible": [
        *in_entry(DAILY, flags=4, extra_data_size=1),
        after_head(DAILY, b"xdaily"),
    ],
    "directory-entry.extra_data.incompatible": [
        *in_entry(DAILY, extra_data_size=1),
        after_head(DAILY, b"xdaily"),
    ],
    "directory-entry.name_size.too-large": _long_name,
    "directory-entry.name.empty": [
        *in_entry(CRASHED, name_size=0),
        *in_payload(bitmap_directory_size=88),
    ],
    "directory-entry.name.nul": [after_head(DAILY, b"da\0ly")],
    "directory-entry.name.duplicate": repeated(0, 0),
    "directory-entry.padding.nonzero": [after_head(DAILY, b"daily\0\0\1")],
    "bitmap-table.limit": many_tables,
    "bitmap-table.overlap": in_entry(WEEKLY, bitmap_table_offset=TABLES[DAILY]),
    "bitmap-table.entry.reserved": [in_table(DAILY, 0x1002)],
    "bitmap-table.entry.unaligned": _unaligned_data,
    "bitmap-table.entry.past-eof": [in_table(DAILY, PAST_EOF)],
    "bitmap-table.entry.more": [
        *in_entry(CRASHED, bitmap_table_size=len(_OUTSIDE)),
        in_table(CRASHED, *_OUTSIDE),
    ],
    "bitmap-data.overlap": [in_table(DAILY, 0x1400)],
}

IDS = tuple(_FAULTS)
HUGE = "bitmap-table.limit"
"""The tables of this image have 256 MiB: looking at them several times takes seconds."""


def broken(id: str) -> bytes:
    """The image with the fault of a problem id, and as few others as can be."""
    patches = _FAULTS[id]
    return patched(image(), *(patches() if callable(patches) else patches))
