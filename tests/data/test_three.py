"""An image that QEMU made, read without QEMU: what it says about it is written down here."""

from __future__ import annotations

from pathlib import Path

import pytest

import qcow2bm

THREE = Path(__file__).with_name("three.qcow2")

KiB, MiB = 1 << 10, 1 << 20

EXTENTS = {
    "daily": [
        (512, 512),
        (5 * KiB, 512),
        (30 * KiB, 20 * KiB),
        (3 * MiB, 512),
        (8 * MiB, MiB),
        (12 * MiB, 100 * KiB),
        (16 * MiB - 512, 512),
    ],
    "base": [(12 * MiB, 100 * KiB)],
}
SHA256 = {  # of x-debug-block-dirty-bitmap-sha256
    "daily": "b9e00224a02bcf8456d53a0336afa7bbdc22860cb8c9fa8e76e821d667e55b68",
    "base": "7b29403f26b2d0b7c88ba61f2f2e79c69545e62b4c47bce916f62a5c9610038c",
}


def test_the_image_as_a_whole() -> None:
    with qcow2bm.open(THREE, strict=True) as image:
        assert image.version == 3
        assert image.virtual_size == 16 * MiB
        assert image.cluster_size == 4 * KiB
        assert image.refcount_bits == 16
        assert image.backing_file is None
        assert image.is_consistent
        assert image.problems == ()
        assert image.bitmaps_extension == (3, 0, 96, 0x13000)


def test_the_bitmaps_in_the_order_of_the_directory() -> None:
    with qcow2bm.open(THREE) as image:
        found = [(b.name, b.granularity, b.auto, b.status) for b in image.bitmaps.values()]
    assert found == [
        ("crashed", 64 * KiB, True, "inconsistent"),
        ("daily", 512, True, "valid"),
        ("base", 4 * KiB, False, "valid"),
    ]


@pytest.mark.parametrize("name", EXTENTS)
def test_the_bits(name: str) -> None:
    with qcow2bm.open(THREE) as image:
        bitmap = image.bitmaps[name]
        found = [tuple(row) for array in bitmap.extents() for row in array.tolist()]
        assert found == EXTENTS[name]
        assert bitmap.count() == sum(length for _, length in EXTENTS[name])
        assert bitmap.totals() == (bitmap.count(), len(EXTENTS[name]))
        assert bitmap.clusters == (0, 0, 1)
        assert bitmap.sha256() == SHA256[name]
        granules = sum(length // bitmap.granularity for _, length in EXTENTS[name])
        packed = bitmap.packed().tobytes()
        assert len(packed) == 16 * MiB // bitmap.granularity // 8
        assert int.from_bytes(packed).bit_count() == granules


def test_the_bitmap_of_the_crash_shows_its_bits_only_as_stale() -> None:
    with qcow2bm.open(THREE) as image:
        bitmap = image.bitmaps["crashed"]
        for read in (bitmap.count, bitmap.totals, bitmap.packed, bitmap.sha256):
            with pytest.raises(qcow2bm.BitmapInconsistentError):
                read()
        with pytest.raises(qcow2bm.BitmapInconsistentError):
            next(bitmap.extents())
        assert bitmap.stale_bits().tobytes() == bytes([0, 0, 1]) + bytes(29)
