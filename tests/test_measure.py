"""How much bitmaps take and would take, compared with what becomes of images."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray
from support import golden_images
from support.audit import Audit
from support.device import Device
from support.images import ONES, ZEROES, Stored, build_image
from support.layouts import LAYOUTS, build

import qcow2bm
from qcow2bm import Addition, BitmapSpace, Growth, build_empty_image

CLUSTER = 512
COVERED = 8 * CLUSTER << 16  # bytes of the disk, by a cluster of bits
MiB = 1 << 20


def name(number: int, size: int = 36) -> str:
    return f"{number:0{size}d}"


def stripes(size: int, granularity: int) -> NDArray[np.uint8]:
    """Bits of which every cluster is to be stored: neither all zeros nor all ones."""
    bits = -(-size // granularity)
    every_other = np.zeros(bits, np.uint8)
    every_other[::2] = 1
    return np.packbits(every_other, bitorder="little")


def grown(before: bytes | bytearray, after: bytes | bytearray) -> tuple[int, int]:
    """By how many bytes the clusters in use, and the file, have grown."""
    old, new = Audit(before), Audit(after)
    assert new.miscounted == {}
    return new.cluster_size * (len(new.refcounts) - len(old.refcounts)), len(after) - len(before)


def require_exact(
    data: bytes | bytearray, count: int, granularity: int, size: int = 36
) -> Addition:
    """Adds bitmaps to two copies of an image, clean and full, and compares both growths."""
    with qcow2bm.open(bytes(data)) as image:
        addition = image.measure_addition(count, granularity=granularity, name_size=size)
        bits = stripes(image.virtual_size, granularity)
    assert addition.granularity == granularity
    for growth in (addition.empty, addition.full):
        copy = bytearray(data)
        with qcow2bm.open(copy, "r+") as image, image.edit() as edit:
            for number in range(count):
                if growth is addition.empty:
                    edit.add(name(number, size), granularity)
                else:
                    edit.load(name(number, size), granularity, bits)
        assert (growth.total, growth.file) == grown(data, copy)
    return addition


@pytest.mark.spec("MEASURE-5")
@pytest.mark.parametrize("granularity", [512, 64 << 10])
@pytest.mark.parametrize("order", range(7))
@pytest.mark.parametrize("cluster_bits", [9, 12, 16])
def test_an_image_grows_by_what_was_measured(
    cluster_bits: int, order: int, granularity: int
) -> None:
    size = 5 * MiB + 512
    image = build_image(Stored(b"a", granularity_bits=16), cluster_bits=cluster_bits, size=size,
                        refcount_order=order)  # fmt: skip
    for count in (1, 9):
        require_exact(image.data, count, granularity)


@pytest.mark.spec("MEASURE-5")
@pytest.mark.spec("MEASURE-7")
@pytest.mark.parametrize("refcount_bits", [1, 16, 64])
@pytest.mark.parametrize("cluster_size", [512, 4096, 65536])
def test_a_new_image_grows_by_what_was_measured(cluster_size: int, refcount_bits: int) -> None:
    new = build_empty_image(16 * MiB, cluster_size, refcount_bits)
    data = new.head.ljust(new.length, b"\0")
    addition = require_exact(data, 2, 512)
    data_clusters = -(-(16 * MiB // 512 // 8) // cluster_size)
    assert addition.full.data == 2 * data_clusters * cluster_size
    assert addition.empty.data == 0
    assert addition.empty.directory == cluster_size


@pytest.mark.spec("MEASURE-5")
def test_refcount_blocks_and_a_larger_refcount_table_are_measured() -> None:
    """The file outgrows what a refcount table of one cluster can count: 2 MiB."""
    image = build_image(size=256 * MiB, refcount_order=6)
    addition = require_exact(image.data, 33, 512)
    assert addition.full.data == 33 * 128 * CLUSTER
    most_blocks = 64  # that a table of one cluster leads to
    assert addition.full.refcounts > most_blocks * CLUSTER
    assert addition.empty.refcounts < addition.full.refcounts


@pytest.mark.spec("MEASURE-5")
def test_free_clusters_inside_the_file_are_used_before_the_file_grows() -> None:
    large = Stored(b"large", [b"\1"] * 40, granularity_bits=9)
    data = build_image(large, Stored(b"a"), size=40 * COVERED >> 7).data
    with qcow2bm.open(data, "r+") as image, image.edit() as edit:
        edit.remove("large")
    addition = require_exact(data, 1, 512)
    assert addition.empty.file == 0
    assert addition.full.total == 41 * CLUSTER
    assert 0 <= addition.full.file < 4 * CLUSTER


@pytest.mark.spec("MEASURE-6")
def test_the_length_of_the_names_counts_for_the_directory() -> None:
    data = build_image(size=MiB).data
    sizes = [require_exact(data, 4, 512, size).empty.directory for size in (1, 36, 500, 1023)]
    assert sizes == [CLUSTER, CLUSTER, 5 * CLUSTER, 9 * CLUSTER]


@pytest.mark.spec("MEASURE-5")
def test_the_default_granularity_is_that_of_add() -> None:
    for cluster_bits, granularity in ((9, 4096), (16, 1 << 16), (21, 1 << 16)):
        with qcow2bm.open(build_image(cluster_bits=cluster_bits).data) as image:
            assert image.measure_addition().granularity == granularity


@pytest.mark.spec("MEASURE-8")
@pytest.mark.parametrize(
    ("arguments", "error", "reason"),
    [
        ({"count": 0}, ValueError, "count is 0"),
        ({"name_size": 0}, ValueError, "a name has 1 to 1023 bytes"),
        ({"name_size": 1024}, ValueError, "a name has 1 to 1023 bytes"),
        ({"granularity": 1000}, ValueError, "granularity is 1000"),
        ({"granularity": 512, "virtual_size": 1 << 60}, qcow2bm.LimitError, "size of a bitmap"),
        ({"virtual_size": 0}, qcow2bm.UnsupportedError, "0 bytes"),
        ({"count": 65535}, qcow2bm.LimitError, "the number of bitmaps is 65536"),
        ({"count": 65534, "name_size": 1023}, qcow2bm.LimitError, "bitmap directory"),
    ],
)
def test_what_cannot_be_added_is_not_measured(
    arguments: dict[str, int], error: type[Exception], reason: str
) -> None:
    with qcow2bm.open(build_image(Stored()).data) as image, pytest.raises(error, match=reason):
        image.measure_addition(**arguments)


@pytest.mark.spec("MEASURE-8")
def test_an_image_that_is_not_edited_is_not_measured() -> None:
    stale = build_image(Stored(), autoclear=False).data
    with qcow2bm.open(stale) as image, pytest.raises(qcow2bm.BitmapStaleError, match='"daily"'):
        image.measure_addition()
    corrupt = build_image(Stored(), header={"incompatible_features": 2}).data
    with qcow2bm.open(corrupt) as image, pytest.raises(qcow2bm.FormatError, match="corrupt"):
        image.measure_addition()


@pytest.mark.spec("MEASURE-8")
@pytest.mark.parametrize("spare", [0, 1, 2, 3, 5, 6, 8])
def test_a_device_without_room_is_an_error_that_says_what_is_missing(spare: int) -> None:
    device = Device(build_image(Stored(), size=4 * COVERED).data, spare)
    with qcow2bm.open(device, "r+") as image:
        if spare < 2 + 4:  # a table and a directory, and the bits
            with pytest.raises(qcow2bm.NoRoomError) as caught:
                image.measure_addition(granularity=1 << 16)
            assert caught.value.missing == (2 - spare if spare < 2 else 6 - spare) * CLUSTER
        else:
            addition = image.measure_addition(granularity=1 << 16)
            assert addition.full.total == 5 * CLUSTER
            assert addition.full.file == 0


@pytest.mark.spec("MEASURE-8")
@pytest.mark.parametrize("name", ["version_2", "dirty", "full_header", "broken"])
def test_a_measurement_fails_for_the_reason_for_which_the_edit_fails(name: str) -> None:
    data = getattr(golden_images, name)().data
    with pytest.raises(qcow2bm.Qcow2BmError) as of_edit:
        add(bytearray(data), 1)
    with qcow2bm.open(data) as image, pytest.raises(type(of_edit.value)) as of_measurement:
        image.measure_addition()
    assert str(of_measurement.value) == str(of_edit.value)


@pytest.mark.spec("MEASURE-8")
def test_while_an_image_is_edited_or_tracked_it_is_not_measured() -> None:
    with qcow2bm.open(build_image(Stored()).data, "r+") as image:
        with image.edit(), pytest.raises(qcow2bm.StateError, match="being edited"):
            image.measure_addition()
        with image.track(), pytest.raises(qcow2bm.StateError, match="being tracked"):
            image.measure_addition()


@pytest.mark.spec("MEASURE-5")
def test_very_many_bitmaps_are_measured_without_being_made() -> None:
    with qcow2bm.open(build_image(size=1 << 50, cluster_bits=21).data) as image:
        addition = image.measure_addition(60_000, granularity=2 << 20)
    assert addition.full.data == 60_000 * (64 << 20)


def add(data: bytearray, count: int) -> None:
    """Adds bitmaps of the default granularity, with names of 36 bytes."""
    with qcow2bm.open(data, "r+") as image, image.edit() as edit:
        for number in range(count):
            edit.add(name(number))


@pytest.mark.spec("MEASURE-5")
def test_some_layouts_grow_by_what_was_measured_or_are_refused() -> None:
    require_exact_growth([*LAYOUTS][::10])


@pytest.mark.deep
@pytest.mark.spec("MEASURE-5")
def test_every_layout_grows_by_what_was_measured_or_is_refused() -> None:
    grown, refused = require_exact_growth(LAYOUTS)
    print(f"{grown} times an image grew as measured, {refused} times both were refused")


def require_exact_growth(layouts: Iterable[str]) -> tuple[int, int]:
    """Adds bitmaps to images with snapshots, unknown extensions, wrong refcounts, and so on.

    Returns how often an image grew, and how often it refused.
    """
    grown = refused = 0
    for layout in layouts:
        before = build(layout)
        for count in (1, 30):
            after = bytearray(before)
            try:
                add(after, count)
            except qcow2bm.Qcow2BmError as error:
                with qcow2bm.open(before) as image, pytest.raises(type(error)):
                    image.measure_addition(count)
                refused += 1
                continue
            with qcow2bm.open(before) as image, qcow2bm.open(after) as edited:
                growth = image.measure_addition(count).empty
                assert growth.total == in_use(edited) - in_use(image), layout
            assert growth.file == len(after) - len(before), layout
            grown += 1
    assert grown > refused
    return grown, refused


def in_use(image: qcow2bm.Image) -> int:
    """The bytes of all clusters that are in use."""
    end, free = image.file_space()
    assert end is not None
    assert free is not None
    return end - free


# Bitmaps that are there


MIXED = Stored(b"mixed", [b"\x01", b"\x02", ONES, *[ZEROES] * 66, b"\x03"])


@pytest.mark.spec("MEASURE-1")
def test_at_most_every_cluster_of_bits_is_stored() -> None:
    data = build_image(MIXED, size=70 * COVERED).data
    with qcow2bm.open(data, "r+") as image:
        bitmap = image.bitmaps["mixed"]
        assert bitmap.space == BitmapSpace(32, 2 * CLUSTER, 3 * CLUSTER)
        full = bitmap.full_space()
        assert full == BitmapSpace(32, 2 * CLUSTER, 70 * CLUSTER)
        bits = stripes(image.virtual_size, 1 << 16)
        with image.edit() as edit:
            edit.remove("mixed")
            edit.load("mixed", 1 << 16, bits)
        assert image.bitmaps["mixed"].space == full


@pytest.mark.spec("MEASURE-2")
@pytest.mark.parametrize(
    ("entries", "tables", "stored"),
    [(1, 1, 1), (2, 1, 2), (64, 1, 2), (69, 2, 2), (70, 2, 3), (71, 2, 3), (129, 3, 3)],
)
def test_after_a_resize_those_clusters_stay_that_lie_on_the_disk(
    entries: int, tables: int, stored: int
) -> None:
    with qcow2bm.open(build_image(MIXED, size=70 * COVERED).data) as image:
        bitmap = image.bitmaps["mixed"]
        kept = BitmapSpace(32, tables * CLUSTER, stored * CLUSTER)
        assert bitmap.space_after_resize(entries * COVERED) == kept
        full = BitmapSpace(32, tables * CLUSTER, entries * CLUSTER)
        assert bitmap.full_space(entries * COVERED) == full


@pytest.mark.spec("MEASURE-2")
def test_a_resize_that_a_bitmap_cannot_follow_is_an_error() -> None:
    with qcow2bm.open(build_image(Stored()).data) as image:
        with pytest.raises(qcow2bm.LimitError, match="the size of a bitmap of granularity 65536"):
            image.bitmaps["daily"].space_after_resize(1 << 50)
        with pytest.raises(qcow2bm.UnsupportedError):
            image.bitmaps["daily"].full_space(0)


@pytest.mark.spec("MEASURE-1")
def test_what_a_bitmap_can_take_is_not_known_if_it_cannot_be_read_or_used() -> None:
    with qcow2bm.open(build_image(Stored(), autoclear=False).data) as stale:
        assert stale.bitmap(0).full_space() is None
        assert stale.bitmap(0).space_after_resize(MiB) is None
    odd = Stored(b"coarse", [ZEROES], granularity_bits=40)
    with qcow2bm.open(build_image(odd).data) as image:
        assert image.bitmap(0).full_space() is None


# The next backup


@pytest.mark.spec("MEASURE-3")
@pytest.mark.spec("MEASURE-4")
def test_a_coarser_copy_has_what_was_measured() -> None:
    size = 70 * COVERED - 70000
    data = build_image(MIXED, size=size).data
    with qcow2bm.open(data, "r+") as image:
        measured = image.bitmaps["mixed"].coarser_totals()
        assert measured[0][1:] == image.bitmaps["mixed"].totals()
        assert [b.granularity // a.granularity for a, b in pairwise(measured)] == [2] * 15
        with image.edit() as edit:
            for totals in measured[1:]:
                edit.copy("mixed", str(totals.granularity), totals.granularity)
        for totals in measured[1:]:
            assert image.bitmaps[str(totals.granularity)].totals() == totals[1:]


@pytest.mark.spec("MEASURE-4")
@pytest.mark.parametrize("is_dirty", [False, True])
def test_if_nothing_or_all_is_dirty_no_granularity_makes_a_difference(is_dirty: bool) -> None:
    size = 3 * COVERED + 5 * 512
    with qcow2bm.open(build_image(Stored(), size=size).data, "r+") as image:
        if is_dirty:
            with image.edit() as edit:
                edit.invert("daily")
        (only,) = image.bitmaps["daily"].coarser_totals()
        assert only == (1 << 16, size * is_dirty, int(is_dirty))


@pytest.mark.spec("MEASURE-3")
def test_bits_that_miss_writes_are_not_counted() -> None:
    in_use = build_image(Stored(flags=3)).data
    with qcow2bm.open(in_use) as image, pytest.raises(qcow2bm.BitmapInconsistentError):
        image.bitmaps["daily"].coarser_totals()


def test_a_growth_has_a_sum() -> None:
    assert Growth(directory=1, tables=2, data=4, refcounts=8, file=16).total == 15
