"""The requirements of spec/edit.md, and of spec/refcounts.md as far as edits need refcounts."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
from support.faulty_storage import Fault, FaultyStorage
from support.images import ONES, ZEROES, Built, Stored, build_image, extension
from support.specreader import page

import qcow2bm
from qcow2bm.api import Edit
from qcow2bm.clusters.plan import Barrier, Plan, Write
from qcow2bm.format.directory import FLAG_AUTO, FLAG_IN_USE
from qcow2bm.format.extensions import BACKING_FORMAT, BITMAPS, FEATURE_NAMES
from qcow2bm.format.features import INCOMPATIBLE_CORRUPT, INCOMPATIBLE_DIRTY

CLUSTER = 512
COVERED = 8 * CLUSTER << 9  # by a cluster of a bitmap of granularity 512
SIZE = 3 * COVERED
BITS = bytes(range(1, 200))


def three(**options: Any) -> Built:
    """Three bitmaps: of two stored clusters and one that is not, disabled, and in use."""
    return build_image(
        Stored(b"daily", (BITS, ZEROES, BITS), granularity_bits=9),
        Stored(b"base", flags=0),
        Stored(b"crashed", flags=FLAG_AUTO | FLAG_IN_USE),
        size=SIZE,
        **options,
    )


def facts(data: bytes | bytearray) -> dict[str, object]:
    """All that can be known of the bitmaps of an image."""
    with qcow2bm.open(data) as image:
        return {
            name: (b.status, b.granularity, b.auto, b.sha256() if b.status == "valid" else None)
            for name, b in image.bitmaps.items()
        }


def planned(data: bytes | bytearray, change: Callable[[Edit], None]) -> Plan:
    with qcow2bm.open(data) as image, image.edit(dry_run=True) as edit:
        change(edit)
        return edit.plan()


def edited(data: bytearray, change: Callable[[Edit], None]) -> bytearray:
    with qcow2bm.open(data, "r+") as image, image.edit() as edit:
        change(edit)
    return data


def add(edit: Edit) -> None:
    edit.add("new")


def dirty_bytes(data: bytes | bytearray, name: str) -> set[tuple[int, int]]:
    with qcow2bm.open(data) as image:
        return {(int(a), int(b)) for rows in image.bitmaps[name].extents() for a, b in rows}


def whats(plan: Plan, kind: type) -> list[str]:
    return [step.what for step in plan.steps if isinstance(step, kind)]


def prefixes(data: bytes | bytearray, plan: Plan) -> Iterator[bytes]:
    """The image after each step of a plan; tests/crash has every other state there can be."""
    state = bytearray(data)
    yield bytes(state)
    for write in plan.writes:
        content = b"".join(bytes(part) for part in write.parts)
        state.extend(bytes(max(0, write.offset + len(content) - len(state))))
        state[write.offset : write.offset + len(content)] = content
        yield bytes(state)


@pytest.mark.spec("INV-ATOMIC")
@pytest.mark.spec("EDIT-1")
def test_at_every_step_all_is_old_or_all_is_new() -> None:
    def change(edit: Edit) -> None:
        edit.remove("crashed")
        edit.merge("base", "daily")
        edit.rename("daily", "weekly")

    data = three().data
    old, plan = facts(data), planned(data, change)
    new = facts(edited(data[:], change))
    assert old != new
    assert plan.commit_point is not None
    done = sum(isinstance(step, Write) for step in plan.steps[: plan.commit_point])
    found = [facts(state) for state in prefixes(data, plan)]
    assert found == [old] * (done + 1) + [new] * (len(plan.writes) - done)


@pytest.mark.spec("EDIT-2")
def test_what_fails_or_changes_nothing_writes_nothing() -> None:
    storage = FaultyStorage(three().data)
    with qcow2bm.open(storage, "r+") as image:

        def change() -> None:
            with image.edit() as edit:
                edit.remove("daily")
                edit.remove("never there")

        with pytest.raises(qcow2bm.BitmapNotFoundError):
            change()
        with image.edit() as edit:
            edit.set("daily", 0, 512)  # is dirty already
    assert storage.effects == []


@pytest.mark.spec("EDIT-3")
def test_one_bit_writes_one_cluster_of_data() -> None:
    plan = planned(three().data, lambda edit: edit.reset("daily", 0, 512))
    assert [(w.what, w.length) for w in plan.writes] == [
        ("new bitmap tables", CLUSTER),
        ("new bitmap directory", CLUSTER),
        ("new bitmap data", CLUSTER),
        ("refcounts of new clusters", 512),
        ("bitmaps extension", 24),
        ("refcounts of freed clusters", 512),
    ]


@pytest.mark.spec("INV-TAIL")
@pytest.mark.spec("EDIT-4")
def test_clusters_of_one_value_are_not_stored() -> None:
    size = SIZE + 512  # so that the last cluster has one bit
    data = build_image(Stored(b"daily", (BITS, ZEROES, BITS, ZEROES), 9), size=size).data
    edited(data, lambda edit: edit.set("daily", 0, size))
    with qcow2bm.open(data) as image:
        assert image.bitmaps["daily"].clusters == (0, 3, 1)
        assert image.bitmaps["daily"].count() == size
    edited(data, lambda edit: edit.clear("daily"))
    with qcow2bm.open(data) as image:
        assert image.bitmaps["daily"].clusters == (4, 0, 0)


@pytest.mark.spec("INV-UNKNOWN")
@pytest.mark.spec("EDIT-5")
def test_what_is_unknown_survives() -> None:
    names = bytes([2, 9]) + b"a future feature".ljust(46, b"\0")
    image = build_image(
        Stored(b"daily", flags=FLAG_AUTO, padding=b"\1\2\3"),
        Stored(b"base"),
        size=SIZE, cluster_bits=12, extensions=[extension(FEATURE_NAMES, names)],
        extensions_behind=[extension(0x1234, b"unknown")],
        additional_fields=b"24 bytes of later fields",
        header={"compatible_features": 1 << 40, "autoclear_features": 1 | 1 << 9},
    )  # fmt: skip
    before = bytes(image.data)
    plan = planned(before, lambda edit: edit.disable("base"))
    first, barrier = plan.steps[:2]
    assert isinstance(first, Write)
    assert isinstance(barrier, Barrier)
    assert (first.offset, first.parts) == (88, ((1).to_bytes(8, "big"),))
    data = edited(image.data, lambda edit: edit.disable("base"))
    with qcow2bm.open(before) as old, qcow2bm.open(data) as new:
        autoclear = old.header.autoclear_features
        assert new.header == old.header._replace(autoclear_features=autoclear & ~(1 << 9))
        for (_, was), (_, now) in zip(old.extensions, new.extensions, strict=True):
            assert was == now or was.name == "bitmaps"
        before_entry, entry = old.directory[0], new.directory[0]
        assert entry == before_entry._replace(offset=entry.offset)
    assert b"daily\1\2\3" in data[image.offset("bitmap-directory") :]


@pytest.mark.spec("EDIT-6")
@pytest.mark.parametrize(
    "options",
    [
        {"version": 2},
        {"header": {"incompatible_features": INCOMPATIBLE_DIRTY}},
        {"header": {"incompatible_features": INCOMPATIBLE_CORRUPT}},
        {"header": {"l1_size": 0}},
        {"header": {"refcount_order": 7}},
    ],
    ids=str,
)
def test_what_is_not_edited(options: Mapping[str, Any]) -> None:
    data = build_image(Stored(), size=SIZE, **options).data
    before = bytes(data)
    with (
        qcow2bm.open(data, "r+") as image,
        pytest.raises((qcow2bm.FormatError, qcow2bm.UnsupportedError)),
    ):
        image.edit()
    assert data == before


@pytest.mark.spec("EDIT-6")
@pytest.mark.spec("REF-7")
@pytest.mark.parametrize("refcount", [0, 2])
def test_a_cluster_to_be_freed_has_refcount_1(refcount: int) -> None:
    image = three()
    cluster = image.offset("bitmap-data", 0, 0) // CLUSTER
    counts = image.offset("refcount-block")
    image.data[counts + 2 * cluster : counts + 2 * cluster + 2] = refcount.to_bytes(2, "big")
    before = bytes(image.data)
    with (
        qcow2bm.open(image.data, "r+") as opened,
        pytest.raises(qcow2bm.FormatError, match=f"is {refcount}, must be 1"),
        opened.edit() as edit,
    ):
        edit.remove("daily")
    assert image.data == before


@pytest.mark.spec("EDIT-7")
def test_what_can_be_done_with_a_bitmap_in_use() -> None:
    with qcow2bm.open(three().data) as image, image.edit(dry_run=True) as edit:
        for change in (edit.clear, edit.enable, edit.disable, edit.invert, edit.fit):
            with pytest.raises(qcow2bm.BitmapInconsistentError, match="inconsistent"):
                change("crashed")
        with pytest.raises(qcow2bm.BitmapInconsistentError):
            edit.merge("daily", "crashed")
        with pytest.raises(qcow2bm.BitmapExistsError):
            edit.add("crashed")
        edit.remove("crashed")
        edit.add("crashed")
    with qcow2bm.open(three().data) as image, image.edit(dry_run=True) as edit:
        edit.salvage("crashed")
        edit.clear("crashed")
    with qcow2bm.open(three().data) as image, image.edit(dry_run=True) as edit:
        with pytest.raises(qcow2bm.BitmapExistsError):
            edit.load("daily", 1 << 16, bytes(SIZE >> 19))
        edit.load("crashed", 1 << 16, bytes(SIZE >> 19))
        edit.clear("crashed")


@pytest.mark.spec("EDIT-7")
def test_what_can_be_done_with_a_table_that_does_not_fit() -> None:
    with qcow2bm.open(shrunk()) as image, image.edit(dry_run=True) as edit:
        with pytest.raises(qcow2bm.BitmapBrokenError, match='fit bitmap "daily" first'):
            edit.clear("daily")
        edit.disable("daily")
        edit.enable("daily")
        edit.rename("daily", "weekly")
        edit.fit("weekly")
        edit.clear("weekly")
        edit.remove("weekly")


def shrunk() -> bytearray:
    data = build_image(Stored(b"daily", (BITS, ZEROES, BITS), 9), size=SIZE).data
    data[24:32] = (COVERED + 512).to_bytes(8, "big")
    return data


def grown() -> bytearray:
    table = (BITS, ZEROES)
    return build_image(Stored(b"daily", table, 9), size=SIZE).data


@pytest.mark.spec("EDIT-8")
def test_stale_bitmaps_go_together_and_free_nothing() -> None:
    data = build_image(Stored(b"daily", (BITS,), 16), size=SIZE, autoclear=False).data
    with qcow2bm.open(data) as image, image.edit(dry_run=True) as edit:
        with pytest.raises(qcow2bm.BitmapStaleError):
            edit.remove("daily")
        with pytest.raises(qcow2bm.BitmapStaleError, match=r"Edit\.remove_all"):
            edit.add("daily")
        edit.remove_all()
        assert "refcounts of freed clusters" not in whats(edit.plan(), Write)
        edit.add("daily")
    edited(data, lambda edit: edit.remove_all())
    with qcow2bm.open(data) as image:
        assert image.bitmaps_extension is None
        assert image.problems == ()


@pytest.mark.spec("EDIT-9")
@pytest.mark.parametrize("cluster_bits", range(9, 22))
def test_the_default_granularity(cluster_bits: int) -> None:
    data = build_image(cluster_bits=cluster_bits, size=1 << 22).data
    with qcow2bm.open(edited(data, add)) as image:
        expected = min(max(1 << cluster_bits, 4 << 10), 64 << 10)
        assert image.bitmaps["new"].granularity == expected


@pytest.mark.spec("EDIT-10")
@pytest.mark.parametrize(
    ("name", "granularity", "error"),
    [
        ("", None, ValueError),
        ("n" * 1024, None, ValueError),
        ("nul\0", None, ValueError),
        ("daily", None, qcow2bm.BitmapExistsError),
        ("new", 256, ValueError),
        ("new", 1000, ValueError),
        ("new", 4 << 30, ValueError),
        ("new", 0, ValueError),
    ],
)
def test_limits(name: str, granularity: int | None, error: type[Exception]) -> None:
    with (
        qcow2bm.open(three().data) as image,
        image.edit(dry_run=True) as edit,
        pytest.raises(error),
    ):
        edit.add(name, granularity)


@pytest.mark.spec("EDIT-10")
def test_limits_of_size() -> None:
    huge = build_image(size=4 << 40, cluster_bits=16).data
    with qcow2bm.open(huge) as image, image.edit(dry_run=True) as edit:
        with pytest.raises(qcow2bm.LimitError):
            edit.add("new", 512)
        edit.add("new", 1024)
    empty = build_image(size=0).data
    with (
        qcow2bm.open(empty) as image,
        image.edit(dry_run=True) as edit,
        pytest.raises(qcow2bm.UnsupportedError),
    ):
        edit.add("new")


@pytest.mark.spec("INV-COARSE")
@pytest.mark.spec("EDIT-11")
def test_rounding_never_loses_a_dirty_byte() -> None:
    def change(edit: Edit) -> None:
        edit.clear("base")
        edit.set("base", 65535, 2)
        edit.set("base", SIZE - 1, 1)

    data = edited(three().data, change)
    assert dirty_bytes(data, "base") == {(0, 131072), (SIZE - 65536, 65536)}
    edited(data, lambda edit: edit.reset_many("base", [(1, 131071), (SIZE - 65535, 65535)]))
    assert dirty_bytes(data, "base") == {(0, 65536), (SIZE - 65536, 65536)}


@pytest.mark.spec("EDIT-12")
def test_fitting_drops_what_is_cut_off() -> None:
    data = shrunk()
    edited(data, lambda edit: edit.fit("daily"))
    with qcow2bm.open(data) as image:
        assert image.problems == ()
        assert image.bitmaps["daily"].packed().tobytes() == BITS.ljust(512, b"\0") + b"\0"


@pytest.mark.spec("INV-COARSE")
@pytest.mark.spec("EDIT-12")
def test_fitting_makes_dirty_what_was_not_covered() -> None:
    data = edited(grown(), lambda edit: edit.fit("daily"))
    with qcow2bm.open(data) as image:
        assert image.problems == ()
        packed = image.bitmaps["daily"].packed().tobytes()
        assert packed == BITS.ljust(512, b"\0") + b"\xff" * 1024


OPERATIONS: dict[str, Callable[[set[int], set[int]], set[int]]] = {
    "or": set.union,
    "and": set.intersection,
    "xor": set.symmetric_difference,
    "subtract": set.difference,
}


@pytest.mark.spec("INV-COARSE")
@pytest.mark.spec("EDIT-13")
@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize(("target", "source"), [(9, 9), (9, 12), (12, 9), (11, 9), (16, 10)])
def test_set_algebra(op: Any, target: int, source: int) -> None:
    random = np.random.default_rng(target * source)
    disk = 64 << 10 << 3
    bits = {
        n: random.integers(0, 256, disk >> n >> 3, np.uint8).tobytes() for n in (target, source)
    }
    if target != source:
        fine = bytearray(bits[min(target, source)])
        fine[8:32] = b"\xff" * 24  # so that some coarse granules are dirty all through
        bits[min(target, source)] = bytes(fine)
    image = build_image(
        Stored(b"target", (bits[target],), target),
        Stored(b"source", (bits[source][::-1],), source),
        size=disk,
        cluster_bits=12,
    )
    with qcow2bm.open(image.data) as before:
        sectors = {name: sectors_of(bitmap) for name, bitmap in before.bitmaps.items()}
    edited(image.data, lambda edit: edit.merge("target", "source", op))
    exact = OPERATIONS[op](sectors["target"], sectors["source"])
    width = 1 << target - 9
    expected = {
        s for sector in exact for s in range(sector // width * width, (sector // width + 1) * width)
    }
    with qcow2bm.open(image.data) as after:
        assert sectors_of(after.bitmaps["target"]) == expected


def sectors_of(bitmap: qcow2bm.Bitmap) -> set[int]:
    return {
        sector
        for rows in bitmap.extents()
        for start, length in rows.tolist()
        for sector in range(start // 512, (start + length) // 512)
    }


@pytest.mark.spec("EDIT-14")
def test_what_cannot_be_merged() -> None:
    other = build_image(Stored(), size=SIZE + 512).data
    with (
        qcow2bm.open(three().data) as image,
        qcow2bm.open(other) as different,
        image.edit(dry_run=True) as edit,
    ):
        with pytest.raises(qcow2bm.BitmapError, match=f"{SIZE + 512} bytes"):
            edit.merge("daily", different.bitmaps["daily"])
        edit.add("coarse", 2 << 30)
        edit.add("fine", 512)
        edit.merge("coarse", "fine")
        edit.merge("fine", "coarse")


def overlay() -> bytearray:
    """An overlay as QEMU makes it, without bitmaps, and with the name of a backing file."""
    format, names = extension(BACKING_FORMAT, b"qcow2"), extension(FEATURE_NAMES, bytes(384))
    options: dict[str, Any] = {"cluster_bits": 16, "backing_name": b"base.qcow2"}
    return build_image(extensions=[format, names], size=SIZE, **options).data


def no_backing() -> bytearray:
    return build_image(extensions=[extension(FEATURE_NAMES, bytes(384))], cluster_bits=16).data


def last_of_overlay() -> bytearray:
    return edited(overlay(), add)


COMMITS: dict[str, tuple[str, Callable[[], bytearray], Callable[[Edit], None]]] = {
    "usual": ("Commit order", lambda: three().data, lambda edit: edit.reset("daily", 0, 512)),
    "first": ("Header area", overlay, add),
    "last": ("Header area", last_of_overlay, lambda edit: edit.remove("new")),
}


@pytest.mark.parametrize("case", COMMITS)
def test_the_steps_of_a_commit(case: str) -> None:
    heading, image, change = COMMITS[case]
    tables = [t for t in page("edit.md").tables if t.heading == heading]
    table = tables[-1] if case == "last" else tables[0]
    plan = planned(image(), change)
    found = [
        (
            "commit"
            if number == plan.commit_point
            else "barrier"
            if plan.is_barrier(number)
            else "write",
            step.what,
        )
        for number, step in enumerate(plan.steps)
    ]
    assert found == [(row["step"], row["what"]) for row in table.rows]


@pytest.mark.spec("EDIT-15")
@pytest.mark.parametrize(
    ("image", "change", "limit"),
    [
        (lambda: three().data, lambda edit: edit.merge("base", "daily"), 3),
        (lambda: three().data, lambda edit: edit.remove("daily"), 3),
        (no_backing, add, 3),
        (overlay, add, 5),
        (last_of_overlay, lambda edit: edit.remove("new"), 5),
        (
            lambda: (
                build_image(
                    Stored(), cluster_bits=12, extensions_behind=[extension(1, bytes(600))]
                ).data
            ),
            lambda edit: edit.remove("daily"),
            5,
        ),
    ],
)
def test_how_many_barriers(
    image: Callable[[], bytearray], change: Callable[[Edit], None], limit: int
) -> None:
    assert 2 <= planned(image(), change).barriers <= limit


@pytest.mark.spec("INV-REFCOUNT")
@pytest.mark.spec("EDIT-16")
@pytest.mark.spec("REF-6")
def test_new_structures_are_whole_clusters_counted_before_the_commit() -> None:
    plan = planned(three().data, lambda edit: edit.merge("base", "daily"))
    assert plan.commit_point is not None
    before = [s for s in plan.steps[: plan.commit_point] if isinstance(s, Write)]
    fresh = [write for write in before if write.is_fresh]
    assert fresh
    assert all(w.offset % CLUSTER == w.length % CLUSTER == 0 for w in fresh)
    counts = [write for write in plan.writes if "refcounts" in write.what]
    assert all(write.offset % 512 == write.length % 512 == 0 for write in counts)
    assert counts[0] in before
    assert counts[-1] not in before


@pytest.mark.spec("INV-ATOMIC")
@pytest.mark.spec("EDIT-17")
def test_what_a_failure_leaves_behind() -> None:
    data = three().data
    plan = planned(data, add)
    assert plan.commit_point is not None
    outcomes = []
    for number in range(len(plan.steps)):
        copy = data[:]
        counting = FaultyStorage(copy)
        with qcow2bm.open(counting, "r+") as image, image.edit() as edit:
            add(edit)
        first = counting.calls.index("write")
        storage = FaultyStorage(data[:], Fault(first + number, errno.EIO))
        with qcow2bm.open(storage, "r+") as image:
            with pytest.raises(qcow2bm.CommitError) as raised, image.edit() as edit:
                add(edit)
            with pytest.raises(qcow2bm.StateError, match="in doubt"):
                image.edit()
        outcomes.append(raised.value.outcome)
        assert len(storage.effects) - storage.effects.count("truncate") == number + 1
        if raised.value.outcome == "old":
            assert facts(storage.data) == facts(data)
        if number == 0:
            assert storage.data == data
    assert outcomes == [plan.outcome(number) for number in range(len(plan.steps))]
    assert outcomes == ["old"] * plan.commit_point + ["unknown"] * 2 + ["new"] * 2


@pytest.mark.spec("EDIT-18")
def test_bitmaps_are_made_anew() -> None:
    with qcow2bm.open(three().data, "r+") as image:
        old, mapping = image.bitmaps["daily"], image.bitmaps
        with image.edit() as edit:
            edit.set("daily", COVERED, 512)
        assert image.bitmaps["daily"].status == "valid"
        for look in (
            old.count,
            lambda: old.status,
            lambda: old.name,
            lambda: mapping["daily"].name,
        ):
            with pytest.raises(qcow2bm.StateError, match="outdated by a commit"):
                look()


@pytest.mark.spec("EDIT-19")
def test_a_full_header_is_refused() -> None:
    data = build_image(size=SIZE, backing_name=b"b" * 380).data
    before = bytes(data)
    with (
        qcow2bm.open(data, "r+") as image,
        pytest.raises(qcow2bm.LimitError, match="header area"),
        image.edit() as edit,
    ):
        add(edit)
    assert data == before


@pytest.mark.spec("REF-2")
@pytest.mark.spec("EDIT-6")
@pytest.mark.parametrize(
    "structure", ["l1-table", "refcount-block", "bitmap-table", "bitmap-directory"]
)
def test_a_structure_without_refcount_means_that_refcounts_are_wrong(structure: str) -> None:
    image = three()
    place = image.offset(structure)
    counts = image.offset("refcount-block") + 2 * (place // CLUSTER)
    image.data[counts : counts + 2] = bytes(2)
    with pytest.raises(qcow2bm.FormatError, match=f"{place:#x} at .* is 0, must be 1"):
        planned(image.data, add)


@pytest.mark.spec("EDIT-6")
def test_structures_that_overlap() -> None:
    image = three()
    image.plant(image.offset("l1-table"), "refcount-table", 0, 0)
    with (
        qcow2bm.open(image.data) as opened,
        pytest.raises(qcow2bm.FormatError, match="used twice"),
    ):
        opened.edit(dry_run=True)


@pytest.mark.spec("EDIT-6")
def test_two_bitmaps_extensions() -> None:
    payload = three().offset("bitmaps-extension")
    again = extension(BITMAPS, bytes(three().data[payload : payload + 24]))
    image = three(extensions_behind=[again])
    with (
        qcow2bm.open(image.data) as opened,
        pytest.raises(qcow2bm.FormatError, match="second time"),
    ):
        opened.edit(dry_run=True)


@pytest.mark.spec("EDIT-20")
@pytest.mark.parametrize("operation", ["copy", "merge", "invert", "set_many"])
def test_an_operation_that_fails_changes_nothing(operation: str) -> None:
    image = build_image(
        Stored(b"daily", (BITS, BITS, BITS), 9), Stored(b"base", (BITS, BITS, BITS), 9), size=SIZE
    )
    gone = image.offset("bitmap-data", 0, 2)

    class Failing(FaultyStorage):
        is_failing = False

        def read_into(self, offset: int, buffer: memoryview) -> int:
            if self.is_failing and offset <= gone < offset + len(buffer):
                raise qcow2bm.StorageError("<failing>", offset, len(buffer), "is gone")
            return super().read_into(offset, buffer)

    storage = Failing(image.data)
    before = facts(image.data)
    with qcow2bm.open(storage, "r+") as opened, opened.edit() as edit:
        storage.is_failing = True
        operations: dict[str, Callable[[], None]] = {
            "copy": lambda: edit.copy("daily", "new"),
            "merge": lambda: edit.merge("base", "daily", "xor"),
            "invert": lambda: edit.invert("daily"),
            "set_many": lambda: edit.set_many("daily", [(0, SIZE - 512)] * 2),
        }
        with pytest.raises(qcow2bm.StorageError):
            operations[operation]()
        storage.is_failing = False
    assert facts(image.data) == before


@pytest.mark.spec("REF-3")
def test_old_clusters_are_used_again() -> None:
    data = three().data
    sizes = []
    for number in range(8):
        edited(data, lambda edit, n=number: edit.set("daily", COVERED + 512 * n, 512))  # type: ignore[misc]
        sizes.append(len(data))
    assert sizes[2:] == sizes[2:3] * 6


@pytest.mark.spec("REF-3")
def test_a_storage_that_cannot_grow() -> None:
    class Device(FaultyStorage):
        def capacity(self) -> int:
            return len(self.data)

    storage = Device(three().data)
    before = bytes(storage.data)
    with (
        qcow2bm.open(storage, "r+") as image,
        pytest.raises(qcow2bm.StorageError, match="No space left") as raised,
        image.edit() as edit,
    ):
        add(edit)
    assert raised.value.errno == errno.ENOSPC
    assert storage.data == before
    assert storage.effects == []


@pytest.mark.spec("REF-4")
@pytest.mark.spec("REF-5")
def test_refcount_structures_come_first() -> None:
    data = build_image(size=1 << 32, refcount_order=6).data
    blocks, tables = 0, 0
    for number in range(40):

        def change(edit: Edit, name: str = str(number)) -> None:
            edit.add(name, 512)
            edit.set_many(name, [(n << 21, 512) for n in range(100)])

        plan = planned(data, change)
        steps = [step.what for step in plan.steps]
        if "new refcount block" in steps:
            blocks += 1
            leading = {"refcount table entries of new blocks", "place of the refcount table"}
            (use,) = leading.intersection(steps)
            last = len(steps) - 1 - steps[::-1].index(use)
            assert plan.is_barrier(steps.index(use) - 1)
            assert plan.is_barrier(last + 1)
            assert (
                steps.index("new refcount block")
                < steps.index(use)
                < steps.index("new bitmap data")
            )
            tables += use == "place of the refcount table"
            if use == "place of the refcount table":
                switch = plan.steps[steps.index(use)]
                assert isinstance(switch, Write)
                assert (switch.offset, switch.length) == (48, 12)
        edited(data, change)
    assert blocks > 5
    assert tables >= 1
    assert qcow2bm.open(data).problems == ()


@pytest.mark.spec("REF-7")
def test_a_refcount_table_that_cannot_be_right() -> None:
    image = three()
    image.data[image.offset("refcount-table") + 7] |= 1
    with pytest.raises(qcow2bm.FormatError, match="refcount table: entry 0"):
        planned(image.data, add)


def test_all_ones_can_be_asked_for_again() -> None:
    data = build_image(Stored(b"daily", (ONES, BITS, ZEROES), 9), size=SIZE).data
    edited(data, lambda edit: edit.invert("daily"))
    edited(data, lambda edit: edit.invert("daily"))
    with qcow2bm.open(data) as image:
        assert image.bitmaps["daily"].clusters == (1, 1, 1)
