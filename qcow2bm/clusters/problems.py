"""The problems of a header and its extensions, as far as these alone can tell.

*Spec*: spec/header.md; the ids are in spec/problems.md.
"""

from __future__ import annotations

from collections.abc import Iterator

from qcow2bm.clusters.file import ClusterFile
from qcow2bm.clusters.layout import snapshot_entries
from qcow2bm.format import extensions, features
from qcow2bm.format.extensions import HeaderExtension
from qcow2bm.format.features import Feature
from qcow2bm.format.header import (
    FIELD_OFFSETS,
    MAX_REFCOUNT_ORDER,
    MAX_SNAPSHOTS,
    V3_LENGTH,
)
from qcow2bm.problem_kinds import KINDS, problem
from qcow2bm.problems import REFUSED, Problem, Severity
from qcow2bm.units import ceil_div, escape

MAX_BACKING_FILE_SIZE = 1023
MAX_BACKING_FORMAT_LENGTH = 15
MAX_L1_BYTES = 32 << 20
MAX_REFCOUNT_TABLE_BYTES = 8 << 20
MIN_EXTENDED_L2_CLUSTER_SIZE = 16 << 10
MAX_OFFSET = (1 << 63) - 1
MAX_FILE_LENGTH = 0x7FFFFFFFC0000000  # QEMU's, whole GiB
MAX_SIZE = 1 << 62  # keeps every product of bits and granularity within int64
MAX_L1_ENTRIES = (1 << 31) - 1  # for the disk alone; more is a disk too big for QEMU

CRYPT_LUKS = 2

_PLACE_FAULTS = {
    "l1_table_offset": (
        "header.l1_table_offset.invalid",
        "header.l1_table_offset.unreadable",
        "header.l1_table_offset.past-eof",
    ),
    "refcount_table_offset": (
        "header.refcount_table_offset.invalid",
        "header.refcount_table_offset.unreadable",
        "header.refcount_table_offset.past-eof",
    ),
    "snapshots_offset": (
        "header.snapshots_offset.invalid",
        "header.snapshots_offset.unreadable",
        "header.snapshots_offset.past-eof",
    ),
}


def header_problems(file: ClusterFile) -> tuple[Problem, ...]:
    """Every fault of the header and of the header extensions, in file order."""
    found = (
        *_fixed(file),
        *_tables(file),
        *_snapshots(file),
        *_features(file),
        *_extensions(file),
    )
    return tuple(sorted(found, key=lambda problem: problem.offset))


def _at(id: str, reason: str) -> Problem:
    """Returns a Problem of a header field."""
    return problem(id, FIELD_OFFSETS[KINDS[id].field], reason)


def _fixed(file: ClusterFile) -> Iterator[Problem]:
    header, cluster_size = file.header, file.cluster_size
    if header.backing_file_offset > cluster_size:
        yield _at("header.backing_file_offset.invalid", "lies beyond the first cluster")
    elif header.backing_file_offset:
        limit = min(MAX_BACKING_FILE_SIZE, cluster_size - header.backing_file_offset)
        if header.backing_file_size > limit:
            yield _at(
                "header.backing_file_size.too-large",
                f"is {header.backing_file_size}, more than the {limit} bytes there can be",
            )
    if header.size % 512:
        yield _at(
            "header.size.unaligned",
            f"is {header.size}, not whole sectors: QEMU uses {file.virtual_size}",
        )
    if header.crypt_method > CRYPT_LUKS:
        yield _at("header.crypt_method.unknown", f"is {header.crypt_method}, must be 0 to 2")
    if header.refcount_order > MAX_REFCOUNT_ORDER:
        yield _at("header.refcount_order.too-large", f"is {header.refcount_order}, at most 6")
    if header.version == 3:
        if header.header_length < V3_LENGTH:
            yield _at(
                "header.header_length.too-small",
                f"is {header.header_length}, at least {V3_LENGTH}: "
                "where the header extensions begin is unknown",
            )
        elif header.header_length > cluster_size:
            yield _at(
                "header.header_length.too-large",
                f"is {header.header_length}, more than a cluster: "
                "where the header extensions begin is unknown",
            )
        elif header.header_length % 8:
            yield _at(
                "header.header_length.unaligned", f"is {header.header_length}, no multiple of 8"
            )
    if any(header.padding):
        yield _at("header.padding.nonzero", "is not zero")


def _tables(file: ClusterFile) -> Iterator[Problem]:
    header, cluster_size = file.header, file.cluster_size
    l2_entry_size = 16 if header.incompatible_features & features.INCOMPATIBLE_EXTENDED_L2 else 8
    entries = ceil_div(header.size, cluster_size * (cluster_size // l2_entry_size))
    if entries > MAX_L1_ENTRIES or header.size > MAX_SIZE:
        yield _at("header.size.too-large", f"is {header.size}, too big for clusters this small")
    elif header.l1_size < entries:
        yield _at("header.l1_size.too-small", f"is {header.l1_size}, but the disk needs {entries}")
    if 8 * header.l1_size > MAX_L1_BYTES:
        yield _at("header.l1_size.too-large", f"is {header.l1_size}, at most {MAX_L1_BYTES // 8}")
    else:
        yield from _place(file, "l1_table_offset", 8 * header.l1_size)
    length = header.refcount_table_clusters * cluster_size
    if not length:
        yield _at("header.refcount_table_clusters.zero", "is 0")
    if length > MAX_REFCOUNT_TABLE_BYTES:
        yield _at(
            "header.refcount_table_clusters.too-large",
            f"is {header.refcount_table_clusters}, at most "
            f"{MAX_REFCOUNT_TABLE_BYTES // cluster_size}",
        )
    else:
        yield from _place(file, "refcount_table_offset", length)


def _place(file: ClusterFile, field: str, length: int) -> Iterator[Problem]:
    """Finds the faults of a header field that is the offset of a table of ``length`` bytes."""
    offset: int = getattr(file.header, field)
    invalid, unreadable, past_eof = _PLACE_FAULTS[field]
    if offset % file.cluster_size:
        yield _at(invalid, f"is {offset:#x}, not at the start of a cluster")
    elif offset + length > MAX_OFFSET:
        yield _at(invalid, f"is {offset:#x}, beyond any file")
    elif length and offset + length > MAX_FILE_LENGTH:
        yield _at(unreadable, f"is {offset:#x}, beyond any file QEMU reads")
    elif length and not file.contains(offset, length):
        yield _at(
            past_eof,
            f"is {offset:#x}: {length} bytes there reach past the end of the file",
        )


def _snapshots(file: ClusterFile) -> Iterator[Problem]:
    """Yields the reasons for which QEMU refuses the snapshot table; walks over its entries only."""
    count, start = file.header.nb_snapshots, file.header.snapshots_offset
    if count > MAX_SNAPSHOTS:
        yield _at("header.nb_snapshots.too-large", f"is {count}, at most {MAX_SNAPSHOTS}")
        return
    if not count:
        yield from _place(file, "snapshots_offset", 0)
        return
    from qcow2bm.format import snapshots  # few images have any

    yield from _place(file, "snapshots_offset", snapshots.HEAD_LENGTH * count)
    for entry in snapshot_entries(file):
        if entry.extra_data_size > snapshots.MAX_EXTRA_DATA_SIZE:
            yield problem(
                "snapshot-table.extra_data_size.too-large",
                entry.offset + snapshots.FIELD_OFFSETS["extra_data_size"],
                f"is {entry.extra_data_size}, at most {snapshots.MAX_EXTRA_DATA_SIZE}",
            )
            return
        if entry.offset + entry.size - start > snapshots.MAX_TABLE_SIZE:
            reason = f"is longer than {snapshots.MAX_TABLE_SIZE} bytes"
            yield problem("snapshot-table.size.too-large", start, reason)
            return


def _features(file: ClusterFile) -> Iterator[Problem]:
    header = file.header
    unknown = [
        _named(f)
        for f in file.features("incompatible")
        if not features.KNOWN_INCOMPATIBLE >> f.bit & 1
    ]
    if unknown:
        yield _at(
            "header.incompatible_features.unknown",
            f"has unknown bits set: {', '.join(unknown)}; the image must not be interpreted",
        )
    if header.incompatible_features & features.INCOMPATIBLE_DIRTY:
        yield _at("header.incompatible_features.dirty", "has the dirty bit: refcounts are outdated")
    if header.incompatible_features & features.INCOMPATIBLE_CORRUPT:
        yield _at(
            "header.incompatible_features.corrupt", "has the corrupt bit: QEMU only reads the image"
        )
    if (
        header.incompatible_features & features.INCOMPATIBLE_EXTENDED_L2
        and file.cluster_size < MIN_EXTENDED_L2_CLUSTER_SIZE
    ):
        yield _at(
            "header.incompatible_features.extended-l2",
            "has extended L2 entries, which need clusters of 16 KiB or more",
        )
    names = [_named(f) for f in file.features("autoclear") if not file.known_autoclear >> f.bit & 1]
    if names:
        yield _at("header.autoclear_features.unknown", f"has unknown bits set: {', '.join(names)}")
    if (
        header.autoclear_features & features.AUTOCLEAR_RAW_DATA_FILE
        and not header.incompatible_features & features.INCOMPATIBLE_DATA_FILE
    ):
        yield _at(
            "header.autoclear_features.no-data-file",
            "says that the data file is raw, but there is none",
        )
    if header.autoclear_features & features.AUTOCLEAR_BITMAPS and not (
        file.find(extensions.BITMAPS) or file.area.fault or not file.has_extension_area
    ):
        yield _at(
            "header.autoclear_features.no-bitmaps",
            "has the bitmaps bit, but there is no bitmaps extension: "
            "the next write makes QEMU mark the image corrupt",
        )
    compression = header.compression_type or 0
    has_bit = bool(header.incompatible_features & features.INCOMPATIBLE_COMPRESSION)
    if compression > 1:
        yield _at("header.compression_type.unknown", f"is {compression}, must be 0 or 1")
    if has_bit and not compression:
        yield _at("header.compression_type.bit-unexpected", "is 0, but its feature bit is set")
    if compression and not has_bit:
        yield _at(
            "header.compression_type.bit-missing",
            f"is {compression}, but its feature bit is not set",
        )


def _named(feature: Feature) -> str:
    return f"{feature.bit} ({escape(feature.name)})" if feature.name else str(feature.bit)


def _extensions(file: ClusterFile) -> Iterator[Problem]:
    header, area = file.header, file.area
    places = area.offsets(file.extensions_offset)
    for extension, place in zip(area.extensions, places, strict=True):
        data = place + extensions.HEAD_LENGTH
        length = len(extension.data)
        if any(extension.padding):
            yield problem("header-extension.padding.nonzero", data + length, "is not zero")
        if extension.type == extensions.BACKING_FORMAT and length > MAX_BACKING_FORMAT_LENGTH:
            yield problem(
                "header-extension.backing-format.too-long",
                place,
                f"is {length} bytes long, at most {MAX_BACKING_FORMAT_LENGTH}",
            )
        if extension.type == extensions.CRYPTO:
            yield from _crypto(file, extension, place)
        if extension.type == extensions.BITMAPS and length != extensions.BITMAPS_LENGTH:
            yield problem(
                "header-extension.bitmaps.length",
                place + 4,
                f"is {length}, must be {extensions.BITMAPS_LENGTH}",
            )
    end = file.extensions_end
    if area.fault:
        yield problem("header-extension.length.too-large", area.fault.offset, area.fault.reason)
    elif len(area.end) < extensions.HEAD_LENGTH and file.has_extension_area:
        yield problem("header-extension.end.missing", end, "is missing")
    pairs = zip(area.extensions, places, strict=True)
    bitmaps = [place for extension, place in pairs if extension.type == extensions.BITMAPS]
    if len(bitmaps) > 1:
        reason = "extension stands there a second time; QEMU goes by the last"
        severity: Severity | None = None
        found = (e for e in area.extensions if e.type == extensions.BITMAPS)
        if not all(_is_taken_by_qemu(e, file.cluster_size) for e in [*found][:-1]):
            severity, reason = REFUSED, f"{reason}, and refuses one before"
        yield problem("header-extension.bitmaps.duplicate", bitmaps[1], reason, None, severity)
    if header.crypt_method == CRYPT_LUKS and not file.find(extensions.CRYPTO):
        yield problem("header-extension.crypto.missing", end, "is missing")


def _is_taken_by_qemu(extension: HeaderExtension, cluster_size: int) -> bool:
    """Whether a bitmaps extension that does not count keeps QEMU from opening the image."""
    if len(extension.data) != extensions.BITMAPS_LENGTH:
        return False
    found = extensions.parse_bitmaps_extension(extension.data, 0)
    is_unaligned = found.bitmap_directory_offset % cluster_size
    is_empty = not found.nb_bitmaps or not found.bitmap_directory_size
    return not (is_empty or found.reserved or is_unaligned)


def _crypto(file: ClusterFile, extension: HeaderExtension, place: int) -> Iterator[Problem]:
    if file.header.crypt_method != CRYPT_LUKS:
        yield problem(
            "header-extension.crypto.unexpected",
            place,
            f"is there, but crypt_method is {file.header.crypt_method}",
        )
    if len(extension.data) != extensions.CRYPTO_LENGTH:
        yield problem(
            "header-extension.crypto.length",
            place + 4,
            f"is {len(extension.data)}, must be {extensions.CRYPTO_LENGTH}",
        )
        return
    offset = extensions.parse_crypto_header(extension.data, place + extensions.HEAD_LENGTH).offset
    if offset % file.cluster_size:
        yield problem(
            "header-extension.crypto.unaligned",
            place + extensions.HEAD_LENGTH,
            f"leads to {offset:#x}, which is not the start of a cluster",
        )
