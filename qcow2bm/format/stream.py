"""The records of QEMU's migration stream, as far as it takes to find dirty bitmaps in it.

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

# A bitmap of 32 MiB comes in 32,768 records; construct would need seconds for them.
U8, U32, U64 = (flat_struct(Struct("value" / field)) for field in (Int8ub, Int32ub, Int64ub))
_READ_ENVELOPE = flat_struct(_ENVELOPE)
_READ_PART = flat_struct(_PART)
_READ_COMMAND = flat_struct(Struct(*_COMMAND.subcons[:2], "length" / Int16ub))
_READ_VERSIONS = flat_struct(Struct(*_SECTION.subcons[-2:]))


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


def parse_envelope(window: StreamBuffer) -> None:
    """What every whole stream begins with.

    Raises:
        FormatError: it is no migration stream, or one of another version.
    """
    magic, version = window.read(_READ_ENVELOPE)
    if magic != MAGIC:
        window.reject("migration stream", "magic", "is not QEVM", 8)
    if version != VERSION:
        window.reject("migration stream", "version", f"is {version}, must be {VERSION}", 4)


def parse_configuration(window: StreamBuffer) -> bytes:
    """The machine's name in a CONFIGURATION record, without its subsections.

    Raises:
        FormatError: the name is too long.
    """
    window.read(U8)
    (length,) = window.read(U32)
    if length > MAX_NAME:
        window.reject("configuration", "length", f"is {length}, more than {MAX_NAME}", 4)
    return window.take(length)


def parse_subsection(window: StreamBuffer) -> bytes:
    """The idstr of a SUBSECTION record, whose body is left."""
    window.read(U8)
    idstr = parse_string(window)
    window.read(U32)
    return idstr


def parse_section(window: StreamBuffer) -> Section:
    """The header of a section, without its body; or a FOOTER."""
    type, section_id = window.read(_READ_PART)
    if type not in (SECTION_START, SECTION_FULL):
        return Section(type, section_id)
    idstr = parse_string(window)
    return Section(type, section_id, idstr, *window.read(_READ_VERSIONS))


def parse_command(window: StreamBuffer) -> Command:
    """A COMMAND record; the raw bytes that follow PACKAGED are not part of it."""
    _, command, length = window.read(_READ_COMMAND)
    return Command(command, window.take(length))


def parse_string(window: StreamBuffer) -> bytes:
    """A string behind one byte that is its length."""
    (length,) = window.read(U8)
    return window.take(length)


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
