"""The plan of an edit: the writes, their places, and the use of the old clusters."""

from __future__ import annotations

import errno
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.audit import Audit
from support.images import ONES, ZEROES, Built, Stored, Word, build_image, extension
from support.plans import Work, each, edit, plan_of

import qcow2bm
from qcow2bm.clusters.plan import is_in_one_sector
from qcow2bm.format.directory import FLAG_AUTO
from qcow2bm.format.extensions import BACKING_FORMAT
from qcow2bm.storage.memory import MemoryStorage

CLUSTER = 512
PER_CLUSTER = 8 * CLUSTER
GRANULE = 1 << 16
CLUSTERS = 40
SIZE = CLUSTERS * PER_CLUSTER * GRANULE

TABLE: list[Word] = [b"\x01" if n % 4 else (ZEROES, ONES)[n % 8 // 4] for n in range(CLUSTERS)]
DAILY = Stored(b"daily", TABLE)
WEEKLY = Stored(b"weekly", [b"\x03"] * CLUSTERS, flags=0)


def image_of(*bitmaps: Stored, **options: Any) -> Built:
    return build_image(*bitmaps, **({"size": SIZE} | options))


def whats(plan: qcow2bm.Plan) -> Counter[str]:
    """Counts the clusters that a plan writes, by kind; of refcounts and header, the writes."""
    counts: Counter[str] = Counter()
    for write in plan.writes:
        counts[write.what] += write.length // CLUSTER if write.is_fresh else 1
    return counts


# --- only what changes is written -------------------------------------------------------------


@pytest.mark.spec("EDIT-3")
@pytest.mark.parametrize(
    ("cluster", "is_stored"), [(0, False), (1, True), (4, False), (CLUSTERS - 1, True)]
)
def test_one_bit_takes_one_cluster_of_data(cluster: int, is_stored: bool) -> None:
    image = image_of(DAILY, WEEKLY)
    before = Audit(image.data)
    start = (cluster * PER_CLUSTER + 100) * GRANULE
    verb = "reset" if TABLE[cluster] == ONES else "set"
    plan, audit = edit(image.data, lambda edit: getattr(edit, verb)("daily", start, GRANULE))
    counts = whats(plan)
    assert counts["new bitmap data"] == 1
    assert counts["new bitmap tables"] == 1
    assert counts["new bitmap directory"] == 1
    assert counts["bitmaps extension"] == 1
    assert plan.barriers == 3
    daily = audit.bitmaps[0]
    same = [a == b for a, b in zip(before.bitmaps[0].words, daily.words, strict=True)]
    assert [n for n, is_same in enumerate(same) if not is_same] == [cluster]
    assert audit.bitmaps[1] == before.bitmaps[1]
    assert not audit.references.keys() & {before.bitmaps[0].table_offset // CLUSTER}
    assert sum(audit.references.values()) == sum(before.references.values()) + (not is_stored)
    audit.check()


@pytest.mark.spec("EDIT-4")
@pytest.mark.parametrize(("verb", "word"), [("set", ONES), ("reset", ZEROES)])
def test_a_cluster_of_equal_bits_takes_no_space(verb: str, word: int) -> None:
    image = image_of(Stored(b"daily", [b"\x5a" * CLUSTER] * CLUSTERS))
    length = PER_CLUSTER * GRANULE
    plan, audit = edit(
        image.data, lambda edit: getattr(edit, verb)("daily", 3 * length, 2 * length)
    )
    assert "new bitmap data" not in whats(plan)
    words = audit.bitmaps[0].words
    assert words[3:5] == (word, word)
    assert len(audit.bitmaps[0].data_offsets) == CLUSTERS - 2
    audit.check()


@pytest.mark.spec("EDIT-4")
@pytest.mark.parametrize("missing", [0, 1, 7, PER_CLUSTER - 1])
def test_the_last_cluster_is_all_ones_only_where_all_of_it_is_on_the_disk(missing: int) -> None:
    size = SIZE - missing * GRANULE
    image = image_of(size=size)

    def work(edit: qcow2bm.Edit) -> None:
        edit.add("daily", GRANULE)
        edit.set("daily", 0, size)

    plan, audit = edit(image.data, work)
    assert audit.bitmaps[0].words[:-1] == (ONES,) * (CLUSTERS - 1)
    assert whats(plan)["new bitmap data"] == bool(missing)
    assert (audit.bitmaps[0].words[-1] == ONES) == (not missing)
    audit.check()


@pytest.mark.spec("EDIT-3")
@pytest.mark.parametrize("verb", ["disable", "rename"])
def test_a_flag_or_a_name_takes_a_directory_and_nothing_else(verb: str) -> None:
    image = image_of(DAILY, WEEKLY)
    before = Audit(image.data)
    works: dict[str, Work] = {
        "disable": lambda edit: edit.disable("daily"),
        "rename": lambda edit: edit.rename("daily", "a much longer name than it had before"),
    }
    plan, audit = edit(image.data, works[verb])
    assert whats(plan) == Counter(
        {
            "new bitmap directory": 1,
            "refcounts of new clusters": 1,
            "bitmaps extension": 1,
            "refcounts of freed clusters": 1,
        }
    )
    assert plan.barriers == 3
    assert audit.bitmaps[0].words == before.bitmaps[0].words
    assert audit.bitmaps[0].table_offset == before.bitmaps[0].table_offset


NO_EFFECT: dict[str, Work] = {
    "nothing": lambda edit: None,
    "set what is set": lambda edit: edit.set("daily", PER_CLUSTER * GRANULE, 1),
    "reset what is not": lambda edit: edit.reset("daily", 0, PER_CLUSTER * GRANULE),
    "set nothing": lambda edit: edit.set_many("daily", []),
    "enable what is": lambda edit: edit.enable("daily"),
    "disable what is": lambda edit: edit.disable("weekly"),
    "rename to itself": lambda edit: edit.rename("daily", "daily"),
    "merge itself": lambda edit: edit.merge("daily", "daily"),
    "fit what fits": lambda edit: edit.fit("daily"),
    "there and back": each(lambda edit: edit.invert("daily"), lambda edit: edit.invert("daily")),
    "renamed and back": each(
        lambda edit: edit.rename("daily", "x"), lambda edit: edit.rename("x", "daily")
    ),
    "added and removed": each(lambda edit: edit.add("x"), lambda edit: edit.remove("x")),
    "set and reset": each(
        lambda edit: edit.set("daily", 7 * GRANULE, 300 * GRANULE),
        lambda edit: edit.reset("daily", 7 * GRANULE, 300 * GRANULE),
    ),
}


@pytest.mark.spec("EDIT-2")
@pytest.mark.parametrize("name", NO_EFFECT)
def test_without_effect_nothing_is_written(name: str) -> None:
    image = image_of(DAILY, WEEKLY)
    before = bytes(image.data)
    plan, _ = edit(image.data, NO_EFFECT[name])
    assert plan == qcow2bm.Plan()
    assert image.data == before


@pytest.mark.parametrize("autoclear", [True, False])
def test_removing_all_of_nothing_writes_nothing(autoclear: bool) -> None:
    image = image_of(autoclear=autoclear)
    assert plan_of(image.data, lambda edit: edit.remove_all()) == qcow2bm.Plan()
    work = each(lambda edit: edit.add("x"), lambda edit: edit.remove_all())
    assert plan_of(image.data, work) == qcow2bm.Plan()


def test_planning_leaves_the_edit_as_it_was() -> None:
    """If all changes are taken back, planning must not clear the bits behind the disk."""
    image = image_of(Stored(b"daily", [b"\0" * 511 + b"\x80"] * CLUSTERS), size=SIZE - GRANULE)
    before = bytes(image.data)

    def work(edit: qcow2bm.Edit) -> None:
        edit.set("daily", 0, 1)
        assert edit.plan().steps
        edit.reset("daily", 0, GRANULE)

    plan, _ = edit(image.data, work)
    assert plan == qcow2bm.Plan()
    assert image.data == before


# --- old content never shows ------------------------------------------------------------------


def with_garbage(image: Built, clusters: int) -> bytearray:
    """All that is free, within the file and behind it, full of old data."""
    audit = Audit(image.data)
    data = image.data
    data.extend(bytes(clusters * image.cluster_size))
    for number in range(len(data) // image.cluster_size):
        if not audit.refcounts[number]:
            start = number * image.cluster_size
            data[start : start + image.cluster_size] = b"\xaa" * image.cluster_size
    return data


@pytest.mark.spec("EDIT-16")
@pytest.mark.parametrize("cluster_bits", [9, 12, 16])
@pytest.mark.parametrize("order", range(7))
def test_clusters_are_written_whole(cluster_bits: int, order: int) -> None:
    image = build_image(
        Stored(b"daily", [b"\x01"]), size=1 << 20, cluster_bits=cluster_bits, refcount_order=order
    )
    data = with_garbage(image, 40)

    def work(edit: qcow2bm.Edit) -> None:
        edit.set("daily", 5 * GRANULE, 1)
        edit.add("fine", 512)
        edit.set("fine", 1 << 19, 513)
        edit.add("clean")

    plan, audit = edit(data, work)
    audit.check()
    daily, fine, clean = audit.bitmaps
    assert (audit.dirty(daily), audit.dirty(fine), audit.dirty(clean)) == (
        {0, 5},
        {1024, 1025},
        set(),
    )
    for write in plan.writes:
        if write.is_fresh:
            assert write.offset % audit.cluster_size == 0
            assert write.length % audit.cluster_size == 0
    assert audit.payload
    for offset, used in [
        (audit.payload[3], audit.payload[2]),
        *((bitmap.table_offset, 8 * len(bitmap.words)) for bitmap in audit.bitmaps),
    ]:
        end = offset - offset % -audit.cluster_size
        rest = audit.data[offset + used : max(end, offset + audit.cluster_size)]
        assert not any(rest)


@pytest.mark.spec("EDIT-16")
@pytest.mark.parametrize(("order", "copies"), [(4, 140), (5, 70), (6, 36)])
def test_the_refcount_table_grows_over_old_content(order: int, copies: int) -> None:
    """With 512-byte clusters one cluster of table counts 8 MiB at 16 bits, 2 MiB at 64."""
    size = 256 << 20
    image = image_of(size=size, refcount_order=order)
    data = with_garbage(image, 500)
    ranges = np.arange(0, size, PER_CLUSTER * 512)[:, None] + [[0, 0]]
    ranges[:, 1] = 700
    before = Audit(data)
    assert before.table_clusters == 1

    def work(edit: qcow2bm.Edit) -> None:
        edit.add("0", 512)
        edit.set_many("0", ranges)
        for n in range(1, copies):
            edit.copy("0", str(n))

    plan, audit = edit(data, work)
    audit.check()
    assert audit.table_clusters > 1
    assert audit.references[before.table_offset // CLUSTER] == 0
    expected = {start // 512 + n for start, _ in ranges.tolist() for n in (0, 1)}
    assert all(audit.dirty(bitmap) == expected for bitmap in audit.bitmaps)
    assert plan.barriers == 2 + 3
    _, audit = edit(data, lambda edit: edit.remove_all())
    audit.check()
    assert audit.payload is None


@pytest.mark.parametrize(("order", "copies"), [(5, 16), (6, 8)])
def test_what_was_given_back_is_used_again(order: int, copies: int) -> None:
    """However often bitmaps are rewritten, the file must have room for the old and the new only."""
    size = 256 << 20
    data = image_of(size=size, refcount_order=order).data
    ranges = np.arange(0, size, PER_CLUSTER * 512)[:, None] + [[0, 0]]
    ranges[:, 1] = 1
    names = [str(n) for n in range(copies)]

    def add(edit: qcow2bm.Edit) -> None:
        edit.add("0", 512)
        edit.set_many("0", ranges)
        for name in names[1:]:
            edit.copy("0", name)

    def invert(edit: qcow2bm.Edit) -> None:
        for name in names:
            edit.invert(name)

    edit(data, add)
    length = len(data)
    for _ in range(6):
        edit(data, invert)
    assert len(data) < 3 * length


# --- room -------------------------------------------------------------------------------------


class FixedStorage(MemoryStorage):
    """Storage that cannot grow, as a block device."""

    def __init__(self, data: bytearray) -> None:
        super().__init__(data, "<device>")
        self._length = len(data)

    def capacity(self) -> int:
        return self._length

    def write(self, offset: int, parts: Any) -> None:
        super().write(offset, parts)
        assert self.size() == self._length


@pytest.mark.parametrize("spare", range(8))
def test_a_device_is_used_up_to_its_last_cluster(spare: int) -> None:
    image = image_of(DAILY, WEEKLY)
    data = with_garbage(image, spare)
    before = bytes(data)
    start = (PER_CLUSTER + 100) * GRANULE
    # One of data, one of a table of 40 entries, one of directory; the counted ones are all full.
    with qcow2bm.open(FixedStorage(data), "r+") as opened:
        edit = opened.edit()
        with edit:
            edit.set("daily", start, 1)
            if spare < 3:
                with pytest.raises(qcow2bm.StorageError) as raised:
                    edit.plan()
                assert raised.value.errno == errno.ENOSPC
                assert "No space left" in str(raised.value)
                edit.remove_all()
                edit.add("daily")
                edit.remove("daily")  # giving back needs no room
            else:
                assert edit.plan().steps
        assert len(opened.bitmaps) == (0 if spare < 3 else 2)
    assert len(data) == len(before)
    Audit(data).check()


def test_an_edit_there_is_no_room_for_changes_nothing() -> None:
    data = with_garbage(image_of(DAILY, WEEKLY), 2)
    before = bytes(data)
    with qcow2bm.open(FixedStorage(data), "r+") as opened:
        with (
            pytest.raises(qcow2bm.StorageError, match="nothing was changed"),
            opened.edit() as edit,
        ):
            edit.invert("daily")
        assert data == before
        assert opened.bitmaps["daily"].status == "valid"  # and the Image is as it was
        with opened.edit() as edit:
            edit.remove("daily")
        assert list(opened.bitmaps) == ["weekly"]
    Audit(data).check()


@given(st.sets(st.integers(0, 60), max_size=50), st.integers(0, 12))
@settings(max_examples=25)
def test_free_clusters_are_used_wherever_they_are(used: set[int], clusters: int) -> None:
    image = image_of(Stored(b"daily", [b"\x03"] * CLUSTERS))
    end = len(image.data) // CLUSTER
    block = image.offset("refcount-block")
    for number in used:
        image.data[block + 2 * (end + number) + 1] = 1
    data = with_garbage(image, 61)
    free = 61 - len(used)
    ranges = [((PER_CLUSTER * n + 9) * GRANULE, 1) for n in range(clusters)]
    needed = clusters + 2 if clusters else 0
    before = bytes(data)
    with qcow2bm.open(FixedStorage(data), "r+") as opened:
        if needed > free:
            with pytest.raises(qcow2bm.StorageError), opened.edit() as edit:
                edit.set_many("daily", ranges)
            assert data == before
            return
        with opened.edit() as edit:
            edit.set_many("daily", ranges)
    audit = Audit(data)
    leaks = {end + number: (1, 0) for number in used}
    assert audit.miscounted == leaks
    assert all(data[n * CLUSTER :][:CLUSTER] == before[n * CLUSTER :][:CLUSTER] for n in leaks)


# --- barriers ---------------------------------------------------------------------------------


HEADERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "overlay": {"extensions": [extension(BACKING_FORMAT, b"qcow2")], "backing_name": b"base.img"},
    "64 KiB": {"cluster_bits": 16, "extensions": [extension(0x6803F857, bytes(0x180))]},
    "64 KiB overlay": {
        "cluster_bits": 16,
        "extensions": [extension(BACKING_FORMAT, b"qcow2"), extension(0x6803F857, bytes(0x180))],
        "backing_name": b"base.img",
    },
    "additional fields": {"cluster_bits": 12, "additional_fields": b"unknown!" * 60},
    "straddling": {"cluster_bits": 12, "extensions": [extension(0x12345678, bytes(368))]},
    "others behind": {
        "cluster_bits": 12,
        "extensions_behind": [extension(0x12345678, b"odd"), extension(0x12345679, bytes(600))],
        "backing_name": b"base.img",
    },
}


@pytest.mark.spec("EDIT-5")
@pytest.mark.spec("EDIT-15")
@pytest.mark.parametrize("layout", HEADERS)
def test_how_many_barriers_a_commit_has(layout: str) -> None:
    image = image_of(size=1 << 30, **HEADERS[layout])
    data = image.data

    def first(edit: qcow2bm.Edit) -> None:
        edit.add("daily", GRANULE)
        edit.set("daily", 0, 1)

    plan, audit = edit(data, first)
    assert plan.barriers <= 5
    assert audit.dirty(audit.bitmaps[0]) == {0}
    plan, _ = edit(data, lambda edit: edit.set("daily", 1 << 20, 1))
    straightening = [s for s in plan.steps if s.what == "use of the copy of the header extensions"]
    assert plan.barriers == 3 or straightening
    for _ in range(2):
        plan, audit = edit(data, lambda edit: edit.invert("daily"))
        assert plan.barriers == 3
        assert plan.commit_point is not None
        commit = plan.steps[plan.commit_point]
        assert isinstance(commit, qcow2bm.Write)
        assert commit.length == 24
        assert is_in_one_sector(commit.offset, 24)
    plan, audit = edit(data, lambda edit: edit.remove("daily"))
    assert plan.barriers <= 5
    assert (audit.payload, audit.autoclear) == (None, 0)
    audit.check()


@pytest.mark.spec("EDIT-5")
@pytest.mark.parametrize("bits", [1 << 63, 1 << 2, 0xFFFFFFFFFFFFFFFC])
def test_unknown_autoclear_bits_are_cleared_before_anything_is_written(bits: int) -> None:
    image = image_of(DAILY)
    image.plant(bits | 1, "header", 0, "autoclear_features")
    assert plan_of(image.data, lambda edit: edit.enable("daily")).steps == ()  # nothing to do
    plan, audit = edit(image.data, lambda edit: edit.disable("daily"))
    assert audit.autoclear == 1
    first = plan.steps[0]
    assert isinstance(first, qcow2bm.Write)
    assert (first.offset, first.length, first.parts) == (88, 8, (bytes(7) + b"\1",))
    assert plan.is_barrier(1)
    assert plan.barriers == 4


@pytest.mark.spec("EDIT-19")
@pytest.mark.parametrize("name", [b"", b"n" * 200])
def test_a_full_header_is_refused_and_nothing_written(name: bytes) -> None:
    filler = extension(0x12345678, bytes(512 - 112 - 8 - 8 - 16 - len(name)))
    image = image_of(cluster_bits=9, extensions=[filler], backing_name=name)
    before = bytes(image.data)
    with qcow2bm.open(image.data, "r+") as opened:
        with pytest.raises(qcow2bm.LimitError), opened.edit() as edit:
            edit.add("daily")
        assert image.data == before
        assert opened.problems == ()


def test_freeing_finds_a_wrong_refcount_before_anything_is_written() -> None:
    image = image_of(DAILY, WEEKLY)
    cluster = Audit(image.data).bitmaps[0].data_offsets[3] // CLUSTER
    image.data[image.offset("refcount-block") + 2 * cluster + 1] = 2
    before = bytes(image.data)
    with qcow2bm.open(image.data, "r+") as opened:
        with pytest.raises(qcow2bm.FormatError, match="is 2, must be 1"), opened.edit() as edit:
            edit.remove("daily")
        assert image.data == before
        with opened.edit() as edit:  # what does not touch it is done
            edit.clear("weekly")
    with qcow2bm.open(image.data) as opened:
        assert opened.bitmaps["weekly"].count() == 0
        assert opened.bitmaps["daily"].count() > 0


@pytest.mark.parametrize("what", ["data", "table"])
def test_a_cluster_in_use_that_is_not_counted_ends_the_edit(what: str) -> None:
    """Refcounts of which one is seen to be wrong are not what to find free clusters by."""
    image = image_of(DAILY, WEEKLY)
    weekly = Audit(image.data).bitmaps[1]
    place = weekly.table_offset if what == "table" else min(weekly.data_offsets)
    image.data[image.offset("refcount-block") + 2 * (place // CLUSTER) + 1] = 0
    before = bytes(image.data)
    with (
        qcow2bm.open(image.data, "r+") as opened,
        pytest.raises(qcow2bm.FormatError, match=f"{place:#x} at .* is 0, must be 1"),
        opened.edit() as edit,
    ):
        edit.invert("daily")
    assert image.data == before


# --- many bitmaps -----------------------------------------------------------------------------


def many(count: int, data: bytearray) -> Audit:
    """Adds so many bitmaps, then changes one of them."""

    def work(edit: qcow2bm.Edit) -> None:
        for n in range(count):
            edit.add(f"{n:05}", 1 << 20)

    edit(data, work)
    plan, audit = edit(data, lambda edit: edit.set(f"{count // 2:05}", 0, 1))
    assert whats(plan)["new bitmap data"] == 1
    assert plan.barriers == (5 if whats(plan)["new refcount block"] else 3)
    assert [b.name for b in audit.bitmaps] == [b"%05d" % n for n in range(count)]
    assert [bool(audit.dirty(b)) for b in audit.bitmaps] == [n == count // 2 for n in range(count)]
    audit.check()
    return audit


def test_a_thousand_bitmaps() -> None:
    data = image_of(size=1 << 20).data
    many(1000, data)
    _, audit = edit(data, lambda edit: edit.remove_all())
    audit.check()
    assert audit.payload is None


@pytest.mark.deep
@pytest.mark.spec("EDIT-10")
def test_as_many_bitmaps_as_there_can_be() -> None:
    data = build_image(size=1 << 20).data
    many(65535, data)
    with qcow2bm.open(data) as opened, opened.edit(dry_run=True) as edit_:
        with pytest.raises(qcow2bm.LimitError, match="65536"):
            edit_.add("one more")
        with pytest.raises(qcow2bm.LimitError, match="65536"):
            edit_.copy("00000", "one more")
        edit_.remove("00000")
        edit_.add("one more")
    _, audit = edit(data, lambda edit: edit.remove_all())
    audit.check()


@pytest.mark.deep
@pytest.mark.spec("EDIT-10")
def test_a_directory_has_a_limit_of_its_own() -> None:
    """65,535 names of 1023 bytes are 24 bytes an entry too many for QEMU."""
    data = image_of(size=1 << 20).data
    with qcow2bm.open(data) as opened, opened.edit(dry_run=True) as edit_:
        for n in range(65535):
            edit_.add(f"{n:01023}", 1 << 20)
        with pytest.raises(qcow2bm.LimitError, match="bitmap directory"):
            edit_.plan()


def test_entries_of_kept_bitmaps_are_copied_as_they_are() -> None:
    image = image_of(DAILY, WEEKLY, Stored(b"third", flags=FLAG_AUTO))
    before = Audit(image.data).bitmaps
    _, audit = edit(
        image.data, each(lambda edit: edit.remove("weekly"), lambda edit: edit.add("last"))
    )
    assert audit.bitmaps[:2] == [before[0], before[2]]
    assert audit.bitmaps[2].name == b"last"
