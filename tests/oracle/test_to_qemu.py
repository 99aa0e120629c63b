"""QEMU opens what this library's schemas build, finds it sound, and reads the same."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
from support.images import ONES, ZEROES, Stored, Word, build_image, extension
from support.qemu import Disk

import qcow2bm
from qcow2bm.format.directory import FLAG_AUTO, FLAG_IN_USE
from qcow2bm.format.features import FeatureName, FeatureNames, build_feature_names

UNKNOWN_EXTENSIONS = (
    extension(0x12345678, b"odd"),
    extension(0x6803F857, build_feature_names(FeatureNames((FeatureName(2, 63, b"x" * 46),)))),
    extension(0x7FFFFFFF, b""),
)


def random_table(random: Random, entries: int, cluster_size: int) -> list[Word]:
    def sparse() -> bytes:
        return bytes(random.choice((0, 0, 0, 0xFF, random.randrange(256))) for _ in range(100))

    def dense() -> bytes:
        return random.randbytes(cluster_size)

    words = (lambda: ZEROES, lambda: ONES, sparse, dense)
    return [random.choice(words)() for _ in range(entries)]


def assert_qemu_reads_the_same(path: Path) -> None:
    disk = Disk(path)
    check = disk.check()
    assert check.returncode == 0, check
    with qcow2bm.open(path, strict=True) as image:
        assert [entry["name"] for entry in disk.listed()] == list(image.bitmaps)
        for name, bitmap in image.bitmaps.items():
            found = [tuple(row) for array in bitmap.extents() for row in array.tolist()]
            assert found == disk.extents(name)
            assert bitmap.count() == sum(length for _, length in found)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("refcount_order", range(7))
@pytest.mark.parametrize("cluster_bits", [9, 10, 12, 16])
def test_sound_images(tmp_path: Path, cluster_bits: int, refcount_order: int, seed: int) -> None:
    random = Random(f"{cluster_bits} {refcount_order} {seed}")
    cluster_size = 1 << cluster_bits
    size = random.randrange(1, 5 * 8 * cluster_size) * 512
    bitmaps = [
        Stored(
            f"bitmap {number}".encode(),
            random_table(random, -(-size // (8 * cluster_size << bits)), cluster_size),
            granularity_bits=bits,
            flags=random.choice((0, FLAG_AUTO)),
        )
        for number, bits in enumerate((9, 10, 16))
    ]
    built = build_image(
        *bitmaps,
        cluster_bits=cluster_bits,
        size=size,
        refcount_order=refcount_order,
        extensions=UNKNOWN_EXTENSIONS,
        whole_clusters=bool(seed % 2),
    )
    path = tmp_path / "image"
    path.write_bytes(built.data)

    assert_qemu_reads_the_same(path)


def test_a_header_longer_than_ours(tmp_path: Path) -> None:
    path = tmp_path / "image"
    built = build_image(Stored(), additional_fields=bytes(range(24)), cluster_bits=12)
    path.write_bytes(built.data)

    assert_qemu_reads_the_same(path)


def test_thousands_of_bitmaps(tmp_path: Path) -> None:
    """QEMU compares each name with all others: more would take it minutes."""
    path = tmp_path / "image"
    names = [str(number).encode() for number in range(5000)]
    built = build_image(*map(Stored, names), cluster_bits=9, size=1 << 20)
    path.write_bytes(built.data)

    disk = Disk(path)
    with qcow2bm.open(path, strict=True) as image:
        assert [entry["name"] for entry in disk.listed()] == list(image.bitmaps)
    assert disk.check().returncode == 0


def test_qemu_rewrites_what_was_built(tmp_path: Path) -> None:
    """A guest write adds its bits to those stored here; what QEMU does not know survives."""
    path = tmp_path / "image"
    table: list[Word] = [ONES, ZEROES, b"\x05"]
    size = 3 * 8 * 512 * 512
    built = build_image(
        Stored(b"daily", table, granularity_bits=9),
        Stored(b"crashed", table, granularity_bits=9, flags=FLAG_AUTO | FLAG_IN_USE),
        size=size,
        extensions=UNKNOWN_EXTENSIONS[:1],
    )
    path.write_bytes(built.data)
    disk = Disk(path)
    disk.io("write 3M 512")

    with qcow2bm.open(path, strict=True) as image:
        assert image.bitmaps["crashed"].status == "inconsistent"
        found = [tuple(row) for part in image.bitmaps["daily"].extents() for row in part.tolist()]
        assert found == [(0, 2 << 20), (3 << 20, 512), (4 << 20, 512), ((4 << 20) + 1024, 512)]
        assert 0x12345678 in [extension.type for _, extension in image.extensions]
    assert disk.check().returncode == 0
