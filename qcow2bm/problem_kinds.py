"""The table of all kinds of problems: what each one is, means, and does to other decisions.

*Spec*: spec/problems.md; a test compares that page with `KINDS`.
"""

from __future__ import annotations

from qcow2bm.problems import (
    BITMAPS_EXTENSION,
    CLUSTER,
    COSMETIC,
    DATA,
    DIRECTORY,
    ENTRY,
    HEADER,
    HEADER_EXTENSION,
    L1_TABLE,
    L2_TABLE,
    LEAK,
    NOTE,
    REFCOUNT_TABLE,
    REFUSED,
    SNAPSHOT_TABLE,
    TABLE,
    UNUSABLE,
    Kind,
    Problem,
    Severity,
)

_PAST_EOF = "counting reference for region exceeding the end of the file"
_CONSTRAINTS = "doesn't satisfy the constraints"
_BAD_TABLE = "Could not read bitmap_table table from image for bitmap"
_BROKEN_DIRECTORY = "Broken bitmap directory"


def problem(
    id: str,
    offset: int,
    reason: str,
    bitmap_index: int | None = None,
    severity: Severity | None = None,
    element: int | None = None,
) -> Problem:
    """Returns a Problem of the kind with this id.

    ``severity`` is given only where it differs from that of the kind. ``element`` is the number
    of the element where the structure is an array.
    """
    kind = KINDS[id]
    return Problem(kind, severity or kind.severity, offset, bitmap_index, element, reason)


# fmt: off
_ALL = (
    Kind(
        "header.backing_file_offset.invalid", HEADER, "backing_file_offset", REFUSED,
        qemu_message="Invalid backing file offset",
        meaning=(
            "The backing file's name would lie outside the first cluster; set the right name with "
            "a backup of the header at hand, bitmaps do not depend on it."
        ),
    ),
    Kind(
        "header.backing_file_size.too-large", HEADER, "backing_file_size", REFUSED,
        qemu_message="Backing file name too long",
        meaning=(
            "The backing file's name is longer than there is room for; bitmaps do not depend on "
            "it, repair the header from a copy."
        ),
    ),
    Kind(
        "header.size.unaligned", HEADER, "size", NOTE,
        meaning="The disk's size is not whole sectors, and QEMU rounds it down; nothing to do.",
    ),
    Kind(
        "header.size.too-large", HEADER, "size", REFUSED,
        qemu_message="Image is too big",
        meaning=(
            "The disk's size is nonsense, so no bitmap can be told to fit it; restore the header "
            "from a copy."
        ),
        distrusts_all=True,
    ),
    Kind(
        "header.crypt_method.unknown", HEADER, "crypt_method", REFUSED,
        qemu_message="Unsupported encryption method",
        meaning=(
            "The disk is encrypted in an unknown way; bitmaps are not encrypted and can be read, "
            "the disk cannot."
        ),
    ),
    Kind(
        "header.l1_size.too-small", HEADER, "l1_size", REFUSED,
        qemu_message="L1 table is too small",
        meaning=(
            "The L1 table does not cover the disk; header and disk size do not belong together, "
            "restore the header from a copy."
        ),
    ),
    Kind(
        "header.l1_size.too-large", HEADER, "l1_size", REFUSED,
        qemu_message="Active L1 table too large",
        meaning="The L1 table's size is nonsense; restore the header from a copy.",
    ),
    Kind(
        "header.l1_table_offset.invalid", HEADER, "l1_table_offset", REFUSED,
        qemu_message="Active L1 table offset invalid",
        meaning=(
            "The L1 table is not where a table can be: at the start of a cluster, ending before "
            "2^63; restore the header from a copy."
        ),
    ),
    Kind(
        "header.l1_table_offset.past-eof", HEADER, "l1_table_offset", UNUSABLE,
        meaning=(
            "The file was cut off before the L1 table, so the disk's content is lost even though "
            "QEMU opens the image; restore the file."
        ),
        is_past_end=True,
    ),
    Kind(
        "header.l1_table_offset.unreadable", HEADER, "l1_table_offset", REFUSED,
        qemu_message="Could not read L1 table",
        meaning=(
            "The L1 table would end beyond the longest file QEMU reads, 2^63 - 2^30 bytes; restore "
            "the header from a copy."
        ),
    ),
    Kind(
        "header.refcount_table_offset.invalid", HEADER, "refcount_table_offset", REFUSED,
        qemu_message="Reference count table offset invalid",
        meaning=(
            "The refcount table is not where a table can be: at the start of a cluster, ending "
            "before 2^63; restore the header from a copy."
        ),
    ),
    Kind(
        "header.refcount_table_offset.past-eof", HEADER, "refcount_table_offset", UNUSABLE,
        meaning=(
            "The file was cut off before the refcount table; take a copy and let qemu-img check -r "
            "all rebuild it."
        ),
        is_past_end=True,
    ),
    Kind(
        "header.refcount_table_offset.unreadable", HEADER, "refcount_table_offset", REFUSED,
        qemu_message="Could not initialize refcount handling",
        meaning=(
            "The refcount table would end beyond the longest file QEMU reads; restore the header "
            "from a copy."
        ),
    ),
    Kind(
        "header.refcount_table_clusters.zero", HEADER, "refcount_table_clusters", REFUSED,
        qemu_message="Image does not contain a reference count table",
        meaning="There is no refcount table; take a copy and let qemu-img check -r all rebuild it.",
    ),
    Kind(
        "header.refcount_table_clusters.too-large", HEADER, "refcount_table_clusters", REFUSED,
        qemu_message="Reference count table too large",
        meaning="The refcount table's size is nonsense; restore the header from a copy.",
    ),
    Kind(
        "header.nb_snapshots.too-large", HEADER, "nb_snapshots", REFUSED,
        qemu_message="Snapshot table too large",
        meaning="The number of snapshots is nonsense; restore the header from a copy.",
    ),
    Kind(
        "header.snapshots_offset.invalid", HEADER, "snapshots_offset", REFUSED,
        qemu_message="Snapshot table offset invalid",
        meaning=(
            "The snapshot table is not where a table can be: at the start of a cluster, ending "
            "before 2^63; restore the header from a copy."
        ),
    ),
    Kind(
        "header.snapshots_offset.past-eof", HEADER, "snapshots_offset", UNUSABLE,
        meaning=(
            "The file was cut off before the snapshot table, so the snapshots are lost; the disk "
            "and the bitmaps are not."
        ),
        is_past_end=True,
    ),
    Kind(
        "header.snapshots_offset.unreadable", HEADER, "snapshots_offset", REFUSED,
        qemu_message="Failed to read snapshot table",
        meaning=(
            "The snapshot table would end beyond the longest file QEMU reads; restore the header "
            "from a copy."
        ),
    ),
    Kind(
        "snapshot-table.size.too-large", SNAPSHOT_TABLE, "", REFUSED,
        qemu_message="Snapshot table is too big",
        meaning=(
            "The snapshot table is longer than 64 MiB, more than QEMU reads: it was overwritten, "
            "or has thousands of snapshots; take a copy, then let qemu-img check -r all drop what "
            "is too much. Bitmaps can be read."
        ),
    ),
    Kind(
        "snapshot-table.extra_data_size.too-large", SNAPSHOT_TABLE, "extra_data_size", REFUSED,
        qemu_message="Too much extra metadata in snapshot table entry",
        meaning=(
            "A newer program stored more about a snapshot than QEMU reads, or the table was "
            "overwritten; take a copy, then let qemu-img check -r all drop what is too much. "
            "Bitmaps can be read."
        ),
    ),
    Kind(
        "header.incompatible_features.unknown", HEADER, "incompatible_features", REFUSED,
        qemu_message="Unsupported qcow2 feature(s)",
        meaning=(
            "A newer program made the image, and nothing in it can be believed by this one; use "
            "that program, or a newer version of this one."
        ),
        distrusts_all=True,
    ),
    Kind(
        "header.incompatible_features.dirty", HEADER, "incompatible_features", NOTE,
        meaning=(
            "The program that wrote the image last was cut short, so refcounts are outdated; the "
            "next writable open by QEMU repairs them."
        ),
    ),
    Kind(
        "header.incompatible_features.corrupt", HEADER, "incompatible_features", NOTE,
        meaning=(
            "QEMU found the image damaged and no longer writes to it; take a copy, then run "
            "qemu-img check -r all."
        ),
    ),
    Kind(
        "header.incompatible_features.extended-l2", HEADER, "incompatible_features", REFUSED,
        qemu_message="Unsupported subcluster size",
        meaning=(
            "Extended L2 entries need clusters of 16 KiB or more, so the bit is wrong; restore the "
            "header from a copy."
        ),
    ),
    Kind(
        "header.autoclear_features.unknown", HEADER, "autoclear_features", NOTE,
        meaning=(
            "A newer feature is in use that a writer must switch off; nothing to do for a reader."
        ),
    ),
    Kind(
        "header.autoclear_features.no-bitmaps", HEADER, "autoclear_features", UNUSABLE,
        meaning=(
            "The bit of the bitmaps is set but they are gone; clear the bit before the next write, "
            "which otherwise makes QEMU mark the image corrupt."
        ),
        repair="directory",
    ),
    Kind(
        "header.autoclear_features.no-data-file", HEADER, "autoclear_features", REFUSED,
        qemu_message="data-file-raw requires a data file",
        meaning=(
            "The header speaks of a raw data file, but there is none; clear the bit, or restore "
            "the header from a copy."
        ),
    ),
    Kind(
        "header.refcount_order.too-large", HEADER, "refcount_order", REFUSED,
        qemu_message="Reference count entry width too large",
        meaning="The width of a refcount is nonsense; restore the header from a copy.",
    ),
    Kind(
        "header.header_length.too-small", HEADER, "header_length", REFUSED,
        qemu_message="qcow2 header too short",
        meaning=(
            "Where the header extensions begin is unknown, so no bitmap can be found; restore the "
            "header from a copy."
        ),
    ),
    Kind(
        "header.header_length.too-large", HEADER, "header_length", REFUSED,
        qemu_message="qcow2 header exceeds cluster size",
        meaning=(
            "Where the header extensions begin is unknown, so no bitmap can be found; restore the "
            "header from a copy."
        ),
    ),
    Kind(
        "header.header_length.unaligned", HEADER, "header_length", COSMETIC,
        meaning="The header's length breaks the specification, but QEMU takes it; nothing to do.",
    ),
    Kind(
        "header.compression_type.unknown", HEADER, "compression_type", REFUSED,
        qemu_message="unknown compression type",
        meaning=(
            "Clusters are compressed in an unknown way; bitmaps can be read, compressed parts of "
            "the disk cannot."
        ),
    ),
    Kind(
        "header.compression_type.bit-missing", HEADER, "compression_type", REFUSED,
        qemu_message="Compression type incompatible feature bit must be set",
        meaning=(
            "Compression type and feature bit contradict each other; restore the header from a "
            "copy."
        ),
    ),
    Kind(
        "header.compression_type.bit-unexpected", HEADER, "compression_type", REFUSED,
        qemu_message="Compression type incompatible feature bit must not be set",
        meaning=(
            "Compression type and feature bit contradict each other; restore the header from a "
            "copy."
        ),
    ),
    Kind(
        "header.padding.nonzero", HEADER, "padding", COSMETIC,
        meaning="Bytes that should be zero are not, and nobody reads them; nothing to do.",
    ),
    Kind(
        "header-extension.length.too-large", HEADER_EXTENSION, "length", REFUSED,
        qemu_message="Header extension too large",
        meaning=(
            "An extension or the end marker claims more bytes than there are, or fewer than 8 are "
            "left for the next, so what follows is unknown; restore the header from a copy."
        ),
    ),
    Kind(
        "header-extension.end.missing", HEADER_EXTENSION, "end marker", NOTE,
        meaning="The extensions fill all the room there is and have no end marker; nothing to do.",
    ),
    Kind(
        "header-extension.padding.nonzero", HEADER_EXTENSION, "padding", COSMETIC,
        meaning="Bytes that should be zero are not, and nobody reads them; nothing to do.",
    ),
    Kind(
        "header-extension.backing-format.too-long", HEADER_EXTENSION, "backing format", REFUSED,
        qemu_message="ERROR: ext_backing_format: len=",
        meaning=(
            "The backing file's format is no format QEMU knows; set it with qemu-img rebase -u "
            "once the image opens again, or restore the header from a copy."
        ),
    ),
    Kind(
        "header-extension.crypto.missing", HEADER_EXTENSION, "crypto header", REFUSED,
        qemu_message="Missing CRYPTO header for crypt method 2",
        meaning=(
            "The disk is encrypted with LUKS but the way to its keys is lost; restore the header "
            "from a copy, bitmaps can be read."
        ),
    ),
    Kind(
        "header-extension.crypto.unexpected", HEADER_EXTENSION, "crypto header", REFUSED,
        qemu_message="CRYPTO header extension only expected with LUKS encryption method",
        meaning=(
            "The extension says where the keys of an encrypted disk are, but the header says that "
            "the disk is not encrypted with LUKS; restore the header from a copy, bitmaps can be "
            "read."
        ),
    ),
    Kind(
        "header-extension.crypto.length", HEADER_EXTENSION, "crypto header length", REFUSED,
        qemu_message="CRYPTO header extension size",
        meaning=(
            "The disk is encrypted with LUKS but the way to its keys is lost; restore the header "
            "from a copy, bitmaps can be read."
        ),
    ),
    Kind(
        "header-extension.crypto.unaligned", HEADER_EXTENSION, "crypto header", REFUSED,
        qemu_message="is not a multiple of cluster size",
        meaning=(
            "The keys of the encrypted disk are not where they can be; restore the header from a "
            "copy, bitmaps can be read."
        ),
    ),
    Kind(
        "header-extension.bitmaps.duplicate", HEADER_EXTENSION, "bitmaps", COSMETIC,
        meaning=(
            "There are two bitmaps extensions and the last counts; QEMU leaves one at its next "
            "write."
        ),
        forbids_edit=True,
    ),
    Kind(
        "header-extension.bitmaps.length", HEADER_EXTENSION, "bitmaps length", REFUSED,
        qemu_message="bitmaps_ext: Invalid extension length",
        meaning=(
            "The bitmaps extension has a length it cannot have, so no bitmap can be found; take "
            "full backups, and clear autoclear bit 0 only after the length is right, as QEMU "
            "checks it even then."
        ),
        repair="directory",
    ),
    Kind(
        "bitmaps-extension.autoclear.off", BITMAPS_EXTENSION, "", LEAK,
        qemu_message=(
            "a program lacking bitmap support modified this file, so all bitmaps are now "
            "considered inconsistent"
        ),
        meaning=(
            "A program without bitmap support wrote to the image, so every bitmap misses writes; "
            "salvage those whose backups are to go on, before a writer drops them, or take a full "
            "backup; repair --only stale --only refcounts gives the space back."
        ),
        repair="stale",
    ),
    Kind(
        "bitmaps-extension.version.too-old", BITMAPS_EXTENSION, "", LEAK,
        qemu_message=(
            "This qcow2 v2 image contains bitmaps, but they may have been modified by a program "
            "without persistent bitmap support"
        ),
        meaning=(
            "The image was made one of version 2, which has no bitmaps, so every bitmap misses "
            "writes; take a full backup, and run qemu-img check -r leaks to get the space back."
        ),
    ),
    Kind(
        "bitmaps-extension.nb_bitmaps.zero", BITMAPS_EXTENSION, "nb_bitmaps", REFUSED,
        qemu_message="found bitmaps extension with zero bitmaps",
        meaning=(
            "The number of bitmaps is wrong; the bitmaps found in the directory are shown and can "
            "be read."
        ),
        repair="directory",
        breaks_directory_end=True,
    ),
    Kind(
        "bitmaps-extension.nb_bitmaps.too-large", BITMAPS_EXTENSION, "nb_bitmaps", REFUSED,
        qemu_message="bitmaps, exceeding the QEMU supported maximum of 65535",
        meaning=(
            "The number of bitmaps is wrong; the bitmaps found in the directory are shown and can "
            "be read."
        ),
        repair="directory",
        breaks_directory_end=True,
    ),
    Kind(
        "bitmaps-extension.nb_bitmaps.less", BITMAPS_EXTENSION, "nb_bitmaps", REFUSED,
        qemu_message="More bitmaps found than specified in header extension",
        meaning=(
            "The directory holds more bitmaps than it should; all are shown, and those that are "
            "counted can be read."
        ),
        repair="directory",
        breaks_directory_end=True,
    ),
    Kind(
        "bitmaps-extension.nb_bitmaps.more", BITMAPS_EXTENSION, "nb_bitmaps", REFUSED,
        qemu_message="Less bitmaps found than specified in header extension",
        meaning=(
            "The directory holds fewer bitmaps than it should; those found can be read, look for "
            "missing names."
        ),
        repair="directory",
        breaks_directory_end=True,
    ),
    Kind(
        "bitmaps-extension.reserved.nonzero", BITMAPS_EXTENSION, "reserved", REFUSED,
        qemu_message="bitmaps_ext: Reserved field is not zero",
        meaning="A reserved field is in use, perhaps by a newer program; bitmaps can be read.",
        repair="directory",
    ),
    Kind(
        "bitmaps-extension.bitmap_directory_size.zero",
        BITMAPS_EXTENSION,
        "bitmap_directory_size",
        REFUSED,
        qemu_message="Requested bitmap directory size is zero",
        meaning="The directory's size is lost, and its bitmaps with it; take full backups.",
        repair="directory",
        breaks_directory_end=True,
    ),
    Kind(
        "bitmaps-extension.bitmap_directory_size.too-large",
        BITMAPS_EXTENSION,
        "bitmap_directory_size",
        REFUSED,
        qemu_message="exceeds the maximum supported size",
        meaning="The directory's size is nonsense; entries at its start are shown.",
        repair="directory",
        breaks_directory_end=True,
    ),
    Kind(
        "bitmaps-extension.bitmap_directory_offset.unaligned",
        BITMAPS_EXTENSION,
        "bitmap_directory_offset",
        REFUSED,
        qemu_message="bitmaps_ext: invalid bitmap directory offset",
        meaning=(
            "The directory is not where it can be, so nothing found there is believed; take full "
            "backups."
        ),
        repair="directory",
    ),
    Kind(
        "bitmaps-extension.bitmap_directory_offset.zero",
        BITMAPS_EXTENSION,
        "bitmap_directory_offset",
        REFUSED,
        qemu_message="Bitmap extra data is not supported",
        meaning=(
            "The directory would be where the header is, so no bitmap can be found; take full "
            "backups."
        ),
        repair="directory",
    ),
    Kind(
        "bitmaps-extension.bitmap_directory_offset.past-eof",
        BITMAPS_EXTENSION,
        "bitmap_directory_offset",
        REFUSED,
        qemu_message=_CONSTRAINTS,
        meaning=(
            "The file was cut off before the directory, so the bitmaps are lost, and guest data "
            "may be too; take full backups after you checked the disk."
        ),
        repair="directory",
        is_past_end=True,
    ),
    Kind(
        "bitmaps-extension.bitmap_directory_offset.unreadable",
        BITMAPS_EXTENSION,
        "bitmap_directory_offset",
        REFUSED,
        qemu_message="Failed to read bitmap directory",
        meaning=(
            "The directory's offset is beyond any file, so its bitmaps are lost; take full "
            "backups."
        ),
        repair="directory",
    ),
    Kind(
        "bitmaps-extension.bitmap_directory_size.past-eof",
        BITMAPS_EXTENSION,
        "bitmap_directory_size",
        UNUSABLE,
        qemu_message=_CONSTRAINTS,
        meaning=(
            "The file was cut off within the directory, or the size is wrong; bitmaps that are "
            "left can be read, take full backups in the place of the others."
        ),
        repair="directory",
        is_past_end=True,
        breaks_directory_end=True,
    ),
    Kind(
        "bitmap-directory.overlap", DIRECTORY, "", UNUSABLE,
        meaning=(
            "The directory lies where something else is too, so one of them was overwritten; take "
            "full backups and check the image."
        ),
        repair="directory",
        is_overlap=True,
    ),
    Kind(
        "bitmap-directory.rest", DIRECTORY, "", REFUSED,
        qemu_message=_BROKEN_DIRECTORY,
        meaning=(
            "Bytes after the last entry make no entry, zero or not; the bitmaps before them can be "
            "read."
        ),
        repair="directory",
        breaks_directory_end=True,
    ),
    Kind(
        "bitmap-directory.zeroes", DIRECTORY, "", REFUSED,
        qemu_message="More bitmaps found than specified in header extension",
        meaning=(
            "The directory claims more bytes than its entries have, and the rest is zero; all "
            "bitmaps can be read."
        ),
        repair="directory",
        breaks_directory_end=True,
    ),
    Kind(
        "bitmap-directory.zero-entries", DIRECTORY, "", REFUSED,
        qemu_message=_CONSTRAINTS,
        meaning=(
            "There are zeros in the place of the last entries, as in a cluster that was freed; the "
            "bitmaps before them can be read, take full backups in the place of the others."
        ),
        repair="directory",
        breaks_directory_end=True,
    ),
    Kind(
        "directory-entry.surplus", ENTRY, "", UNUSABLE,
        meaning=(
            "The entry is one more than nb_bitmaps counts, so it may be left over from an older "
            "directory; take a full backup."
        ),
        repair="directory",
    ),
    Kind(
        "directory-entry.truncated", ENTRY, "", REFUSED,
        qemu_message=_BROKEN_DIRECTORY,
        meaning=(
            "The entry reaches past the directory's end, so its name is unknown; a size in it is "
            "wrong, or the directory was cut off."
        ),
        repair="directory",
        breaks_directory_end=True,
    ),
    Kind(
        "directory-entry.bitmap_table_offset.zero", ENTRY, "bitmap_table_offset", REFUSED,
        qemu_message=_CONSTRAINTS,
        meaning="The bitmap has no table; take a full backup, and let repair drop the bitmap.",
        repair="directory",
    ),
    Kind(
        "directory-entry.bitmap_table_offset.unaligned", ENTRY, "bitmap_table_offset", REFUSED,
        qemu_message=_CONSTRAINTS,
        meaning=(
            "The bitmap's table is not where a table can be; take a full backup, and let repair "
            "drop the bitmap."
        ),
        repair="directory",
    ),
    Kind(
        "directory-entry.bitmap_table_offset.past-eof", ENTRY, "bitmap_table_offset", UNUSABLE,
        meaning=(
            "The bitmap's table lies outside the file, where QEMU reads zeros and takes the disk "
            "for clean; take a full backup, and remove the bitmap with qemu-img."
        ),
        repair="directory",
        is_past_end=True,
    ),
    Kind(
        "directory-entry.bitmap_table_offset.unreadable", ENTRY, "bitmap_table_offset", REFUSED,
        qemu_message=_BAD_TABLE,
        meaning=(
            "The offset of the bitmap's table is beyond any file; take a full backup, and let "
            "repair drop the bitmap."
        ),
        repair="directory",
    ),
    Kind(
        "directory-entry.bitmap_table_size.zero", ENTRY, "bitmap_table_size", REFUSED,
        qemu_message=_CONSTRAINTS,
        meaning="The bitmap has no table; take a full backup, and let repair drop the bitmap.",
        repair="directory",
    ),
    Kind(
        "directory-entry.bitmap_table_size.too-large", ENTRY, "bitmap_table_size", REFUSED,
        qemu_message=_CONSTRAINTS,
        meaning=(
            "The table's size is beyond what QEMU takes; take a full backup, and let repair drop "
            "the bitmap."
        ),
        repair="directory",
    ),
    Kind(
        "directory-entry.bitmap_table_size.less", ENTRY, "bitmap_table_size", REFUSED,
        qemu_message=_CONSTRAINTS,
        meaning=(
            "The bitmap does not cover the disk, which was perhaps resized by another program; fit "
            "mends that."
        ),
        repair="directory",
        is_fittable=True,
    ),
    Kind(
        "directory-entry.bitmap_table_size.more", ENTRY, "bitmap_table_size", REFUSED,
        qemu_message="Could not read bitmap",
        meaning="The bitmap is for a larger disk; fit mends that.",
        repair="directory",
        is_fittable=True,
    ),
    Kind(
        "directory-entry.bitmap_table_size.outdated", ENTRY, "bitmap_table_size", NOTE,
        meaning=(
            "The bitmap is in use and was stored for a disk of another size; nothing to do but "
            "what its status asks for."
        ),
        repair="directory",
    ),
    Kind(
        "directory-entry.flags.reserved", ENTRY, "flags", REFUSED,
        qemu_message=_CONSTRAINTS,
        meaning=(
            "The entry uses flags of unknown meaning; use the program that wrote it, or let repair "
            "drop the bitmap."
        ),
        repair="directory",
    ),
    Kind(
        "directory-entry.flags.extra-data-compatible", ENTRY, "flags", REFUSED,
        qemu_message=_CONSTRAINTS,
        meaning=(
            "The entry has a flag that the format allows and QEMU does not; the bitmap can be "
            "read, QEMU cannot open the image."
        ),
        repair="directory",
        keeps_status=True,
        costs_no_bitmap=True,
    ),
    Kind(
        "directory-entry.type.unknown", ENTRY, "type", REFUSED,
        qemu_message=_CONSTRAINTS,
        meaning=(
            "It is a bitmap of a kind unknown here; use the program that wrote it, or let repair "
            "drop the bitmap."
        ),
        repair="directory",
    ),
    Kind(
        "directory-entry.granularity_bits.too-large", ENTRY, "granularity_bits", REFUSED,
        qemu_message=_CONSTRAINTS,
        meaning=(
            "The granularity is beyond what the format allows; take a full backup, and let repair "
            "drop the bitmap."
        ),
        repair="directory",
    ),
    Kind(
        "directory-entry.granularity_bits.unsupported", ENTRY, "granularity_bits", REFUSED,
        qemu_message=_CONSTRAINTS,
        meaning=(
            "The granularity is one the format allows and QEMU does not; the bitmap can be read, "
            "QEMU cannot open the image."
        ),
        repair="directory",
        keeps_status=True,
    ),
    Kind(
        "directory-entry.extra_data.compatible", ENTRY, "extra_data_size", REFUSED,
        qemu_message="Bitmap extra data is not supported",
        meaning=(
            "The entry has extra data marked as harmless, which the format allows and QEMU does "
            "not; the bitmap can be read, QEMU cannot open the image."
        ),
        repair="directory",
        keeps_status=True,
        costs_no_bitmap=True,
    ),
    Kind(
        "directory-entry.extra_data.incompatible", ENTRY, "extra_data_size", REFUSED,
        qemu_message="Bitmap extra data is not supported",
        meaning=(
            "The entry has extra data that changes its meaning; use the program that wrote it, or "
            "let repair drop the bitmap."
        ),
        repair="directory",
    ),
    Kind(
        "directory-entry.name_size.too-large", ENTRY, "name_size", REFUSED,
        qemu_message=_CONSTRAINTS,
        meaning=(
            "The name is longer than QEMU takes; the bitmap can be read, QEMU cannot open the "
            "image."
        ),
        repair="directory",
        keeps_status=True,
        costs_no_bitmap=True,
    ),
    Kind(
        "directory-entry.name.empty", ENTRY, "name_size", COSMETIC,
        meaning="The bitmap has no name; address it by its number, such as @2.",
        repair="directory",
    ),
    Kind(
        "directory-entry.name.nul", ENTRY, "name", COSMETIC,
        meaning=(
            "The name has a NUL byte, where it ends for QEMU; a writable open by QEMU may fail or "
            "shorten it."
        ),
        repair="directory",
        suggests_misreading=True,
    ),
    Kind(
        "directory-entry.name.duplicate", ENTRY, "name", REFUSED,
        qemu_message="Bitmap already exists",
        meaning=(
            "Several bitmaps have this name and nobody knows which is meant; look at each by its "
            "number, take a full backup, and remove them."
        ),
        repair="directory",
        costs_no_bitmap=True,
    ),
    Kind(
        "directory-entry.padding.nonzero", ENTRY, "padding", COSMETIC,
        meaning="Bytes that should be zero are not, and nobody reads them; nothing to do.",
        repair="directory",
        suggests_misreading=True,
    ),
    Kind(
        "bitmap-table.limit", TABLE, "", UNUSABLE,
        meaning=(
            "The tables before this one have 256 MiB together, more than any image needs, so it "
            "was not looked at; look at the image with fewer bitmaps."
        ),
        repair="directory",
        costs_no_bitmap=True,
    ),
    Kind(
        "bitmap-table.overlap", TABLE, "", UNUSABLE,
        meaning=(
            "The table lies where something else is too, so one of them was overwritten; take a "
            "full backup, and check the image."
        ),
        repair="directory",
        is_overlap=True,
    ),
    Kind(
        "bitmap-table.entry.reserved", TABLE, "entry", REFUSED,
        qemu_message=_BAD_TABLE,
        meaning=(
            "The table was overwritten or comes from a newer program; take a full backup, and let "
            "repair drop the bitmap."
        ),
        repair="directory",
    ),
    Kind(
        "bitmap-table.entry.unaligned", TABLE, "entry", REFUSED,
        qemu_message=_BAD_TABLE,
        meaning="The table was overwritten; take a full backup, and let repair drop the bitmap.",
        repair="directory",
    ),
    Kind(
        "bitmap-table.entry.past-eof", TABLE, "entry", UNUSABLE,
        meaning=(
            "Bitmap data lies outside the file, where QEMU reads zeros and takes the disk for "
            "clean; take a full backup, and remove the bitmap with qemu-img."
        ),
        repair="directory",
        is_past_end=True,
    ),
    Kind(
        "bitmap-table.entry.more", TABLE, "entry", NOTE,
        meaning=(
            "The table has more bad entries than are listed, as a table that was overwritten does."
        ),
        repair="directory",
        stands_for_more=True,
    ),
    Kind(
        "bitmap-data.overlap", DATA, "", UNUSABLE,
        meaning=(
            "Bitmap data lies where something else is too, so one of them was overwritten; take a "
            "full backup, and check the image."
        ),
        repair="directory",
        is_overlap=True,
    ),
    Kind(
        "bitmap-data.tail", DATA, "", COSMETIC,
        meaning=(
            "Bits that stand for nothing are set behind the end of the disk, as QEMU itself leaves "
            "them; nothing to do."
        ),
        repair="tails",
        needs_check=True,
    ),
    Kind(
        "bitmap-data.beyond", DATA, "", UNUSABLE,
        meaning=(
            "Bits that stand for nothing are set far behind the end of the disk, where no program "
            "leaves any, so granularity or size are not what they were; take a full backup, and "
            "let repair drop the bitmap."
        ),
        repair="directory",
        needs_check=True,
    ),
    Kind(
        "cluster.refcount.too-low", CLUSTER, "", UNUSABLE,
        qemu_message="ERROR cluster",
        meaning=(
            "The cluster is in use more often than it is counted, so a writer may take it for free "
            "and overwrite what is there; take a copy, then run qemu-img check -r all."
        ),
        repair="refcounts",
        needs_check=True,
        is_undercount=True,
    ),
    Kind(
        "cluster.refcount.leak", CLUSTER, "", LEAK,
        qemu_message="Leaked cluster",
        meaning=(
            "The cluster is counted but nothing uses it: space is lost, nothing else; qemu-img "
            "check -r leaks gives it back. If there are stale bitmaps it may be theirs: salvage "
            "them first."
        ),
        repair="refcounts",
        needs_check=True,
    ),
    Kind(
        "cluster.refcount.more", CLUSTER, "", NOTE,
        meaning=(
            "There are more clusters with such a refcount than are listed; nothing more to do than "
            "for those."
        ),
        repair="refcounts",
        needs_check=True,
        stands_for_more=True,
    ),
    Kind(
        "snapshot-table.past-eof", SNAPSHOT_TABLE, "", UNUSABLE,
        meaning=(
            "The file was cut off within the snapshot table, so snapshots are lost, and nobody "
            "knows what clusters were theirs; take a copy, then run qemu-img check -r all."
        ),
        needs_check=True,
        is_past_end=True,
    ),
    Kind(
        "snapshot-table.entry.incomplete", SNAPSHOT_TABLE, "entry", UNUSABLE,
        qemu_message="ERROR snapshot table entry",
        meaning=(
            "The snapshot says less of itself than version 3 asks for; take a copy, then run "
            "qemu-img check -r all."
        ),
        needs_check=True,
    ),
    Kind(
        "snapshot-table.entry.more", SNAPSHOT_TABLE, "entry", NOTE,
        meaning="There are more such entries than are listed; nothing more to do than for those.",
        needs_check=True,
        stands_for_more=True,
    ),
    Kind(
        "refcount-table.entry.invalid", REFCOUNT_TABLE, "entry", UNUSABLE,
        qemu_message="refcount table entry corrupted",
        meaning=(
            "The entry leads to no refcount block, so the clusters that it counts pass for free; "
            "take a copy, then run qemu-img check -r all."
        ),
        needs_check=True,
    ),
    Kind(
        "refcount-table.entry.past-eof", REFCOUNT_TABLE, "entry", UNUSABLE,
        qemu_message="is outside image",
        meaning=(
            "The file was cut off before the refcount block; take a copy, then run qemu-img check "
            "-r all."
        ),
        needs_check=True,
        is_past_end=True,
    ),
    Kind(
        "refcount-table.entry.shared", REFCOUNT_TABLE, "entry", UNUSABLE,
        qemu_message="ERROR refcount block",
        meaning=(
            "The refcount block is used as something else as well, and either will overwrite the "
            "other; take a copy, then run qemu-img check -r all."
        ),
        needs_check=True,
    ),
    Kind(
        "refcount-table.entry.more", REFCOUNT_TABLE, "entry", NOTE,
        meaning="There are more such entries than are listed; nothing more to do than for those.",
        needs_check=True,
        stands_for_more=True,
    ),
    Kind(
        "l1-table.past-eof", L1_TABLE, "", UNUSABLE,
        qemu_message=_PAST_EOF,
        meaning=(
            "The file was cut off before the L1 table; the content of that disk or snapshot is "
            "lost."
        ),
        needs_check=True,
        is_past_end=True,
    ),
    Kind(
        "l1-table.invalid", L1_TABLE, "", UNUSABLE,
        qemu_message="L1 table",
        meaning=(
            "The snapshot's L1 table is not where a table can be, so the snapshot is lost; the "
            "disk is not."
        ),
        needs_check=True,
    ),
    Kind(
        "l1-table.entry.reserved", L1_TABLE, "entry", UNUSABLE,
        qemu_message="ERROR found L1 entry with reserved bits set",
        meaning=(
            "The entry has bits that mean nothing, so it was overwritten; take a copy, and compare "
            "the disk with a backup."
        ),
        needs_check=True,
    ),
    Kind(
        "l1-table.entry.unaligned", L1_TABLE, "entry", UNUSABLE,
        qemu_message="Table is not cluster aligned; L1 entry corrupted",
        meaning=(
            "The entry leads to no L2 table, so a part of the disk cannot be read; restore that "
            "part from a backup."
        ),
        needs_check=True,
    ),
    Kind(
        "l1-table.entry.past-eof", L1_TABLE, "entry", UNUSABLE,
        qemu_message=_PAST_EOF,
        meaning=(
            "The file was cut off before the L2 table, so a part of the disk reads as zeros; "
            "restore that part from a backup."
        ),
        needs_check=True,
        is_past_end=True,
    ),
    Kind(
        "l1-table.entry.copied", L1_TABLE, "entry", UNUSABLE,
        qemu_message="OFLAG_COPIED L2 cluster",
        meaning=(
            "The entry says wrongly whether its L2 table can be changed in place; take a copy, "
            "then run qemu-img check -r all."
        ),
        needs_check=True,
    ),
    Kind(
        "l1-table.entry.more", L1_TABLE, "entry", NOTE,
        meaning="There are more such entries than are listed; nothing more to do than for those.",
        needs_check=True,
        stands_for_more=True,
    ),
    Kind(
        "l2-table.entry.reserved", L2_TABLE, "entry", UNUSABLE,
        qemu_message="ERROR found l2 entry with reserved bits set",
        meaning=(
            "The entry has bits that mean nothing, so it was overwritten; take a copy, and compare "
            "the disk with a backup."
        ),
        needs_check=True,
    ),
    Kind(
        "l2-table.entry.unaligned", L2_TABLE, "entry", UNUSABLE,
        qemu_message="is not properly aligned; L2 entry corrupted",
        meaning=(
            "The entry leads to no cluster, so a part of the disk cannot be read; restore that "
            "part from a backup."
        ),
        needs_check=True,
    ),
    Kind(
        "l2-table.entry.past-eof", L2_TABLE, "entry", UNUSABLE,
        qemu_message=_PAST_EOF,
        meaning=(
            "The file was cut off before the cluster, so a part of the disk reads as zeros; "
            "restore that part from a backup."
        ),
        needs_check=True,
        is_past_end=True,
    ),
    Kind(
        "l2-table.entry.copied", L2_TABLE, "entry", UNUSABLE,
        qemu_message="OFLAG_COPIED data cluster",
        meaning=(
            "The entry says wrongly whether its cluster can be written in place; take a copy, then "
            "run qemu-img check -r all."
        ),
        needs_check=True,
    ),
    Kind(
        "l2-table.entry.compressed", L2_TABLE, "entry", UNUSABLE,
        qemu_message="compressed cluster",
        meaning=(
            "A compressed cluster is where none can be; take a copy, and compare the disk with a "
            "backup."
        ),
        needs_check=True,
    ),
    Kind(
        "l2-table.entry.subclusters", L2_TABLE, "entry", UNUSABLE,
        qemu_message="corrupted subcluster allocation bitmap",
        meaning=(
            "The entry says of a part of its cluster that it has data and reads as zeros, or has "
            "data where there is no cluster; take a copy, and compare the disk with a backup."
        ),
        needs_check=True,
    ),
    Kind(
        "l2-table.entry.more", L2_TABLE, "entry", NOTE,
        meaning="There are more such entries than are listed; nothing more to do than for those.",
        needs_check=True,
        stands_for_more=True,
    ),
)
# fmt: on

KINDS: dict[str, Kind] = {kind.id: kind for kind in _ALL}
"""Every kind of problem by its id."""

UNKNOWN_FEATURE = KINDS["header.incompatible_features.unknown"]
BITMAPS_GONE = KINDS["header.autoclear_features.no-bitmaps"]
EXTENSION_LENGTH = KINDS["header-extension.bitmaps.length"]


def summary_of(structure: str) -> Kind:
    """Returns the kind that stands for the problems of a structure that are not listed.

    Raises:
        KeyError: all problems of this structure are listed.
    """
    for kind in _ALL:
        if kind.structure == structure and kind.stands_for_more:
            return kind
    raise KeyError(structure)
