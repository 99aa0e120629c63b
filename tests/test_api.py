"""The front: opening, names, statuses, errors, and what closing means."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import pytest
from support.images import ONES, ZEROES, Built, Stored, Word, build_image, extension
from support.scripted_storage import ScriptedStorage

import qcow2bm
from qcow2bm.bitmaps.bit_reader import CHUNK_BYTES
from qcow2bm.format.directory import FLAG_AUTO, FLAG_IN_USE
from qcow2bm.format.extensions import BITMAPS

if TYPE_CHECKING:
    from qcow2bm.storage.sources import Source

CLUSTER = 512
SIZE = 8 * CLUSTER << 16


def image_of(*bitmaps: Stored, **options: Any) -> Built:
    return build_image(*bitmaps, size=SIZE, **options)


SOUND = Stored(b"daily", [b"\x01"])


# --- opening ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["w", "r+b", "+r", "rb", "", "rw", "a", "R"])
def test_there_is_no_mode_but_two(mode: str) -> None:
    with pytest.raises(ValueError, match=r"mode is .*, must be 'r' or 'r\+'"):
        qcow2bm.open(image_of(SOUND).data, mode)


def test_every_source_is_read_alike(image: Path) -> None:
    data = image.read_bytes()
    with image.open("rb") as file:
        sources: list[Source] = [
            *(str(image), image, data, bytearray(data), memoryview(data)),
            *(io.BytesIO(data), file, ScriptedStorage(data)),
        ]
        for source in sources:
            with qcow2bm.open(source) as opened:
                assert opened.bitmaps["weekly"].count() == 65536
                assert opened.file_size == len(data)


def test_what_the_caller_opened_stays_open() -> None:
    data = image_of(SOUND).data
    storage, stream = ScriptedStorage(data), io.BytesIO(data)
    sources: list[Source] = [storage, stream]
    for source in sources:
        for _ in range(2):
            with qcow2bm.open(source) as image:
                assert image.bitmaps["daily"].count() == 65536
    assert not storage.closed
    assert not stream.closed


@pytest.mark.parametrize("data", [b"", b"QFI", b"QFI\xfb", b"raw" * 500, b"QFI\xfb\0\0\0\3"])
def test_what_is_no_image_is_a_format_error(data: bytes) -> None:
    storage = ScriptedStorage(data)
    with pytest.raises(qcow2bm.FormatError):
        qcow2bm.open(storage)
    assert not storage.closed


@pytest.mark.parametrize("version", [0, 1, 4, 1 << 31])
def test_other_versions_are_unsupported(version: int) -> None:
    image = image_of(SOUND)
    image.plant(version, "header", 0, "version")
    with pytest.raises(qcow2bm.UnsupportedError):
        qcow2bm.open(image.data)


@pytest.mark.parametrize("bits", [0, 8, 22, 63, 1 << 31])
def test_impossible_cluster_sizes_are_a_format_error(bits: int) -> None:
    image = image_of(SOUND)
    offset = image.plant(bits, "header", 0, "cluster_bits")
    with pytest.raises(qcow2bm.FormatError) as raised:
        qcow2bm.open(image.data)
    assert (raised.value.field, raised.value.offset) == ("cluster_bits", offset)


def test_an_image_that_cannot_be_opened_leaves_no_file_open(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(b"raw")
    for _ in range(3):  # pytest turns the warning of a file left open into an error
        with pytest.raises(qcow2bm.FormatError):
            qcow2bm.open(path)
    path.write_bytes(image_of(Stored(type=9)).data)
    with pytest.raises(qcow2bm.FormatError):
        qcow2bm.open(path, strict=True)


def test_strict_closes_what_it_opened_only() -> None:
    storage = ScriptedStorage(image_of(Stored(type=9)).data)
    with pytest.raises(qcow2bm.FormatError, match="type at"):
        qcow2bm.open(storage, strict=True)
    assert not storage.closed


@pytest.mark.parametrize("force_share", [False, True])
def test_locks_are_taken_unless_sharing_is_forced(force_share: bool) -> None:
    class Locked(ScriptedStorage):
        def read_lock(self) -> Any:
            raise qcow2bm.ImageLockedError(self.name, "is writing to it")

    storage = Locked(image_of(SOUND).data)
    if force_share:
        assert qcow2bm.open(storage, force_share=True).bitmaps["daily"].count() == 65536
        return
    with pytest.raises(qcow2bm.ImageLockedError):
        qcow2bm.open(storage)


# --- what the header says ---------------------------------------------------------------------


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("cluster_bits", [9, 12, 16, 21])
def test_the_facts_of_an_image(version: int, cluster_bits: int) -> None:
    orders = [4] if version == 2 else range(7)
    for order in orders:
        built = build_image(
            Stored(),
            cluster_bits=cluster_bits,
            version=version,
            refcount_order=order,
            size=(1 << 30) + 513,
            backing_name=b"base \xff.qcow2",
            extensions=[extension(0x12345678, b"abc")],
        )
        with qcow2bm.open(built.data) as image:
            assert image.version == image.header.version == version
            assert image.cluster_size == 1 << cluster_bits
            assert image.virtual_size == (1 << 30) + 512
            assert image.file_size == len(built.data)
            assert image.refcount_bits == 1 << order
            assert image.backing_file == "base \udcff.qcow2"
            assert [(offset, found.type) for offset, found in image.extensions] == [
                (built.offset("header-extension", 0), 0x12345678),
                (built.offset("header-extension", 1), BITMAPS),
            ]
            assert image.is_consistent == (version == 3)
            assert image.bitmaps_extension
            assert image.bitmaps_extension.nb_bitmaps == 1
            assert image.bitmaps["daily"].status == ("stale" if version == 2 else "valid")
            assert image.features("incompatible") == image.features("compatible") == ()


def test_an_image_without_bitmaps() -> None:
    with qcow2bm.open(image_of().data) as image:
        assert image.bitmaps_extension is None
        assert image.directory == ()
        assert image.problems == ()
        assert not image.bitmaps
        assert not image.is_consistent


def test_a_refcount_width_that_cannot_be_is_none() -> None:
    image = image_of()
    image.plant(64, "header", 0, "refcount_order")
    assert qcow2bm.open(image.data).refcount_bits is None


def test_an_image_says_who_it_is() -> None:
    image = qcow2bm.open(image_of(SOUND).data)
    assert image.name == "<memory>"
    assert repr(image) == "<qcow2bm.Image '<memory>'>"
    assert repr(image.bitmaps) == "<1 bitmaps of <qcow2bm.Image '<memory>'>>"
    assert repr(image.bitmap(0)) == "<qcow2bm.Bitmap 0 'daily' of '<memory>'>"


# --- names ------------------------------------------------------------------------------------

NAMES = {
    "empty": (b"", ""),
    "longest": (b"n" * 1023, "n" * 1023),
    "longer than QEMU takes": (b"n" * 65535, "n" * 65535),
    "UTF-8": ("täglich ☃".encode(), "täglich ☃"),
    "not UTF-8": (b"caf\xe9\xff", "caf\udce9\udcff"),
    "terminal codes": (b"\x1b[31m\r\n", "\x1b[31m\r\n"),
    "quotes": (b'"\\', '"\\'),
    "spaces": (b" \t", " \t"),
}


@pytest.mark.parametrize(("stored", "name"), NAMES.values(), ids=NAMES)
def test_names_lead_to_their_bitmaps(stored: bytes, name: str) -> None:
    image = qcow2bm.open(image_of(Stored(b"other"), Stored(stored, [ONES])).data)
    assert list(image.bitmaps) == ["other", name]
    assert name in image.bitmaps
    bitmap = image.bitmaps[name]
    assert (bitmap.name, bitmap.index) == (name, 1)
    assert bitmap.name.encode("utf-8", "surrogateescape") == stored
    assert bitmap.status == "valid"
    assert bitmap.count() == SIZE


def test_a_name_that_several_have_leads_nowhere() -> None:
    twice = image_of(Stored(b"same"), Stored(b"one"), Stored(b"same"))
    image = qcow2bm.open(twice.data)
    assert [entry.name for entry in image.directory] == ["same", "one", "same"]
    assert list(image.bitmaps) == ["one"]
    assert "same" not in image.bitmaps
    with pytest.raises(qcow2bm.BitmapNotFoundError) as raised:
        image.bitmaps["same"]
    assert raised.value.name == "same"
    assert [image.bitmap(index).status for index in range(3)] == ["broken", "valid", "broken"]


def test_an_entry_without_a_name_has_a_number_all_the_same() -> None:
    cut = image_of(Stored(b"whole"), Stored(b"cut", [ONES]))
    cut.plant(0xFFF0, "directory-entry", 1, "name_size")
    image = qcow2bm.open(cut.data)
    assert [entry.name for entry in image.directory] == ["whole", None]
    assert list(image.bitmaps) == ["whole"]
    bitmap = image.bitmap(1)
    assert (bitmap.name, bitmap.status, bitmap.clusters) == ("", "broken", None)
    with pytest.raises(qcow2bm.BitmapBrokenError):
        bitmap.stale_bits()


def test_names_that_end_alike_for_qemu_are_told_apart_but_broken() -> None:
    image = qcow2bm.open(image_of(Stored(b"a"), Stored(b"a\0b")).data)
    assert [bitmap.status for bitmap in image.bitmaps.values()] == ["broken", "broken"]


@pytest.mark.parametrize("index", [-1, 1, 1 << 40])
def test_there_are_only_so_many_entries(index: int) -> None:
    image = qcow2bm.open(image_of(SOUND).data)
    with pytest.raises(qcow2bm.BitmapNotFoundError) as raised:
        image.bitmap(index)
    assert raised.value.name == f"@{index}"


@pytest.mark.parametrize("key", [0, None, b"daily", ("daily",)])
def test_what_is_no_name_is_no_bitmap(key: Any) -> None:
    image = qcow2bm.open(image_of(SOUND).data)
    assert key not in image.bitmaps
    assert image.bitmaps.get(key) is None


@pytest.mark.parametrize(("flags", "auto", "in_use"), [(0, 0, 0), (1, 0, 1), (2, 1, 0), (3, 1, 1)])
def test_what_an_entry_says(flags: int, auto: int, in_use: int) -> None:
    image = qcow2bm.open(image_of(Stored(flags=flags, granularity_bits=20)).data)
    bitmap = image.bitmaps["daily"]
    assert (bitmap.auto, bitmap.in_use, bitmap.granularity) == (auto, in_use, 1 << 20)
    assert bitmap.entry == image.directory[0]


# --- statuses ---------------------------------------------------------------------------------

READERS: dict[str, Callable[[qcow2bm.Bitmap], Any]] = {
    "count": qcow2bm.Bitmap.count,
    "totals": qcow2bm.Bitmap.totals,
    "extents": lambda bitmap: list(bitmap.extents()),
    "packed": qcow2bm.Bitmap.packed,
    "sha256": qcow2bm.Bitmap.sha256,
}
STATUSES: dict[str, tuple[Stored, bool, type[qcow2bm.BitmapError] | None]] = {
    "valid": (SOUND, True, None),
    "inconsistent": (SOUND._replace(flags=FLAG_IN_USE), True, qcow2bm.BitmapInconsistentError),
    "stale": (SOUND, False, qcow2bm.BitmapStaleError),
    "broken": (SOUND._replace(flags=8), True, qcow2bm.BitmapBrokenError),
}
BOTH = {
    "stale before broken": ("stale", SOUND._replace(flags=8), False),
    "stale before inconsistent": ("stale", SOUND._replace(flags=FLAG_IN_USE), False),
    "broken before inconsistent": ("broken", SOUND._replace(flags=FLAG_IN_USE | 8), True),
}


@pytest.mark.parametrize("status", STATUSES)
def test_only_a_valid_bitmap_can_be_read(status: str) -> None:
    stored, autoclear, error = STATUSES[status]
    image = qcow2bm.open(image_of(stored, autoclear=autoclear).data)
    bitmap = image.bitmaps["daily"]
    assert bitmap.status == status
    for reader in READERS.values():
        if error is None:
            reader(bitmap)
            continue
        with pytest.raises(qcow2bm.BitmapError) as raised:
            reader(bitmap)
        assert type(raised.value) is error
        assert raised.value.name == "daily"
    assert bitmap.stale_bits().tolist() == [1] + [0] * (CLUSTER - 1)
    assert bitmap.stale_totals() == (65536, 1)


@pytest.mark.parametrize(("status", "stored", "autoclear"), BOTH.values(), ids=BOTH)
def test_the_worst_status_counts(status: str, stored: Stored, autoclear: bool) -> None:
    image = qcow2bm.open(image_of(stored, autoclear=autoclear).data)
    assert image.bitmaps["daily"].status == status


@pytest.mark.parametrize(
    ("field", "value"), [("incompatible_features", 1 << 5), ("size", (1 << 62) + 512)]
)
def test_an_image_that_must_not_be_interpreted_has_no_valid_bitmap(field: str, value: int) -> None:
    image = image_of(SOUND)
    image.plant(value, "header", 0, field)
    bitmap = qcow2bm.open(image.data).bitmaps["daily"]
    assert bitmap.status == "broken"
    with pytest.raises(qcow2bm.BitmapBrokenError, match=f"header: {field} at"):
        bitmap.count()


def test_the_error_of_a_broken_bitmap_names_the_fault() -> None:
    image = image_of(SOUND)
    image.plant(9, "directory-entry", 0, "type")
    offset = image.offset("directory-entry", 0, "type")
    with pytest.raises(qcow2bm.BitmapBrokenError, match=f"type at {offset:#x} is 9"):
        qcow2bm.open(image.data).bitmaps["daily"].count()


def test_bits_belong_to_the_caller() -> None:
    bitmap = qcow2bm.open(image_of(SOUND).data).bitmaps["daily"]
    first, second = bitmap.packed(), bitmap.packed()
    first[:] = 255
    assert np.array_equal(second, bitmap.packed())


# --- closing and pickling ---------------------------------------------------------------------

OF_IMAGE: dict[str, Callable[[qcow2bm.Image], Any]] = {
    **{
        name: (lambda image, name=name: getattr(image, name))  # type: ignore[misc]
        for name in (
            *("header", "version", "virtual_size", "cluster_size", "file_size"),
            *("refcount_bits", "backing_file", "extensions", "bitmaps_extension"),
            *("is_consistent", "directory", "problems"),
        )
    },
    "features": lambda image: image.features("compatible"),
    "bitmap": lambda image: image.bitmap(0),
    "backing_format": lambda image: image.backing_format,
    "snapshots": lambda image: image.snapshots(),
    "bitmap_space": lambda image: image.bitmap_space,
    "file_space": lambda image: image.file_space(),
    "use_by_another_process": lambda image: image.use_by_another_process(),
    "raise_first_problem": lambda image: image.raise_first_problem(),
}
OF_BITMAP: dict[str, Callable[[qcow2bm.Bitmap], Any]] = READERS | {
    "status": lambda bitmap: bitmap.status,
    "problems": lambda bitmap: bitmap.problems,
    "clusters": lambda bitmap: bitmap.clusters,
    "space": lambda bitmap: bitmap.space,
    "table": lambda bitmap: list(bitmap.table()),
    "stale_bits": qcow2bm.Bitmap.stale_bits,
    "stale_totals": qcow2bm.Bitmap.stale_totals,
}


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
@pytest.mark.parametrize("name", [*OF_IMAGE, *OF_BITMAP])
def test_a_closed_image_gives_nothing(name: str, used: bool) -> None:
    image = qcow2bm.open(image_of(SOUND).data)
    bitmap = image.bitmaps["daily"]

    def call() -> object:
        return OF_IMAGE[name](image) if name in OF_IMAGE else OF_BITMAP[name](bitmap)

    if used:
        assert bitmap.problems == image.problems == ()
        call()
    image.close()
    image.close()
    with pytest.raises(qcow2bm.StateError) as raised:
        call()
    assert raised.value.required == "open"


@pytest.mark.parametrize("force_share", [False, True])
def test_extents_end_where_the_image_is_closed(tmp_path: Path, force_share: bool) -> None:
    """Once the image is closed, extents must raise: they must not read a closed file."""
    path = tmp_path / "disk.qcow2"
    words: list[Word] = [b"\x01", *[ZEROES] * (2 * CHUNK_BYTES // CLUSTER), b"\x01"]
    path.write_bytes(
        build_image(Stored(table=words, granularity_bits=9), size=len(words) * SIZE >> 7).data
    )
    with qcow2bm.open(path, force_share=force_share) as image:
        extents = image.bitmaps["daily"].extents()
        with mock.patch("qcow2bm.bitmaps.bit_reader._MANY_EXTENTS", 1):
            next(extents)
    with pytest.raises(qcow2bm.Qcow2BmError):
        list(extents)


def test_leaving_the_block_closes() -> None:
    with pytest.raises(KeyError), qcow2bm.open(image_of(SOUND).data) as image:
        raise KeyError
    with pytest.raises(qcow2bm.StateError):
        _ = image.header


def test_an_image_cannot_be_pickled_or_copied() -> None:
    image = qcow2bm.open(image_of(SOUND).data)
    for thing in (image, image.bitmaps["daily"], image.bitmaps):
        with pytest.raises(TypeError, match="cannot be pickled"):
            pickle.dumps(thing)
        with pytest.raises(TypeError, match="cannot be pickled"):
            copy.deepcopy(thing)


def test_what_is_read_of_an_image_can_be_pickled() -> None:
    image = qcow2bm.open(image_of(Stored(b"\xff", flags=FLAG_AUTO | 8)).data)
    for value in (image.header, image.directory, image.problems, image.bitmap(0).clusters):
        assert pickle.loads(pickle.dumps(value)) == value
