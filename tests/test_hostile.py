"""Images made to do harm: nothing but this library's errors leaves, and no memory is eaten.

What passes for valid is held against a second opinion: all ways to read it must agree.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.images import ONES, ZEROES, Built, Stored, Word, build_image, extension
from support.model import Model
from support.mutants import different
from support.traced_memory import traced_memory

import qcow2bm
from qcow2bm.format.directory import FLAG_IN_USE
from qcow2bm.format.extensions import BACKING_FORMAT, DATA_FILE, FEATURE_NAMES

CLUSTER = 512
SIZE = 3 * 8 * CLUSTER << 16
MAX_MEMORY = 16 << 20
MOST_USED = 256
"""How many bitmaps of an image are used, about: all of them unless there are more."""

ERRORS = {
    "inconsistent": qcow2bm.BitmapInconsistentError,
    "stale": qcow2bm.BitmapStaleError,
    "broken": qcow2bm.BitmapBrokenError,
}


@contextmanager
def little_memory(limit: int = 2 << 30) -> Iterator[None]:
    """An allocation far beyond any need fails, instead of taking the machine with it."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def use_everything(data: bytes | bytearray) -> Sequence[str]:
    """Opens an image, calls all there is, and compares; returns the statuses of the used bitmaps.

    Raises anything but the errors that are promised, and AssertionError.
    """
    statuses = []
    with qcow2bm.open(data) as image:
        with suppress(qcow2bm.FormatError):
            image.raise_first_problem()
        assert image.problems == image.problems
        assert all(problem.message.isprintable() for problem in image.problems)
        for kind in ("incompatible", "compatible", "autoclear"):
            image.features(kind)
        _ = (image.backing_file, image.extensions, image.refcount_bits, image.virtual_size)
        assert all(image.bitmaps[name].name == name for name in image.bitmaps)
        # A mutant can have thousands of entries, nearly all of them alike: a part of them tells.
        step = 1 + len(image.directory) // MOST_USED
        for bitmap in (image.bitmap(entry.index) for entry in image.directory[::step]):
            statuses.append(bitmap.status)
            _ = bitmap.clusters
            if bitmap.status == "valid":
                assert_agrees(bitmap, image.virtual_size)
            else:
                assert_refuses(bitmap)
            with suppress(qcow2bm.BitmapBrokenError, qcow2bm.LimitError):
                totals = bitmap.stale_totals()
                bits = bitmap.stale_bits()
                assert (totals.dirty_bytes > 0) == bits.any()
    return statuses


def assert_agrees(bitmap: qcow2bm.Bitmap, virtual_size: int) -> None:
    packed = bitmap.packed()
    model = Model.of_packed(packed.tobytes(), bitmap.granularity, virtual_size)
    extents = model.extents
    dirty = sum(length for _, length in extents)
    assert packed.tobytes() == model.packed
    assert [row for e in bitmap.extents() for row in e.tolist()] == extents
    assert bitmap.count() == dirty
    assert bitmap.totals() == (dirty, len(extents))
    assert bitmap.sha256() == model.sha256
    assert bitmap.stale_bits().tobytes() == model.packed


def assert_refuses(bitmap: qcow2bm.Bitmap) -> None:
    readers: list[Callable[[], object]] = [
        *(bitmap.count, bitmap.totals, bitmap.packed, bitmap.sha256),
        lambda: list(bitmap.extents()),
    ]
    for reader in readers:
        with pytest.raises(ERRORS[bitmap.status]):
            reader()


def survives(data: bytes | bytearray) -> bool:
    """Whether it opens at all; any error but the library's own goes through."""
    try:
        use_everything(data)
    except qcow2bm.Qcow2BmError:
        return False
    return True


# --- small files that claim a lot -------------------------------------------------------------


def tiny() -> Built:
    """An image of a disk of one sector with one bitmap, from which 1 KiB is left in the end."""
    return build_image(Stored(table=[b"\x01"], granularity_bits=9), size=512)


def cut(image: Built) -> bytearray:
    """Header and directory, in 1 KiB."""
    image.plant(CLUSTER, "bitmaps-extension", 0, "bitmap_directory_offset")
    directory = image.offset("bitmap-directory")
    image.data[CLUSTER : 2 * CLUSTER] = image.data[directory : directory + CLUSTER]
    return image.data[: 2 * CLUSTER]


CLAIMS: dict[str, list[tuple[str, str, int]]] = {
    "a directory of 4 GiB": [("bitmaps-extension", "bitmap_directory_size", 4 << 30)],
    "a directory of 2^64 bytes": [("bitmaps-extension", "bitmap_directory_size", (1 << 64) - 1)],
    "2^32 bitmaps": [("bitmaps-extension", "nb_bitmaps", (1 << 32) - 1)],
    "2^32 table entries": [("directory-entry", "bitmap_table_size", (1 << 32) - 1)],
    "2^32 table entries in use": [
        ("directory-entry", "bitmap_table_size", (1 << 32) - 1),
        ("directory-entry", "flags", 3),
    ],
    "2^20 table entries": [("directory-entry", "bitmap_table_size", 1 << 20)],
    "a table at 2^63": [("directory-entry", "bitmap_table_offset", 1 << 63)],
    "a table at 2^64": [("directory-entry", "bitmap_table_offset", (1 << 64) - CLUSTER)],
    "a name of 64 KiB": [("directory-entry", "name_size", 0xFFFF)],
    "4 GiB of extra data": [("directory-entry", "extra_data_size", (1 << 32) - 1)],
    "65,536 snapshots": [("header", "nb_snapshots", 65536)],
    "2^32 snapshots": [("header", "nb_snapshots", (1 << 32) - 1)],
    "snapshots at 2^63": [("header", "nb_snapshots", 1), ("header", "snapshots_offset", 1 << 63)],
    "a header of 4 GiB": [("header", "header_length", (1 << 32) - 1)],
    "a header of 1 KiB": [("header", "header_length", 1024)],
    "an L1 table of 32 GiB": [("header", "l1_size", (1 << 32) - 1)],
    "an L1 table at 2^63": [("header", "l1_table_offset", 1 << 63)],
    "a refcount table of 2 TiB": [("header", "refcount_table_clusters", (1 << 32) - 1)],
    "a refcount table at 2^63": [("header", "refcount_table_offset", 1 << 63)],
    "a backing name of 4 GiB": [
        ("header", "backing_file_offset", 256),
        ("header", "backing_file_size", (1 << 32) - 1),
    ],
    "a backing name at 2^63": [("header", "backing_file_offset", 1 << 63)],
    "a disk of 2^64 bytes": [("header", "size", (1 << 64) - 1)],
    "a disk of 2^62 bytes": [("header", "size", 1 << 62)],
    "clusters of 2 MiB": [("header", "cluster_bits", 21)],
    "an extension of 4 GiB": [("bitmaps-extension", "length", (1 << 32) - 1)],
    "refcounts of 2^255 bits": [("header", "refcount_order", 255)],
    "every feature": [
        ("header", f"{kind}_features", (1 << 64) - 1)
        for kind in ("incompatible", "compatible", "autoclear")
    ],
    "a bit of 2^63 bytes": [("directory-entry", "granularity_bits", 63)],
    "a bit of 2^255 bytes": [("directory-entry", "granularity_bits", 255)],
    "a table in the directory": [("directory-entry", "bitmap_table_offset", CLUSTER)],
    "a table in the header": [("directory-entry", "bitmap_table_offset", 0)],
}


@pytest.mark.parametrize("claims", CLAIMS.values(), ids=CLAIMS)
def test_a_small_file_takes_little_memory(claims: list[tuple[str, str, int]]) -> None:
    image = tiny()
    for structure, field, value in claims:
        image.plant(value, structure, 0, field)
    data = cut(image) if claims[0][0] != "bitmaps-extension" else image.data
    survives(data)  # whatever is loaded on first use is loaded now
    with little_memory(), traced_memory() as memory:
        survives(data)
    assert memory.peak < MAX_MEMORY


def test_bits_that_nobody_could_hold_are_refused() -> None:
    """A table of one entry, and a disk of 2^61 bytes of which each has a bit of its own."""
    image = tiny()
    image.plant(1 << 61, "header", 0, "size")
    image.plant(0, "directory-entry", 0, "granularity_bits")
    with little_memory(), pytest.raises(qcow2bm.Qcow2BmError):
        qcow2bm.open(image.data).bitmap(0).stale_bits()


# --- structures in one another ----------------------------------------------------------------


def two() -> Built:
    table: list[Word] = [b"\x01", ZEROES, ONES]
    return build_image(Stored(b"first", table), Stored(b"second", table), size=SIZE)


def statuses_with(structure: str, index: int, field: str | int, value: int) -> Sequence[str]:
    image = two()
    image.plant(value, structure, index, field)
    return use_everything(image.data)


@pytest.mark.parametrize("other", ["bitmap-table", "bitmap-directory", "l1-table"])
def test_a_table_is_used_for_something_else(other: str) -> None:
    place = two().offset(other, 0)
    expected = ["broken" if other == "bitmap-table" else "valid", "broken"]
    assert statuses_with("directory-entry", 1, "bitmap_table_offset", place) == expected


@pytest.mark.parametrize("other", ["bitmap-table", "bitmap-directory", "refcount-table"])
def test_data_is_used_for_something_else(other: str) -> None:
    place = two().offset(other, 0)
    expected = ["broken" if other == "bitmap-table" else "valid", "broken"]
    assert statuses_with("bitmap-table", 1, 0, place) == expected


def test_a_table_is_its_own_data() -> None:
    place = two().offset("bitmap-table", 1)
    assert statuses_with("bitmap-table", 1, 0, place) == ["valid", "broken"]


def test_a_cluster_of_data_is_used_twice() -> None:
    mine, others = two().offset("bitmap-data", 1), two().offset("bitmap-data", 0)
    assert statuses_with("bitmap-table", 1, 1, mine) == ["valid", "broken"]
    assert statuses_with("bitmap-table", 1, 1, others) == ["broken", "broken"]


def test_the_directory_lies_in_a_table() -> None:
    image = two()
    start, stop = image.offset("bitmap-directory"), image.offset("bitmap-table", 1)
    content = image.data[start : start + 64]
    image.plant(stop, "bitmaps-extension", 0, "bitmap_directory_offset")
    image.data[stop : stop + 64] = content
    assert use_everything(image.data) == ["valid", "broken"]


@pytest.mark.parametrize("count", [2, 500])
def test_all_bitmaps_share_one_table(count: int) -> None:
    """Neither time nor memory goes by what the tables claim together."""
    image = build_image(
        *(Stored(f"{number}".encode(), [ONES], flags=FLAG_IN_USE) for number in range(count))
    )
    for number in range(count):
        image.plant(image.offset("bitmap-table"), "directory-entry", number, "bitmap_table_offset")
    with qcow2bm.open(image.data) as opened:
        assert {bitmap.status for bitmap in opened.bitmaps.values()} == {"broken"}
        assert len(opened.problems) <= 2 * count


# --- mutants ----------------------------------------------------------------------------------


def seeds() -> list[Built]:
    """Images whose mutants reach every corner."""
    table: list[Word] = [b"\x01", ZEROES, ONES]
    return [
        two(),
        build_image(
            Stored(b"\xff name", [b"\xaa" * 8, ONES], granularity_bits=10),
            Stored(b"", [ZEROES, ZEROES], granularity_bits=10, flags=FLAG_IN_USE),
            Stored(b"extra", [ONES, b"\1"], granularity_bits=10, flags=4, extra_data=b"unknown"),
            size=(7 << 20) + 513,
            backing_name=b"base",
            extensions=[extension(BACKING_FORMAT, b"raw"), extension(DATA_FILE, b"data")],
            whole_clusters=False,
        ),
        build_image(Stored(b"stale", table), size=SIZE, autoclear=False),
        build_image(Stored(b"old", table), size=SIZE, version=2),
        build_image(
            Stored(b"large", [b"\x80" * 64], granularity_bits=9),
            cluster_bits=12,
            size=4096 * 8 * 512,
            extensions=[extension(FEATURE_NAMES, b"\0\x05fifth".ljust(48, b"\0"))],
            refcount_order=0,
        ),
    ]


INTERESTING = (
    *(0, 1, 2, 7, 8, 9, 63, 64, 255, 256, 511, 512, 1024, 65535, 65536),
    *(1 << 31, (1 << 32) - 1, 1 << 32, 1 << 56, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1),
)


READ = {
    "header": 112,
    "header-extension": 8,
    "bitmaps-extension": 24,
    "directory-entry": 32,
    "bitmap-table": 24,
}


def metadata(image: Built) -> list[range]:
    """What the reader goes by, each structure: where a mutation tells."""
    return [
        range(start, start + READ[structure])
        for (structure, _), start in image.starts.items()
        if structure in READ and start + READ[structure] <= len(image.data)
    ]


def mutate(image: Built, places: list[range], rng: random.Random) -> bytearray:
    data = bytearray(image.data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        place = rng.choice(rng.choice(places))
        width = rng.choice((1, 2, 4, 8))
        match rng.randrange(6):
            case 0:
                data[place] ^= 1 << rng.randrange(8)
            case 1:
                data[place] = rng.randrange(256)
            case 2:
                at, value = place & -width, rng.choice(INTERESTING)
                data[at : at + width] = (value & (1 << 8 * width) - 1).to_bytes(width, "big")
            case 3:  # a pointer to another structure
                at = place & -8
                target = rng.choice(list(image.starts.values()))
                data[at : at + 8] = target.to_bytes(8, "big")
            case 4:
                start = rng.choice(places).start
                data[place & -8 : (place & -8) + 32] = data[start : start + 32]
            case _ if rng.random() < 0.2:
                del data[rng.randrange(len(data)) :]
                return data
    return data


def fuzz(seed: int, count: int, part: int = 0, parts: int = 1) -> None:
    images = [(image, metadata(image)) for image in seeds()]
    judged = opened = 0
    with little_memory():
        for number, data in different(
            lambda rng: mutate(*rng.choice(images), rng), seed, count, part, parts
        ):
            judged += 1
            try:
                opened += survives(bytearray(data))
            except BaseException as error:
                error.add_note(f"seed {seed}, mutant {number}: {data[:1024].hex()}")
                raise
    print(f"{judged} different ones of {count} mutants, {opened} of which open")
    assert opened > judged // 4  # or they are too broken to test anything but the header


def test_mutants() -> None:
    fuzz(seed=1, count=1500)


@pytest.mark.deep
@pytest.mark.parametrize("part", range(10))
def test_many_mutants(part: int) -> None:
    fuzz(seed=2, count=40_000, part=part, parts=10)


@given(data=st.binary(max_size=2048))
@settings(max_examples=100, deadline=None)
def test_arbitrary_bytes(data: bytes) -> None:
    survives(data)
    survives(b"QFI\xfb\0\0\0\3" + data)


@given(
    data=st.binary(min_size=1, max_size=64),
    structure=st.sampled_from(
        [
            *(("header", 0), ("header-extension", 0), ("bitmaps-extension", 0)),
            *(("directory-entry", 0), ("directory-entry", 1)),
            *(("bitmap-table", 0), ("bitmap-table", 1)),
        ]
    ),
    shift=st.integers(0, 120),
)
@settings(max_examples=200, deadline=None)
def test_arbitrary_bytes_inside_an_image(
    data: bytes, structure: tuple[str, int], shift: int
) -> None:
    image = two()
    start = image.offset(*structure)
    image.data[start + shift : start + shift + len(data)] = data
    with little_memory():
        survives(image.data)


# --- as many bitmaps as there can be ----------------------------------------------------------


def test_the_most_bitmaps_an_image_can_have() -> None:
    count = 65535
    names = [f"bitmap {number}".encode() for number in range(count)]
    image = build_image(*(Stored(name, [ZEROES]) for name in names), size=SIZE // 3)
    with qcow2bm.open(image.data) as opened:
        assert [entry.name_bytes for entry in opened.directory] == names
        assert list(opened.bitmaps) == [name.decode() for name in names]
        assert opened.bitmaps["bitmap 65534"].status == "valid"
        assert opened.problems == ()


def test_what_an_entry_takes_in_memory() -> None:
    count = 4096
    image = build_image(*(Stored(b"name %d" % number) for number in range(count)))
    with traced_memory() as memory:
        opened = qcow2bm.open(image.data)
        assert opened.bitmap(count - 1).status == "valid"
    assert memory.peak < 2048 * count
