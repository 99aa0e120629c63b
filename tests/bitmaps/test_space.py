"""How much of the image file bitmaps take, and what their tables have."""

from __future__ import annotations

import pytest
from support.images import ONES, ZEROES, Built, Stored, build_image
from support.problem_images import broken

import qcow2bm
from qcow2bm import BitmapSpace, TableRun

CLUSTER = 512
COVERED = 8 * CLUSTER << 16  # bytes of the disk, by a cluster of bits


def image(count: int = 3, *, autoclear: bool = True) -> Built:
    """The first so many of three bitmaps, with tables of 70 entries, which are two clusters."""
    bitmaps = (
        Stored(b"mixed", [b"\x01", b"\x02", ONES, *[ZEROES] * 66, b"\x03"]),
        Stored(b"a name of 25 bytes, no less"),
        Stored(b"extra", [ONES] * 70, extra_data=bytes(9)),
    )
    return build_image(*bitmaps[:count], size=70 * COVERED, autoclear=autoclear)


def in_use(image: qcow2bm.Image) -> int:
    """The bytes of all clusters that are in use."""
    end, free = image.file_space()
    assert end is not None
    assert free is not None
    return end - free


@pytest.mark.spec("TAB-5")
def test_a_bitmap_takes_its_entry_its_table_and_its_data() -> None:
    with qcow2bm.open(image().data) as opened:
        spaces = [opened.bitmap(number).space for number in range(3)]
        assert spaces == [
            BitmapSpace(directory=24 + 8, tables=2 * CLUSTER, data=3 * CLUSTER),
            BitmapSpace(directory=24 + 32, tables=2 * CLUSTER, data=0),
            BitmapSpace(directory=24 + 16, tables=2 * CLUSTER, data=0),
        ]
        assert opened.bitmap_space == BitmapSpace(CLUSTER, 6 * CLUSTER, 3 * CLUSTER)
        assert opened.bitmap_space.total == 10 * CLUSTER


@pytest.mark.spec("TAB-5")
def test_an_image_without_bitmaps_has_no_space_of_bitmaps() -> None:
    with qcow2bm.open(build_image().data) as opened:
        assert opened.bitmap_space == BitmapSpace(0, 0, 0)


@pytest.mark.spec("TAB-5")
def test_to_remove_a_bitmap_frees_its_table_and_its_data() -> None:
    data = image(2).data
    with qcow2bm.open(data, "r+") as opened:
        before = in_use(opened)
        space = opened.bitmaps["mixed"].space
        with opened.edit() as edit:
            edit.remove("mixed")
        assert space
        assert before - in_use(opened) == space.tables + space.data


@pytest.mark.spec("TAB-5")
def test_the_space_of_bitmaps_is_not_known_if_a_table_was_not_read() -> None:
    with qcow2bm.open(image(autoclear=False).data) as stale:
        assert stale.bitmap(0).space is None
        assert stale.bitmap_space is None
    with qcow2bm.open(broken("directory-entry.bitmap_table_offset.zero")) as opened:
        spaces = [opened.bitmap(number).space for number in range(len(opened.directory))]
        assert spaces.count(None) == 1
        assert opened.bitmap_space is None


def test_table_entries_are_runs_of_one_kind() -> None:
    built = image()
    first, second, last = (built.offset("bitmap-data", 0, n) for n in (0, 1, 69))
    assert second == first + CLUSTER
    with qcow2bm.open(built.data) as opened:
        assert list(opened.bitmaps["mixed"].table()) == [
            TableRun(0, 2, "allocated", first, None),
            TableRun(2, 1, "all-ones", None, None),
            TableRun(3, 66, "all-zeroes", None, None),
            TableRun(69, 1, "allocated", last, None),
        ]


def test_an_invalid_entry_is_a_run_of_its_own_and_has_its_word() -> None:
    built = image()
    built.plant(1 << 63, "bitmap-table", 1, 3)
    built.plant(7 << 60, "bitmap-table", 1, 4)
    with qcow2bm.open(built.data) as opened:
        assert opened.bitmap(1).status == "broken"
        assert list(opened.bitmap(1).table()) == [
            TableRun(0, 3, "all-zeroes", None, None),
            TableRun(3, 1, "invalid", None, 1 << 63),
            TableRun(4, 1, "invalid", None, 7 << 60),
            TableRun(5, 65, "all-zeroes", None, None),
        ]


def test_the_table_of_a_stale_bitmap_is_shown_as_it_is_stored() -> None:
    with qcow2bm.open(image(autoclear=False).data) as stale:
        assert list(stale.bitmap(2).table()) == [TableRun(0, 70, "all-ones", None, None)]


def test_a_table_that_cannot_be_read_is_an_error() -> None:
    with qcow2bm.open(broken("directory-entry.bitmap_table_offset.zero")) as opened:
        (lost,) = (b for b in map(opened.bitmap, range(3)) if not b.has_stale_bits)
        with pytest.raises(qcow2bm.BitmapBrokenError, match="its table cannot be read"):
            lost.table()


def test_a_table_that_changed_since_it_was_judged_is_an_error() -> None:
    built = image()
    with qcow2bm.open(built.data, force_share=True) as opened:
        assert opened.bitmap(1).status == "valid"
        built.plant(1, "bitmap-table", 1, 3)
        with pytest.raises(qcow2bm.ChangedWhileReadingError, match="bitmap table"):
            opened.bitmap(1).table()
