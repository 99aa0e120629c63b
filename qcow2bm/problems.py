"""The one shape in which every fault of an image is reported, and the table of all faults.

*Spec*: spec/problems.md says what each id means to a user; a test compares it with `KINDS`.
"""

from typing import Final, Literal, NamedTuple

REFUSED: Final = "refused"  # QEMU will not open the image
UNUSABLE: Final = "unusable"  # what the structure describes cannot be used; QEMU may not notice
LEAK: Final = "leak"  # space is lost, and nothing else
COSMETIC: Final = "cosmetic"  # breaks the specification without consequence
NOTE: Final = "note"  # worth knowing, no fault

Severity = Literal["refused", "unusable", "leak", "cosmetic", "note"]
SEVERITIES: tuple[Severity, ...] = (REFUSED, UNUSABLE, LEAK, COSMETIC, NOTE)

HEADER = "header"
HEADER_EXTENSION = "header extension"
SNAPSHOT_TABLE = "snapshot table"
BITMAPS_EXTENSION = "bitmaps extension"
DIRECTORY = "bitmap directory"
ENTRY = "bitmap directory entry"
TABLE = "bitmap table"
DATA = "bitmap data"
CLUSTER = "cluster"
REFCOUNT_TABLE = "refcount table"
L1_TABLE = "L1 table"
L2_TABLE = "L2 table"

_PAST_EOF = "counting reference for region exceeding the end of the file"
_CONSTRAINTS = "doesn't satisfy the constraints"
_BAD_TABLE = "Could not read bitmap_table table from image for bitmap"
_BROKEN_DIRECTORY = "Broken bitmap directory"


class Kind(NamedTuple):
    """What every Problem of one id has in common.

    ``qemu_message`` is the part of QEMU's message that does not vary, None where QEMU says
    nothing. ``keeps_status`` marks what the specification allows and only QEMU refuses: the
    bitmap can be read all the same.
    """

    structure: str
    field: str
    severity: Severity
    qemu_message: str | None = None
    keeps_status: bool = False


class Problem(NamedTuple):
    """One fault, and where to find it.

    ``offset`` is the host offset of the field in bytes; ``bitmap_index`` the number of the
    bitmap directory entry it concerns, None where it concerns the image.
    """

    id: str
    severity: Severity
    structure: str
    field: str
    offset: int
    bitmap_index: int | None
    message: str
    qemu_message: str | None

    @property
    def reason(self) -> str:
        """The message without the place it begins with."""
        return self.message.partition(f" at {self.offset:#x} ")[2]

    @property
    def is_serious(self) -> bool:
        """Whether the severity is refused, unusable or leak: more than a remark."""
        return self.severity in (REFUSED, UNUSABLE, LEAK)

    @property
    def breaks_bitmap(self) -> bool:
        """Whether the bitmap it concerns must not be read because of it."""
        return self.severity in (REFUSED, UNUSABLE) and not kind_of(self.id).keeps_status


def kind_of(id: str) -> Kind:
    """What problems of that id have in common."""
    return KINDS.get(id) or CHECKED_KINDS[id]


def problem(
    id: str,
    offset: int,
    reason: str,
    bitmap_index: int | None = None,
    severity: Severity | None = None,
    element: int | None = None,
) -> Problem:
    """A Problem of a known id.

    ``severity`` is given only where the case differs from the table's; ``element`` is the
    number of the field where the structure is an array.
    """
    kind = kind_of(id)
    severity = severity or kind.severity
    place = kind.structure
    if bitmap_index is not None:
        place += f" of entry {bitmap_index}" if place in (TABLE, DATA) else f" {bitmap_index}"
    what = f"{place}: {kind.field}" if kind.field else place
    if element is not None:
        what += f" {element}"
    return Problem(
        id,
        severity,
        kind.structure,
        kind.field,
        offset,
        bitmap_index,
        f"{what} at {offset:#x} {reason}",
        # Of a fault that makes QEMU refuse some images it says nothing where it does not.
        kind.qemu_message if severity in (REFUSED, LEAK) or id in CHECKED_KINDS else None,
    )


KINDS: dict[str, Kind] = {
    "header.backing_file_offset.invalid": Kind(
        HEADER, "backing_file_offset", REFUSED, "Invalid backing file offset"
    ),
    "header.backing_file_size.too-large": Kind(
        HEADER, "backing_file_size", REFUSED, "Backing file name too long"
    ),
    "header.size.unaligned": Kind(HEADER, "size", NOTE),
    "header.size.too-large": Kind(HEADER, "size", REFUSED, "Image is too big"),
    "header.crypt_method.unknown": Kind(
        HEADER, "crypt_method", REFUSED, "Unsupported encryption method"
    ),
    "header.l1_size.too-small": Kind(HEADER, "l1_size", REFUSED, "L1 table is too small"),
    "header.l1_size.too-large": Kind(HEADER, "l1_size", REFUSED, "Active L1 table too large"),
    "header.l1_table_offset.invalid": Kind(
        HEADER, "l1_table_offset", REFUSED, "Active L1 table offset invalid"
    ),
    "header.l1_table_offset.past-eof": Kind(HEADER, "l1_table_offset", UNUSABLE),
    "header.l1_table_offset.unreadable": Kind(
        HEADER, "l1_table_offset", REFUSED, "Could not read L1 table"
    ),
    "header.refcount_table_offset.invalid": Kind(
        HEADER, "refcount_table_offset", REFUSED, "Reference count table offset invalid"
    ),
    "header.refcount_table_offset.past-eof": Kind(HEADER, "refcount_table_offset", UNUSABLE),
    "header.refcount_table_offset.unreadable": Kind(
        HEADER, "refcount_table_offset", REFUSED, "Could not initialize refcount handling"
    ),
    "header.refcount_table_clusters.zero": Kind(
        HEADER,
        "refcount_table_clusters",
        REFUSED,
        "Image does not contain a reference count table",
    ),
    "header.refcount_table_clusters.too-large": Kind(
        HEADER, "refcount_table_clusters", REFUSED, "Reference count table too large"
    ),
    "header.nb_snapshots.too-large": Kind(
        HEADER, "nb_snapshots", REFUSED, "Snapshot table too large"
    ),
    "header.snapshots_offset.invalid": Kind(
        HEADER, "snapshots_offset", REFUSED, "Snapshot table offset invalid"
    ),
    "header.snapshots_offset.past-eof": Kind(HEADER, "snapshots_offset", UNUSABLE),
    "header.snapshots_offset.unreadable": Kind(
        HEADER, "snapshots_offset", REFUSED, "Failed to read snapshot table"
    ),
    "snapshot-table.size.too-large": Kind(SNAPSHOT_TABLE, "", REFUSED, "Snapshot table is too big"),
    "snapshot-table.extra_data_size.too-large": Kind(
        SNAPSHOT_TABLE,
        "extra_data_size",
        REFUSED,
        "Too much extra metadata in snapshot table entry",
    ),
    "header.incompatible_features.unknown": Kind(
        HEADER, "incompatible_features", REFUSED, "Unsupported qcow2 feature(s)"
    ),
    "header.incompatible_features.dirty": Kind(HEADER, "incompatible_features", NOTE),
    "header.incompatible_features.corrupt": Kind(HEADER, "incompatible_features", NOTE),
    "header.incompatible_features.extended-l2": Kind(
        HEADER, "incompatible_features", REFUSED, "Unsupported subcluster size"
    ),
    "header.autoclear_features.unknown": Kind(HEADER, "autoclear_features", NOTE),
    "header.autoclear_features.no-bitmaps": Kind(HEADER, "autoclear_features", UNUSABLE),
    "header.autoclear_features.no-data-file": Kind(
        HEADER, "autoclear_features", REFUSED, "data-file-raw requires a data file"
    ),
    "header.refcount_order.too-large": Kind(
        HEADER, "refcount_order", REFUSED, "Reference count entry width too large"
    ),
    "header.header_length.too-small": Kind(
        HEADER, "header_length", REFUSED, "qcow2 header too short"
    ),
    "header.header_length.too-large": Kind(
        HEADER, "header_length", REFUSED, "qcow2 header exceeds cluster size"
    ),
    "header.header_length.unaligned": Kind(HEADER, "header_length", COSMETIC),
    "header.compression_type.unknown": Kind(
        HEADER, "compression_type", REFUSED, "unknown compression type"
    ),
    "header.compression_type.bit-missing": Kind(
        HEADER,
        "compression_type",
        REFUSED,
        "Compression type incompatible feature bit must be set",
    ),
    "header.compression_type.bit-unexpected": Kind(
        HEADER,
        "compression_type",
        REFUSED,
        "Compression type incompatible feature bit must not be set",
    ),
    "header.padding.nonzero": Kind(HEADER, "padding", COSMETIC),
    "header-extension.length.too-large": Kind(
        HEADER_EXTENSION, "length", REFUSED, "Header extension too large"
    ),
    "header-extension.end.missing": Kind(HEADER_EXTENSION, "end marker", NOTE),
    "header-extension.padding.nonzero": Kind(HEADER_EXTENSION, "padding", COSMETIC),
    "header-extension.backing-format.too-long": Kind(
        HEADER_EXTENSION, "backing format", REFUSED, "ERROR: ext_backing_format: len="
    ),
    "header-extension.crypto.missing": Kind(
        HEADER_EXTENSION, "crypto header", REFUSED, "Missing CRYPTO header for crypt method 2"
    ),
    "header-extension.crypto.unexpected": Kind(
        HEADER_EXTENSION,
        "crypto header",
        REFUSED,
        "CRYPTO header extension only expected with LUKS encryption method",
    ),
    "header-extension.crypto.length": Kind(
        HEADER_EXTENSION, "crypto header length", REFUSED, "CRYPTO header extension size"
    ),
    "header-extension.crypto.unaligned": Kind(
        HEADER_EXTENSION, "crypto header", REFUSED, "is not a multiple of cluster size"
    ),
    "header-extension.bitmaps.duplicate": Kind(HEADER_EXTENSION, "bitmaps", COSMETIC),
    "header-extension.bitmaps.length": Kind(
        HEADER_EXTENSION, "bitmaps length", REFUSED, "bitmaps_ext: Invalid extension length"
    ),
    "bitmaps-extension.autoclear.off": Kind(
        BITMAPS_EXTENSION,
        "",
        LEAK,
        "a program lacking bitmap support modified this file, "
        "so all bitmaps are now considered inconsistent",
    ),
    "bitmaps-extension.version.too-old": Kind(
        BITMAPS_EXTENSION,
        "",
        LEAK,
        "This qcow2 v2 image contains bitmaps, but they may have been modified by a program "
        "without persistent bitmap support",
    ),
    "bitmaps-extension.nb_bitmaps.zero": Kind(
        BITMAPS_EXTENSION, "nb_bitmaps", REFUSED, "found bitmaps extension with zero bitmaps"
    ),
    "bitmaps-extension.nb_bitmaps.too-large": Kind(
        BITMAPS_EXTENSION,
        "nb_bitmaps",
        REFUSED,
        "bitmaps, exceeding the QEMU supported maximum of 65535",
    ),
    "bitmaps-extension.nb_bitmaps.less": Kind(
        BITMAPS_EXTENSION,
        "nb_bitmaps",
        REFUSED,
        "More bitmaps found than specified in header extension",
    ),
    "bitmaps-extension.nb_bitmaps.more": Kind(
        BITMAPS_EXTENSION,
        "nb_bitmaps",
        REFUSED,
        "Less bitmaps found than specified in header extension",
    ),
    "bitmaps-extension.reserved.nonzero": Kind(
        BITMAPS_EXTENSION, "reserved", REFUSED, "bitmaps_ext: Reserved field is not zero"
    ),
    "bitmaps-extension.bitmap_directory_size.zero": Kind(
        BITMAPS_EXTENSION,
        "bitmap_directory_size",
        REFUSED,
        "Requested bitmap directory size is zero",
    ),
    "bitmaps-extension.bitmap_directory_size.too-large": Kind(
        BITMAPS_EXTENSION,
        "bitmap_directory_size",
        REFUSED,
        "exceeds the maximum supported size",
    ),
    "bitmaps-extension.bitmap_directory_offset.unaligned": Kind(
        BITMAPS_EXTENSION,
        "bitmap_directory_offset",
        REFUSED,
        "bitmaps_ext: invalid bitmap directory offset",
    ),
    "bitmaps-extension.bitmap_directory_offset.zero": Kind(
        BITMAPS_EXTENSION,
        "bitmap_directory_offset",
        REFUSED,
        "Bitmap extra data is not supported",
    ),
    "bitmaps-extension.bitmap_directory_offset.past-eof": Kind(
        BITMAPS_EXTENSION, "bitmap_directory_offset", REFUSED, _CONSTRAINTS
    ),
    "bitmaps-extension.bitmap_directory_offset.unreadable": Kind(
        BITMAPS_EXTENSION,
        "bitmap_directory_offset",
        REFUSED,
        "Failed to read bitmap directory",
    ),
    "bitmaps-extension.bitmap_directory_size.past-eof": Kind(
        BITMAPS_EXTENSION, "bitmap_directory_size", UNUSABLE, _CONSTRAINTS
    ),
    "bitmap-directory.overlap": Kind(DIRECTORY, "", UNUSABLE),
    "bitmap-directory.rest": Kind(DIRECTORY, "", REFUSED, _BROKEN_DIRECTORY),
    "bitmap-directory.zeroes": Kind(
        DIRECTORY, "", REFUSED, "More bitmaps found than specified in header extension"
    ),
    "bitmap-directory.zero-entries": Kind(DIRECTORY, "", REFUSED, _CONSTRAINTS),
    "directory-entry.surplus": Kind(ENTRY, "", UNUSABLE),
    "directory-entry.truncated": Kind(ENTRY, "", REFUSED, _BROKEN_DIRECTORY),
    "directory-entry.bitmap_table_offset.zero": Kind(
        ENTRY, "bitmap_table_offset", REFUSED, _CONSTRAINTS
    ),
    "directory-entry.bitmap_table_offset.unaligned": Kind(
        ENTRY, "bitmap_table_offset", REFUSED, _CONSTRAINTS
    ),
    "directory-entry.bitmap_table_offset.past-eof": Kind(ENTRY, "bitmap_table_offset", UNUSABLE),
    "directory-entry.bitmap_table_offset.unreadable": Kind(
        ENTRY, "bitmap_table_offset", REFUSED, _BAD_TABLE
    ),
    "directory-entry.bitmap_table_size.zero": Kind(
        ENTRY, "bitmap_table_size", REFUSED, _CONSTRAINTS
    ),
    "directory-entry.bitmap_table_size.too-large": Kind(
        ENTRY, "bitmap_table_size", REFUSED, _CONSTRAINTS
    ),
    "directory-entry.bitmap_table_size.less": Kind(
        ENTRY, "bitmap_table_size", REFUSED, _CONSTRAINTS
    ),
    "directory-entry.bitmap_table_size.more": Kind(
        ENTRY, "bitmap_table_size", REFUSED, "Could not read bitmap"
    ),
    "directory-entry.bitmap_table_size.outdated": Kind(ENTRY, "bitmap_table_size", NOTE),
    "directory-entry.flags.reserved": Kind(ENTRY, "flags", REFUSED, _CONSTRAINTS),
    "directory-entry.flags.extra-data-compatible": Kind(
        ENTRY, "flags", REFUSED, _CONSTRAINTS, keeps_status=True
    ),
    "directory-entry.type.unknown": Kind(ENTRY, "type", REFUSED, _CONSTRAINTS),
    "directory-entry.granularity_bits.too-large": Kind(
        ENTRY, "granularity_bits", REFUSED, _CONSTRAINTS
    ),
    "directory-entry.granularity_bits.unsupported": Kind(
        ENTRY, "granularity_bits", REFUSED, _CONSTRAINTS, keeps_status=True
    ),
    "directory-entry.extra_data.compatible": Kind(
        ENTRY,
        "extra_data_size",
        REFUSED,
        "Bitmap extra data is not supported",
        keeps_status=True,
    ),
    "directory-entry.extra_data.incompatible": Kind(
        ENTRY, "extra_data_size", REFUSED, "Bitmap extra data is not supported"
    ),
    "directory-entry.name_size.too-large": Kind(
        ENTRY, "name_size", REFUSED, _CONSTRAINTS, keeps_status=True
    ),
    "directory-entry.name.empty": Kind(ENTRY, "name_size", COSMETIC),
    "directory-entry.name.nul": Kind(ENTRY, "name", COSMETIC),
    "directory-entry.name.duplicate": Kind(ENTRY, "name", REFUSED, "Bitmap already exists"),
    "directory-entry.padding.nonzero": Kind(ENTRY, "padding", COSMETIC),
    "bitmap-table.limit": Kind(TABLE, "", UNUSABLE),
    "bitmap-table.overlap": Kind(TABLE, "", UNUSABLE),
    "bitmap-table.entry.reserved": Kind(TABLE, "entry", REFUSED, _BAD_TABLE),
    "bitmap-table.entry.unaligned": Kind(TABLE, "entry", REFUSED, _BAD_TABLE),
    "bitmap-table.entry.past-eof": Kind(TABLE, "entry", UNUSABLE),
    "bitmap-table.entry.more": Kind(TABLE, "entry", NOTE),
    "bitmap-data.overlap": Kind(DATA, "", UNUSABLE),
}
"""What a reader finds, who looks at header, extensions, directory and tables."""

CHECKED_KINDS: dict[str, Kind] = {
    "bitmap-data.tail": Kind(DATA, "", COSMETIC),
    "bitmap-data.beyond": Kind(DATA, "", UNUSABLE),
    "cluster.refcount.too-low": Kind(CLUSTER, "", UNUSABLE, "ERROR cluster"),
    "cluster.refcount.leak": Kind(CLUSTER, "", LEAK, "Leaked cluster"),
    "cluster.refcount.more": Kind(CLUSTER, "", NOTE),
    "snapshot-table.past-eof": Kind(SNAPSHOT_TABLE, "", UNUSABLE),
    "snapshot-table.entry.incomplete": Kind(
        SNAPSHOT_TABLE, "entry", UNUSABLE, "ERROR snapshot table entry"
    ),
    "snapshot-table.entry.more": Kind(SNAPSHOT_TABLE, "entry", NOTE),
    "refcount-table.entry.invalid": Kind(
        REFCOUNT_TABLE, "entry", UNUSABLE, "refcount table entry corrupted"
    ),
    "refcount-table.entry.past-eof": Kind(REFCOUNT_TABLE, "entry", UNUSABLE, "is outside image"),
    "refcount-table.entry.shared": Kind(REFCOUNT_TABLE, "entry", UNUSABLE, "ERROR refcount block"),
    "refcount-table.entry.more": Kind(REFCOUNT_TABLE, "entry", NOTE),
    "l1-table.past-eof": Kind(L1_TABLE, "", UNUSABLE, _PAST_EOF),
    "l1-table.invalid": Kind(L1_TABLE, "", UNUSABLE, "L1 table"),
    "l1-table.entry.reserved": Kind(
        L1_TABLE, "entry", UNUSABLE, "ERROR found L1 entry with reserved bits set"
    ),
    "l1-table.entry.unaligned": Kind(
        L1_TABLE, "entry", UNUSABLE, "Table is not cluster aligned; L1 entry corrupted"
    ),
    "l1-table.entry.past-eof": Kind(L1_TABLE, "entry", UNUSABLE, _PAST_EOF),
    "l1-table.entry.copied": Kind(L1_TABLE, "entry", UNUSABLE, "OFLAG_COPIED L2 cluster"),
    "l1-table.entry.more": Kind(L1_TABLE, "entry", NOTE),
    "l2-table.entry.reserved": Kind(
        L2_TABLE, "entry", UNUSABLE, "ERROR found l2 entry with reserved bits set"
    ),
    "l2-table.entry.unaligned": Kind(
        L2_TABLE, "entry", UNUSABLE, "is not properly aligned; L2 entry corrupted"
    ),
    "l2-table.entry.past-eof": Kind(L2_TABLE, "entry", UNUSABLE, _PAST_EOF),
    "l2-table.entry.copied": Kind(L2_TABLE, "entry", UNUSABLE, "OFLAG_COPIED data cluster"),
    "l2-table.entry.compressed": Kind(L2_TABLE, "entry", UNUSABLE, "compressed cluster"),
    "l2-table.entry.subclusters": Kind(
        L2_TABLE, "entry", UNUSABLE, "corrupted subcluster allocation bitmap"
    ),
    "l2-table.entry.more": Kind(L2_TABLE, "entry", NOTE),
}
"""What it takes to look at every reference and refcount to find."""
