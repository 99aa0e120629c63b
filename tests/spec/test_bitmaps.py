"""The requirements of spec/bitmaps.md."""

from __future__ import annotations

import hashlib
import struct

import pytest
from support.problem_images import broken, cut_directory, in_version_2
from support.spec_image import (
    CRASHED,
    DAILY,
    PAST_EOF,
    TABLES,
    WEEKLY,
    Patch,
    after_head,
    image,
    in_entry,
    in_header,
    in_payload,
    in_table,
    patched,
)

import qcow2bm
from qcow2bm.api import Bitmap
from qcow2bm.errors import (
    BitmapBrokenError,
    BitmapError,
    BitmapInconsistentError,
    BitmapStaleError,
)
from qcow2bm.format.directory import parse_directory


def open_patched(*patches: Patch) -> qcow2bm.Image:
    return qcow2bm.open(patched(image(), *patches))


def statuses(opened: qcow2bm.Image) -> list[str]:
    return [opened.bitmap(entry.index).status for entry in opened.directory]


def extents(bitmap: Bitmap) -> list[list[int]]:
    return [row for part in bitmap.extents() for row in part.tolist()]


STALE = in_header(autoclear_features=0)


@pytest.mark.spec("BME-1")
def test_without_the_autoclear_bit_every_bitmap_is_stale() -> None:
    with open_patched(*STALE) as opened:
        assert statuses(opened) == ["stale"] * 3


@pytest.mark.spec("BME-2")
def test_in_version_2_every_bitmap_is_stale() -> None:
    with open_patched(*in_version_2()) as opened:
        assert statuses(opened) == ["stale"] * 3


@pytest.mark.spec("BME-3")
def test_a_stale_directory_is_shown_and_its_faults_are_notes() -> None:
    with open_patched(*STALE, *in_entry(DAILY, type=9), in_table(WEEKLY, 2)) as opened:
        assert [bitmap.name for bitmap in opened.bitmaps.values()] == ["daily", "weekly", "crashed"]
        stale, *others = opened.problems
        assert stale.id == "bitmaps-extension.autoclear.off"
        assert [(p.id, p.severity) for p in others] == [("directory-entry.type.unknown", "note")]
        assert all(bitmap.clusters is None for bitmap in opened.bitmaps.values())


@pytest.mark.spec("DIR-1")
def test_names_are_told_apart_by_their_bytes() -> None:
    first, second = after_head(DAILY, b"d\xffily"), after_head(CRASHED, b"d\xfeily")
    with open_patched(*in_entry(CRASHED, name_size=5), first, second) as opened:
        assert list(opened.bitmaps) == ["d\udcffily", "weekly", "d\udcfeily"]
        assert opened.problems == ()


@pytest.mark.spec("DIR-2")
def test_names_are_equal_if_they_are_up_to_a_nul() -> None:
    renamed = after_head(WEEKLY, b"da\0one")
    with open_patched(after_head(DAILY, b"da\0ly"), renamed) as opened:
        assert statuses(opened) == ["broken", "broken", "inconsistent"]


@pytest.mark.spec("DIR-3")
def test_extra_data_must_be_compatible() -> None:
    with qcow2bm.open(broken("directory-entry.extra_data.compatible")) as opened:
        assert opened.bitmaps["daily"].count() == 261632
        assert opened.bitmaps["daily"].entry.extra_data == b"x"
    with qcow2bm.open(broken("directory-entry.extra_data.incompatible")) as opened:
        assert opened.bitmaps["daily"].status == "broken"


@pytest.mark.spec("DIR-4")
def test_an_entry_that_is_cut_off_is_the_last() -> None:
    with open_patched(*in_entry(WEEKLY, name_size=100)) as opened:
        assert [entry.name for entry in opened.directory] == ["daily", None]
        assert statuses(opened) == ["valid", "broken"]


@pytest.mark.spec("DIR-4")
@pytest.mark.parametrize("left", [0, 1, 6])
def test_a_name_cut_off_by_the_end_of_the_file_is_not_believed(left: int) -> None:
    with qcow2bm.open(cut_directory(88 + left)) as opened:
        assert statuses(opened) == ["valid", "valid", "broken"]
    with qcow2bm.open(cut_directory(95)) as opened:  # but its padding
        assert statuses(opened) == ["valid", "valid", "inconsistent"]


@pytest.mark.spec("DIR-5")
def test_zeros_at_the_end_are_no_entries() -> None:
    with qcow2bm.open(broken("bitmap-directory.zeroes")) as opened:
        assert statuses(opened) == ["valid", "valid", "inconsistent"]


@pytest.mark.spec("DIR-6")
@pytest.mark.parametrize("count", [0, 1, 2, 4, 65536])
def test_a_wrong_count_hides_no_bitmap_but_uncounted_ones_are_broken(count: int) -> None:
    sound = ["valid", "valid", "inconsistent"]
    with open_patched(*in_payload(nb_bitmaps=count)) as opened:
        assert statuses(opened) == sound[:count] + ["broken"] * (3 - count)


@pytest.mark.spec("DIR-7")
@pytest.mark.parametrize("size", [1, 1023, 1024, 65535])
def test_names_of_any_length_are_read(size: int) -> None:
    head = struct.pack(">QIIBBHI", 0xE00, 1, 0, 1, 16, size, 0)
    (entry,) = parse_directory(head + b"n" * size + bytes(-size % 8), 0, 65535).entries
    assert entry.name == "n" * size


@pytest.mark.spec("DIR-8")
def test_what_is_read_of_a_directory_is_bounded() -> None:
    entry = struct.pack(">QIIBBHI", 0xE00, 1, 0, 1, 16, 0, 0)
    start = 1 << 16
    data = patched(
        image(),
        *in_payload(bitmap_directory_offset=start, bitmap_directory_size=1 << 62),
        (start, entry * 65537),
    )
    with qcow2bm.open(data) as opened:
        assert len(opened.directory) == 65535


@pytest.mark.spec("TAB-1")
@pytest.mark.parametrize("word", [2, 1 << 8, 1 << 56, 1 << 63, 0x1001, 3])
def test_any_other_word_breaks_the_bitmap(word: int) -> None:
    with open_patched(in_table(DAILY, word)) as opened:
        assert statuses(opened) == ["broken", "valid", "inconsistent"]
        with pytest.raises(BitmapBrokenError, match="reserved bits"):
            opened.bitmaps["daily"].count()


@pytest.mark.spec("TAB-1")
def test_an_unaligned_word_breaks_the_bitmap() -> None:
    with qcow2bm.open(broken("bitmap-table.entry.unaligned")) as opened:
        assert statuses(opened) == ["broken"]


@pytest.mark.spec("TAB-2")
@pytest.mark.spec("DEV-3")
@pytest.mark.parametrize(
    ("patches", "expected"),
    [
        ([in_table(DAILY, 0x1400)], ["broken", "broken", "inconsistent"]),
        ([in_table(DAILY, TABLES[WEEKLY])], ["broken", "broken", "inconsistent"]),
        ([in_table(DAILY, 0xC00)], ["broken", "valid", "inconsistent"]),
        ([in_table(DAILY, 0x600)], ["broken", "valid", "inconsistent"]),
        ([in_table(DAILY, 0x200)], ["broken", "valid", "inconsistent"]),
        (in_entry(DAILY, bitmap_table_offset=0x800), ["broken", "valid", "inconsistent"]),
        (in_entry(DAILY, bitmap_table_offset=0xC00), ["broken", "valid", "inconsistent"]),
    ],
    ids=["data", "other table", "directory", "L1 table", "refcount table", "table", "tie"],
)
def test_what_overlaps_is_broken(patches: list[Patch], expected: list[str]) -> None:
    with open_patched(*patches) as opened:
        assert statuses(opened) == expected


@pytest.mark.spec("TAB-2")
@pytest.mark.parametrize(
    "wrong",
    [
        in_header(l1_table_offset=0xE08),
        in_header(refcount_table_offset=0xE08),
        in_header(refcount_table_offset=PAST_EOF),
        in_header(l1_size=1 << 23),
        in_header(l1_size=1),
        in_header(refcount_table_clusters=1 << 20),
    ],
)
def test_a_wrong_header_field_overlaps_nothing(wrong: list[Patch]) -> None:
    with open_patched(*wrong) as opened:
        assert {problem.structure for problem in opened.problems} == {"header"}
        assert statuses(opened) == ["valid", "valid", "inconsistent"]


@pytest.mark.spec("TAB-2")
@pytest.mark.parametrize(
    "wrong",
    [
        in_header(l1_table_offset=0xE00, l1_size=1 << 23),
        in_header(l1_table_offset=0xE00, l1_size=1),
        in_header(refcount_table_offset=0xE00, refcount_table_clusters=1 << 20),
        in_header(snapshots_offset=0xE00, nb_snapshots=60000),
    ],
)
def test_a_wrong_size_hides_no_overlap(wrong: list[Patch]) -> None:
    with open_patched(*wrong) as opened:
        assert statuses(opened)[0] == "broken"


@pytest.mark.spec("TAB-2")
def test_a_directory_where_something_else_is_breaks_all() -> None:
    with open_patched((0x208, struct.pack(">Q", 0xC00))) as opened:  # a second refcount block
        assert [p.id for p in opened.problems] == ["bitmap-directory.overlap"]
        assert statuses(opened) == ["broken"] * 3


@pytest.mark.spec("TAB-2")
def test_what_an_overlapped_table_says_is_held_against_nobody() -> None:
    shared = in_entry(DAILY, bitmap_table_offset=TABLES[CRASHED])
    with open_patched(*shared, in_table(CRASHED, 0x1400)) as opened:
        assert statuses(opened) == ["broken", "valid", "broken"]


@pytest.mark.spec("TAB-3")
def test_how_much_of_the_last_clusters_must_be_in_the_file() -> None:
    end = 0x1800
    moved = patched(image(), in_table(DAILY, end), (end, b"\xff" * 10))
    with qcow2bm.open(moved) as opened:  # 80 bits: exactly these 10 bytes
        assert opened.bitmaps["daily"].count() == 5242368
    with qcow2bm.open(moved[:-1]) as opened:
        assert opened.bitmaps["daily"].status == "broken"
    with qcow2bm.open(image()[:-1]) as opened:  # the last byte of the table of "crashed"
        assert statuses(opened) == ["valid", "valid", "broken"]


@pytest.mark.spec("INV-TAIL")
@pytest.mark.spec("DATA-1")
@pytest.mark.spec("DATA-2")
@pytest.mark.parametrize("stored", [[(0x1000, b"\xff" * 512)], [in_table(DAILY, 1)]])
def test_nothing_lies_past_the_disk(stored: list[Patch]) -> None:
    size = 77 * 65536 + 512  # 78 bits
    with open_patched(*in_header(size=size), *in_entry(WEEKLY, flags=1), *stored) as opened:
        bitmap = opened.bitmaps["daily"]
        assert bitmap.packed().tobytes() == b"\xff" * 9 + b"\x3f"
        assert bitmap.count() == size
        assert extents(bitmap) == [[0, size]]


@pytest.mark.spec("DATA-3")
def test_the_digest_is_that_of_whole_words() -> None:
    with qcow2bm.open(image()) as opened:
        bitmap = opened.bitmaps["daily"]
        words = bitmap.packed().tobytes().ljust(16, b"\0")
        assert bitmap.sha256() == hashlib.sha256(words).hexdigest()


@pytest.mark.spec("DATA-4")
def test_extents_are_merged_over_kinds_of_cluster() -> None:
    with open_patched(in_table(WEEKLY, 0x1400, 1, 1)) as opened:
        assert extents(opened.bitmaps["weekly"]) == [[0, 512], [2093056, 5242368 - 2093056]]


@pytest.mark.spec("STAT-1")
def test_the_order_of_the_statuses() -> None:
    worst = in_entry(DAILY, flags=1, type=9)
    with open_patched(*worst, *STALE) as opened:
        assert opened.bitmaps["daily"].status == "stale"
    with open_patched(*worst) as opened:
        assert opened.bitmaps["daily"].status == "broken"
    with open_patched(*in_entry(DAILY, flags=1)) as opened:
        assert opened.bitmaps["daily"].status == "inconsistent"


REFUSALS: list[tuple[list[Patch], type[BitmapError]]] = [
    (in_entry(DAILY, flags=1), BitmapInconsistentError),
    (STALE, BitmapStaleError),
    ([in_table(DAILY, 2)], BitmapBrokenError),
]


@pytest.mark.spec("STAT-2")
@pytest.mark.parametrize(("patches", "error"), REFUSALS)
def test_only_a_valid_bitmap_is_read(patches: list[Patch], error: type[BitmapError]) -> None:
    with open_patched(*patches) as opened:
        bitmap = opened.bitmaps["daily"]
        for read in (bitmap.count, bitmap.packed, bitmap.sha256, lambda: list(bitmap.extents())):
            with pytest.raises(error):
                read()


@pytest.mark.spec("INV-COARSE")
@pytest.mark.spec("STAT-2")
def test_stale_bits_are_dirty_where_they_cannot_be_read() -> None:
    with open_patched(in_table(WEEKLY, 0x1400, 2, 0)) as opened:
        stale = opened.bitmaps["weekly"].stale_bits().tobytes()
        assert stale == b"\1" + bytes(510) + b"\xff" + b"\xff" * 512 + bytes(256)


@pytest.mark.spec("STAT-4")
def test_a_broken_bitmap_does_not_affect_another() -> None:
    with open_patched(*in_entry(DAILY, type=9, bitmap_table_size=0), in_table(DAILY, 2)) as opened:
        assert statuses(opened) == ["broken", "valid", "inconsistent"]
        assert opened.bitmaps["weekly"].count() == 2101760
