"""What an image has for each range of its disk, by tables that are written by hand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.images import ONES, ZEROES, Built, Stored, build_image
from support.mapped_images import (
    COMPRESSED,
    COPIED,
    EXTENDED,
    WITH_DATA_FILE,
    ZERO,
    Entry,
    mapped_image,
)
from support.scripted_storage import ScriptedStorage
from support.sparse_images import every, sparse_image
from support.traced_memory import traced_memory

import qcow2bm
from qcow2bm import DataKind, FormatError
from qcow2bm.guest import data_map

CLUSTER = 512  # whose L2 tables have 64 entries
TABLE = 64 * CLUSTER
BIG = 1 << 14  # the smallest cluster with extended L2 entries
SUBCLUSTER = BIG // 32

UNALLOCATED, DATA, ZEROS, PACKED = DataKind
Rows = list[tuple[int, int, DataKind]]


def kinds(source: Any) -> Rows:
    """The ranges of an image, all pieces together."""
    with qcow2bm.open(source) as image:
        rows = [row for part in image.data_extents() for row in part.tolist()]
    return [(start, length, DataKind(kind)) for start, length, kind in rows]


@pytest.mark.spec("MAP-2")
def test_each_entry_has_its_kind_and_neighbours_are_joined() -> None:
    last = 3 * TABLE - 1024  # the disk ends two clusters before its third L2 table does
    image = mapped_image(
        {
            0: {
                0: COPIED | CLUSTER,
                1: 2 * CLUSTER,
                2: CLUSTER | ZERO,
                3: ZERO,
                5: COMPRESSED | 700,
            }
            | {63: COPIED | CLUSTER},
            2: {0: COPIED | CLUSTER, 61: COPIED | CLUSTER, 62: COPIED | 7 * CLUSTER},
        },
        size=last,
    )
    assert kinds(image.data) == [
        (0, 2 * CLUSTER, DATA),
        (2 * CLUSTER, 2 * CLUSTER, ZEROS),
        (4 * CLUSTER, CLUSTER, UNALLOCATED),
        (5 * CLUSTER, CLUSTER, PACKED),
        (6 * CLUSTER, 57 * CLUSTER, UNALLOCATED),
        (63 * CLUSTER, CLUSTER, DATA),
        (TABLE, TABLE, UNALLOCATED),
        (2 * TABLE, CLUSTER, DATA),
        (2 * TABLE + CLUSTER, 60 * CLUSTER, UNALLOCATED),
        (last - CLUSTER, CLUSTER, DATA),
    ]


@pytest.mark.spec("MAP-2")
@pytest.mark.parametrize("cluster_bits", range(10, 22))
def test_the_last_range_ends_where_the_disk_ends_inside_of_a_cluster(cluster_bits: int) -> None:
    cluster = 1 << cluster_bits
    size = 2 * cluster - 512
    image = mapped_image({0: {1: COPIED | cluster}}, cluster_bits=cluster_bits, size=size)
    assert kinds(image.data) == [(0, cluster, UNALLOCATED), (cluster, cluster - 512, DATA)]


def test_neighbours_are_joined_across_l2_tables_and_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_map, "_BATCH_BYTES", CLUSTER // 4)
    monkeypatch.setattr(data_map, "_TABLES_AT_ONCE", 2)
    full = dict.fromkeys(range(64), COPIED | CLUSTER)
    image = mapped_image({2: full, 1: full, 0: full, 4: full}, size=5 * TABLE)
    assert kinds(image.data) == [
        (0, 3 * TABLE, DATA),
        (3 * TABLE, TABLE, UNALLOCATED),
        (4 * TABLE, TABLE, DATA),
    ]


def test_each_subcluster_has_its_kind() -> None:
    image = mapped_image(
        {
            0: {
                0: (COPIED | BIG, 0b1100 << 32 | 0b0011),
                1: (COPIED | BIG, 0),
                2: (0, 1 << 63),
                3: (COMPRESSED | BIG, 0),
            }
        },
        cluster_bits=14,
        size=4 * BIG - 512,
        **EXTENDED,
    )
    assert kinds(image.data) == [
        (0, 2 * SUBCLUSTER, DATA),
        (2 * SUBCLUSTER, 2 * SUBCLUSTER, ZEROS),
        (4 * SUBCLUSTER, 91 * SUBCLUSTER, UNALLOCATED),
        (95 * SUBCLUSTER, SUBCLUSTER, ZEROS),
        (3 * BIG, BIG - 512, PACKED),
    ]


@pytest.mark.spec("MAP-5")
@pytest.mark.parametrize("autoclear", [0, 2])  # not raw, raw
def test_the_first_cluster_of_a_data_file_has_the_offset_0(autoclear: int) -> None:
    options = WITH_DATA_FILE | {
        "header": WITH_DATA_FILE["header"] | {"autoclear_features": autoclear}
    }
    far = TABLE - CLUSTER  # beyond the end of the image file, but not of the data file
    tables: dict[int, dict[int, Entry]] = {0: {0: COPIED, 63: COPIED | far}}
    image = mapped_image(tables, size=TABLE, **options)
    assert kinds(image.data) == [
        (0, CLUSTER, DATA),
        (CLUSTER, far - CLUSTER, UNALLOCATED),
        (far, CLUSTER, DATA),
    ]
    assert kinds(mapped_image({0: {0: COPIED}}, size=TABLE).data) == [(0, TABLE, UNALLOCATED)]
    extended = {
        "header": {"incompatible_features": 1 << 2 | 1 << 4, "autoclear_features": autoclear},
        "extensions": WITH_DATA_FILE["extensions"],
    }
    image = mapped_image({0: {0: (COPIED, 1)}}, cluster_bits=14, size=BIG, **extended)
    assert kinds(image.data)[0] == (0, SUBCLUSTER, DATA)
    with qcow2bm.open(image.data) as opened:
        assert "l2-table.entry.subclusters" not in {p.id for p in opened.check().problems}


@pytest.mark.spec("MAP-4")
def test_neither_snapshots_nor_other_files_count(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    with sparse_image(path, cluster_bits=9, disk_size=TABLE, has_l1_table=False) as made:
        data = made.add(bytes(CLUSTER))
        zeros = made.add(every(ZERO, 0, 64))
        full = made.add(every(COPIED - (1 << 64) | data, 0, 64))
        made.l1_table(1, every(zeros, 0, 1))
        made.snapshots_with([(made.add(every(full, 0, 1)), 1)])
    assert kinds(path) == [(0, TABLE, ZEROS)]
    overlay = mapped_image({}, size=TABLE, backing_name=b"/no/such/file")
    assert kinds(overlay.data) == [(0, TABLE, UNALLOCATED)]
    assert not UNALLOCATED.reads_as_zeros(has_backing_file=True)
    assert UNALLOCATED.reads_as_zeros(has_backing_file=False)


def test_what_a_short_l1_table_lacks_is_unallocated() -> None:
    full: dict[int, Entry] = dict.fromkeys(range(64), ZERO)
    image = mapped_image({0: full, 1: full}, size=2 * TABLE, header={"l1_size": 1})
    assert kinds(image.data) == [(0, TABLE, ZEROS), (TABLE, TABLE, UNALLOCATED)]
    with qcow2bm.open(image.data) as opened:
        assert "header.l1_size.too-small" in {problem.id for problem in opened.problems}


def test_a_disk_without_a_byte_has_no_range() -> None:
    assert kinds(mapped_image({}, size=0).data) == []


# --- hostile tables ------------------------------------------------------------------------------


@pytest.mark.spec("MAP-6")
@pytest.mark.parametrize(
    ("entry", "options", "reason"),
    [
        (CLUSTER | 2, {}, "has reserved bits set"),
        (1 << 56 | ZERO, {}, "has reserved bits set"),
        (CLUSTER | ZERO, {"version": 2}, "has reserved bits set"),
        (1 << 40, {}, "leads past the end of the file"),
        (COMPRESSED | 1 << 40, {}, "leads past the end of the file"),
        (COMPRESSED | (1 << 62) - 1, {}, "leads past the end of the file"),
        (CLUSTER, {"cluster_bits": 10}, "leads to no start of a cluster"),
        (COMPRESSED | CLUSTER, WITH_DATA_FILE, "is compressed, beside a data file"),
        (CLUSTER, WITH_DATA_FILE, "leads to another offset of the data file"),
        (COPIED, WITH_DATA_FILE, "leads to another offset of the data file"),
        ((BIG, 1 << 32 | 1), EXTENDED, "has subclusters that cannot be"),
        ((0, 1), EXTENDED, "has subclusters that cannot be"),
        ((COMPRESSED | BIG, 1), EXTENDED, "has subclusters that cannot be"),
        ((BIG | ZERO, 0), EXTENDED, "has reserved bits set"),
    ],
)
def test_an_l2_entry_that_cannot_be_is_named(
    entry: Entry, options: dict[str, Any], reason: str
) -> None:
    bits = 14 if isinstance(entry, tuple) else options.get("cluster_bits", 9)
    options = {"cluster_bits": bits} | options
    per_table = (1 << bits) // (16 if isinstance(entry, tuple) else 8)
    size = 2 * per_table << bits  # two L2 tables
    image = mapped_image({1: {7: entry, 9: entry}}, size=size, **options)
    with pytest.raises(FormatError, match=reason) as raised:
        kinds(image.data)
    error = raised.value
    table = len(image.data) - image.cluster_size
    place = table + 7 * (16 if isinstance(entry, tuple) else 8)
    assert (error.structure, error.field, error.offset) == ("L2 table", "entry 7", place)


@pytest.mark.spec("MAP-6", "MAP-7")
@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (CLUSTER | 1, "has reserved bits set"),
        (1 << 40, "leads to 0x10000000000, past the end of the file"),
        ("first table", "leads to .*, as does another entry"),
        ("l1-table", "leads to .*, in the L1 table itself"),
    ],
)
def test_an_l1_entry_that_cannot_be_is_named(entry: int | str, reason: str) -> None:
    image = mapped_image({0: {}}, size=4 * TABLE)
    places = {"first table": len(image.data) - CLUSTER, "l1-table": image.offset("l1-table")}
    word = entry if isinstance(entry, int) else places[entry]
    offset = image.plant(word, "l1-table", 0, 3)
    with pytest.raises(FormatError, match=reason) as raised:
        kinds(image.data)
    error = raised.value
    number = 0 if entry == "first table" else 3
    assert (error.structure, error.field) == ("L1 table", f"entry {number}")
    assert error.offset == offset - 8 * (3 - number)


@pytest.mark.spec("MAP-6")
def test_an_unaligned_l1_entry_is_named() -> None:
    image = mapped_image({}, cluster_bits=12, size=1 << 20)
    image.plant(512, "l1-table", 0, 0)
    with pytest.raises(
        FormatError, match=r"entry 0 at .* leads to 0x200, not the start of a cluster"
    ):
        kinds(image.data)


@pytest.mark.spec("MAP-6")
def test_what_lies_before_a_fault_is_returned_and_nothing_behind_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(data_map, "_BATCH_BYTES", CLUSTER)
    image = mapped_image({0: {0: ZERO, 1: CLUSTER}, 1: {1: ZERO, 5: CLUSTER | 2}}, size=2 * TABLE)
    with qcow2bm.open(image.data) as opened:
        found = opened.data_extents()
        assert next(found).tolist() == [[0, CLUSTER, ZEROS]]
        with pytest.raises(FormatError, match="L2 table: entry 5"):
            next(found)


@pytest.mark.spec("MAP-8")
@pytest.mark.parametrize(
    "header",
    [
        {"incompatible_features": 1 << 40},
        {"incompatible_features": 1 << 4},  # with clusters of 512 bytes
        {"size": (1 << 63) - 512},
        {"l1_size": (4 << 20) + 1},
        {"l1_table_offset": 100},
        {"l1_table_offset": 1 << 40},
    ],
)
def test_a_header_with_which_the_tables_cannot_be_read(header: dict[str, int]) -> None:
    image = mapped_image({}, cluster_bits=9, size=TABLE, header=header)
    with pytest.raises(FormatError, match=next(iter(header))):
        kinds(image.data)


WORDS = st.one_of(
    st.integers(0, (1 << 64) - 1),
    st.sampled_from([0, ZERO, COPIED, CLUSTER, COPIED | CLUSTER, COMPRESSED | 700, 1 << 40]),
)


@given(
    st.dictionaries(st.integers(0, 3), WORDS, max_size=3),
    st.dictionaries(st.integers(0, 63), WORDS, max_size=8),
    st.sampled_from([{}, {"version": 2}, WITH_DATA_FILE]),
)
def test_whatever_the_tables_have_there_is_a_whole_map_or_a_named_fault(
    l1: dict[int, int], l2: dict[int, int], options: dict[str, Any]
) -> None:
    image = mapped_image({1: l2}, size=4 * TABLE - CLUSTER, **options)
    for number, word in l1.items():
        image.plant(word, "l1-table", 0, number)
    try:
        found = kinds(image.data)
    except FormatError as error:
        assert error.structure in ("L1 table", "L2 table")  # noqa: PT017
        return
    assert sum(length for _, length, _ in found) == 4 * TABLE - CLUSTER
    assert [start for start, _, _ in found[1:]] == [
        start + length for start, length, _ in found[:-1]
    ]


# --- what reading costs --------------------------------------------------------------------------


@pytest.mark.spec("MAP-10")
def test_a_large_disk_with_few_tables_costs_its_l1_table() -> None:
    table = {0: COPIED | 1 << 16}
    image = mapped_image({0: table, 32767: table}, cluster_bits=16, size=16 << 40)
    storage = ScriptedStorage(image.data)
    with qcow2bm.open(storage) as opened:
        before = len(storage.reads)
        rows = np.concatenate(list(opened.data_extents()))
    assert len(rows) == 4
    assert rows[2].tolist() == [32767 << 29, 1 << 16, DATA]
    reads = storage.reads[before:]
    assert len(reads) < 20
    assert sum(stop - start for start, stop in reads) < 3 * (256 << 10)


@pytest.mark.spec("MAP-10")
def test_adjacent_l2_tables_are_read_at_once() -> None:
    tables: dict[int, dict[int, Entry]] = {n: {0: ZERO} for n in range(200)}
    image = mapped_image(tables, size=200 * TABLE)
    storage = ScriptedStorage(image.data)
    assert len(kinds(storage)) == 400
    assert len(storage.reads) < 20


@pytest.mark.spec("MAP-10")
def test_l2_tables_in_holes_cost_no_reading_and_no_memory(tmp_path: Path) -> None:
    path, count = tmp_path / "disk", 20_000
    disk = count << 39
    with sparse_image(path, cluster_bits=21, disk_size=disk, has_l1_table=False) as made:
        made.l1_table(count, every(1 << 30, 1 << 21, count))
        made.end = (1 << 30) + (count << 21)
    with qcow2bm.open(path) as image, traced_memory() as memory:
        assert [part.tolist() for part in image.data_extents()] == [[[0, disk, UNALLOCATED]]]
    assert memory.peak < 8 << 20


@pytest.mark.spec("MAP-9")
@pytest.mark.parametrize("is_forced", [False, True])
def test_a_change_of_the_tables_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_forced: bool
) -> None:
    monkeypatch.setattr(data_map, "_BATCH_BYTES", CLUSTER)
    image = mapped_image({0: {1: ZERO}, 1: {1: ZERO}, 2: {1: ZERO}}, size=4 * TABLE)
    path = tmp_path / "disk"
    path.write_bytes(image.data)
    with qcow2bm.open(path, force_share=is_forced) as opened:
        found = opened.data_extents()
        next(found)
        with path.open("r+b") as other:
            other.seek(image.offset("l1-table", 0, 3))
            other.write((COPIED | CLUSTER).to_bytes(8, "big"))
        with pytest.raises(qcow2bm.ChangedWhileReadingError):
            list(found)


@pytest.mark.spec("MAP-9")
def test_an_entry_that_leads_to_what_a_vm_has_just_added_is_no_fault(tmp_path: Path) -> None:
    image = mapped_image({0: {1: ZERO}}, size=TABLE)
    path = tmp_path / "disk"
    path.write_bytes(image.data)
    with qcow2bm.open(path, force_share=True) as opened:
        end = len(image.data)
        with path.open("r+b") as other:
            other.seek(end - CLUSTER)  # the L2 table
            other.write((COPIED | end).to_bytes(8, "big"))
            other.seek(end)
            other.write(bytes(CLUSTER))
        found = opened.data_extents()
        with pytest.raises(qcow2bm.ChangedWhileReadingError):
            next(found)
    assert kinds(path)[0] == (0, CLUSTER, DATA)


@pytest.mark.spec("MAP-9")
def test_an_image_that_is_edited_or_tracked_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(mapped_image({0: {0: ZERO}}, Stored(), size=2 * TABLE).data)
    expected = [[0, CLUSTER, ZEROS], [CLUSTER, 2 * TABLE - CLUSTER, UNALLOCATED]]
    with qcow2bm.open(path, "r+") as image:

        def found() -> list[list[int]]:
            return [row for part in image.data_extents() for row in part.tolist()]

        assert found() == expected
        with image.edit() as edit:
            edit.add("new")
        assert found() == expected
        with image.track() as tracker:
            assert found() == expected
            tracker.mark(0, 512)
            tracker.flush()
            assert found() == expected
        assert found() == expected


@pytest.mark.spec("MAP-9")
def test_nothing_is_read_of_an_image_that_is_closed() -> None:
    with qcow2bm.open(mapped_image({}, size=TABLE).data) as image:
        found = image.data_extents()
    with pytest.raises(qcow2bm.StateError):
        next(found)


# --- with the bits of a bitmap -------------------------------------------------------------------


def image_with_bitmap() -> Built:
    """A disk of two L2 tables; dirty is the first half of its first one, and all of the second."""
    table: list[int | bytes] = [b"\xff" * 4 + bytes(4) + b"\xff" * 8]
    some: dict[int, Entry] = {
        n: [0, ZERO, COPIED | CLUSTER, COMPRESSED | 700][n % 4] for n in range(64)
    }
    bitmap = Stored(b"daily", table, granularity_bits=9)
    return mapped_image({1: some}, bitmap, Stored(b"all", [ONES], 9), size=2 * TABLE)


def marked(bitmap: qcow2bm.Bitmap) -> Iterator[tuple[int, int, int, int]]:
    for part in bitmap.data_extents():
        assert part.dtype == np.int64
        yield from map(tuple, part.tolist())


@pytest.mark.spec("MAP-3")
def test_dirty_and_clean_ranges_are_told_apart_by_what_the_image_has() -> None:
    half = TABLE // 2
    with qcow2bm.open(image_with_bitmap().data) as image:
        daily = image.bitmaps["daily"]
        rows = list(marked(daily))
        assert rows[:4] == [
            (0, half, 1, UNALLOCATED),
            (half, half, 0, UNALLOCATED),
            (TABLE, CLUSTER, 1, UNALLOCATED),
            (TABLE + CLUSTER, CLUSTER, 1, ZEROS),
        ]
        assert rows[-1] == (2 * TABLE - CLUSTER, CLUSTER, 1, PACKED)
        assert len(rows) == 66
        totals = daily.data_totals()
        assert totals.clean == {UNALLOCATED: half, DATA: 0, ZEROS: 0, PACKED: 0}
        quarter = TABLE // 4
        assert totals.dirty == {
            UNALLOCATED: half + quarter,
            DATA: quarter,
            ZEROS: quarter,
            PACKED: quarter,
        }
        assert sum(totals.dirty.values()) == daily.count()


@pytest.mark.spec("MAP-3")
def test_a_combination_of_bitmaps() -> None:
    with qcow2bm.open(image_with_bitmap().data) as image:
        daily, everything = image.bitmaps["daily"], image.bitmaps["all"]
        rows = np.concatenate([*image.dirty_data_extents(everything - daily)])
        opposite = np.array(list(marked(daily)))
        opposite[:, 2] ^= 1
        assert (rows == opposite).all()
        totals, of_daily = image.dirty_data_totals(everything - daily), daily.data_totals()
        assert (totals.clean, totals.dirty) == (of_daily.dirty, of_daily.clean)
        larger = build_image(Stored(b"other"), size=8 * TABLE).data
        with qcow2bm.open(larger) as other, pytest.raises(ValueError, match="the disk has"):
            image.dirty_data_totals(other.bitmaps["other"])


def test_a_bitmap_that_is_all_dirty_or_all_clean() -> None:
    tables: dict[int, dict[int, Entry]] = {0: {0: ZERO}}
    both = Stored(b"all", [ONES], 9), Stored(b"none", [ZEROES], 9)
    with qcow2bm.open(mapped_image(tables, *both, size=TABLE).data) as image:
        for name, is_dirty in (("all", 1), ("none", 0)):
            assert list(marked(image.bitmaps[name])) == [
                (0, CLUSTER, is_dirty, ZEROS),
                (CLUSTER, TABLE - CLUSTER, is_dirty, UNALLOCATED),
            ]


def test_the_bits_of_a_bitmap_that_is_not_valid_are_not_combined_either() -> None:
    crashed = Stored(b"daily", [ONES], 9, flags=1)
    with qcow2bm.open(mapped_image({}, crashed, size=TABLE).data) as image:
        daily = image.bitmaps["daily"]
        with pytest.raises(qcow2bm.BitmapInconsistentError):
            next(daily.data_extents())
