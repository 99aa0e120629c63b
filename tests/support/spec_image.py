"""The image of spec/image.md, and bytes to put over its fields."""

from __future__ import annotations

import struct
from typing import Any

from support.specreader import vector

from qcow2bm.format import directory, extensions, header

CLUSTER = 512
LONGEST = 0x7FFFFFFFC0000000
"""The greatest length of a file that QEMU accepts."""
EXTENSION, PAYLOAD, END = 0x70, 0x78, 0x90
DIRECTORY, PAST_EOF = 0xC00, 1 << 20
BEHIND = 12 * CLUSTER
"""The first cluster behind all others."""
BEYOND = 1 << 63
"""An offset no file reaches."""
DAILY, WEEKLY, CRASHED = range(3)
TABLES = {DAILY: 0xE00, WEEKLY: 0x1200, CRASHED: 0x1600}

Patch = tuple[int, bytes]
"""Bytes to be written over those at an offset."""


def image() -> bytes:
    """The sound image."""
    return vector("image.md", "hex image")


def patched(image: bytes, *patches: Patch) -> bytes:
    """A copy of an image, longer if need be."""
    data = bytearray(image)
    for offset, content in patches:
        data.extend(bytes(max(0, offset - len(data))))
        data[offset : offset + len(content)] = content
    return bytes(data)


def places(schema: Any) -> dict[str, tuple[int, int]]:
    """The offset and the width of each field of a construct."""
    places, position = {}, 0
    for field in schema.subcons:
        places[field.name] = position, field.sizeof()
        position += field.sizeof()
    return places


_HEADER = places(header._V3_FIXED) | {"compression_type": (104, 1), "padding": (105, 7)}
_PAYLOAD = places(extensions._BITMAPS)
_ENTRY = places(directory._HEAD)


def fields(offsets: dict[str, tuple[int, int]], start: int, **values: int) -> list[Patch]:
    """Sets fields of a structure that begins at ``start``."""
    return [
        (start + offsets[name][0], value.to_bytes(offsets[name][1], "big"))
        for name, value in values.items()
    ]


def in_header(**values: int) -> list[Patch]:
    """Sets fields of the fixed header."""
    return fields(_HEADER, 0, **values)


def in_payload(**values: int) -> list[Patch]:
    """Sets fields of the bitmaps extension."""
    return fields(_PAYLOAD, PAYLOAD, **values)


def in_entry(index: int, **values: int) -> list[Patch]:
    """Sets fields of a bitmap directory entry."""
    return fields(_ENTRY, DIRECTORY + 32 * index, **values)


def after_head(index: int, content: bytes) -> Patch:
    """Replaces the 8 bytes of extra data, name and padding of an entry."""
    return DIRECTORY + 32 * index + directory.HEAD_LENGTH, content.ljust(8, b"\0")


def in_table(index: int, *words: int) -> Patch:
    """Replaces the first entries of a bitmap table."""
    return TABLES[index], struct.pack(f">{len(words)}Q", *words)


def extension(type: int, length: int, content: bytes) -> bytes:
    """A header extension that claims a length."""
    return struct.pack(">II", type, length) + content


def crypto(offset: int, length: int = 16) -> Patch:
    """A crypto header extension that leads to an offset, cut or padded to a length."""
    data = struct.pack(">QQ", offset, CLUSTER).ljust(length, b"\0")[:length]
    return END, extension(extensions.CRYPTO, length, data)


# --- the image with a disk that is not empty ------------------------------------------------------

REFCOUNT_TABLE, REFCOUNT_BLOCK, L1 = 0x200, 0x400, 0x600
L2, DATA = 24 * CLUSTER, 25 * CLUSTER
COPIED = 1 << 63


def word(value: int) -> bytes:
    """A table entry."""
    return struct.pack(">Q", value & (1 << 64) - 1)


def refcount(cluster: int, value: int) -> Patch:
    """Sets the refcount of a cluster."""
    return REFCOUNT_BLOCK + 2 * cluster, struct.pack(">H", value)


def with_disk(*patches: Patch) -> bytes:
    """The image of the specification with one cluster of guest data, and patches."""
    l2 = word(COPIED | DATA).ljust(CLUSTER, b"\0")
    return patched(
        image(),
        (L1, word(COPIED | L2)),
        (L2, l2),
        (DATA, b"d" * CLUSTER),
        refcount(24, 1),
        refcount(25, 1),
        *patches,
    )
