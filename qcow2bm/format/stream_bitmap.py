"""The records of the section ``dirty-bitmap`` in QEMU's migration stream: parsing and building.

The frame of the stream is parsed in ``stream``.

*Spec*: spec/stream.md, "Records of bitmaps".
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from construct import Bytes, Int8ub, Int32ub, Int64ub, Rebuild, Struct, len_, this

from qcow2bm.errors import FormatError
from qcow2bm.format.schema import build, flat_struct
from qcow2bm.format.stream import U8, parse_string
from qcow2bm.format.stream_buffer import StreamBuffer

DIRTY_BITMAP = b"dirty-bitmap"
DIRTY_BITMAP_VERSION = 1

EOS = 0x01
ZEROES = 0x02
BITMAP_NAME = 0x04
DEVICE_NAME = 0x08
START = 0x10
COMPLETE = 0x20
BITS = 0x40
EXTRA_FLAGS = 0x80

ENABLED = 0x01
PERSISTENT = 0x02
AUTOLOAD = 0x04
RESERVED_FLAGS = 0xF8

MIN_GRANULARITY = 512
MAX_BUFFER = 10240

_NAME = Struct("length" / Rebuild(Int8ub, len_(this.name)), "name" / Bytes(this.length))
_START = Struct("granularity" / Int32ub, "bitmap_flags" / Int8ub)
_BITS = Struct("start_sector" / Int64ub, "nr_sectors" / Int32ub)
_BUFFER = Struct("size" / Rebuild(Int64ub, len_(this.data)), "data" / Bytes(this.size))

# A bitmap of 32 MiB comes in 32,768 records; construct would need seconds to parse that many.
_READ_START = flat_struct(_START)
_READ_BITS = flat_struct(_BITS)
_READ_BITS_AND_SIZE = flat_struct(Struct(*_BITS.subcons, "size" / Int64ub))


class Start(NamedTuple):
    """The body of a START record: the granularity in bytes, and the flags of the bitmap."""

    granularity: int
    bitmap_flags: int


class Bits(NamedTuple):
    """The body of a BITS record: a range of sectors of 512 bytes, and their bits with padding.

    If all bits are clear, ``data`` is None.
    """

    start_sector: int
    nr_sectors: int
    data: bytes | None


class Record(NamedTuple):
    """A record of a dirty-bitmap section.

    If ``node_alias`` or ``bitmap_alias`` is None, the alias of the record before applies.
    """

    flags: int
    node_alias: bytes | None = None
    bitmap_alias: bytes | None = None
    body: Start | Bits | None = None


def parse_record(buffer: StreamBuffer) -> Record:
    """Parses a record of a dirty-bitmap section.

    Raises:
        FormatError: the record breaks a rule that does not depend on the records before.
    """
    (flags,) = buffer.read(U8)
    node_alias = bitmap_alias = None
    if flags & EXTRA_FLAGS:
        buffer.reject("dirty-bitmap record", "flags", f"is {flags:#x}: more than one byte", 1)
    if flags & DEVICE_NAME:
        node_alias = _parse_alias(buffer, "node alias")
    if flags & BITMAP_NAME:
        bitmap_alias = _parse_alias(buffer, "bitmap alias")
    if flags & START:
        return Record(flags, node_alias, bitmap_alias, _parse_start(buffer))
    if flags & COMPLETE or not flags & BITS:
        return Record(flags, node_alias, bitmap_alias)
    if flags & ZEROES:
        start_sector, nr_sectors = buffer.read(_READ_BITS)
        data = None
    else:
        start_sector, nr_sectors, size = buffer.read(_READ_BITS_AND_SIZE)
        if size > MAX_BUFFER:
            buffer.reject("BITS record", "size", f"is {size}, more than {MAX_BUFFER}", 8)
        data = buffer.take(size)
    return Record(flags, node_alias, bitmap_alias, Bits(start_sector, nr_sectors, data))


def _parse_alias(buffer: StreamBuffer, field: str) -> bytes:
    alias = parse_string(buffer)
    if not alias:
        buffer.reject("dirty-bitmap record", field, "is empty", 1)
    return alias


def _parse_start(buffer: StreamBuffer) -> Start:
    start = Start(*buffer.read(_READ_START))
    granularity = start.granularity
    if granularity < MIN_GRANULARITY or granularity & (granularity - 1):
        reason = f"is {granularity}, must be a power of two from {MIN_GRANULARITY} on"
        buffer.reject("START record", "granularity", reason, 5)
    if start.bitmap_flags & RESERVED_FLAGS:
        reason = f"is {start.bitmap_flags:#x}, which has reserved bits"
        buffer.reject("START record", "bitmap_flags", reason, 1)
    return start


def build_record(record: Record) -> bytes:
    """Builds a record of a dirty-bitmap section; its ``flags`` must match its aliases and body.

    Raises:
        FormatError: a value does not fit its field.
    """
    parts = [U8.pack(record.flags)]
    for alias in (record.node_alias, record.bitmap_alias):
        if alias is not None:
            parts.append(build(_NAME, {"name": alias}, "dirty-bitmap record"))
    body = record.body
    try:
        if isinstance(body, Start):
            parts.append(_READ_START.pack(*body))
        elif body and body.data is None:
            parts.append(_READ_BITS.pack(body.start_sector, body.nr_sectors))
        elif body and body.data is not None:
            head = body.start_sector, body.nr_sectors, len(body.data)
            parts += [_READ_BITS_AND_SIZE.pack(*head), body.data]
    except struct.error as error:
        raise FormatError("dirty-bitmap record", "", 0, "has a value out of range") from error
    return b"".join(parts)
