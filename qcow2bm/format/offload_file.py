"""The records of an offload file, which has the bitmaps that were taken out of a running machine.

The file has a head, and then records, each of which was appended when it was whole.

*Spec*: spec/live.md, "Offload file".
"""

from __future__ import annotations

import zlib
from typing import NamedTuple
from uuid import UUID

from construct import (
    Bytes,
    GreedyBytes,
    Int8ub,
    Int16ub,
    Int32ub,
    Int64ub,
    Prefixed,
    PrefixedArray,
    Struct,
    Terminated,
)

from qcow2bm.errors import FormatError, UnsupportedError
from qcow2bm.format.schema import build, field_offsets, parse
from qcow2bm.format.sidecar import MAX_GRANULARITY_BITS, MIN_GRANULARITY_BITS
from qcow2bm.units import decode_name, encode_name

MAGIC = b"\x89qbmlive"
VERSION = 1
DIGEST_BYTES = 32
TOKEN_BYTES = 8

PLAN, COPY, RESTORED, ROLLED, COLLECTED, RECORDED = 1, 2, 3, 4, 5, 6
"""The types of records."""

ENABLED = 0x01
RESERVED_FLAGS = 0xFE

MAX_PLAN_BYTES = 1 << 26

_HEAD = Struct("magic" / Bytes(8), "version" / Int32ub, "reserved" / Int32ub)
_RECORD = Struct(
    "type" / Int32ub,
    "number" / Int32ub,
    "size" / Int64ub,
    "crc" / Int32ub,
)
_NAME = Prefixed(Int16ub, GreedyBytes)
_BITMAP = Struct("flags" / Int8ub, "granularity_bits" / Int8ub, "name" / _NAME)
_NODE = Struct(
    "uuid" / Bytes(16),
    "disk_size" / Int64ub,
    "recorder_bits" / Int8ub,
    "name" / _NAME,
    "bitmaps" / PrefixedArray(Int32ub, _BITMAP),
)
_PLAN = Struct(
    "tail_bits" / Int8ub,
    "nodes" / PrefixedArray(Int32ub, _NODE),
    Terminated,
)
HEAD_BYTES, RECORD_BYTES = _HEAD.sizeof(), _RECORD.sizeof()
_HEAD_OFFSETS, _RECORD_OFFSETS = field_offsets(_HEAD), field_offsets(_RECORD)


class RecordHead(NamedTuple):
    """The start of a record: its ``type``, which one of that type it is, and its payload's size."""

    type: int
    number: int
    size: int


class PlannedBitmap(NamedTuple):
    """A bitmap that is to be taken out; ``granularity`` is in bytes."""

    name: str
    granularity: int
    enabled: bool


class PlannedNode(NamedTuple):
    """A node whose bitmaps are to be taken out.

    Attributes:
        uuid: it is in the names of the bitmaps that are left there instead.
        name: of the node.
        disk_size: in bytes.
        bitmaps: those that are to be taken out.
        recorder_granularity: in bytes, of the bitmap that records exactly; 0 if there is none.
    """

    uuid: UUID
    name: str
    disk_size: int
    bitmaps: tuple[PlannedBitmap, ...]
    recorder_granularity: int = 0


class OffloadPlan(NamedTuple):
    """What is to be taken out of a machine; ``tail_granularity`` is in bytes."""

    tail_granularity: int
    nodes: tuple[PlannedNode, ...]

    @property
    def bitmaps(self) -> list[tuple[PlannedNode, PlannedBitmap]]:
        """The bitmaps of all nodes, as a new list; a bitmap's place in the list is its number."""
        return [(node, bitmap) for node in self.nodes for bitmap in node.bitmaps]

    def numbers_of(self, node: int) -> range:
        """Returns the numbers of the bitmaps of the node that has the number ``node``."""
        first = sum(len(before.bitmaps) for before in self.nodes[:node])
        return range(first, first + len(self.nodes[node].bitmaps))


def parse_head(data: bytes) -> None:
    """Checks the first `HEAD_BYTES` of an offload file.

    Raises:
        FormatError: it is no offload file.
        UnsupportedError: this library does not know its version.
    """
    found = parse(_HEAD, data, "offload file", 0, _HEAD_OFFSETS)
    if found.magic != MAGIC:
        raise FormatError("offload file", "magic", 0, "is not the magic of an offload file")
    if found.version != VERSION:
        raise UnsupportedError(f"version {found.version} of offload files, only version {VERSION}")
    if found.reserved:
        reason = f"is {found.reserved}, must be 0"
        raise FormatError("offload file", "reserved", _HEAD_OFFSETS["reserved"], reason)


def build_head() -> bytes:
    """Builds the first `HEAD_BYTES` of an offload file."""
    return build(_HEAD, {"magic": MAGIC, "version": VERSION, "reserved": 0}, "offload file")


def parse_record_head(data: bytes, offset: int) -> RecordHead:
    """Parses the `RECORD_BYTES` at ``offset``.

    Raises:
        FormatError: there are fewer bytes, or they are damaged.
    """
    found = parse(_RECORD, data, "record", offset, _RECORD_OFFSETS)
    place = _RECORD_OFFSETS["crc"]
    if found.crc != zlib.crc32(data[:place]):
        raise FormatError("record", "crc", offset + place, "does not match: the file is damaged")
    return RecordHead(found.type, found.number, found.size)


def build_record_head(head: RecordHead) -> bytes:
    """Builds the start of a record.

    Raises:
        FormatError: a value does not fit its field.
    """
    data = build(_RECORD, {**head._asdict(), "crc": 0}, "record")
    crc = zlib.crc32(data[: _RECORD_OFFSETS["crc"]])
    return build(_RECORD, {**head._asdict(), "crc": crc}, "record")


def parse_plan(data: bytes, offset: int) -> OffloadPlan:
    """Parses the payload of the record of the plan, which is at ``offset``.

    Raises:
        FormatError: the payload breaks a rule of the format.
    """
    found = parse(_PLAN, data, "plan", offset)
    tail_granularity = _granularity("plan", "tail_bits", found.tail_bits, offset)
    nodes: list[PlannedNode] = []
    for node in found.nodes:
        structure = f"node {len(nodes)} of the plan"
        if not node.disk_size or node.disk_size % 512 or node.disk_size >> 62:
            reason = f"is {node.disk_size}, must be a multiple of 512 below 2^62, and not 0"
            raise FormatError(structure, "disk_size", offset, reason)
        bitmaps = []
        for bitmap in node.bitmaps:
            if bitmap.flags & RESERVED_FLAGS:
                reason = f"is {bitmap.flags}, must be 0 or 1"
                raise FormatError(structure, "flags", offset, reason)
            granularity = _granularity(
                structure, "granularity_bits", bitmap.granularity_bits, offset
            )
            enabled = bool(bitmap.flags & ENABLED)
            bitmaps.append(PlannedBitmap(decode_name(bitmap.name), granularity, enabled))
        recorder = node.recorder_bits and _granularity(
            structure, "recorder_bits", node.recorder_bits, offset
        )
        name = decode_name(node.name)
        uuid = UUID(bytes=node.uuid)
        nodes.append(PlannedNode(uuid, name, node.disk_size, tuple(bitmaps), recorder))
    return OffloadPlan(tail_granularity, tuple(nodes))


def build_plan(plan: OffloadPlan) -> bytes:
    """Builds the payload of the record of the plan.

    Raises:
        FormatError: a value does not fit its field.
    """
    nodes = [
        {
            "uuid": node.uuid.bytes,
            "disk_size": node.disk_size,
            "recorder_bits": _bits(node.recorder_granularity) if node.recorder_granularity else 0,
            "name": encode_name(node.name),
            "bitmaps": [
                {
                    "flags": ENABLED if bitmap.enabled else 0,
                    "granularity_bits": _bits(bitmap.granularity),
                    "name": encode_name(bitmap.name),
                }
                for bitmap in node.bitmaps
            ],
        }
        for node in plan.nodes
    ]
    return build(_PLAN, {"tail_bits": _bits(plan.tail_granularity), "nodes": nodes}, "plan")


def _bits(granularity: int) -> int:
    return granularity.bit_length() - 1


def _granularity(structure: str, field: str, bits: int, offset: int) -> int:
    if not MIN_GRANULARITY_BITS <= bits <= MAX_GRANULARITY_BITS:
        reason = f"is {bits}, must be {MIN_GRANULARITY_BITS} to {MAX_GRANULARITY_BITS}"
        raise FormatError(structure, field, offset, reason)
    return 1 << bits
