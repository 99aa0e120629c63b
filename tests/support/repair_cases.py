"""Images whose repair is interrupted, and what a reader finds in an image."""

from __future__ import annotations

from typing import NamedTuple

import qcow2bm

CRASHES = (
    "directory-entry.type.unknown", "bitmaps-extension.nb_bitmaps.less", "bitmap-data.overlap",
    "header.autoclear_features.no-bitmaps", "header-extension.bitmaps.length",
    "bitmap-table.entry.past-eof", "directory-entry.name.duplicate", "bitmap-directory.rest",
    "directory-entry.extra_data.compatible", "bitmaps-extension.bitmap_directory_offset.zero",
)  # fmt: skip
"""The problems whose repair is interrupted: each takes another way through the repair."""


class BitmapFacts(NamedTuple):
    """The facts that a reader learns about a bitmap."""

    status: str
    flags: int
    granularity: int
    digest: str


def bitmap_facts(data: bytes | bytearray) -> dict[str, BitmapFacts]:
    """The facts about each bitmap of an image by name; only a valid bitmap has a digest."""
    found = {}
    with qcow2bm.open(bytes(data)) as opened:
        for name, bitmap in opened.bitmaps.items():
            digest = bitmap.sha256() if bitmap.status == "valid" else ""
            flags = bitmap.entry.flags & 3
            found[name] = BitmapFacts(bitmap.status, flags, bitmap.granularity, digest)
    return found
