"""The frame of QEMU's migration stream: parsing and building the records around the sections.

The content of two sections is parsed in ``stream_bitmap`` and ``stream_ram``.

*Spec*: spec/stream.md.
"""

from __future__ import annotations

from typing import NamedTuple

from construct import Bytes, Int8ub, Int16ub, Int32ub, Int64ub, Rebuild, Struct, len_, this

from qcow2bm.format.schema import build, flat_struct
from qcow2bm.format.stream_buffer import StreamBuffer

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

MAX_NAME = 255

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

# A bitmap of 32 MiB comes in 32,768 records; construct would need seconds to parse that many.
U8, U32, U64 = (flat_struct(Struct("value" / field)) for field in (Int8ub, Int32ub, Int64ub))
_READ_ENVELOPE = flat_struct(_ENVELOPE)
_READ_PART = flat_struct(_PART)
_READ_COMMAND = flat_struct(Struct(*_COMMAND.subcons[:2], "length" / Int16ub))
_READ_VERSIONS = flat_struct(Struct(*_SECTION.subcons[-2:]))


class Section(NamedTuple):
    """The header of a section, or a FOOTER.

    Only SECTION_START and SECTION_FULL have more than ``type`` and ``section_id``.
    """

    type: int
    section_id: int
    idstr: bytes = b""
    instance_id: int = 0
    version_id: int = 0


class Command(NamedTuple):
    """A COMMAND record."""

    command: int
    data: bytes


def parse_envelope(buffer: StreamBuffer) -> None:
    """Parses the magic and version at the start of a whole stream.

    Raises:
        FormatError: the data are not a migration stream, or are of another version.
    """
    magic, version = buffer.read(_READ_ENVELOPE)
    if magic != MAGIC:
        buffer.reject("migration stream", "magic", "is not QEVM", 8)
    if version != VERSION:
        buffer.reject("migration stream", "version", f"is {version}, must be {VERSION}", 4)


def parse_configuration(buffer: StreamBuffer) -> bytes:
    """Parses a CONFIGURATION record up to its subsections; returns the name of the machine.

    Raises:
        FormatError: the name is too long.
    """
    buffer.read(U8)
    (length,) = buffer.read(U32)
    if length > MAX_NAME:
        buffer.reject("configuration", "length", f"is {length}, more than {MAX_NAME}", 4)
    return buffer.take(length)


def parse_subsection(buffer: StreamBuffer) -> bytes:
    """Parses the header of a SUBSECTION record, without its body; returns its idstr."""
    buffer.read(U8)
    idstr = parse_string(buffer)
    buffer.read(U32)
    return idstr


def parse_section(buffer: StreamBuffer) -> Section:
    """Parses the header of a section, without its body, or a FOOTER."""
    type, section_id = buffer.read(_READ_PART)
    if type not in (SECTION_START, SECTION_FULL):
        return Section(type, section_id)
    idstr = parse_string(buffer)
    return Section(type, section_id, idstr, *buffer.read(_READ_VERSIONS))


def parse_command(buffer: StreamBuffer) -> Command:
    """Parses a COMMAND record; the raw bytes that follow PACKAGED are not part of the record."""
    _, command, length = buffer.read(_READ_COMMAND)
    return Command(command, buffer.take(length))


def parse_string(buffer: StreamBuffer) -> bytes:
    """Parses a string of at most 255 bytes; the byte before the string is its length."""
    (length,) = buffer.read(U8)
    return buffer.take(length)


def build_envelope() -> bytes:
    """Builds the magic and version at the start of a whole stream."""
    return _READ_ENVELOPE.pack(MAGIC, VERSION)


def build_configuration(machine: bytes) -> bytes:
    """Builds a CONFIGURATION record without subsections."""
    return build(_CONFIGURATION, {"type": CONFIGURATION, "machine": machine}, "configuration")


def build_section(section: Section) -> bytes:
    """Builds the header of a section, or a FOOTER.

    Raises:
        FormatError: a value does not fit its field.
    """
    is_named = section.type in (SECTION_START, SECTION_FULL)
    return build(_SECTION if is_named else _PART, section._asdict(), "section")
