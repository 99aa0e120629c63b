"""The records of QEMU's migration stream, as far as it takes to find dirty bitmaps in it.

*Spec*: spec/stream.md.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from construct import Bytes, Int8ub, Int16ub, Int32ub, Int64ub, Rebuild, Struct, len_, this

from qcow2bm.errors import FormatError
from qcow2bm.format.schema import build, flat_struct
from qcow2bm.format.window import Window

MAGIC = int.from_bytes(b"QEVM", "big")
VERSION = 3

EOF = 0x00
SECTION_START = 0x01
SECTION_PART = 0x02
SECTION_END = 0x03
SECTION_FULL = 0x04
SUBSECTION = 0x05
VMDESCRIPTION = 0x06
CONFIGURATION = 0x07
COMMAND = 0x08
FOOTER = 0x7E
RECORD_TYPES = {
    EOF: "EOF",
    SECTION_START: "SECTION_START",
    SECTION_PART: "SECTION_PART",
    SECTION_END: "SECTION_END",
    SECTION_FULL: "SECTION_FULL",
    SUBSECTION: "SUBSECTION",
    VMDESCRIPTION: "VMDESCRIPTION",
    CONFIGURATION: "CONFIGURATION",
    COMMAND: "COMMAND",
    FOOTER: "FOOTER",
}

POSTCOPY_ADVISE = 3
PACKAGED = 7

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
MAX_NAME = 255
MAX_BUFFER = 10240

_ENVELOPE = Struct("magic" / Int32ub, "version" / Int32ub)
_CONFIGURATION = Struct(
    "type" / Int8ub, "length" / Rebuild(Int32ub, len_(this.machine)), "machine" / Bytes(this.length)
)
_SECTION = Struct(
    "type" / Int8ub,
    "section_id" / Int32ub,
    "idlen" / Rebuild(Int8ub, len_(this.idstr)),
    "idstr" / Bytes(this.idlen),
    "instance_id" / Int32ub,
    "version_id" / Int32ub,
)
_PART = Struct("type" / Int8ub, "section_id" / Int32ub)
_COMMAND = Struct(
    "type" / Int8ub,
    "command" / Int16ub,
    "length" / Rebuild(Int16ub, len_(this.data)),
    "data" / Bytes(this.length),
)
_NAME = Struct("length" / Rebuild(Int8ub, len_(this.name)), "name" / Bytes(this.length))
_START = Struct("granularity" / Int32ub, "bitmap_flags" / Int8ub)
_BITS = Struct("start_sector" / Int64ub, "nr_sectors" / Int32ub)
_BUFFER = Struct("size" / Rebuild(Int64ub, len_(this.data)), "data" / Bytes(this.size))

# A bitmap of 32 MiB comes in 32,768 records; construct would need seconds for them.
U8, U32, U64 = (flat_struct(Struct("value" / field)) for field in (Int8ub, Int32ub, Int64ub))
_READ_ENVELOPE = flat_struct(_ENVELOPE)
_READ_PART = flat_struct(_PART)
_READ_COMMAND = flat_struct(Struct(*_COMMAND.subcons[:2], "length" / Int16ub))
_READ_VERSIONS = flat_struct(Struct(*_SECTION.subcons[-2:]))
_READ_START = flat_struct(_START)
_READ_BITS = flat_struct(_BITS)
_READ_BITS_AND_SIZE = flat_struct(Struct(*_BITS.subcons, "size" / Int64ub))


class Section(NamedTuple):
    """The header of a SECTION_START or SECTION_FULL record, or of another with its id alone."""

    type: int
    section_id: int
    idstr: bytes = b""
    instance_id: int = 0
    version_id: int = 0


class Command(NamedTuple):
    """A COMMAND record."""

    command: int
    data: bytes


class Start(NamedTuple):
    """What a START record says: granularity in bytes, and the flags of the bitmap."""

    granularity: int
    bitmap_flags: int


class Bits(NamedTuple):
    """What a BITS record says: sectors of 512 bytes, and their bits with padding.

    ``data`` is None where all bits are clear.
    """

    start_sector: int
    nr_sectors: int
    data: bytes | None


class Record(NamedTuple):
    """A record of a dirty-bitmap section. A name that is None is that of the record before."""

    flags: int
    node_alias: bytes | None = None
    bitmap_alias: bytes | None = None
    body: Start | Bits | None = None


def parse_envelope(window: Window) -> None:
    """What every whole stream begins with.

    Raises:
        FormatError: it is no migration stream, or one of another version.
    """
    magic, version = window.read(_READ_ENVELOPE)
    if magic != MAGIC:
        window.reject("migration stream", "magic", "is not QEVM", 8)
    if version != VERSION:
        window.reject("migration stream", "version", f"is {version}, must be {VERSION}", 4)


def parse_configuration(window: Window) -> bytes:
    """The machine's name in a CONFIGURATION record, without its subsections.

    Raises:
        FormatError: the name is too long.
    """
    window.read(U8)
    (length,) = window.read(U32)
    if length > MAX_NAME:
        window.reject("configuration", "length", f"is {length}, more than {MAX_NAME}", 4)
    return window.take(length)


def parse_subsection(window: Window) -> bytes:
    """The idstr of a SUBSECTION record, whose body is left."""
    window.read(U8)
    idstr = parse_string(window)
    window.read(U32)
    return idstr


def parse_section(window: Window) -> Section:
    """The header of a section, without its body; or a FOOTER."""
    type, section_id = window.read(_READ_PART)
    if type not in (SECTION_START, SECTION_FULL):
        return Section(type, section_id)
    idstr = parse_string(window)
    return Section(type, section_id, idstr, *window.read(_READ_VERSIONS))


def parse_command(window: Window) -> Command:
    """A COMMAND record; the raw bytes that follow PACKAGED are not part of it."""
    _, command, length = window.read(_READ_COMMAND)
    return Command(command, window.take(length))


def parse_string(window: Window) -> bytes:
    """A string behind one byte that is its length."""
    (length,) = window.read(U8)
    return window.take(length)


def parse_record(window: Window) -> Record:
    """A record of a dirty-bitmap section.

    Raises:
        FormatError: it breaks a rule that holds whatever came before.
    """
    (flags,) = window.read(U8)
    node_alias = bitmap_alias = None
    if flags & EXTRA_FLAGS:
        window.reject("dirty-bitmap record", "flags", f"is {flags:#x}: more than one byte", 1)
    if flags & DEVICE_NAME:
        node_alias = _parse_alias(window, "node alias")
    if flags & BITMAP_NAME:
        bitmap_alias = _parse_alias(window, "bitmap alias")
    if flags & START:
        return Record(flags, node_alias, bitmap_alias, _parse_start(window))
    if flags & COMPLETE or not flags & BITS:
        return Record(flags, node_alias, bitmap_alias)
    if flags & ZEROES:
        start_sector, nr_sectors = window.read(_READ_BITS)
        data = None
    else:
        start_sector, nr_sectors, size = window.read(_READ_BITS_AND_SIZE)
        if size > MAX_BUFFER:
            window.reject("BITS record", "size", f"is {size}, more than {MAX_BUFFER}", 8)
        data = window.take(size)
    return Record(flags, node_alias, bitmap_alias, Bits(start_sector, nr_sectors, data))


def _parse_alias(window: Window, field: str) -> bytes:
    alias = parse_string(window)
    if not alias:
        window.reject("dirty-bitmap record", field, "is empty", 1)
    return alias


def _parse_start(window: Window) -> Start:
    start = Start(*window.read(_READ_START))
    granularity = start.granularity
    if granularity < MIN_GRANULARITY or granularity & (granularity - 1):
        reason = f"is {granularity}, must be a power of two from {MIN_GRANULARITY} on"
        window.reject("START record", "granularity", reason, 5)
    if start.bitmap_flags & RESERVED_FLAGS:
        reason = f"is {start.bitmap_flags:#x}, which has reserved bits"
        window.reject("START record", "bitmap_flags", reason, 1)
    return start


def build_envelope() -> bytes:
    """What every whole stream begins with."""
    return _READ_ENVELOPE.pack(MAGIC, VERSION)


def build_configuration(machine: bytes) -> bytes:
    """A CONFIGURATION record without subsections."""
    return build(_CONFIGURATION, {"type": CONFIGURATION, "machine": machine}, "configuration")


def build_section(section: Section) -> bytes:
    """The header of a section, or a FOOTER.

    Raises:
        FormatError: a value does not fit its field.
    """
    is_named = section.type in (SECTION_START, SECTION_FULL)
    return build(_SECTION if is_named else _PART, section._asdict(), "section")


def build_record(record: Record) -> bytes:
    """A record of a dirty-bitmap section; ``flags`` must say what there is of names and body.

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
