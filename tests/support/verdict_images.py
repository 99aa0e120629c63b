"""Small images with one bitmap for each answer of a verdict."""

from __future__ import annotations

from support.images import Built, Stored, build_image

from qcow2bm.format.directory import FLAG_AUTO, FLAG_IN_USE

SIZE = 160 << 16
BITS = b"\5"
ENABLED = Stored(b"enabled", [BITS])
DISABLED = Stored(b"disabled", [BITS], flags=0)
CRASHED = Stored(b"crashed", [BITS], flags=FLAG_AUTO | FLAG_IN_USE)


def image_of(*bitmaps: Stored, autoclear: bool = True) -> Built:
    """An image with these bitmaps; without ``autoclear`` they are stale."""
    return build_image(*bitmaps, size=SIZE, autoclear=autoclear)
