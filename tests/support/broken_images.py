"""Hundreds of broken images: every field that concerns bitmaps at its edge values, and more.

All are made of the image of spec/image.md, whose bitmaps are daily, weekly and crashed.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator

from support.spec_image import (
    CLUSTER,
    CRASHED,
    DAILY,
    DIRECTORY,
    EXTENSION,
    PAST_EOF,
    TABLES,
    WEEKLY,
    Patch,
    after_head,
    image,
    in_entry,
    in_header,
    in_payload,
    patched,
)

_PAYLOAD = {
    "nb_bitmaps": 4,
    "reserved": 4,
    "bitmap_directory_size": 8,
    "bitmap_directory_offset": 8,
}
_ENTRY = {
    "bitmap_table_offset": 8,
    "bitmap_table_size": 4,
    "flags": 4,
    "type": 1,
    "granularity_bits": 1,
    "name_size": 2,
    "extra_data_size": 4,
}
_REFCOUNT_BLOCK = 0x400
_WORDS = {
    "reserved low": 0x1002,
    "reserved high": 1 << 60,
    "ones and offset": 0x1001,
    "past the end": PAST_EOF,
    "far past the end": 1 << 55,
    "header": 0,
    "directory": DIRECTORY,
    "refcount table": 0x200,
    "refcount block": _REFCOUNT_BLOCK,
    "L1 table": 0x600,
    "its own table": -1,
    "another's data": -2,
    "unaligned": 0x1100,
}


def _edges(width: int, old: int) -> Iterator[int]:
    most = (1 << 8 * width) - 1
    values = [0, 1, 2, 3, 9, 31, 32, 255, 512, 513, 65535, 1 << 31, most, most - 511, old + 1]
    values += old - 1, old + 8, old - 8, old * 2, old // 2, old ^ 0x80, old + CLUSTER
    yield from dict.fromkeys(value for value in values if 0 <= value <= most and value != old)


def _number(place: int, width: int) -> int:
    return int.from_bytes(image()[place : place + width], "big")


def faults() -> Iterator[tuple[str, list[Patch]]]:
    """Each fault: a text that names it, and the patches that make it."""
    place = EXTENSION + 8
    for field, width in _PAYLOAD.items():
        for value in _edges(width, _number(place, width)):
            yield f"extension.{field} = {value:#x}", in_payload(**{field: value})
        place += width
    for index in (DAILY, WEEKLY, CRASHED):
        place = DIRECTORY + 32 * index
        for field, width in _ENTRY.items():
            for value in _edges(width, _number(place, width)):
                yield f"entry {index}.{field} = {value:#x}", in_entry(index, **{field: value})
            place += width
        for what, word in _WORDS.items():
            word = TABLES[index] if word == -1 else 0x1400 if word == -2 else word
            content = struct.pack(">Q", word)
            if image()[TABLES[index] : TABLES[index] + 8] != content:
                yield f"table {index}: {what}", [(TABLES[index], content)]
        for name in (b"daily", b"weekly", b"\xff\xfe", b"a\0b", b"daily\0\0\1", b"\x1b[31m"):
            patch = after_head(index, name)
            if not image()[patch[0] :].startswith(patch[1]):
                yield f"entry {index}: name {name!r}", [patch]
    for cluster in range(12):
        for value in (0, 1, 2, 255, 65535):
            if _number(_REFCOUNT_BLOCK + 2 * cluster, 2) != value:
                patch = _REFCOUNT_BLOCK + 2 * cluster, struct.pack(">H", value)
                yield f"refcount of cluster {cluster} = {value}", [patch]
    yield "autoclear without extension", [(EXTENSION, bytes(8))]
    yield "autoclear off", in_header(autoclear_features=0)
    yield "extension too short", [(EXTENSION + 4, bytes([0, 0, 0, 16]))]


def broken_images() -> Iterator[tuple[str, bytes]]:
    """All of them: with one fault, with two, and cut off."""
    single = list(faults())
    for what, patches in single:
        yield what, patched(image(), *patches)
    for (one, some), (other, more) in itertools.islice(
        zip(single[::5], single[3::5], strict=False), 80
    ):
        yield f"{one} and {other}", patched(image(), *some, *more)
    for length in range(DIRECTORY, len(image()), 96):
        yield f"cut at {length:#x}", image()[:length]
