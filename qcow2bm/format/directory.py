"""The bitmap directory and its entries: parsing and building.

Which values of an entry are wrong is judged in ``bitmaps/``.

*Spec*: spec/bitmaps.md, "Bitmap directory".
"""

import struct
from typing import NamedTuple

from construct import Bytes, Int8ub, Int16ub, Int32ub, Int64ub, Rebuild, Struct, len_, this

from qcow2bm.format.schema import build, field_offsets, flat_struct
from qcow2bm.units import align_up, decode_name

FLAG_IN_USE = 1 << 0
FLAG_AUTO = 1 << 1
FLAG_EXTRA_DATA_COMPATIBLE = 1 << 2
KNOWN_FLAGS = 0b111
FLAG_NAMES = {
    FLAG_IN_USE: "in-use",
    FLAG_AUTO: "auto",
    FLAG_EXTRA_DATA_COMPATIBLE: "extra-data-compatible",
}

TYPE_DIRTY_TRACKING = 1

_HEAD = Struct(
    "bitmap_table_offset" / Int64ub,
    "bitmap_table_size" / Int32ub,
    "flags" / Int32ub,
    "type" / Int8ub,
    "granularity_bits" / Int8ub,
    "name_size" / Int16ub,
    "extra_data_size" / Int32ub,
)
ENTRY = Struct(
    *_HEAD.subcons[:-2],
    "name_size" / Rebuild(Int16ub, len_(this.name)),
    "extra_data_size" / Rebuild(Int32ub, len_(this.extra_data)),
    "extra_data" / Bytes(this.extra_data_size),
    "name" / Bytes(this.name_size),
    "padding" / Bytes(lambda this: -(this.extra_data_size + this.name_size) % 8),
)

# An image may have 65,535 entries. construct would need seconds to parse that many.
_READ_HEAD = flat_struct(_HEAD)
HEAD_LENGTH = _READ_HEAD.size


FIELD_OFFSETS = field_offsets(_HEAD)
"""The byte offset of each field in a directory entry, by its name in the specification."""


class DirectoryEntry(NamedTuple):
    """One bitmap directory entry. Fields have their names in the specification.

    ``number`` is the position of the entry in the directory, from 0, and ``offset`` is the host
    offset of the entry; neither is stored in the entry. ``name_size`` and ``extra_data_size`` are
    the stored sizes. If these sizes reach beyond the end of the directory, the entry is cut off:
    then ``name_bytes`` is None, and ``extra_data`` and ``padding`` are empty.
    """

    number: int
    offset: int
    bitmap_table_offset: int
    bitmap_table_size: int
    flags: int
    type: int
    granularity_bits: int
    name_size: int
    extra_data_size: int
    extra_data: bytes
    name_bytes: bytes | None
    padding: bytes

    @property
    def index(self) -> int:  # type: ignore[override]  # tuple.index() is not needed
        """The position of the entry in the directory, from 0."""
        return self.number

    @property
    def name(self) -> str | None:
        """The name; bytes that are not UTF-8 are surrogates (PEP 383). None if cut off."""
        if self.name_bytes is None:
            return None
        return decode_name(self.name_bytes)

    @property
    def granularity(self) -> int:
        """The number of guest bytes that one bit stands for."""
        return 1 << self.granularity_bits

    @property
    def in_use(self) -> bool:
        """Whether the disk may have been changed without a record in this bitmap."""
        return bool(self.flags & FLAG_IN_USE)

    @property
    def auto(self) -> bool:
        """Whether a writer of the image must record all writes to the disk in this bitmap."""
        return bool(self.flags & FLAG_AUTO)

    @property
    def size(self) -> int:
        """The number of bytes that the entry occupies in the directory, including padding."""
        return HEAD_LENGTH + align_up(self.extra_data_size + self.name_size, 8)

    def offset_of(self, field: str) -> int:
        """The host offset of a field; ``field`` is its name in the specification."""
        if field == "extra_data":
            return self.offset + HEAD_LENGTH
        if field == "name":
            return self.offset + HEAD_LENGTH + self.extra_data_size
        if field == "padding":
            return self.offset + HEAD_LENGTH + self.extra_data_size + self.name_size
        return self.offset + FIELD_OFFSETS[field]


class Directory(NamedTuple):
    """The entries of a bitmap directory; ``rest`` is the bytes after the last entry."""

    entries: tuple[DirectoryEntry, ...]
    rest: bytes


def parse_directory(data: bytes, offset: int, max_entries: int) -> Directory:
    """Parses at most ``max_entries`` entries; ``offset`` is the host offset of ``data``.

    Accepts any bytes. Only the last entry can be cut off, and bytes that do not form an entry are
    the ``rest``. If only zeros follow, they are not parsed as entries, because the type of an entry
    is not 0.
    """
    entries: list[DirectoryEntry] = []
    position, end = 0, len(data)
    content = len(data.rstrip(b"\0"))
    while position < content and end - position >= HEAD_LENGTH and len(entries) < max_entries:
        head = _READ_HEAD.unpack_from(data, position)
        name_size, extra_data_size = head[5], head[6]
        extra = position + HEAD_LENGTH
        name = extra + extra_data_size
        padding = name + name_size
        stop = extra + align_up(extra_data_size + name_size, 8)
        place = len(entries), offset + position
        if stop > end:
            entries.append(DirectoryEntry._make((*place, *head, b"", None, b"")))
            return Directory(tuple(entries), b"")
        tail = data[extra:name], data[name:padding], data[padding:stop]
        entries.append(DirectoryEntry._make((*place, *head, *tail)))
        position = stop
    return Directory(tuple(entries), data[position:])


def build_entry_head(entry: DirectoryEntry) -> bytes:
    """Builds the bytes of an entry before its extra data, without the slow path of construct."""
    return _READ_HEAD.pack(*(getattr(entry, field) for field in FIELD_OFFSETS))


def build_entry(entry: DirectoryEntry) -> bytes:
    """Builds the bytes of an entry, with its extra data, name and padding.

    Raises:
        FormatError: a value does not fit its field.
        ValueError: the entry was cut off.
    """
    if entry.name_bytes is None:
        raise ValueError("the entry is cut off, so its name is unknown")
    return build(ENTRY, entry._asdict() | {"name": entry.name_bytes}, "bitmap directory entry")


def build_directory(directory: Directory) -> bytes:
    """Builds the bytes of a bitmap directory: the same bytes as `build_entry`, but faster.

    Raises:
        FormatError: a value does not fit its field.
        ValueError: an entry was cut off.
    """
    return b"".join(map(_build_entry_fast, directory.entries)) + directory.rest


def _build_entry_fast(entry: DirectoryEntry) -> bytes:
    extra_data, name = entry.extra_data, entry.name_bytes
    is_sound = (
        name is not None
        and (entry.extra_data_size, entry.name_size) == (len(extra_data), len(name))
        and len(entry.padding) == -(len(extra_data) + len(name)) % 8
    )
    if name is None or not is_sound:
        return build_entry(entry)  # raises the error that fits
    try:
        return build_entry_head(entry) + extra_data + name + entry.padding
    except struct.error:
        return build_entry(entry)
