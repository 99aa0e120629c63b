r"""qcow2 images built in memory without QEMU: sound ones, and ones with a fault planted.

    image = build_image(Stored(b"daily", [ONES, b"\x01"]), size=1 << 29)
    offset = image.plant(7, "directory-entry", 0, "type")
    qcow2bm.open(image.data)

What `build_image` returns is sound, with refcounts that `qemu-img check` finds right, as long as
its arguments are. Every structure and field is found by name in `Built.offset`, so that a test
says which one it breaks, not where that happens to lie.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from qcow2bm.format.bitmap_table import ENTRY_LENGTH, build_bitmap_table
from qcow2bm.format.directory import (
    FIELD_OFFSETS as ENTRY_OFFSETS,
)
from qcow2bm.format.directory import (
    FLAG_AUTO,
    HEAD_LENGTH,
    TYPE_DIRTY_TRACKING,
    Directory,
    DirectoryEntry,
    build_directory,
)
from qcow2bm.format.extensions import (
    BITMAPS,
    BITMAPS_LENGTH,
    BitmapsExtension,
    HeaderExtension,
    HeaderExtensions,
    build_bitmaps_extension,
    build_extensions,
)
from qcow2bm.format.features import AUTOCLEAR_BITMAPS
from qcow2bm.format.header import FIELD_OFFSETS as HEADER_OFFSETS
from qcow2bm.format.header import V2_LENGTH, Header, build_header
from qcow2bm.format.refcounts import build_refcount_block, build_refcount_table
from qcow2bm.units import align_up, ceil_div

ZEROES, ONES = 0, 1
"""The table words of a cluster that is not stored because all its bits are the same."""

Word = int | bytes
"""A table entry: `ZEROES`, `ONES`, any other raw word, or the bytes of a cluster to store."""


class Stored(NamedTuple):
    """One bitmap to store.

    Without a ``table`` all of it is clean. A cluster given as bytes is filled up with zeros.
    ``padding`` is that of the directory entry; ``after_table`` stands in the table's last
    cluster behind its entries, as leftovers do.
    """

    name: bytes = b"daily"
    table: Sequence[Word] | None = None
    granularity_bits: int = 16
    flags: int = FLAG_AUTO
    type: int = TYPE_DIRTY_TRACKING
    extra_data: bytes = b""
    padding: bytes | None = None
    after_table: bytes = b""

    def words(self, size: int, cluster_size: int) -> Sequence[Word]:
        """The table of the bitmap, or a clean table for a disk of ``size`` bytes."""
        if self.table is not None:
            return self.table
        return (ZEROES,) * ceil_div(size, 8 * cluster_size << self.granularity_bits)


def _widths(offsets: Mapping[str, int], end: int) -> dict[str, int]:
    ends = [*list(offsets.values())[1:], end]
    return {name: stop - offsets[name] for name, stop in zip(offsets, ends, strict=True)}


_BITMAPS_OFFSETS = {
    "type": -8,
    "length": -4,
    "nb_bitmaps": 0,
    "reserved": 4,
    "bitmap_directory_size": 8,
    "bitmap_directory_offset": 16,
}
_EXTENSION_OFFSETS = {"type": 0, "length": 4, "data": 8}
_OFFSETS: dict[str, Mapping[str, int]] = {
    "header": HEADER_OFFSETS,
    "header-extension": _EXTENSION_OFFSETS,
    "bitmaps-extension": _BITMAPS_OFFSETS,
    "directory-entry": ENTRY_OFFSETS,
}
_WIDTHS = {
    "header": _widths(HEADER_OFFSETS, 112),
    "header-extension": _widths(_EXTENSION_OFFSETS, 9),
    "bitmaps-extension": _widths(_BITMAPS_OFFSETS, BITMAPS_LENGTH),
    "directory-entry": _widths(ENTRY_OFFSETS, HEAD_LENGTH),
}


class Built(NamedTuple):
    """An image, and where in it everything lies.

    ``starts`` has the host offset of each structure by (structure, index): "header",
    "header-extension" (by its place in the area, that of the bitmaps as a rule last, then the
    end marker), "bitmaps-extension" (its payload), "backing-name", "refcount-table",
    "refcount-block", "l1-table", "bitmap-directory", and by the number of the bitmap
    "directory-entry" and "bitmap-table".
    """

    data: bytearray
    cluster_size: int
    starts: dict[tuple[str, int], int]
    clusters: dict[tuple[int, int], int]
    entries: tuple[DirectoryEntry, ...]

    def offset(self, structure: str, index: int = 0, field: str | int = "") -> int:
        """The host offset of a structure, or of one field of it.

        The field is a name, in "bitmap-table" the number of an entry. "bitmap-data" has the
        clusters that are stored, by the number of their table entry.
        """
        if structure == "bitmap-data":
            return self.clusters[index, int(field or 0)]
        start = self.starts[structure, index]
        if isinstance(field, int):
            return start + ENTRY_LENGTH * field
        if structure == "directory-entry" and field in ("extra_data", "name", "padding"):
            return self.entries[index].offset_of(field)
        return start + _OFFSETS[structure][field] if field else start

    def plant(self, value: int, structure: str, index: int = 0, field: str | int = "") -> int:
        """Puts a number into a field, or a byte where there is none; returns its host offset."""
        offset = self.offset(structure, index, field)
        names = _WIDTHS.get(structure, {})
        width = ENTRY_LENGTH if isinstance(field, int) else names.get(field, 1)
        self.data[offset : offset + width] = value.to_bytes(width, "big")
        return offset


class _Space:
    """Hands out the file's clusters from first to last."""

    def __init__(self, cluster_size: int, first_cluster: int) -> None:
        self.cluster_size = cluster_size
        self.end = first_cluster * cluster_size
        self.parts: dict[int, bytes] = {}

    def put(self, content: bytes) -> int:
        offset = self.end
        self.parts[offset] = content
        self.end += align_up(len(content), self.cluster_size)
        return offset


def extension(type: int, data: bytes) -> HeaderExtension:
    """A header extension with the padding it has to have."""
    return HeaderExtension(type, data, bytes(-len(data) % 8))


def build_image(
    *bitmaps: Stored,
    cluster_bits: int = 9,
    size: int = 1 << 20,
    version: int = 3,
    refcount_order: int = 4,
    backing_name: bytes = b"",
    extensions: Sequence[HeaderExtension] = (),
    extensions_behind: Sequence[HeaderExtension] = (),
    additional_fields: bytes = b"",
    header: Mapping[str, int] | None = None,
    autoclear: bool = True,
    directory_rest: bytes = b"",
    whole_clusters: bool = True,
) -> Built:
    """An image of a disk of ``size`` bytes, empty, with these bitmaps.

    Args:
        bitmaps: in the order of the directory; without any there is no bitmaps extension.
        extensions: the header extensions before that of the bitmaps.
        extensions_behind: those behind it.
        additional_fields: the header's bytes from 112 on.
        header: header fields that are to have another value than the sound one.
        autoclear: whether the bitmaps are marked consistent; never so in version 2.
        directory_rest: bytes of the directory behind its last entry.
        whole_clusters: whether the file's last cluster is complete. If not, the file ends with
            the last byte in use, as QEMU leaves it.
    """
    cluster_size = 1 << cluster_bits
    tables = [bitmap.words(size, cluster_size) for bitmap in bitmaps]
    entries = [_entry(number, bitmap) for number, bitmap in enumerate(bitmaps)]
    directory_size = sum(entry.size for entry in entries) + len(directory_rest)
    l1_size = max(1, ceil_div(size, cluster_size * (cluster_size // 8)))

    lengths = [8 * l1_size, directory_size]
    for bitmap, words in zip(bitmaps, tables, strict=True):
        lengths.append(ENTRY_LENGTH * len(words) + len(bitmap.after_table))
        lengths += [cluster_size for word in words if isinstance(word, bytes)]
    used = 1 + sum(ceil_div(length, cluster_size) for length in lengths)
    table_clusters, blocks = _refcount_clusters(used, cluster_size, refcount_order)
    used += table_clusters + blocks

    first_block = (1 + table_clusters) * cluster_size
    starts = {("header", 0): 0, ("refcount-table", 0): cluster_size}
    starts |= {("refcount-block", n): first_block + n * cluster_size for n in range(blocks)}
    space = _Space(cluster_size, 1 + table_clusters + blocks)
    starts["l1-table", 0] = space.put(bytes(8 * l1_size))

    clusters = {}
    for number, (bitmap, words) in enumerate(zip(bitmaps, tables, strict=True)):
        raw = array("Q")
        for place, word in enumerate(words):
            if isinstance(word, bytes):
                clusters[number, place] = word = space.put(word.ljust(cluster_size, b"\0"))
            raw.append(word)
        offset = space.put(build_bitmap_table(raw) + bitmap.after_table)
        starts["bitmap-table", number] = offset
        entries[number] = entries[number]._replace(
            bitmap_table_offset=offset, bitmap_table_size=len(words)
        )
    place = space.end
    starts["bitmap-directory", 0] = place
    for number, entry in enumerate(entries):
        entries[number] = entry._replace(offset=place)
        starts["directory-entry", number] = place
        place += entry.size
    directory = build_directory(Directory(tuple(entries), directory_rest))
    directory_offset = space.put(directory)

    fixed = Header(
        version=version,
        backing_file_offset=0,
        backing_file_size=len(backing_name),
        cluster_bits=cluster_bits,
        size=size,
        crypt_method=0,
        l1_size=l1_size,
        l1_table_offset=starts["l1-table", 0],
        refcount_table_offset=cluster_size,
        refcount_table_clusters=table_clusters,
        nb_snapshots=0,
        snapshots_offset=0,
    )
    if version == 3:
        fixed = fixed._replace(
            autoclear_features=AUTOCLEAR_BITMAPS if bitmaps and autoclear else 0,
            refcount_order=refcount_order,
            header_length=112 + len(additional_fields),
            compression_type=0,
            padding=bytes(7),
            additional_fields=additional_fields,
        )
    start = fixed.header_length if version == 3 else V2_LENGTH
    listed = list(extensions)
    if bitmaps:
        payload = BitmapsExtension(len(bitmaps), 0, len(directory), directory_offset)
        listed.append(extension(BITMAPS, build_bitmaps_extension(payload)))
    listed += extensions_behind
    area = HeaderExtensions(tuple(listed), bytes(8))
    heads = area.offsets(start)
    end = start + sum(e.size for e in listed)
    starts |= {("header-extension", n): head for n, head in enumerate((*heads, end))}
    starts["bitmaps-extension", 0] = heads[len(extensions)] + 8 if bitmaps else 0
    starts["backing-name", 0] = end + 8
    if backing_name:
        fixed = fixed._replace(backing_file_offset=end + 8)
    fixed = Header(**fixed._asdict() | dict(header or {}))
    first = build_header(fixed) + build_extensions(area) + backing_name
    if len(first) > cluster_size:
        raise ValueError(f"{len(first)} bytes of header do not fit into a cluster")

    data = bytearray(used * cluster_size)
    space.parts |= {0: first, cluster_size: _refcount_table(first_block, blocks, cluster_size)}
    refcounts = array("BBBBHIQ"[refcount_order], [1]) * used
    refcounts.extend([0] * (-used % 8))  # whole bytes, whatever the width
    space.parts[first_block] = build_refcount_block(refcounts, refcount_order)
    for offset, content in space.parts.items():
        data[offset : offset + len(content)] = content
    if not whole_clusters:
        last = max(space.parts)
        del data[last + len(space.parts[last]) :]
    return Built(data, cluster_size, starts, clusters, tuple(entries))


def small_image() -> Built:
    """A sound image with a disk of 512 MiB and two bitmaps of two clusters each, enabled both.

    Of "daily" the first granule (64 KiB) and all of the second half are dirty, of "weekly" the
    second granule of the second half.
    """
    daily = Stored(b"daily", [b"\x01", ONES])
    weekly = Stored(b"weekly", [ZEROES, b"\x02"])
    return build_image(daily, weekly, size=2 * 8 * 512 << 16)


def _entry(number: int, bitmap: Stored) -> DirectoryEntry:
    tail = len(bitmap.extra_data) + len(bitmap.name)
    return DirectoryEntry(
        number=number,
        offset=0,
        bitmap_table_offset=0,
        bitmap_table_size=0,
        flags=bitmap.flags,
        type=bitmap.type,
        granularity_bits=bitmap.granularity_bits,
        name_size=len(bitmap.name),
        extra_data_size=len(bitmap.extra_data),
        extra_data=bitmap.extra_data,
        name_bytes=bitmap.name,
        padding=bytes(-tail % 8) if bitmap.padding is None else bitmap.padding,
    )


def _refcount_clusters(used: int, cluster_size: int, refcount_order: int) -> tuple[int, int]:
    """The clusters of a refcount table and its blocks that count ``used`` others and themselves."""
    per_block = 8 * cluster_size >> refcount_order
    table = blocks = 1
    while used + table + blocks > blocks * per_block:
        blocks += 1
        table = ceil_div(8 * blocks, cluster_size)
    return table, blocks


def _refcount_table(first_block: int, blocks: int, cluster_size: int) -> bytes:
    # The blocks stand one after the other, so that their content is one run of refcounts.
    return build_refcount_table(array("Q", (first_block + n * cluster_size for n in range(blocks))))
