"""The hex blocks of spec/: what the library reads from them, and that it builds them again."""

from __future__ import annotations

import ast
from array import array
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from support.spec_image import in_entry, in_header, patched
from support.specreader import Block, pages, unhex, vector

import qcow2bm
from qcow2bm.format import (
    bitmap_table,
    directory,
    extensions,
    features,
    header,
    refcounts,
    snapshots,
    stream_bitmap,
)
from qcow2bm.format.stream_buffer import StreamBuffer
from qcow2bm.migration.stream_bitmaps import read_stream
from qcow2bm.migration.stream_writer import OutgoingBitmap, write_stream


class Words(NamedTuple):
    words: list[int]


class Snapshots(NamedTuple):
    snapshots: tuple[snapshots.SnapshotHeader, ...]


class Codec(NamedTuple):
    """The functions that parse a vector and, if there is one, build it again."""

    parse: Callable[[bytes], Any]
    build: Callable[[Any], bytes] | None = None


def words(
    parse: Callable[[bytes], array[int]], build: Callable[[array[int]], bytes], code: str
) -> Codec:
    """The codec of an array of numbers."""
    return Codec(
        lambda data: Words(parse(data).tolist()), lambda value: build(array(code, value.words))
    )


def block_of(order: int, code: str) -> Codec:
    """The codec of a refcount block."""
    return words(
        lambda data: refcounts.parse_refcount_block(data, order),
        lambda counts: refcounts.build_refcount_block(counts, order),
        code,
    )


class Facts:
    """The facts that a reader finds in an image, under the names that the result blocks use."""

    def __init__(self, data: bytes) -> None:
        with qcow2bm.open(data) as image:
            bitmaps = [image.bitmap(entry.index) for entry in image.directory]
            valid = [bitmap for bitmap in bitmaps if bitmap.status == "valid"]
            self.virtual_size = image.virtual_size
            self.file_size = image.file_size
            self.problems = image.problems
            self.names = [bitmap.name for bitmap in bitmaps]
            self.granularities = [bitmap.granularity for bitmap in bitmaps]
            self.statuses = [bitmap.status for bitmap in bitmaps]
            self.dirty_bytes = [b.count() if b in valid else None for b in bitmaps]
            self.sha256 = [bitmap.sha256() for bitmap in valid]
            self.extents = [
                [row for part in bitmap.extents() for row in part.tolist()] for bitmap in valid
            ]


class Bits:
    """The bitmap "daily" of the image in image.md, on a smaller disk and with other bits."""

    def __init__(self, data: bytes) -> None:
        image = patched(
            vector("image.md", "hex image"),
            *in_header(size=5111296),
            *in_entry(1, flags=1),  # is not for this disk; in use it is no fault
            (0x1000, data),
        )
        with qcow2bm.open(image) as opened:
            bitmap = opened.bitmaps["daily"]
            self.extents = [row for part in bitmap.extents() for row in part.tolist()]
            self.dirty_bytes = bitmap.count()
            self.packed = bitmap.packed().tobytes()


class Stream:
    """The bitmaps of a migration stream."""

    def __init__(self, data: bytes) -> None:
        found = read_stream([data])
        self._bitmaps = bitmaps = found.all
        self.is_complete = found.is_complete
        self.nodes = [bitmap.node_alias for bitmap in bitmaps]
        self.names = [bitmap.bitmap_alias for bitmap in bitmaps]
        self.granularities = [bitmap.granularity for bitmap in bitmaps]
        self.enabled = [bitmap.enabled for bitmap in bitmaps]
        self.persistent = [bitmap.persistent for bitmap in bitmaps]
        self.disk_sizes = [bitmap.disk_size for bitmap in bitmaps]
        self.dirty_bytes = [bitmap.dirty_bytes for bitmap in bitmaps]
        self.sha256 = [bitmap.sha256() for bitmap in bitmaps]

    def build(self) -> bytes:
        return b"".join(
            write_stream(
                [
                    OutgoingBitmap(
                        *(b.node_alias, b.bitmap_alias, b.granularity, b.enabled, b.persistent),
                        b.packed().data,
                        b.disk_size,
                    )
                    for b in self._bitmaps
                ],
                "pc-i440fx-7.2",
            )
        )


_RECORD = Codec(
    lambda data: stream_bitmap.parse_record(StreamBuffer(data)),
    stream_bitmap.build_record,
)

CODECS = {
    "header": Codec(header.parse_header, header.build_header),
    "header extensions": Codec(extensions.parse_extensions, extensions.build_extensions),
    "feature name table": Codec(features.parse_feature_names, features.build_feature_names),
    "generation": Codec(extensions.parse_generation, extensions.build_generation),
    "crypto header": Codec(extensions.parse_crypto_header, extensions.build_crypto_header),
    "bitmaps extension": Codec(
        extensions.parse_bitmaps_extension, extensions.build_bitmaps_extension
    ),
    "bitmap directory": Codec(
        lambda data: directory.parse_directory(data, 0, 65535), directory.build_directory
    ),
    "bitmap table": words(bitmap_table.parse_bitmap_table, bitmap_table.build_bitmap_table, "Q"),
    "bitmap data": Codec(Bits),
    "refcount table": words(refcounts.parse_refcount_table, refcounts.build_refcount_table, "Q"),
    "refcount block of order 4": block_of(4, "H"),
    "refcount block of order 1": block_of(1, "B"),
    "snapshot table": Codec(
        lambda data: Snapshots(snapshots.parse_snapshot_table(data, 1, 0)),
        lambda value: snapshots.build_snapshot_table(value.snapshots),
    ),
    "image": Codec(Facts),
    "START record": _RECORD,
    "BITS record": _RECORD,
    "stream": Codec(Stream, Stream.build),
}


def pairs() -> list[tuple[Block, Block]]:
    """Each hex block of spec/ with the result block after it."""
    found = []
    for page in pages():
        blocks = [block for block in page.blocks if block.info.startswith(("hex ", "result "))]
        found += list(zip(blocks[::2], blocks[1::2], strict=True))
    return found


@pytest.mark.parametrize(("dump", "result"), pairs(), ids=lambda block: block.info)
def test_a_vector_is_read_as_stated_and_built_again(dump: Block, result: Block) -> None:
    kind = dump.info.removeprefix("hex ")
    assert result.info == f"result {kind}"
    data = unhex(dump.text)
    codec = CODECS[kind]
    value = codec.parse(data)
    fields = {name: getattr(value, name) for name in dir(value) if not name.startswith("_")}
    for line in result.text.splitlines():
        expression, _, expected = line.partition(" = ")
        found = eval(expression, {"__builtins__": {}, "len": len}, fields)
        assert (expression, found) == (expression, ast.literal_eval(expected))
    if codec.build:
        assert codec.build(value) == data


def test_every_codec_has_a_vector() -> None:
    assert {dump.info.removeprefix("hex ") for dump, _ in pairs()} == CODECS.keys()
