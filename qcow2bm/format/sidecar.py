"""The records of a sidecar, a file that carries bitmaps beside an image: parsing and building.

*Spec*: spec/sidecar.md.
"""

from __future__ import annotations

from typing import NamedTuple

from construct import Bytes, Int8ub, Int16ub, Int32ub, Int64ub, Rebuild, Struct, len_, this

from qcow2bm.errors import FormatError, UnsupportedError
from qcow2bm.format.schema import build, field_offsets, parse

MAGIC = b"\x89qcow2bm"
VERSION = 1

AUTO = 0x01
RESERVED_FLAGS = 0xFE

MAX_HEADER_BYTES = 2 << 20  # the largest cluster
MAX_BITMAPS = 65535
MAX_NAME_BYTES = 1023
MIN_GRANULARITY_BITS, MAX_GRANULARITY_BITS = 9, 31
DIGEST_BYTES = 32

_HEAD = Struct(
    "magic" / Bytes(8),
    "version" / Int32ub,
    "header_size" / Int32ub,
    "disk_size" / Int64ub,
    "nb_bitmaps" / Int32ub,
    "reserved" / Int32ub,
)
_BITMAP = Struct(
    "data_size" / Int64ub,
    "reserved" / Int32ub,
    "flags" / Int8ub,
    "granularity_bits" / Int8ub,
    "name_size" / Rebuild(Int16ub, len_(this.name)),
    "name" / Bytes(this.name_size),
)
_BITMAP_START = Struct(*_BITMAP.subcons[:-1])
HEAD_BYTES = _HEAD.sizeof()
BITMAP_BYTES = _BITMAP_START.sizeof()
_HEAD_OFFSETS = field_offsets(_HEAD)
_BITMAP_OFFSETS = field_offsets(_BITMAP_START)


class Head(NamedTuple):
    """The record at the start of a sidecar. Sizes are in bytes; ``nb_bitmaps`` is a count."""

    header_size: int
    disk_size: int
    nb_bitmaps: int


class BitmapRecord(NamedTuple):
    """The record of a bitmap. ``name_size`` bytes of its name follow, then its data."""

    data_size: int
    flags: int
    granularity_bits: int
    name_size: int


def parse_head(data: bytes) -> Head:
    """Parses the first `HEAD_BYTES` of a sidecar.

    Raises:
        FormatError: the data are not those of a sidecar, or break a rule of the format.
        UnsupportedError: this library does not know the version of the sidecar.
    """
    found = parse(_HEAD, data, "sidecar", 0, _HEAD_OFFSETS)
    if found.magic != MAGIC:
        raise FormatError("sidecar", "magic", 0, "is not the magic of a sidecar")
    if found.version != VERSION:
        raise UnsupportedError(f"version {found.version} of sidecars, only version {VERSION}")
    for field, value, limit in (
        ("header_size", found.header_size, MAX_HEADER_BYTES),
        ("nb_bitmaps", found.nb_bitmaps, MAX_BITMAPS),
        ("reserved", found.reserved, 0),
    ):
        if value > limit:
            reason = f"is {value}, must be at most {limit}"
            raise FormatError("sidecar", field, _HEAD_OFFSETS[field], reason)
    if not found.disk_size or found.disk_size % 512:
        reason = f"is {found.disk_size}, must be a multiple of 512 and not 0"
        raise FormatError("sidecar", "disk_size", _HEAD_OFFSETS["disk_size"], reason)
    return Head(found.header_size, found.disk_size, found.nb_bitmaps)


def parse_bitmap(data: bytes, offset: int, number: int) -> BitmapRecord:
    """Parses the `BITMAP_BYTES` of the record of bitmap ``number``; ``offset`` is their offset.

    Raises:
        FormatError: the record breaks a rule of the format.
    """
    structure = f"bitmap {number}"
    found = parse(_BITMAP_START, data, structure, offset, _BITMAP_OFFSETS)
    bits, name_size = found.granularity_bits, found.name_size
    for field, value, is_right, rule in (
        ("reserved", found.reserved, not found.reserved, "0"),
        ("flags", found.flags, not found.flags & RESERVED_FLAGS, "0 or 1"),
        (
            "granularity_bits",
            bits,
            MIN_GRANULARITY_BITS <= bits <= MAX_GRANULARITY_BITS,
            f"{MIN_GRANULARITY_BITS} to {MAX_GRANULARITY_BITS}",
        ),
        ("name_size", name_size, 1 <= name_size <= MAX_NAME_BYTES, f"1 to {MAX_NAME_BYTES}"),
    ):
        if not is_right:
            reason = f"is {value}, must be {rule}"
            raise FormatError(structure, field, offset + _BITMAP_OFFSETS[field], reason)
    return BitmapRecord(found.data_size, found.flags, bits, name_size)


def build_head(head: Head) -> bytes:
    """Builds the first `HEAD_BYTES` of a sidecar.

    Raises:
        FormatError: a value does not fit its field.
    """
    return build(
        _HEAD, {"magic": MAGIC, "version": VERSION, "reserved": 0, **head._asdict()}, "sidecar"
    )


def build_bitmap(data_size: int, flags: int, granularity_bits: int, name: bytes) -> bytes:
    """Builds the record of a bitmap and its name; raises as `build_head` does."""
    values = {
        "data_size": data_size,
        "reserved": 0,
        "flags": flags,
        "granularity_bits": granularity_bits,
        "name": name,
    }
    return build(_BITMAP, values, "bitmap")
