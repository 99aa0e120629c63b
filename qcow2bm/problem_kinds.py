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
            "The name of the backing file would lie outside the first cluster. Keep a copy of the "
            "header, then set the right name. Bitmaps do not depend on it."
        ),
    ),
    Kind(
        "header.backing_file_size.too-large", HEADER, "backing_file_size", REFUSED,
        qemu_message="Backing file name too long",
        meaning=(
            "The name of the backing file is longer than the room for it. Bitmaps do not depend on "
            "it. Restore the header from a copy. No bitmap is to be trusted then: run invalidate "
            "IMAGE --all."
        ),
    ),
    Kind(
        "header.size.unaligned", HEADER, "size", NOTE,
        meaning=(
            "The size of the disk is not a whole number of sectors. QEMU rounds it down. Nothing "
            "needs to be done."
        ),
    ),
    Kind(
        "header.size.too-large", HEADER, "size", REFUSED,
        qemu_message="Image is too big",
        meaning=(
            "The size of the disk is impossible, so no bitmap can be matched to the disk. Restore "
            "the header from a copy. No bitmap is to be trusted then: run invalidate IMAGE --all."
        ),
        distrusts_all=True,
    ),
    Kind(
        "header.crypt_method.unknown", HEADER, "crypt_method", REFUSED,
        qemu_message="Unsupported encryption method",
        meaning=(
            "The disk is encrypted by an unknown method. Bitmaps are not encrypted and can be "
            "read, but the disk cannot."
        ),
    ),
    Kind(
        "header.l1_size.too-small", HEADER, "l1_size", REFUSED,
        qemu_message="L1 table is too small",
        meaning=(
            "The L1 table does not cover the disk, so it does not belong to a disk of this size. "
            "Restore the header from a copy. No bitmap is to be trusted then: run invalidate IMAGE "
            "--all."
        ),
    ),
    Kind(
        "header.l1_size.too-large", HEADER, "l1_size", REFUSED,
        qemu_message="Active L1 table too large",
        meaning=(
            "The size of the L1 table is impossible. Restore the header from a copy. No bitmap is "
            "to be trusted then: run invalidate IMAGE --all."
        ),
    ),
    Kind(
        "header.l1_table_offset.invalid", HEADER, "l1_table_offset", REFUSED,
        qemu_message="Active L1 table offset invalid",
        meaning=(
            "The L1 table is in an impossible place: it must begin at the start of a cluster and "
            "end before 2^63. Restore the header from a copy. No bitmap is to be trusted then: run "
            "invalidate IMAGE --all."
        ),
    ),
    Kind(
        "header.l1_table_offset.past-eof", HEADER, "l1_table_offset", UNUSABLE,
        meaning=(
            "The file was cut off before the L1 table. The content of the disk is lost, although "
            "QEMU opens the image. Restore the file from a backup. No bitmap is to be trusted "
            "then: run invalidate IMAGE --all."
        ),
        is_past_end=True,
    ),
    Kind(
        "header.l1_table_offset.unreadable", HEADER, "l1_table_offset", REFUSED,
        qemu_message="Could not read L1 table",
        meaning=(
            "The L1 table would end behind the longest file that QEMU reads, 2^63 - 2^30 bytes. "
            "Restore the header from a copy. No bitmap is to be trusted then: run invalidate IMAGE "
            "--all."
        ),
    ),
    Kind(
        "header.refcount_table_offset.invalid", HEADER, "refcount_table_offset", REFUSED,
        qemu_message="Reference count table offset invalid",
        meaning=(
            "The refcount table is in an impossible place: it must begin at the start of a cluster "
            "and end before 2^63. Restore the header from a copy. No bitmap is to be trusted then: "
            "run invalidate IMAGE --all."
        ),
    ),
    Kind(
        "header.refcount_table_offset.past-eof", HEADER, "refcount_table_offset", UNUSABLE,
        meaning=(
            "The file was cut off before the refcount table. Take a copy of the image, then let "
            "qemu-img check -r all rebuild the refcount table."
        ),
        is_past_end=True,
    ),
    Kind(
        "header.refcount_table_offset.unreadable", HEADER, "refcount_table_offset", REFUSED,
        qemu_message="Could not initialize refcount handling",
        meaning=(
            "The refcount table would end behind the longest file that QEMU reads. Restore the "
            "header from a copy. No bitmap is to be trusted then: run invalidate IMAGE --all."
        ),
    ),
    Kind(
        "header.refcount_table_clusters.zero", HEADER, "refcount_table_clusters", REFUSED,
        qemu_message="Image does not contain a reference count table",
        meaning=(
            "The image has no refcount table. Take a copy of the image, then let qemu-img check -r "
            "all rebuild the refcount table."
        ),
    ),
    Kind(
        "header.refcount_table_clusters.too-large", HEADER, "refcount_table_clusters", REFUSED,
        qemu_message="Reference count table too large",
        meaning=(
            "The size of the refcount table is impossible. Restore the header from a copy. No "
            "bitmap is to be trusted then: run invalidate IMAGE --all."
        ),
    ),
    Kind(
        "header.nb_snapshots.too-large", HEADER, "nb_snapshots", REFUSED,
        qemu_message="Snapshot table too large",
        meaning=(
            "The number of snapshots is impossible. Restore the header from a copy. No bitmap is "
            "to be trusted then: run invalidate IMAGE --all."
        ),
    ),
    Kind(
        "header.snapshots_offset.invalid", HEADER, "snapshots_offset", REFUSED,
        qemu_message="Snapshot table offset invalid",
        meaning=(
            "The snapshot table is in an impossible place: it must begin at the start of a cluster "
            "and end before 2^63. Restore the header from a copy. No bitmap is to be trusted then: "
            "run invalidate IMAGE --all."
        ),
    ),
    Kind(
        "header.snapshots_offset.past-eof", HEADER, "snapshots_offset", UNUSABLE,
        meaning=(
            "The file was cut off before the snapshot table. The snapshots are lost, but the disk "
            "and the bitmaps are not."
        ),
        is_past_end=True,
    ),
    Kind(
        "header.snapshots_offset.unreadable", HEADER, "snapshots_offset", REFUSED,
        qemu_message="Failed to read snapshot table",
        meaning=(
            "The snapshot table would end behind the longest file that QEMU reads. Restore the "
            "header from a copy. No bitmap is to be trusted then: run invalidate IMAGE --all."
        ),
    ),
    Kind(
        "snapshot-table.size.too-large", SNAPSHOT_TABLE, "", REFUSED,
        qemu_message="Snapshot table is too big",
        meaning=(
            "The snapshot table is longer than 64 MiB, which is more than QEMU reads: it was "
            "overwritten, or has thousands of snapshots. Take a copy of the image, then let "
            "qemu-img check -r all drop what is too much. Bitmaps can be read."
        ),
    ),
    Kind(
        "snapshot-table.extra_data_size.too-large", SNAPSHOT_TABLE, "extra_data_size", REFUSED,
        qemu_message="Too much extra metadata in snapshot table entry",
        meaning=(
            "A newer program stored more about a snapshot than QEMU reads, or the snapshot table "
            "was overwritten. Take a copy of the image, then let qemu-img check -r all drop what "
            "is too much. Bitmaps can be read."
        ),
    ),
    Kind(
        "header.incompatible_features.unknown", HEADER, "incompatible_features", REFUSED,
        qemu_message="Unsupported qcow2 feature(s)",
        meaning=(
            "A newer program made the image, so this program cannot interpret anything in it. Use "
            "that program, or a newer version of this one."
        ),
        distrusts_all=True,
    ),
    Kind(
        "header.incompatible_features.dirty", HEADER, "incompatible_features", NOTE,
        meaning=(
            "The program that wrote the image last was interrupted, so refcounts are outdated. "
            "QEMU repairs them when it next opens the image for writing."
        ),
    ),
    Kind(
        "header.incompatible_features.corrupt", HEADER, "incompatible_features", NOTE,
        meaning=(
            "QEMU found damage in the image, and no longer writes to it. Take a copy of the image, "
            "then run qemu-img check -r all."
        ),
    ),
    Kind(
        "header.incompatible_features.extended-l2", HEADER, "incompatible_features", REFUSED,
        qemu_message="Unsupported subcluster size",
        meaning=(
            "Extended L2 entries need clusters of 16 KiB or more, so the feature bit is wrong. "
            "Restore the header from a copy. No bitmap is to be trusted then: run invalidate IMAGE "
            "--all."
        ),
    ),
    Kind(
        "header.autoclear_features.unknown", HEADER, "autoclear_features", NOTE,
        meaning=(
            "The image uses a newer feature, which a program that writes must switch off. A reader "
            "needs to do nothing."
        ),
    ),
    Kind(
        "header.autoclear_features.no-bitmaps", HEADER, "autoclear_features", UNUSABLE,
        meaning=(
            "The header says that the image has bitmaps, but the bitmaps are gone. Let repair "
            "clear the bit before the next write, which would make QEMU mark the image corrupt. "
            "Take full backups."
        ),
        repair="directory",
    ),
    Kind(
        "header.autoclear_features.no-data-file", HEADER, "autoclear_features", REFUSED,
        qemu_message="data-file-raw requires a data file",
        meaning=(
            "The header says that the data file is raw, but the image has no data file. Clear the "
            "bit, or restore the header from a copy. No bitmap is to be trusted then: run "
            "invalidate IMAGE --all."
        ),
    ),
    Kind(
        "header.refcount_order.too-large", HEADER, "refcount_order", REFUSED,
        qemu_message="Reference count entry width too large",
        meaning=(
            "The width of a refcount is impossible. Restore the header from a copy. No bitmap is "
            "to be trusted then: run invalidate IMAGE --all."
        ),
    ),
    Kind(
        "header.header_length.too-small", HEADER, "header_length", REFUSED,
        qemu_message="qcow2 header too short",
        meaning=(
            "The place where the header extensions begin is unknown, so no bitmap can be found. "
            "Restore the header from a copy. No bitmap is to be trusted then: run invalidate IMAGE "
            "--all."
        ),
    ),
    Kind(
        "header.header_length.too-large", HEADER, "header_length", REFUSED,
        qemu_message="qcow2 header exceeds cluster size",
        meaning=(
            "The place where the header extensions begin is unknown, so no bitmap can be found. "
            "Restore the header from a copy. No bitmap is to be trusted then: run invalidate IMAGE "
            "--all."
        ),
    ),
    Kind(
        "header.header_length.unaligned", HEADER, "header_length", COSMETIC,
        meaning=(
            "The length of the header breaks the specification, but QEMU accepts it. Nothing needs "
            "to be done."
        ),
    ),
    Kind(
        "header.compression_type.unknown", HEADER, "compression_type", REFUSED,
        qemu_message="unknown compression type",
        meaning=(
            "Clusters are compressed by an unknown method. Bitmaps can be read, but compressed "
            "parts of the disk cannot."
        ),
    ),
    Kind(
        "header.compression_type.bit-missing", HEADER, "compression_type", REFUSED,
        qemu_message="Compression type incompatible feature bit must be set",
        meaning=(
            "The compression type and its feature bit contradict each other. Restore the header "
            "from a copy. No bitmap is to be trusted then: run invalidate IMAGE --all."
        ),
    ),
    Kind(
        "header.compression_type.bit-unexpected", HEADER, "compression_type", REFUSED,
        qemu_message="Compression type incompatible feature bit must not be set",
        meaning=(
            "The compression type and its feature bit contradict each other. Restore the header "
            "from a copy. No bitmap is to be trusted then: run invalidate IMAGE --all."
        ),
    ),
    Kind(
        "header.padding.nonzero", HEADER, "padding", COSMETIC,
        meaning=(
            "Bytes that should be zero are not, but no program reads them. Nothing needs to be "
            "done."
        ),
    ),
    Kind(
        "header-extension.length.too-large", HEADER_EXTENSION, "length", REFUSED,
        qemu_message="Header extension too large",
        meaning=(
            "A header extension or the end marker claims more bytes than there are, or fewer than "
            "8 bytes are left for the next one. What follows is unknown. Restore the header from a "
            "copy. No bitmap is to be trusted then: run invalidate IMAGE --all."
        ),
    ),
    Kind(
        "header-extension.end.missing", HEADER_EXTENSION, "end marker", NOTE,
        meaning=(
            "The header extensions fill all the room there is, and have no end marker. Nothing "
            "needs to be done."
        ),
    ),
    Kind(
        "header-extension.padding.nonzero", HEADER_EXTENSION, "padding", COSMETIC,
        meaning=(
            "Bytes that should be zero are not, but no program reads them. Nothing needs to be "
            "done."
        ),
    ),
    Kind(
        "header-extension.backing-format.too-long", HEADER_EXTENSION, "backing format", REFUSED,
        qemu_message="ERROR: ext_backing_format: len=",
        meaning=(
            "The format of the backing file is longer than any that QEMU knows. Restore the header "
            "from a copy. No bitmap is to be trusted then: run invalidate IMAGE --all. If the "
            "image opens again, set the format with qemu-img rebase -u."
        ),
    ),
    Kind(
        "header-extension.crypto.missing", HEADER_EXTENSION, "crypto header", REFUSED,
        qemu_message="Missing CRYPTO header for crypt method 2",
        meaning=(
            "The disk is encrypted with LUKS, but nothing says where its keys are. Bitmaps can be "
            "read. Restore the header from a copy. No bitmap is to be trusted then: run invalidate "
            "IMAGE --all."
        ),
    ),
    Kind(
        "header-extension.crypto.unexpected", HEADER_EXTENSION, "crypto header", REFUSED,
        qemu_message="CRYPTO header extension only expected with LUKS encryption method",
        meaning=(
            "A header extension says where the keys of an encrypted disk are, but the header says "
            "that the disk is not encrypted with LUKS. Bitmaps can be read. Restore the header "
            "from a copy. No bitmap is to be trusted then: run invalidate IMAGE --all."
        ),
    ),
    Kind(
        "header-extension.crypto.length", HEADER_EXTENSION, "crypto header length", REFUSED,
        qemu_message="CRYPTO header extension size",
        meaning=(
            "The disk is encrypted with LUKS, but the extension that says where its keys are has a "
            "wrong length. Bitmaps can be read. Restore the header from a copy. No bitmap is to be "
            "trusted then: run invalidate IMAGE --all."
        ),
    ),
    Kind(
        "header-extension.crypto.unaligned", HEADER_EXTENSION, "crypto header", REFUSED,
        qemu_message="is not a multiple of cluster size",
        meaning=(
            "The keys of the encrypted disk are in an impossible place. Bitmaps can be read. "
            "Restore the header from a copy. No bitmap is to be trusted then: run invalidate IMAGE "
            "--all."
        ),
    ),
    Kind(
        "header-extension.bitmaps.duplicate", HEADER_EXTENSION, "bitmaps", COSMETIC,
        meaning=(
            "The image has two bitmaps extensions, and only the last one counts. QEMU removes the "
            "other one at its next write."
        ),
        forbids_edit=True,
    ),
    Kind(
        "header-extension.bitmaps.length", HEADER_EXTENSION, "bitmaps length", REFUSED,
        qemu_message="bitmaps_ext: Invalid extension length",
        meaning=(
            "The length of the bitmaps extension is impossible, so no bitmap can be found. Let "
            "repair set the length, which brings the bitmaps back if nothing else is wrong; "
            "otherwise take full backups. To clear autoclear bit 0 alone does not help: QEMU "
            "checks the length even then."
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
            "A program without bitmap support wrote to the image, so all bitmaps miss writes. If "
            "you need one for the next incremental backup, salvage it before another program "
            "writes to the image and drops it; otherwise take a full backup. To free the clusters "
            "of the bitmaps, run repair --only stale --only refcounts."
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
            "The image was converted to version 2, which has no bitmaps, so all bitmaps miss "
            "writes. Take a full backup. To free the clusters of the bitmaps, run qemu-img check "
            "-r leaks."
        ),
    ),
    Kind(
        "bitmaps-extension.nb_bitmaps.zero", BITMAPS_EXTENSION, "nb_bitmaps", REFUSED,
        qemu_message="found bitmaps extension with zero bitmaps",
        meaning=(
            "The number of bitmaps is wrong. The bitmaps that are found in the directory are shown "
            "and can be read."
        ),
        repair="directory",
        breaks_directory_end=True,
    ),
    Kind(
        "bitmaps-extension.nb_bitmaps.too-large", BITMAPS_EXTENSION, "nb_bitmaps", REFUSED,
        qemu_message="bitmaps, exceeding the QEMU supported maximum of 65535",
        meaning=(
            "The number of bitmaps is wrong. The bitmaps that are found in the directory are shown "
            "and can be read."
        ),
        repair="directory",
        breaks_directory_end=True,
    ),
    Kind(
        "bitmaps-extension.nb_bitmaps.less", BITMAPS_EXTENSION, "nb_bitmaps", REFUSED,
        qemu_message="More bitmaps found than specified in header extension",
        meaning=(
            "The directory has more bitmaps than nb_bitmaps says. All of them are shown, and as "
            "many as nb_bitmaps says can be read."
        ),
        repair="directory",
        breaks_directory_end=True,
    ),
    Kind(
        "bitmaps-extension.nb_bitmaps.more", BITMAPS_EXTENSION, "nb_bitmaps", REFUSED,
        qemu_message="Less bitmaps found than specified in header extension",
        meaning=(
            "The directory has fewer bitmaps than nb_bitmaps says. Those that are found can be "
            "read. Look whether a name is missing."
        ),
        repair="directory",
        breaks_directory_end=True,
    ),
    Kind(
        "bitmaps-extension.reserved.nonzero", BITMAPS_EXTENSION, "reserved", REFUSED,
        qemu_message="bitmaps_ext: Reserved field is not zero",
        meaning="A reserved field is in use, perhaps by a newer program. Bitmaps can be read.",
        repair="directory",
    ),
    Kind(
        "bitmaps-extension.bitmap_directory_size.zero",
        BITMAPS_EXTENSION,
        "bitmap_directory_size",
        REFUSED,
        qemu_message="Requested bitmap directory size is zero",
        meaning=(
            "The size of the directory is lost, and with it the bitmaps. Let repair look for them; "
            "otherwise take full backups."
        ),
        repair="directory",
        breaks_directory_end=True,
    ),
    Kind(
        "bitmaps-extension.bitmap_directory_size.too-large",
        BITMAPS_EXTENSION,
        "bitmap_directory_size",
        REFUSED,
        qemu_message="exceeds the maximum supported size",
        meaning="The size of the directory is impossible. The entries at its start are shown.",
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
            "The directory is in an impossible place, so nothing that is found there is believed. "
            "Take full backups."
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
            "The directory would be where the header is, so no bitmap can be found. Take full "
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
            "The file was cut off before the directory. The bitmaps are lost, and guest data may "
            "be lost, too. Check the disk, then take full backups."
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
            "The offset of the directory is behind the end of any file, so the bitmaps are lost. "
            "Take full backups."
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
            "The file was cut off within the directory, or the size of the directory is wrong. The "
            "bitmaps that are left can be read. Take full backups instead of the others."
        ),
        repair="directory",
        is_past_end=True,
        breaks_directory_end=True,
    ),
    Kind(
        "bitmap-directory.overlap", DIRECTORY, "", UNUSABLE,
        meaning=(
            "The directory and something else use the same clusters, so one of them was "
            "overwritten. Take full backups, and check the image."
        ),
        repair="directory",
        is_overlap=True,
    ),
    Kind(
        "bitmap-directory.rest", DIRECTORY, "", REFUSED,
        qemu_message=_BROKEN_DIRECTORY,
        meaning="Bytes after the last entry form no entry. The bitmaps before them can be read.",
        repair="directory",
        breaks_directory_end=True,
    ),
    Kind(
        "bitmap-directory.zeroes", DIRECTORY, "", REFUSED,
        qemu_message="More bitmaps found than specified in header extension",
        meaning=(
            "The directory is longer than its entries, and the rest is zeros. All bitmaps can be "
            "read."
        ),
        repair="directory",
        breaks_directory_end=True,
    ),
    Kind(
        "bitmap-directory.zero-entries", DIRECTORY, "", REFUSED,
        qemu_message=_CONSTRAINTS,
        meaning=(
            "Zeros are stored where the last entries should be, as in a cluster that was freed. "
            "The bitmaps before them can be read. Take full backups instead of the others."
        ),
        repair="directory",
        breaks_directory_end=True,
    ),
    Kind(
        "directory-entry.surplus", ENTRY, "", UNUSABLE,
        meaning=(
            "The directory has this entry beyond the number that nb_bitmaps says, so it may be "
            "left over from an older directory. Take a full backup."
        ),
        repair="directory",
    ),
    Kind(
        "directory-entry.truncated", ENTRY, "", REFUSED,
        qemu_message=_BROKEN_DIRECTORY,
        meaning=(
            "The entry reaches past the end of the directory, so its name is unknown. A size in "
            "the entry is wrong, or the directory was cut off. Take a full backup if a bitmap is "
            "missing."
        ),
        repair="directory",
        breaks_directory_end=True,
    ),
    Kind(
        "directory-entry.bitmap_table_offset.zero", ENTRY, "bitmap_table_offset", REFUSED,
        qemu_message=_CONSTRAINTS,
        meaning="The bitmap has no table. Take a full backup, and let repair drop the bitmap.",
        repair="directory",
    ),
    Kind(
        "directory-entry.bitmap_table_offset.unaligned", ENTRY, "bitmap_table_offset", REFUSED,
        qemu_message=_CONSTRAINTS,
        meaning=(
            "The table of the bitmap is in an impossible place. Take a full backup, and let repair "
            "drop the bitmap."
        ),
        repair="directory",
    ),
    Kind(
        "directory-entry.bitmap_table_offset.past-eof", ENTRY, "bitmap_table_offset", UNUSABLE,
        meaning=(
            "The table of the bitmap lies behind the end of the file. QEMU reads zeros there, and "
            "takes the disk for clean. Take a full backup, and remove the bitmap with qemu-img."
        ),
        repair="directory",
        is_past_end=True,
    ),
    Kind(
        "directory-entry.bitmap_table_offset.unreadable", ENTRY, "bitmap_table_offset", REFUSED,
        qemu_message=_BAD_TABLE,
        meaning=(
            "The offset of the bitmap's table is behind the end of any file. Take a full backup, "
            "and let repair drop the bitmap."
        ),
        repair="directory",
    ),
    Kind(
        "directory-entry.bitmap_table_size.zero", ENTRY, "bitmap_table_size", REFUSED,
        qemu_message=_CONSTRAINTS,
        meaning="The bitmap has no table. Take a full backup, and let repair drop the bitmap.",
        repair="directory",
    ),
    Kind(
        "directory-entry.bitmap_table_size.too-large", ENTRY, "bitmap_table_size", REFUSED,
        qemu_message=_CONSTRAINTS,
        meaning=(
            "The table is larger than QEMU accepts. Take a full backup, and let repair drop the "
            "bitmap."
        ),
        repair="directory",
    ),
    Kind(
        "directory-entry.bitmap_table_size.less", ENTRY, "bitmap_table_size", REFUSED,
        qemu_message=_CONSTRAINTS,
        meaning=(
            "The bitmap does not cover the whole disk, which was perhaps resized by another "
            "program. Repair it with fit."
        ),
        repair="directory",
        is_fittable=True,
    ),
    Kind(
        "directory-entry.bitmap_table_size.more", ENTRY, "bitmap_table_size", REFUSED,
        qemu_message="Could not read bitmap",
        meaning=(
            "The bitmap belongs to a larger disk, so the disk was perhaps resized by another "
            "program. Repair it with fit."
        ),
        repair="directory",
        is_fittable=True,
    ),
    Kind(
        "directory-entry.bitmap_table_size.outdated", ENTRY, "bitmap_table_size", NOTE,
        meaning=(
            "The bitmap is in_use, and was stored when the disk had another size. Do what its "
            "status asks for; this problem asks for nothing more."
        ),
        repair="directory",
    ),
    Kind(
        "directory-entry.flags.reserved", ENTRY, "flags", REFUSED,
        qemu_message=_CONSTRAINTS,
        meaning=(
            "The entry uses flags of unknown meaning. Use the program that wrote it, or let repair "
            "drop the bitmap."
        ),
        repair="directory",
    ),
    Kind(
        "directory-entry.flags.extra-data-compatible", ENTRY, "flags", REFUSED,
        qemu_message=_CONSTRAINTS,
        meaning=(
            "The entry has a flag that the format allows and QEMU does not. The bitmap can be "
            "read, but QEMU does not open the image. Let repair remove the flag; the bitmap is "
            "kept."
        ),
        repair="directory",
        keeps_status=True,
        costs_no_bitmap=True,
    ),
    Kind(
        "directory-entry.type.unknown", ENTRY, "type", REFUSED,
        qemu_message=_CONSTRAINTS,
        meaning=(
            "The bitmap is of an unknown type. Use the program that wrote it, or let repair drop "
            "the bitmap."
        ),
        repair="directory",
    ),
    Kind(
        "directory-entry.granularity_bits.too-large", ENTRY, "granularity_bits", REFUSED,
        qemu_message=_CONSTRAINTS,
        meaning=(
            "The granularity is larger than the format allows. Take a full backup, and let repair "
            "drop the bitmap."
        ),
        repair="directory",
    ),
    Kind(
        "directory-entry.granularity_bits.unsupported", ENTRY, "granularity_bits", REFUSED,
        qemu_message=_CONSTRAINTS,
        meaning=(
            "The format allows this granularity, but QEMU does not. The bitmap can be read, but "
            "QEMU does not open the image. Save the bitmap if you need it, then let repair drop "
            "it."
        ),
        repair="directory",
        keeps_status=True,
    ),
    Kind(
        "directory-entry.extra_data.compatible", ENTRY, "extra_data_size", REFUSED,
        qemu_message="Bitmap extra data is not supported",
        meaning=(
            "The entry has extra data marked as harmless, which the format allows and QEMU does "
            "not. The bitmap can be read, but QEMU does not open the image. Let repair remove the "
            "extra data; the bitmap is kept."
        ),
        repair="directory",
        keeps_status=True,
        costs_no_bitmap=True,
    ),
    Kind(
        "directory-entry.extra_data.incompatible", ENTRY, "extra_data_size", REFUSED,
        qemu_message="Bitmap extra data is not supported",
        meaning=(
            "The entry has extra data that change its meaning. Use the program that wrote it, or "
            "let repair drop the bitmap."
        ),
        repair="directory",
    ),
    Kind(
        "directory-entry.name_size.too-large", ENTRY, "name_size", REFUSED,
        qemu_message=_CONSTRAINTS,
        meaning=(
            "The name is longer than QEMU accepts. The bitmap can be read, but QEMU does not open "
            "the image. Let repair cut the name; the bitmap is kept."
        ),
        repair="directory",
        keeps_status=True,
        costs_no_bitmap=True,
    ),
    Kind(
        "directory-entry.name.empty", ENTRY, "name_size", COSMETIC,
        meaning="The bitmap has no name. Address it by its number, such as @2.",
        repair="directory",
    ),
    Kind(
        "directory-entry.name.nul", ENTRY, "name", COSMETIC,
        meaning=(
            "The name contains a NUL byte, where it ends for QEMU. If QEMU opens the image for "
            "writing, it may fail, or cut the name."
        ),
        repair="directory",
        suggests_misreading=True,
    ),
    Kind(
        "directory-entry.name.duplicate", ENTRY, "name", REFUSED,
        qemu_message="Bitmap already exists",
        meaning=(
            "Several bitmaps have this name, and nothing says which of them is meant. Look at each "
            "by its number. Let repair give them new names, or take a full backup and remove them."
        ),
        repair="directory",
        costs_no_bitmap=True,
    ),
    Kind(
        "directory-entry.padding.nonzero", ENTRY, "padding", COSMETIC,
        meaning=(
            "Bytes that should be zero are not, but no program reads them. Nothing needs to be "
            "done."
        ),
        repair="directory",
        suggests_misreading=True,
    ),
    Kind(
        "bitmap-table.limit", TABLE, "", UNUSABLE,
        meaning=(
            "The tables before this one are 256 MiB together, more than any image needs, so this "
            "table was not read. Look at the image again when it has fewer bitmaps."
        ),
        repair="directory",
        costs_no_bitmap=True,
    ),
    Kind(
        "bitmap-table.overlap", TABLE, "", UNUSABLE,
        meaning=(
            "The table and something else use the same clusters, so one of them was overwritten. "
            "Take a full backup, and check the image."
        ),
        repair="directory",
        is_overlap=True,
    ),
    Kind(
        "bitmap-table.entry.reserved", TABLE, "entry", REFUSED,
        qemu_message=_BAD_TABLE,
        meaning=(
            "The table was overwritten, or comes from a newer program. Take a full backup, and let "
            "repair drop the bitmap."
        ),
        repair="directory",
    ),
    Kind(
        "bitmap-table.entry.unaligned", TABLE, "entry", REFUSED,
        qemu_message=_BAD_TABLE,
        meaning="The table was overwritten. Take a full backup, and let repair drop the bitmap.",
        repair="directory",
    ),
    Kind(
        "bitmap-table.entry.past-eof", TABLE, "entry", UNUSABLE,
        meaning=(
            "Bitmap data lie behind the end of the file. QEMU reads zeros there, and takes the "
            "disk for clean. Take a full backup, and remove the bitmap with qemu-img."
        ),
        repair="directory",
        is_past_end=True,
    ),
    Kind(
        "bitmap-table.entry.more", TABLE, "entry", NOTE,
        meaning=(
            "The table has more bad entries than are listed, as a table has that was overwritten."
        ),
        repair="directory",
        stands_for_more=True,
    ),
    Kind(
        "bitmap-data.overlap", DATA, "", UNUSABLE,
        meaning=(
            "Bitmap data and something else use the same clusters, so one of them was overwritten. "
            "Take a full backup, and check the image."
        ),
        repair="directory",
        is_overlap=True,
    ),
    Kind(
        "bitmap-data.tail", DATA, "", COSMETIC,
        meaning=(
            "Bits behind the end of the disk are set, as QEMU itself leaves them. They stand for "
            "nothing. Nothing needs to be done."
        ),
        repair="tails",
        needs_check=True,
    ),
    Kind(
        "bitmap-data.beyond", DATA, "", UNUSABLE,
        meaning=(
            "Bits far behind the end of the disk are set, where no program leaves any, so the "
            "granularity or the size was changed. Take a full backup, and let repair drop the "
            "bitmap."
        ),
        repair="directory",
        needs_check=True,
    ),
    Kind(
        "cluster.refcount.too-low", CLUSTER, "", UNUSABLE,
        qemu_message="ERROR cluster",
        meaning=(
            "The cluster is used more often than its refcount says, so a program that writes may "
            "take it for free and overwrite it. Take a copy of the image, then run qemu-img check "
            "-r all."
        ),
        repair="refcounts",
        needs_check=True,
        is_undercount=True,
    ),
    Kind(
        "cluster.refcount.leak", CLUSTER, "", LEAK,
        qemu_message="Leaked cluster",
        meaning=(
            "The cluster has a refcount, but nothing uses it. Space is lost, and nothing else. If "
            "the image has stale bitmaps, the cluster may be theirs: salvage them first. To free "
            "the cluster, run qemu-img check -r leaks."
        ),
        repair="refcounts",
        needs_check=True,
    ),
    Kind(
        "cluster.refcount.more", CLUSTER, "", NOTE,
        meaning=(
            "More clusters have such a refcount than are listed. Do for them what the listed ones "
            "need."
        ),
        repair="refcounts",
        needs_check=True,
        stands_for_more=True,
    ),
    Kind(
        "snapshot-table.past-eof", SNAPSHOT_TABLE, "", UNUSABLE,
        meaning=(
            "The file was cut off within the snapshot table. Snapshots are lost, and it is not "
            "known which clusters were theirs. Take a copy of the image, then run qemu-img check "
            "-r all."
        ),
        needs_check=True,
        is_past_end=True,
    ),
    Kind(
        "snapshot-table.entry.incomplete", SNAPSHOT_TABLE, "entry", UNUSABLE,
        qemu_message="ERROR snapshot table entry",
        meaning=(
            "The entry of the snapshot lacks fields that version 3 requires. Take a copy of the "
            "image, then run qemu-img check -r all."
        ),
        needs_check=True,
    ),
    Kind(
        "snapshot-table.entry.more", SNAPSHOT_TABLE, "entry", NOTE,
        meaning=(
            "More entries have this fault than are listed. Do for them what the listed ones need."
        ),
        needs_check=True,
        stands_for_more=True,
    ),
    Kind(
        "refcount-table.entry.invalid", REFCOUNT_TABLE, "entry", UNUSABLE,
        qemu_message="refcount table entry corrupted",
        meaning=(
            "The entry leads to no refcount block, so the clusters that it should count look free. "
            "Take a copy of the image, then run qemu-img check -r all."
        ),
        needs_check=True,
    ),
    Kind(
        "refcount-table.entry.past-eof", REFCOUNT_TABLE, "entry", UNUSABLE,
        qemu_message="is outside image",
        meaning=(
            "The file was cut off before the refcount block. Take a copy of the image, then run "
            "qemu-img check -r all."
        ),
        needs_check=True,
        is_past_end=True,
    ),
    Kind(
        "refcount-table.entry.shared", REFCOUNT_TABLE, "entry", UNUSABLE,
        qemu_message="ERROR refcount block",
        meaning=(
            "The refcount block and something else use the same cluster, and each will overwrite "
            "the other. Take a copy of the image, then run qemu-img check -r all."
        ),
        needs_check=True,
    ),
    Kind(
        "refcount-table.entry.more", REFCOUNT_TABLE, "entry", NOTE,
        meaning=(
            "More entries have this fault than are listed. Do for them what the listed ones need."
        ),
        needs_check=True,
        stands_for_more=True,
    ),
    Kind(
        "l1-table.past-eof", L1_TABLE, "", UNUSABLE,
        qemu_message=_PAST_EOF,
        meaning=(
            "The file was cut off before the L1 table. The content of that disk or snapshot is "
            "lost. Restore it from a backup."
        ),
        needs_check=True,
        is_past_end=True,
    ),
    Kind(
        "l1-table.invalid", L1_TABLE, "", UNUSABLE,
        qemu_message="L1 table",
        meaning=(
            "The L1 table of a snapshot is in an impossible place. The snapshot is lost, but the "
            "disk is not."
        ),
        needs_check=True,
    ),
    Kind(
        "l1-table.entry.reserved", L1_TABLE, "entry", UNUSABLE,
        qemu_message="ERROR found L1 entry with reserved bits set",
        meaning=(
            "The entry has bits set that mean nothing, so it was overwritten. Take a copy of the "
            "image, and compare the disk with a backup."
        ),
        needs_check=True,
    ),
    Kind(
        "l1-table.entry.unaligned", L1_TABLE, "entry", UNUSABLE,
        qemu_message="Table is not cluster aligned; L1 entry corrupted",
        meaning=(
            "The entry leads to no L2 table, so a part of the disk cannot be read. Restore that "
            "part from a backup."
        ),
        needs_check=True,
    ),
    Kind(
        "l1-table.entry.past-eof", L1_TABLE, "entry", UNUSABLE,
        qemu_message=_PAST_EOF,
        meaning=(
            "The file was cut off before the L2 table, so a part of the disk reads as zeros. "
            "Restore that part from a backup."
        ),
        needs_check=True,
        is_past_end=True,
    ),
    Kind(
        "l1-table.entry.copied", L1_TABLE, "entry", UNUSABLE,
        qemu_message="OFLAG_COPIED L2 cluster",
        meaning=(
            "The entry says wrongly whether its L2 table can be changed in place. Take a copy of "
            "the image, then run qemu-img check -r all."
        ),
        needs_check=True,
    ),
    Kind(
        "l1-table.entry.more", L1_TABLE, "entry", NOTE,
        meaning=(
            "More entries have this fault than are listed. Do for them what the listed ones need."
        ),
        needs_check=True,
        stands_for_more=True,
    ),
    Kind(
        "l2-table.entry.reserved", L2_TABLE, "entry", UNUSABLE,
        qemu_message="ERROR found l2 entry with reserved bits set",
        meaning=(
            "The entry has bits set that mean nothing, so it was overwritten. Take a copy of the "
            "image, and compare the disk with a backup."
        ),
        needs_check=True,
    ),
    Kind(
        "l2-table.entry.unaligned", L2_TABLE, "entry", UNUSABLE,
        qemu_message="is not properly aligned; L2 entry corrupted",
        meaning=(
            "The entry leads to no cluster, so a part of the disk cannot be read. Restore that "
            "part from a backup."
        ),
        needs_check=True,
    ),
    Kind(
        "l2-table.entry.past-eof", L2_TABLE, "entry", UNUSABLE,
        qemu_message=_PAST_EOF,
        meaning=(
            "The file was cut off before the cluster, so a part of the disk reads as zeros. "
            "Restore that part from a backup."
        ),
        needs_check=True,
        is_past_end=True,
    ),
    Kind(
        "l2-table.entry.copied", L2_TABLE, "entry", UNUSABLE,
        qemu_message="OFLAG_COPIED data cluster",
        meaning=(
            "The entry says wrongly whether its cluster can be written in place. Take a copy of "
            "the image, then run qemu-img check -r all."
        ),
        needs_check=True,
    ),
    Kind(
        "l2-table.entry.compressed", L2_TABLE, "entry", UNUSABLE,
        qemu_message="compressed cluster",
        meaning=(
            "The entry leads to a compressed cluster where none can be. Take a copy of the image, "
            "and compare the disk with a backup."
        ),
        needs_check=True,
    ),
    Kind(
        "l2-table.entry.subclusters", L2_TABLE, "entry", UNUSABLE,
        qemu_message="corrupted subcluster allocation bitmap",
        meaning=(
            "The entry says that a part of its cluster both has data and reads as zeros, or that "
            "it has data although there is no cluster. Take a copy of the image, and compare the "
            "disk with a backup."
        ),
        needs_check=True,
    ),
    Kind(
        "l2-table.entry.more", L2_TABLE, "entry", NOTE,
        meaning=(
            "More entries have this fault than are listed. Do for them what the listed ones need."
        ),
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
