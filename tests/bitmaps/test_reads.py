"""A reader reads the parts of an image only when they are needed, and no other parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from support.images import ONES, ZEROES, Built, Stored, Word, build_image
from support.scripted_storage import ScriptedStorage

import qcow2bm
from qcow2bm.format.directory import FLAG_IN_USE

CLUSTER = 512
SIZE = 6 * 8 * CLUSTER << 16
TABLE: list[Word] = [ZEROES, b"\x01", ONES, b"\x02", ZEROES, b"\x03"]
SIZES = {"bitmap-directory": 96, "bitmap-table": 8 * len(TABLE), "bitmap-data": CLUSTER}

READERS: dict[str, Callable[[qcow2bm.Bitmap], Any]] = {
    "count": lambda bitmap: bitmap.count(),
    "totals": lambda bitmap: bitmap.totals(),
    "extents": lambda bitmap: list(bitmap.extents()),
    "packed": lambda bitmap: bitmap.packed(),
    "sha256": lambda bitmap: bitmap.sha256(),
    "stale_bits": lambda bitmap: bitmap.stale_bits(),
}


def two_bitmaps() -> Built:
    return build_image(Stored(b"first", TABLE), Stored(b"second", TABLE), size=SIZE)


def bytes_read(storage: ScriptedStorage, image: Built, structure: str, index: int) -> int:
    """Counts the bytes that were read of a bitmap's table, or of all its stored clusters."""
    fields = [place for number, place in image.clusters if number == index]
    if structure != "bitmap-data":
        return storage.bytes_read(image.offset(structure, index), SIZES[structure])
    return sum(
        storage.bytes_read(image.offset(structure, index, field), CLUSTER) for field in fields
    )


def test_opening_reads_neither_tables_nor_data() -> None:
    image = two_bitmaps()
    storage = ScriptedStorage(image.data)
    opened = qcow2bm.open(storage)
    assert [entry.name for entry in opened.directory] == ["first", "second"]
    assert [bitmap.granularity for bitmap in opened.bitmaps.values()] == [65536, 65536]
    assert opened.bitmap(1).auto
    assert bytes_read(storage, image, "bitmap-directory", 0) > 0
    for index in (0, 1):
        assert bytes_read(storage, image, "bitmap-table", index) == 0
        assert bytes_read(storage, image, "bitmap-data", index) == 0


def test_the_status_takes_each_table_once_and_no_data() -> None:
    image = two_bitmaps()
    storage = ScriptedStorage(image.data)
    opened = qcow2bm.open(storage)
    for _ in range(2):
        assert [bitmap.status for bitmap in opened.bitmaps.values()] == ["valid", "valid"]
        assert opened.problems == opened.bitmap(0).problems == ()
        assert opened.bitmap(1).clusters == (2, 1, 3)
    for index in (0, 1):
        assert bytes_read(storage, image, "bitmap-table", index) == SIZES["bitmap-table"]
        assert bytes_read(storage, image, "bitmap-data", index) == 0


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_only_stored_clusters_of_one_bitmap_are_read_and_each_once(
    reader: Callable[[qcow2bm.Bitmap], Any],
) -> None:
    image = two_bitmaps()
    storage = ScriptedStorage(image.data)
    reader(qcow2bm.open(storage).bitmaps["second"])
    assert bytes_read(storage, image, "bitmap-data", 1) == 3 * CLUSTER
    assert bytes_read(storage, image, "bitmap-data", 0) == 0


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
@pytest.mark.parametrize("word", [ZEROES, ONES])
def test_a_cluster_of_one_value_costs_no_read(
    reader: Callable[[qcow2bm.Bitmap], Any], word: Word
) -> None:
    """A bitmap of 2^40 bytes of disk is as cheap as its table is small."""
    # An L1 table for such a disk would be larger than all the rest.
    stored = Stored(table=[word] * 256, granularity_bits=20)
    image = build_image(stored, header={"size": 1 << 40})
    storage = ScriptedStorage(image.data)
    bitmap = qcow2bm.open(storage).bitmaps["daily"]
    assert bitmap.status == "valid"
    reader(bitmap)
    assert max(stop - start for start, stop in storage.reads) <= 8 * 256
    assert sum(stop - start for start, stop in storage.reads) < 64 << 10


@pytest.mark.parametrize("flags", [0, FLAG_IN_USE])
def test_nothing_is_read_of_a_bitmap_that_cannot_be_used(flags: int) -> None:
    image = build_image(Stored(table=TABLE, flags=flags), size=SIZE, autoclear=bool(flags))
    storage = ScriptedStorage(image.data)
    bitmap = qcow2bm.open(storage).bitmaps["daily"]
    with pytest.raises(qcow2bm.BitmapError):
        bitmap.count()
    assert bytes_read(storage, image, "bitmap-data", 0) == 0
    if not flags:
        assert bytes_read(storage, image, "bitmap-table", 0) == 0


def test_nothing_is_read_past_a_table_or_past_the_bits() -> None:
    """The bytes there belong to nothing, or to another structure."""
    image = build_image(Stored(table=[b"\x01"], after_table=b"\xff" * 24), size=3 << 16)
    storage = ScriptedStorage(image.data)
    assert qcow2bm.open(storage).bitmaps["daily"].count() == 1 << 16
    assert storage.bytes_read(image.offset("bitmap-table") + 8, 24) == 0
    assert storage.bytes_read(image.offset("bitmap-data"), CLUSTER) == 1
