"""Every problem id: planted alone, it is found alone, where it was planted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
from support.images import ONES, ZEROES, Built, Stored, Word, build_image, extension
from support.kinds import READ_KINDS

import qcow2bm
from qcow2bm.bitmaps.entries import MAX_BITMAP_BYTES
from qcow2bm.bitmaps.tables import MAX_FAULTS_LISTED, MAX_TABLES_BYTES
from qcow2bm.format import extensions
from qcow2bm.format.directory import FLAG_EXTRA_DATA_COMPATIBLE, FLAG_IN_USE
from qcow2bm.problem_kinds import problem
from qcow2bm.problems import LEAK, REFUSED, SEVERITIES, UNUSABLE, Severity
from qcow2bm.units import align_up

CLUSTER = 1024
SIZE = 3 * 8 * CLUSTER << 16
TABLE: list[Word] = [ZEROES, b"\x01", ONES]
PAST_EOF = 1 << 40
LONGEST = 0x7FFFFFFFC0000000  # how long a file can be for QEMU
MAX_SIZE = ((1 << 31) - 1) << 17  # of a disk with such clusters
MAX_FILE_LENGTH = 0x7FFFFFFFC0000000  # of QEMU


class Planted(NamedTuple):
    """An image with one fault: where it is, whose it is, and what it cannot be without."""

    image: Built
    offset: int
    owner: int | None = None
    also: frozenset[str] = frozenset()


Plant = Callable[[], Planted]


def sound(second: Stored | None = None, **options: object) -> Built:
    """Two bitmaps; faults are planted in the second, with something before and behind it."""
    bitmaps = Stored(b"first", TABLE), second or Stored(b"second", TABLE), Stored(b"third", TABLE)
    return build_image(*bitmaps, cluster_bits=10, size=SIZE, **options)  # type: ignore[arg-type]


def field(structure: str, name: str, value: int, *also: str) -> Plant:
    """The fault is a value of a field, which is where it is reported."""

    def plant() -> Planted:
        image = sound()
        return Planted(image, image.plant(value, structure, 0, name), also=frozenset(also))

    return plant


def in_header(name: str, value: int, *also: str) -> Plant:
    return field("header", name, value, *also)


def in_payload(name: str, value: int, *also: str) -> Plant:
    return field("bitmaps-extension", name, value, *also)


def in_entry(name: str, value: int, *also: str) -> Plant:
    def plant() -> Planted:
        image = sound()
        offset = image.plant(value, "directory-entry", 1, name)
        return Planted(image, offset, 1, frozenset(also))

    return plant


def built(bitmap: Stored, name: str, *also: str) -> Plant:
    """The fault is in how the second bitmap is stored; it is reported at a field of its entry."""

    def plant() -> Planted:
        image = sound(bitmap)
        return Planted(image, image.offset("directory-entry", 1, name), 1, frozenset(also))

    return plant


def in_table(word: int) -> Plant:
    def plant() -> Planted:
        image = sound()
        return Planted(image, image.plant(word, "bitmap-table", 1, 2), 1)

    return plant


def with_extensions(
    *listed: tuple[int, bytes], at: int = 0, delta: int = 0, also: str = ""
) -> Planted:
    image = sound(extensions=[extension(type, data) for type, data in listed])
    offset = image.offset("header-extension", at) + delta
    return Planted(image, offset, also=frozenset([also] if also else []))


def header_length_unaligned() -> Planted:
    image = sound(additional_fields=bytes(4))
    return Planted(image, image.offset("header", 0, "header_length"))


def backing_name_too_long() -> Planted:
    image = sound()
    image.plant(CLUSTER - 100, "header", 0, "backing_file_offset")
    return Planted(image, image.plant(101, "header", 0, "backing_file_size"))


def compression_unknown() -> Planted:
    image = sound()
    image.plant(1 << 3, "header", 0, "incompatible_features")
    return Planted(image, image.plant(2, "header", 0, "compression_type"))


def compression_bit_unexpected() -> Planted:
    image = sound()
    image.plant(1 << 3, "header", 0, "incompatible_features")
    return Planted(image, image.offset("header", 0, "compression_type"))


def no_bitmaps_extension() -> Planted:
    image = build_image(cluster_bits=10, size=SIZE)
    return Planted(image, image.plant(1, "header", 0, "autoclear_features"))


def snapshots(name: str, **values: int) -> Plant:
    def plant() -> Planted:
        image = sound()
        for each, value in values.items():
            image.plant(value, "header", 0, each)
        return Planted(image, image.offset("header", 0, name))

    return plant


def long_snapshot_table() -> Planted:
    """One more than fit into 64 MiB, each with names of the greatest length."""
    image = sound()
    start = len(image.data)
    entry = bytearray(align_up(40 + 2 * 65535, 8))
    entry[12:16] = b"\xff" * 4  # id_str_size and name_size
    count = (64 << 20) // len(entry) + 1
    image.data.extend(entry * count)
    image.plant(count, "header", 0, "nb_snapshots")
    image.plant(start, "header", 0, "snapshots_offset")
    return Planted(image, start)


def extension_too_large() -> Planted:
    image = sound()
    at = image.offset("header-extension", 1)
    image.data[at : at + 8] = (0x12345678).to_bytes(4, "big") + CLUSTER.to_bytes(4, "big")
    return Planted(image, at + 4)


def extension_end_missing() -> Planted:
    image = sound()
    at = image.offset("header-extension", 1)
    length = CLUSTER - at - 8
    image.data[at : at + 8] = (0x12345678).to_bytes(4, "big") + length.to_bytes(4, "big")
    return Planted(image, CLUSTER)


def extension_padding() -> Planted:
    planted = with_extensions((0x12345678, b"abc"), delta=8 + 3)
    planted.image.data[planted.offset] = 1
    return planted


def bitmaps_twice() -> Planted:
    image = sound()
    start, end = (image.offset("header-extension", number) for number in (0, 1))
    image.data[end : 2 * end - start] = image.data[start:end]
    return Planted(image, end)


def bitmaps_length() -> Planted:
    image = build_image(extensions=[extension(extensions.BITMAPS, bytes(32))], cluster_bits=10)
    return Planted(image, image.offset("header-extension", 0) + 4)


def crypto(data: bytes, delta: int = 0, **header: int) -> Plant:
    def plant() -> Planted:
        image = sound(extensions=[extension(extensions.CRYPTO, data)], header=header)
        return Planted(image, image.offset("header-extension", 0) + delta)

    return plant


def snapshot_extra_data() -> Planted:
    image = sound(header={"nb_snapshots": 1})
    place = len(image.data)
    image.plant(place, "header", 0, "snapshots_offset")
    extra_data_size = place + 36
    image.data.extend(bytes(36) + (1025).to_bytes(4, "big") + bytes(2 * CLUSTER - 40))
    return Planted(image, extra_data_size)


def version_2() -> Planted:
    image = sound(version=2)
    return Planted(image, image.offset("header-extension", 0))


def zero_entries() -> Planted:
    image = sound(directory_rest=bytes(24))
    image.plant(4, "bitmaps-extension", 0, "nb_bitmaps")
    offset = image.offset("directory-entry", 2, "padding") + 3
    return Planted(image, offset, also=frozenset(["bitmaps-extension.nb_bitmaps.more"]))


def autoclear_off() -> Planted:
    image = sound(autoclear=False)
    return Planted(image, image.offset("header-extension", 0))


def directory_rest(rest: bytes) -> Plant:
    def plant() -> Planted:
        image = sound(directory_rest=rest)
        return Planted(image, image.offset("directory-entry", 2, "padding") + 3)

    return plant


def directory_too_large() -> Planted:
    image = sound()
    offset = image.plant(1024 * 65535 + 8, "bitmaps-extension", 0, "bitmap_directory_size")
    # It then reaches past the end of the file, and has zeros at its end.
    also = frozenset(
        ["bitmaps-extension.bitmap_directory_size.past-eof", "bitmap-directory.zeroes"]
    )
    return Planted(image, offset, also=also)


def directory_cut_off() -> Planted:
    """The file ends in the middle of the last name."""
    image = sound(whole_clusters=False)
    del image.data[image.offset("directory-entry", 2, "name") + 2 :]
    offset = image.offset("bitmaps-extension", 0, "bitmap_directory_size")
    return Planted(image, offset, also=frozenset(["directory-entry.truncated"]))


def directory_unaligned() -> Planted:
    # Zeros are read there, which make no entries.
    image = sound()
    value = image.offset("refcount-table") + CLUSTER // 2
    offset = image.plant(value, "bitmaps-extension", 0, "bitmap_directory_offset")
    also = frozenset(["bitmap-directory.zero-entries", "bitmaps-extension.nb_bitmaps.more"])
    return Planted(image, offset, also=also)


def directory_over_table() -> Planted:
    image = sound()
    offset = image.offset("bitmap-directory")
    image.plant(offset, "directory-entry", 1, "bitmap_table_offset")
    return Planted(
        image, offset, also=frozenset(["bitmap-table.overlap", "bitmap-table.entry.reserved"])
    )


def surplus() -> Planted:
    """An entry the header does not count, as an older directory leaves it behind."""
    image = sound()
    image.plant(2, "bitmaps-extension", 0, "nb_bitmaps")
    also = frozenset(["bitmaps-extension.nb_bitmaps.less"])
    return Planted(image, image.offset("directory-entry", 2), 2, also)


def too_many_tables() -> Planted:
    """Entries in use that all claim one table of 8 MiB: one more than are looked at."""
    size = MAX_BITMAP_BYTES // CLUSTER
    count = MAX_TABLES_BYTES // (8 * size) + 1
    names = [f"{number:02}".encode() for number in range(count)]
    image = build_image(*(Stored(name, flags=FLAG_IN_USE) for name in names), cluster_bits=9)
    start = len(image.data)
    for number in range(count):
        image.plant(start, "directory-entry", number, "bitmap_table_offset")
        image.plant(size, "directory-entry", number, "bitmap_table_size")
    image.data.extend(bytes(8 * size))
    also = frozenset(["directory-entry.bitmap_table_size.outdated", "bitmap-table.overlap"])
    return Planted(image, start, count - 1, also)


def tables_overlap() -> Planted:
    image = sound()
    offset = image.offset("bitmap-table", 0)
    image.plant(offset, "directory-entry", 1, "bitmap_table_offset")
    return Planted(image, offset, 1)


def data_overlaps_l1() -> Planted:
    image = sound()
    offset = image.offset("l1-table")
    image.plant(offset, "bitmap-table", 1, 1)
    return Planted(image, offset, 1)


def many_bad_words() -> Planted:
    table: list[Word] = [PAST_EOF] * (MAX_FAULTS_LISTED + 4)
    image = sound(Stored(b"second", table, flags=FLAG_IN_USE))
    offset = image.offset("bitmap-table", 1, MAX_FAULTS_LISTED)
    also = ["bitmap-table.entry.past-eof", "directory-entry.bitmap_table_size.outdated"]
    return Planted(image, offset, 1, frozenset([*also, "bitmap-data.overlap"]))


def truncated() -> Planted:
    image = sound()
    offset = image.plant(0xFFF0, "directory-entry", 2, "name_size")
    return Planted(image, offset, 2)


def zero_size() -> Planted:
    return in_payload("bitmap_directory_size", 0, "bitmaps-extension.nb_bitmaps.more")()


def name_nul() -> Planted:
    image = sound()
    image.plant(0, "directory-entry", 1, "name")
    return Planted(image, image.offset("directory-entry", 1, "name"), 1)


def padding() -> Planted:
    image = sound()
    return Planted(image, image.plant(1, "directory-entry", 1, "padding"), 1)


COMPATIBLE = FLAG_EXTRA_DATA_COMPATIBLE

PLANTS: dict[str, Plant] = {
    "header.backing_file_offset.invalid": in_header("backing_file_offset", CLUSTER + 1),
    "header.backing_file_size.too-large": backing_name_too_long,
    "header.size.unaligned": in_header("size", SIZE - 1),
    "header.size.too-large": in_header("size", 1 << 61, "directory-entry.bitmap_table_size.less"),
    "header.crypt_method.unknown": in_header("crypt_method", 3),
    "header.l1_size.too-small": in_header("l1_size", 0),
    "header.l1_size.too-large": in_header("l1_size", (32 << 17) + 1),
    "header.l1_table_offset.invalid": in_header("l1_table_offset", CLUSTER + 512),
    "header.l1_table_offset.unreadable": in_header("l1_table_offset", LONGEST),
    "header.l1_table_offset.past-eof": in_header("l1_table_offset", PAST_EOF),
    "header.refcount_table_offset.invalid": in_header("refcount_table_offset", CLUSTER + 512),
    "header.refcount_table_offset.unreadable": in_header("refcount_table_offset", LONGEST),
    "header.refcount_table_offset.past-eof": in_header("refcount_table_offset", PAST_EOF),
    "header.refcount_table_clusters.zero": in_header("refcount_table_clusters", 0),
    "header.refcount_table_clusters.too-large": in_header("refcount_table_clusters", 8193),
    "header.nb_snapshots.too-large": in_header("nb_snapshots", 65537),
    "header.snapshots_offset.invalid": in_header("snapshots_offset", CLUSTER + 512),
    "header.snapshots_offset.unreadable": snapshots(
        "snapshots_offset", nb_snapshots=1, snapshots_offset=LONGEST
    ),
    "snapshot-table.size.too-large": long_snapshot_table,
    "header.snapshots_offset.past-eof": snapshots(
        "snapshots_offset", nb_snapshots=1, snapshots_offset=PAST_EOF
    ),
    "header.incompatible_features.unknown": in_header("incompatible_features", 1 << 63),
    "header.incompatible_features.dirty": in_header("incompatible_features", 1 << 0),
    "header.incompatible_features.corrupt": in_header("incompatible_features", 1 << 1),
    "header.incompatible_features.extended-l2": in_header(
        "incompatible_features", 1 << 4, "header.l1_size.too-small"
    ),
    "header.autoclear_features.unknown": in_header("autoclear_features", 1 << 63 | 1),
    "header.autoclear_features.no-bitmaps": no_bitmaps_extension,
    "header.autoclear_features.no-data-file": in_header("autoclear_features", 0b11),
    "header.refcount_order.too-large": in_header("refcount_order", 7),
    "header.header_length.too-small": in_header("header_length", 96),
    "header.header_length.too-large": in_header("header_length", CLUSTER + 8),
    "header.header_length.unaligned": header_length_unaligned,
    "header.compression_type.unknown": compression_unknown,
    "header.compression_type.bit-missing": in_header("compression_type", 1),
    "header.compression_type.bit-unexpected": compression_bit_unexpected,
    "header.padding.nonzero": in_header("padding", 1),
    "header-extension.length.too-large": extension_too_large,
    "header-extension.end.missing": extension_end_missing,
    "header-extension.padding.nonzero": extension_padding,
    "header-extension.backing-format.too-long": lambda: with_extensions(
        (extensions.BACKING_FORMAT, b"f" * 16)
    ),
    "header-extension.crypto.unexpected": crypto(bytes(16)),
    "header-extension.crypto.length": crypto(bytes(24), 4, crypt_method=2),
    "header-extension.crypto.unaligned": crypto(bytes(7) + b"\x08" + bytes(8), 8, crypt_method=2),
    "header-extension.crypto.missing": lambda: Planted(
        image := sound(header={"crypt_method": 2}), image.offset("header-extension", 1)
    ),
    "header-extension.bitmaps.duplicate": bitmaps_twice,
    "header-extension.bitmaps.length": bitmaps_length,
    "snapshot-table.extra_data_size.too-large": snapshot_extra_data,
    "bitmaps-extension.autoclear.off": autoclear_off,
    "bitmaps-extension.version.too-old": version_2,
    "bitmaps-extension.nb_bitmaps.zero": in_payload(
        "nb_bitmaps", 0, "bitmaps-extension.nb_bitmaps.less", "directory-entry.surplus"
    ),
    "bitmaps-extension.nb_bitmaps.too-large": in_payload(
        "nb_bitmaps", 65536, "bitmaps-extension.nb_bitmaps.more"
    ),
    "bitmaps-extension.nb_bitmaps.less": in_payload("nb_bitmaps", 2, "directory-entry.surplus"),
    "directory-entry.surplus": surplus,
    "bitmap-table.limit": too_many_tables,
    "bitmaps-extension.nb_bitmaps.more": in_payload("nb_bitmaps", 4),
    "bitmaps-extension.reserved.nonzero": in_payload("reserved", 1 << 31),
    "bitmaps-extension.bitmap_directory_size.zero": zero_size,
    "bitmaps-extension.bitmap_directory_size.too-large": directory_too_large,
    "bitmaps-extension.bitmap_directory_offset.unaligned": directory_unaligned,
    "bitmaps-extension.bitmap_directory_offset.zero": in_payload(
        "bitmap_directory_offset", 0, "bitmaps-extension.nb_bitmaps.more"
    ),
    "bitmaps-extension.bitmap_directory_offset.past-eof": in_payload(
        "bitmap_directory_offset", PAST_EOF, "bitmaps-extension.nb_bitmaps.more"
    ),
    "bitmaps-extension.bitmap_directory_size.past-eof": directory_cut_off,
    "bitmaps-extension.bitmap_directory_offset.unreadable": in_payload(
        "bitmap_directory_offset", 1 << 63, "bitmaps-extension.nb_bitmaps.more"
    ),
    "bitmap-directory.overlap": directory_over_table,
    "bitmap-directory.rest": directory_rest(b"\1" * 8),
    "bitmap-directory.zeroes": directory_rest(bytes(24)),
    "bitmap-directory.zero-entries": zero_entries,
    "directory-entry.truncated": truncated,
    "directory-entry.bitmap_table_offset.zero": in_entry("bitmap_table_offset", 0),
    "directory-entry.bitmap_table_offset.unaligned": in_entry("bitmap_table_offset", 0x600),
    "directory-entry.bitmap_table_offset.past-eof": in_entry("bitmap_table_offset", PAST_EOF),
    "directory-entry.bitmap_table_offset.unreadable": in_entry(
        "bitmap_table_offset", MAX_FILE_LENGTH
    ),
    "directory-entry.bitmap_table_size.zero": in_entry("bitmap_table_size", 0),
    "directory-entry.bitmap_table_size.too-large": in_entry("bitmap_table_size", (512 << 10) + 1),
    "directory-entry.bitmap_table_size.less": in_entry("bitmap_table_size", 2),
    "directory-entry.bitmap_table_size.more": in_entry("bitmap_table_size", 4),
    "directory-entry.bitmap_table_size.outdated": built(
        Stored(b"second", [*TABLE, ZEROES], flags=FLAG_IN_USE), "bitmap_table_size"
    ),
    "directory-entry.flags.reserved": in_entry("flags", 1 << 31),
    "directory-entry.flags.extra-data-compatible": in_entry("flags", COMPATIBLE),
    "directory-entry.type.unknown": in_entry("type", 0),
    "directory-entry.granularity_bits.too-large": in_entry("granularity_bits", 64),
    "directory-entry.granularity_bits.unsupported": built(
        Stored(b"second", TABLE[:1], granularity_bits=32), "granularity_bits"
    ),
    "directory-entry.extra_data.compatible": built(
        Stored(b"second", TABLE, flags=COMPATIBLE, extra_data=b"x"), "extra_data_size"
    ),
    "directory-entry.extra_data.incompatible": built(
        Stored(b"second", TABLE, extra_data=b"x"), "extra_data_size"
    ),
    "directory-entry.name_size.too-large": built(Stored(b"n" * 1024, TABLE), "name_size"),
    "directory-entry.name.empty": built(Stored(b"", TABLE), "name_size"),
    "directory-entry.name.nul": name_nul,
    "directory-entry.name.duplicate": built(Stored(b"third", TABLE), "name"),
    "directory-entry.padding.nonzero": padding,
    "bitmap-table.overlap": tables_overlap,
    "bitmap-table.entry.reserved": in_table(ONES | 1 << 8),
    "bitmap-table.entry.unaligned": in_table(CLUSTER + 512),
    "bitmap-table.entry.past-eof": in_table(PAST_EOF),
    "bitmap-table.entry.more": many_bad_words,
    "bitmap-data.overlap": data_overlaps_l1,
}


def test_no_problem_is_without_a_row() -> None:
    assert PLANTS.keys() == READ_KINDS.keys()


def test_nothing_is_wrong_with_the_image_to_plant_in() -> None:
    image = qcow2bm.open(sound().data)
    assert image.problems == ()
    assert [bitmap.status for bitmap in image.bitmaps.values()] == ["valid"] * 3


@pytest.mark.parametrize("id", PLANTS)
def test_a_planted_problem_is_found_where_it_is_and_no_other(id: str) -> None:
    image, offset, index, also = PLANTS[id]()
    opened = qcow2bm.open(image.data)
    found = [problem for problem in opened.problems if problem.id == id]
    assert {problem.id for problem in opened.problems} == {id} | also
    assert (offset, index) in [(problem.offset, problem.bitmap_index) for problem in found]
    kind = READ_KINDS[id]
    for each in found:
        assert (each.structure, each.field) == (kind.structure, kind.field)
        assert each.qemu_message == (
            kind.qemu_message if each.severity in (REFUSED, LEAK) else None
        )
        assert f" at {each.offset:#x} " in each.message
        assert each.message.isprintable()
        assert each.severity in SEVERITIES


@pytest.mark.parametrize("id", [id for id in PLANTS if PLANTS[id]().owner is not None])
def test_a_problem_of_one_bitmap_is_no_problem_of_the_others(id: str) -> None:
    planted = PLANTS[id]()
    opened = qcow2bm.open(planted.image.data)
    concerned = {problem.bitmap_index for problem in opened.problems}
    assert planted.owner in concerned
    for bitmap in map(opened.bitmap, range(3)):
        assert bitmap.problems == tuple(
            problem for problem in opened.problems if problem.bitmap_index == bitmap.index
        )
        if bitmap.index not in concerned:
            assert bitmap.status == "valid"
            assert bitmap.count() == (1 + 8 * CLUSTER) << 16
    broken = any(problem.breaks_bitmap for problem in opened.bitmap(planted.owner or 0).problems)
    assert (opened.bitmap(planted.owner or 0).status == "broken") == broken


@pytest.mark.parametrize("id", PLANTS)
def test_strict_raises_what_is_serious(id: str) -> None:
    data = PLANTS[id]().image.data
    serious = [p for p in qcow2bm.open(data).problems if p.is_serious]
    if not serious:
        qcow2bm.open(data, strict=True).close()
        return
    with pytest.raises(qcow2bm.FormatError) as raised:
        qcow2bm.open(data, strict=True)
    first, error = serious[0], raised.value
    assert (str(error), error.offset) == (first.message, first.offset)
    assert error.structure.startswith(first.structure)
    assert error.reason


# --- limits: the last value that is no problem, and the first that is one ---------------------


def ids(image: Built) -> set[str]:
    return {problem.id for problem in qcow2bm.open(image.data).problems}


@pytest.mark.parametrize(
    ("field", "good", "bad", "id"),
    [
        ("crypt_method", 1, 3, "header.crypt_method.unknown"),
        ("nb_snapshots", 65536, 65537, "header.nb_snapshots.too-large"),
        ("l1_size", 32 << 17, (32 << 17) + 1, "header.l1_size.too-large"),
        ("l1_size", 12288, 12287, "header.l1_size.too-small"),
        ("refcount_order", 6, 7, "header.refcount_order.too-large"),
        ("refcount_table_clusters", 8192, 8193, "header.refcount_table_clusters.too-large"),
        ("backing_file_offset", CLUSTER, CLUSTER + 1, "header.backing_file_offset.invalid"),
        ("header_length", 104, 103, "header.header_length.too-small"),
        ("header_length", CLUSTER, CLUSTER + 1, "header.header_length.too-large"),
        ("size", MAX_SIZE, MAX_SIZE + 512, "header.size.too-large"),
    ],
)
def test_limits_of_the_header(field: str, good: int, bad: int, id: str) -> None:
    image = sound()
    image.plant(good, "header", 0, field)
    assert id not in ids(image)
    image.plant(bad, "header", 0, field)
    assert id in ids(image)


@pytest.mark.parametrize(
    ("field", "good", "bad", "fault"),
    [
        ("granularity_bits", [9, 31], [0, 8, 32, 63], "granularity_bits.unsupported"),
        ("granularity_bits", [63], [64, 255], "granularity_bits.too-large"),
        ("type", [1], [0, 2, 255], "type.unknown"),
        ("flags", [0, 1, 2, 3, 4, 7], [8, 1 << 31], "flags.reserved"),
        ("bitmap_table_size", [512 << 10], [(512 << 10) + 1], "bitmap_table_size.too-large"),
        ("bitmap_table_size", [3, 4], [1, 2], "bitmap_table_size.less"),
        ("bitmap_table_size", [2, 3], [4, 5], "bitmap_table_size.more"),
    ],
)
def test_limits_of_an_entry(
    field: str, good: Sequence[int], bad: Sequence[int], fault: str
) -> None:
    image = sound()
    for values, expected in ((good, False), (bad, True)):
        for value in values:
            image.plant(value, "directory-entry", 1, field)
            assert (f"directory-entry.{fault}" in ids(image)) is expected, value


@pytest.mark.parametrize(
    ("length", "id"), [(1023, None), (1024, "directory-entry.name_size.too-large")]
)
def test_the_longest_name(length: int, id: str | None) -> None:
    assert ids(sound(Stored(b"n" * length, TABLE))) == ({id} if id else set())


def test_a_stale_directory_has_only_remarks() -> None:
    """QEMU does not read a stale directory, so its faults are only notes."""
    image = sound(autoclear=False)
    image.plant(9, "directory-entry", 1, "type")
    image.plant(0, "bitmaps-extension", 0, "nb_bitmaps")
    opened = qcow2bm.open(image.data)
    stale, *remarks = opened.problems
    assert stale.id == "bitmaps-extension.autoclear.off"
    assert len(remarks) == 6
    assert {(remark.severity, remark.qemu_message) for remark in remarks} == {("note", None)}
    assert {bitmap.status for bitmap in opened.bitmaps.values()} == {"stale"}


def test_how_far_away_a_table_may_be() -> None:
    """A table past the end of the file is another problem than one past any possible file."""
    image = sound()
    for value, reason in ((MAX_FILE_LENGTH - CLUSTER, "past-eof"), (MAX_FILE_LENGTH, "unreadable")):
        image.plant(value, "directory-entry", 1, "bitmap_table_offset")
        assert ids(image) == {f"directory-entry.bitmap_table_offset.{reason}"}


def test_a_directory_in_the_header_is_believed_nothing() -> None:
    image = sound()
    offset = image.plant(0, "bitmaps-extension", 0, "bitmap_directory_offset")
    opened = qcow2bm.open(image.data)
    assert opened.problems[0].id == "bitmaps-extension.bitmap_directory_offset.zero"
    assert opened.problems[0].offset == offset
    assert opened.directory == ()


@pytest.mark.parametrize("structure", ["refcount-table", "l1-table", "bitmap-directory"])
def test_everything_that_is_not_a_bitmaps_is_known_to_be_taken(structure: str) -> None:
    image = sound()
    image.plant(image.offset(structure), "bitmap-table", 1, 1)
    opened = qcow2bm.open(image.data)
    assert opened.bitmap(1).status == "broken"
    assert [opened.bitmap(index).status for index in (0, 2)] == ["valid", "valid"]
    assert "bitmap-data.overlap" in {problem.id for problem in opened.bitmap(1).problems}
    assert ("bitmap-directory.overlap" in ids(image)) is (structure == "bitmap-directory")


def test_a_directory_in_the_way_of_a_refcount_table_is_reported_behind_an_l1_table() -> None:
    """Each two things that overlap are a case of their own."""
    image = sound()
    clusters = (image.offset("bitmap-directory") - CLUSTER) // CLUSTER + 1
    image.plant(clusters, "header", 0, "refcount_table_clusters")
    assert ids(image) == {"bitmap-directory.overlap", "bitmap-table.overlap"}


@pytest.mark.parametrize("missing", range(1, 12))
def test_the_file_may_end_in_the_padding_of_the_last_entry_but_not_before(missing: int) -> None:
    """QEMU reads zeros past the end, which is what padding is."""
    image = sound(whole_clusters=False)
    name, end = image.offset("directory-entry", 2, "name"), len(image.data)
    opened = qcow2bm.open(image.data[:-missing])
    found = {(problem.id, problem.offset, problem.severity) for problem in opened.problems}
    if end - missing >= name + len(b"third"):
        assert found == set()
        assert opened.bitmap(2).status == "valid"
        return
    place = image.offset("bitmaps-extension", 0, "bitmap_directory_size")
    assert ("bitmaps-extension.bitmap_directory_size.past-eof", place, UNUSABLE) in found
    if len(opened.directory) == 3:
        assert opened.bitmap(2).status == "broken"
    assert [opened.bitmap(index).status for index in (0, 1)] == ["valid", "valid"]


@pytest.mark.parametrize("severity", SEVERITIES)
def test_what_is_serious(severity: Severity) -> None:
    found = problem("header.size.unaligned", 24, "is odd", severity=severity)
    assert found.is_serious == (severity in (REFUSED, UNUSABLE, "leak"))


def test_snapshots_are_walked_over_to_the_last_one() -> None:
    image = sound(header={"nb_snapshots": 3})
    image.plant(len(image.data), "header", 0, "snapshots_offset")
    extra = bytes(36) + (1024).to_bytes(4, "big") + bytes(1024)
    image.data.extend((extra + bytes(40) + extra).ljust(3 * CLUSTER, b"\0"))
    assert ids(image) == set()
    image.plant(1 << 16, "header", 0, "nb_snapshots")
    assert ids(image) == {"header.snapshots_offset.past-eof"}
