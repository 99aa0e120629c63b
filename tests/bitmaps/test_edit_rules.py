"""The refusals of an edit, and the order of the names and flags after the edit."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from support import problem_images
from support.audit import Audit
from support.images import ONES, ZEROES, Built, Stored, Word, build_image
from support.plans import Work, edit, plan_of

import qcow2bm
from qcow2bm.format.directory import FLAG_AUTO, FLAG_IN_USE

CLUSTER = 512
SIZE = 2 * 8 * CLUSTER << 16
KiB, MiB = 1 << 10, 1 << 20


def image_of(*bitmaps: Stored, **options: Any) -> Built:
    return build_image(*bitmaps, **({"size": SIZE} | options))


def refused(data: bytes | bytearray, work: Work, kind: type[Exception], text: str = ".") -> None:
    """The operation raises, and after that the edit is as it was before it."""
    before = bytes(data)
    with qcow2bm.open(data) as image, image.edit(dry_run=True) as edit:
        names, plan = edit.names, edit.plan()
        with pytest.raises(kind, match=text):
            work(edit)
        assert (edit.names, edit.plan()) == (names, plan)
    assert data == before


TABLE: list[Word] = [b"\x01", ONES]
DAILY = Stored(b"daily", TABLE)
WEEKLY = Stored(b"weekly", flags=0, granularity_bits=12, table=[b"\x02", *[ZEROES] * 31])
CRASHED = Stored(b"crashed", flags=FLAG_IN_USE | FLAG_AUTO)

OPERATIONS: dict[str, Callable[[qcow2bm.Edit, str], object]] = {
    "clear": lambda edit, name: edit.clear(name),
    "enable": lambda edit, name: edit.enable(name),
    "disable": lambda edit, name: edit.disable(name),
    "rename": lambda edit, name: edit.rename(name, "new"),
    "rename to itself": lambda edit, name: edit.rename(name, name),
    "copy": lambda edit, name: edit.copy(name, "new"),
    "set": lambda edit, name: edit.set(name, 0, 1),
    "set nothing": lambda edit, name: edit.set_many(name, []),
    "reset": lambda edit, name: edit.reset(name, 0, 1),
    "reset array": lambda edit, name: edit.reset_many(name, np.zeros((1, 2), np.int64)),
    "invert": lambda edit, name: edit.invert(name),
    "merge into": lambda edit, name: edit.merge(name, "weekly"),
    "merge from": lambda edit, name: edit.merge("weekly", name),
    "fit": lambda edit, name: edit.fit(name),
}
MORE: dict[str, Callable[[qcow2bm.Edit, str], object]] = {
    "remove": lambda edit, name: edit.remove(name),
    "add": lambda edit, name: edit.add(name),
}
BITS = [name for name in OPERATIONS if name not in ("enable", "disable", "fit")]


# --- which images, which bitmaps --------------------------------------------------------------


@pytest.mark.spec("EDIT-7")
@pytest.mark.parametrize("operation", OPERATIONS)
def test_what_is_in_use_can_only_be_removed(operation: str) -> None:
    image = image_of(CRASHED, WEEKLY)
    refused(
        image.data,
        lambda edit: OPERATIONS[operation](edit, "crashed"),
        qcow2bm.BitmapInconsistentError,
        "crashed.* is inconsistent .* remove it, or salvage it",
    )


def test_what_is_in_use_is_removed_or_left_alone() -> None:
    image = image_of(CRASHED, WEEKLY, DAILY)
    _, audit = edit(image.data, lambda edit: edit.clear("daily"))
    assert [b.flags for b in audit.bitmaps] == [FLAG_IN_USE | FLAG_AUTO, 0, FLAG_AUTO]
    _, audit = edit(image.data, lambda edit: edit.remove("crashed"))
    assert [b.name for b in audit.bitmaps] == [b"weekly", b"daily"]

    def again(edit: qcow2bm.Edit) -> None:
        edit.remove("weekly")
        edit.add("weekly")

    _, audit = edit(image.data, again)
    assert [b.name for b in audit.bitmaps] == [b"daily", b"weekly"]
    audit.check()


@pytest.mark.parametrize("operation", [*OPERATIONS, "remove"])
def test_a_name_must_be_there(operation: str) -> None:
    work = (OPERATIONS | MORE)[operation]
    image = image_of(DAILY, WEEKLY)
    text = r'"nobody" not found; the image has "daily", "weekly"'
    refused(image.data, lambda edit: work(edit, "nobody"), qcow2bm.BitmapNotFoundError, text)


@pytest.mark.spec("EDIT-8")
@pytest.mark.parametrize("operation", [*OPERATIONS, "remove", "add"])
def test_stale_bitmaps_can_only_be_dropped_together(operation: str) -> None:
    work = (OPERATIONS | MORE)[operation]
    image = image_of(DAILY, WEEKLY, autoclear=False)
    refused(image.data, lambda edit: work(edit, "daily"), qcow2bm.BitmapStaleError)


@pytest.mark.spec("EDIT-8")
def test_after_dropping_stale_bitmaps_new_ones_can_be_made() -> None:
    image = image_of(DAILY, WEEKLY, autoclear=False)
    before = Audit(image.data).refcounts

    def work(edit: qcow2bm.Edit) -> None:
        edit.remove_all()
        assert edit.names == []
        edit.add("daily")
        edit.set("daily", 0, 1)

    with qcow2bm.open(image.data, "r+") as opened, opened.edit() as edit:
        work(edit)
    audit = Audit(image.data)
    assert [(b.name, audit.dirty(b)) for b in audit.bitmaps] == [(b"daily", {0})]
    # Other structures may use the clusters of stale bitmaps: none is freed or used.
    assert (
        audit.refcounts - before == audit.refcounts - Audit(image_of(DAILY, WEEKLY).data).refcounts
    )
    assert all(audit.refcounts[n] == 1 for n in before)
    used = {o // CLUSTER for b in audit.bitmaps for o in (*b.data_offsets, b.table_offset)}
    assert not used & before.keys()


@pytest.mark.spec("EDIT-8")
def test_dropping_stale_bitmaps_takes_the_extension_away() -> None:
    image = image_of(DAILY, autoclear=False)
    before = Audit(image.data).refcounts
    with qcow2bm.open(image.data, "r+") as opened:
        assert [p.id for p in opened.problems] == ["bitmaps-extension.autoclear.off"]
        with opened.edit() as edit:
            edit.remove_all()
        assert opened.bitmaps_extension is None
        assert opened.problems == ()
    audit = Audit(image.data)
    assert (audit.payload, audit.autoclear) == (None, 0)
    assert audit.refcounts == before  # they leak, and are not freed


@pytest.mark.spec("EDIT-6")
@pytest.mark.parametrize("id", [id for id in problem_images.IDS if id != "bitmap-table.limit"])
def test_an_image_with_a_fault_is_edited_if_that_harms_nothing(id: str) -> None:
    data = bytearray(problem_images.broken(id))
    before = bytes(data)
    try:
        image = qcow2bm.open(data, "r+")
    except (qcow2bm.FormatError, qcow2bm.UnsupportedError):
        assert id.startswith("header.")
        return
    with image:
        is_broken = any(
            p.severity in ("refused", "unusable") and p.id not in TOLERATED for p in image.problems
        )
        is_broken |= id == "header-extension.bitmaps.duplicate"
        if is_broken or image.header.incompatible_features & 3 or image.version < 3:
            with pytest.raises((qcow2bm.FormatError, qcow2bm.UnsupportedError)):
                image.edit()
        else:
            with image.edit() as edit:
                edit.remove_all()
            assert Audit(data).bitmaps == []
            return
        assert len(image.bitmaps) <= len(image.directory)  # the Image is as usable as before
    assert data == before


TOLERATED = (  # tables that do not fit, which is what `fit` is for
    "directory-entry.bitmap_table_size.less",
    "directory-entry.bitmap_table_size.more",
)


@pytest.mark.spec("EDIT-6")
def test_version_2_is_refused_with_the_way_out() -> None:
    image = image_of(DAILY, version=2)
    with (
        qcow2bm.open(image.data) as opened,
        pytest.raises(qcow2bm.UnsupportedError, match=r"amend -o compat=1\.1"),
    ):
        opened.edit(dry_run=True)


@pytest.mark.spec("EDIT-6")
@pytest.mark.parametrize(
    ("bit", "text"), [(1, "dirty bit"), (2, "corrupt bit"), (3, "corrupt bit")]
)
def test_dirty_and_corrupt_images_are_refused(bit: int, text: str) -> None:
    image = image_of(DAILY)
    offset = image.plant(bit, "header", 0, "incompatible_features")
    with (
        qcow2bm.open(image.data, "r+") as opened,
        pytest.raises(qcow2bm.FormatError, match=rf"{text}.*repair the image first") as raised,
    ):
        opened.edit()
    assert raised.value.offset == offset


# --- tables that do not fit -------------------------------------------------------------------


@pytest.mark.spec("EDIT-7")
@pytest.mark.parametrize("operation", [name for name in BITS if not name.startswith("rename")])
@pytest.mark.parametrize("length", [1, 3])
def test_a_bitmap_that_does_not_fit_is_fitted_first(operation: str, length: int) -> None:
    image = image_of(Stored(b"short", [ZEROES] * length), WEEKLY)
    refused(
        image.data,
        lambda edit: OPERATIONS[operation](edit, "short"),
        qcow2bm.BitmapBrokenError,
        'fit bitmap "short" first',
    )


@pytest.mark.spec("EDIT-7")
def test_a_bitmap_that_does_not_fit_can_be_renamed_switched_and_removed() -> None:
    image = image_of(Stored(b"short", [ONES], flags=0), WEEKLY)
    (before, *_) = Audit(image.data).bitmaps
    with qcow2bm.open(image.data, "r+") as opened:
        with opened.edit() as edit:
            edit.rename("short", "small")
            edit.enable("small")
            edit.set("weekly", 0, SIZE)
        assert opened.bitmaps["small"].status == "broken"
        entry = opened.bitmaps["small"].entry
        stored = entry.bitmap_table_offset, entry.bitmap_table_size, entry.flags
        assert stored == (before.table_offset, 1, FLAG_AUTO)
        with opened.edit() as edit:
            edit.remove("small")
        assert opened.problems == ()
    Audit(image.data).check()


def test_a_disk_can_have_become_too_large_to_fit() -> None:
    size = (1 << 32) * 512 + 512  # 512 MiB of bits, and one more
    image = image_of(
        Stored(b"daily", [ZEROES], 9), cluster_bits=16, size=1 << 20, header={"size": size}
    )
    image.plant(size // (1 << 29) + 1, "header", 0, "l1_size")
    refused(image.data, lambda edit: edit.fit("daily"), qcow2bm.LimitError, "granularity 512")


# --- names ------------------------------------------------------------------------------------


@pytest.mark.spec("EDIT-10")
@pytest.mark.parametrize("verb", ["add", "rename", "copy"])
@pytest.mark.parametrize(
    ("name", "kind", "text"),
    [
        ("", ValueError, "1 to 1023 bytes, not 0"),
        ("n" * 1024, ValueError, "1 to 1023 bytes, not 1024"),
        ("ü" * 512, ValueError, "1 to 1023 bytes, not 1024"),
        ("a\0b", ValueError, "NUL"),
        ("weekly", qcow2bm.BitmapExistsError, '"weekly" already exists'),
        ("crashed", qcow2bm.BitmapExistsError, '"crashed" already exists'),
    ],
)
def test_names_qemu_could_not_use(verb: str, name: str, kind: type[Exception], text: str) -> None:
    image = image_of(DAILY, WEEKLY, CRASHED)
    works: dict[str, Work] = {
        "add": lambda edit: edit.add(name),
        "rename": lambda edit: edit.rename("daily", name),
        "copy": lambda edit: edit.copy("daily", name),
    }
    refused(image.data, works[verb], kind, text)


def test_qemu_takes_a_name_to_end_at_a_nul() -> None:
    image = image_of(Stored(b"da\0ly", TABLE), WEEKLY)
    refused(image.data, lambda edit: edit.add("da"), qcow2bm.BitmapExistsError)
    refused(image.data, lambda edit: edit.rename("weekly", "da"), qcow2bm.BitmapExistsError)
    _, audit = edit(image.data, lambda edit: edit.add("da\ufffdly"))
    assert [b.name for b in audit.bitmaps] == [b"da\0ly", b"weekly", "da\ufffdly".encode()]
    _, audit = edit(image.data, lambda edit: edit.rename("da\0ly", "plain"))
    assert audit.bitmaps[0].name == b"plain"


@pytest.mark.parametrize(
    "name",
    [b"n" * 1023, b"\xff\xfe", b"caf\xe9", "ü€😀".encode(), b"\x1b[31m\n", b" ", b"@0", b'"'],
)
def test_any_other_name_is_kept_byte_for_byte(name: bytes) -> None:
    text = name.decode("utf-8", "surrogateescape")
    image = image_of(DAILY)

    def work(edit: qcow2bm.Edit) -> None:
        edit.add(text)
        edit.set(text, 0, 1)
        edit.rename("daily", text + "2" if len(name) < 1023 else "2")

    _, audit = edit(image.data, work)
    assert [b.name for b in audit.bitmaps] == [name + b"2" if len(name) < 1023 else b"2", name]
    with qcow2bm.open(image.data) as opened:
        assert opened.bitmaps[text].count() == 1 << 12
    _, audit = edit(image.data, lambda edit: edit.remove(text))
    assert len(audit.bitmaps) == 1


def test_a_rename_keeps_the_order_and_a_new_one_comes_last() -> None:
    image = image_of(Stored(b"a"), Stored(b"b"), Stored(b"c"))

    def work(edit: qcow2bm.Edit) -> None:
        edit.rename("a", "z")
        edit.add("a", enabled=False)
        edit.rename("b", "tmp")
        edit.rename("z", "b")
        edit.copy("c", "y")
        assert edit.names == ["b", "tmp", "c", "a", "y"]

    _, audit = edit(image.data, work)
    assert [b.name for b in audit.bitmaps] == [b"b", b"tmp", b"c", b"a", b"y"]
    assert [b.flags for b in audit.bitmaps] == [FLAG_AUTO] * 3 + [0, FLAG_AUTO]


def test_a_name_can_be_given_again_in_one_edit() -> None:
    image = image_of(Stored(b"daily", TABLE, flags=0))

    def work(edit: qcow2bm.Edit) -> None:
        edit.remove("daily")
        edit.add("daily", 1 << 20)
        edit.set("daily", 5 << 20, 1)

    _, audit = edit(image.data, work)
    (bitmap,) = audit.bitmaps
    assert (bitmap.granularity_bits, bitmap.flags) == (20, FLAG_AUTO)
    assert audit.dirty(bitmap) == {5}


# --- granularities and sizes ------------------------------------------------------------------


@pytest.mark.spec("EDIT-9")
@pytest.mark.parametrize(
    ("cluster_bits", "bits"), [(9, 12), (12, 12), (14, 14), (16, 16), (21, 16)]
)
def test_the_default_granularity_is_that_of_qemu(cluster_bits: int, bits: int) -> None:
    image = image_of(cluster_bits=cluster_bits)
    _, audit = edit(image.data, lambda edit: edit.add("daily"))
    assert [(b.granularity_bits, b.flags) for b in audit.bitmaps] == [(bits, FLAG_AUTO)]


@pytest.mark.spec("EDIT-10")
@pytest.mark.parametrize("verb", ["add", "copy"])
@pytest.mark.parametrize("granularity", [-512, 0, 1, 256, 511, 513, 65537, 1 << 32, 3 << 20])
def test_granularities_are_powers_of_two_within_limits(verb: str, granularity: int) -> None:
    works: dict[str, Work] = {
        "add": lambda edit: edit.add("new", granularity),
        "copy": lambda edit: edit.copy("daily", "new", granularity),
    }
    text = f"granularity is {granularity}, must be a power of two from 512 to 2147483648"
    refused(image_of(DAILY).data, works[verb], ValueError, text)


@pytest.mark.parametrize("bits", [9, 31])
def test_the_limits_themselves_are_allowed(bits: int) -> None:
    _, audit = edit(image_of().data, lambda edit: edit.add("new", 1 << bits))
    assert audit.bitmaps[0].granularity_bits == bits


@pytest.mark.spec("EDIT-10")
def test_a_disk_of_no_bytes_has_no_bitmaps() -> None:
    image = image_of(size=0)
    refused(image.data, lambda edit: edit.add("daily"), qcow2bm.UnsupportedError, "0 bytes")


@pytest.mark.spec("EDIT-10")
def test_a_bitmap_has_512_mib_at_most() -> None:
    size = (1 << 32) * 512
    for more, works in ((0, True), (512, False)):
        image = image_of(cluster_bits=16, size=1 << 20, header={"size": size + more})
        image.plant(size // (1 << 29) + 1, "header", 0, "l1_size")
        if works:
            plan = plan_of(image.data, lambda edit: edit.add("daily", 512))
            assert {w.what for w in plan.writes} >= {"new bitmap tables"}
        else:
            text = r"granularity 512 in bytes is 536870913, more than the limit of 536870912"
            refused(image.data, lambda e: e.add("daily", 512), qcow2bm.LimitError, text)


# --- ranges -----------------------------------------------------------------------------------


RANGES = [(-1, 1), (0, SIZE + 1), (SIZE, 1), (SIZE + 1, 0), (5, -1), (1 << 62, 1 << 62), (-5, 5)]


@pytest.mark.parametrize(("start", "length"), RANGES)
def test_ranges_lie_on_the_disk_or_nothing_is_done(start: int, length: int) -> None:
    data = image_of(DAILY).data
    text = rf"range {start}:{length} does not lie on the disk"
    listed = [(0, 1), (start, length)]
    works: list[Work] = [
        lambda edit: edit.set("daily", start, length),
        lambda edit: edit.reset("daily", start, length),
        lambda edit: edit.set_many("daily", listed),
        lambda edit: edit.reset_many("daily", listed),
        lambda edit: edit.set_many("daily", np.array(listed)),
        lambda edit: edit.reset_many("daily", np.array(listed)),
    ]
    for work in works:
        refused(data, work, ValueError, text)


@pytest.mark.parametrize(
    "ranges",
    [
        np.zeros(2, np.int64),
        np.zeros((2, 3), np.int64),
        np.zeros((1, 2), np.float64),
        np.zeros((1, 2), np.bool_),
    ],
)
def test_arrays_of_another_shape_or_kind_are_refused(ranges: Any) -> None:
    data = image_of(DAILY).data
    refused(data, lambda edit: edit.set_many("daily", ranges), ValueError, r"must be int64\[n, 2\]")


@pytest.mark.parametrize("dtype", ["int64", "uint64", "int32", ">i8", "uint16"])
def test_arrays_of_any_integers_do(dtype: str) -> None:
    image = image_of(Stored(b"daily", granularity_bits=12))
    ranges = np.array([[0, 1], [40960, 5000], [8192, 0]], dtype)
    _, audit = edit(image.data, lambda edit: edit.set_many("daily", ranges))
    assert audit.dirty(audit.bitmaps[0]) == {0, 10, 11}
    backwards = np.ascontiguousarray(ranges[::-1])[::-1]
    _, audit = edit(image.data, lambda edit: edit.reset_many("daily", backwards))
    assert audit.dirty(audit.bitmaps[0]) == {0, 10, 11 - 0} - {10}


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32"])
def test_arrays_of_narrow_integers_damage_no_memory(dtype: str) -> None:
    """Some versions of numpy write anywhere if a type is compared with what it cannot hold.

    Damage is only seen later, so it must not be done to the process that runs the tests.
    """
    program = (
        "import numpy as np\n"
        "from qcow2bm.bits.ranges import checked\n"
        f"ranges = np.array([[0, 1], [100, 50], [7, 0]], {dtype!r})[::-1]\n"
        "for _ in range(5000):\n"
        "    found = checked(ranges, 1 << 40)\n"
        "    assert found.tolist() == ranges.tolist()\n"
        "    assert not (found == 1).any(axis=1).all()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_an_iterator_of_ranges_does() -> None:
    image = image_of(Stored(b"daily"))
    _, audit = edit(
        image.data, lambda edit: edit.set_many("daily", ((n << 16, 1) for n in range(5)))
    )
    assert audit.dirty(audit.bitmaps[0]) == {0, 1, 2, 3, 4}


@pytest.mark.spec("EDIT-11")
@pytest.mark.parametrize(
    ("start", "length", "cleared"),
    [
        (0, 65536, {0}),
        (0, 65535, set()),
        (1, 65535, set()),
        (1, 2 * 65536 - 1, {1}),
        (65535, 65538, {1}),
        (SIZE - 65536, 65536, {SIZE // 65536 - 1}),
        (SIZE - 65536, 65535, set()),
        (SIZE, 0, set()),
    ],
)
def test_reset_clears_no_granule_that_is_only_partly_covered(
    start: int, length: int, cleared: set[int]
) -> None:
    image = image_of(Stored(b"daily", [ONES, ONES]))
    _, audit = edit(image.data, lambda edit: edit.reset("daily", start, length))
    assert set(range(SIZE // 65536)) - audit.dirty(audit.bitmaps[0]) == cleared


@pytest.mark.spec("EDIT-11")
def test_the_last_granule_is_covered_where_the_disk_ends() -> None:
    size = SIZE - 512
    image = image_of(Stored(b"daily", [ONES, b"\xff" * CLUSTER]), size=size)
    last = SIZE // 65536 - 1
    _, audit = edit(image.data, lambda edit: edit.reset("daily", last << 16, size - (last << 16)))
    assert last not in audit.dirty(audit.bitmaps[0])
    assert last - 1 in audit.dirty(audit.bitmaps[0])


# --- merging ----------------------------------------------------------------------------------


def test_an_operation_must_be_one_of_four() -> None:
    op: Any = "nand"
    refused(image_of(DAILY).data, lambda e: e.merge("daily", "daily", op), ValueError, "nand")


@pytest.mark.spec("EDIT-14")
def test_disks_must_have_one_size() -> None:
    data = image_of(DAILY).data
    with qcow2bm.open(image_of(Stored(b"daily"), size=SIZE - 512).data) as other:
        source = other.bitmaps["daily"]
        text = f"belongs to a disk of {SIZE - 512} bytes, but this one has {SIZE}"
        refused(data, lambda edit: edit.merge("daily", source), qcow2bm.BitmapError, text)


@pytest.mark.parametrize(
    ("stored", "options", "kind"),
    [
        (CRASHED, {}, qcow2bm.BitmapInconsistentError),
        (DAILY, {"autoclear": False}, qcow2bm.BitmapStaleError),
        (Stored(b"short", [ZEROES]), {}, qcow2bm.BitmapBrokenError),
    ],
)
def test_a_source_must_be_valid(
    stored: Stored, options: dict[str, Any], kind: type[Exception]
) -> None:
    data = image_of(DAILY).data
    with qcow2bm.open(image_of(stored, **options).data) as other:
        source = other.bitmap(0)
        refused(data, lambda edit: edit.merge("daily", source), kind)


def test_a_target_is_looked_at_first() -> None:
    data = image_of(DAILY).data
    with qcow2bm.open(image_of(DAILY).data) as other:
        source = other.bitmaps["daily"]
        refused(data, lambda edit: edit.merge("nobody", source), qcow2bm.BitmapNotFoundError)


# --- what entries keep ------------------------------------------------------------------------


@pytest.mark.spec("EDIT-5")
def test_padding_and_flags_survive() -> None:
    image = image_of(Stored(b"odd", TABLE, flags=FLAG_AUTO, padding=b"\1\2\3\4\5"), WEEKLY)
    before = Audit(image.data).bitmaps[0]
    assert before.padding == b"\1\2\3\4\5"
    _, audit = edit(image.data, lambda edit: edit.clear("weekly"))
    assert audit.bitmaps[0] == before
    _, audit = edit(image.data, lambda edit: edit.set("odd", 0, SIZE))
    assert audit.bitmaps[0]._replace(table_offset=0, words=()) == before._replace(
        table_offset=0, words=()
    )
    _, audit = edit(image.data, lambda edit: edit.disable("odd"))
    assert (audit.bitmaps[0].flags, audit.bitmaps[0].padding) == (0, before.padding)
    _, audit = edit(image.data, lambda edit: edit.rename("odd", "even"))
    renamed = audit.bitmaps[0]
    assert (renamed.name, renamed.padding) == (b"even", bytes(4))


def test_the_number_of_bitmaps_is_limited_in_the_draft() -> None:
    """All 65,535 of them, in memory only; on disk they are in the deep tests."""
    data = image_of().data
    with qcow2bm.open(data) as image, image.edit(dry_run=True) as edit:
        for n in range(65535):
            edit._draft.bitmaps[b"%d" % n] = None  # type: ignore[assignment]
        with pytest.raises(qcow2bm.LimitError, match="65536, more than the limit of 65535"):
            edit.add("new")
