"""Checking finds problems that a reader does not find, and says where they are."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.console import run
from support.images import Stored, build_image
from support.jsonspec import check_check
from support.kinds import CHECKED_KINDS
from support.plans import after
from support.problem_images import IDS, broken
from support.spec_image import (
    CLUSTER,
    COPIED,
    DAILY,
    DATA,
    L1,
    L2,
    REFCOUNT_BLOCK,
    REFCOUNT_TABLE,
    TABLES,
    Patch,
    image,
    in_entry,
    in_header,
    patched,
    refcount,
    with_disk,
    word,
)
from support.traced_memory import traced_memory

import qcow2bm
from qcow2bm.checking.check import Check
from qcow2bm.checking.cluster_counts import CHUNK
from qcow2bm.checking.listing import MAX_LISTED
from qcow2bm.checking.references import References
from qcow2bm.checking.repair import plan_repair
from qcow2bm.clusters.file import ClusterFile
from qcow2bm.problem_kinds import KINDS, summary_of
from qcow2bm.storage.memory import MemoryStorage

BEHIND = 26 * CLUSTER


def checked(data: bytes | bytearray) -> Check:
    with qcow2bm.open(data) as opened:
        return opened.check()


FOUND: dict[str, tuple[list[Patch], int]] = {
    "cluster.refcount.too-low": ([refcount(25, 0), (L2, word(DATA))], DATA),
    "cluster.refcount.leak": ([refcount(27, 1), (27 * CLUSTER, b"x" * CLUSTER)], 27 * CLUSTER),
    "refcount-table.entry.invalid": ([(REFCOUNT_TABLE + 8, word(0x401))], REFCOUNT_TABLE + 8),
    "refcount-table.entry.past-eof": ([(REFCOUNT_TABLE + 8, word(1 << 30))], REFCOUNT_TABLE + 8),
    "refcount-table.entry.shared": (
        [(REFCOUNT_TABLE + 8, word(REFCOUNT_BLOCK))],
        REFCOUNT_TABLE + 8,
    ),
    "l1-table.past-eof": (in_header(l1_table_offset=1 << 20), 1 << 20),
    "l1-table.entry.reserved": ([(L1, word(COPIED | 1 << 60 | L2))], L1),
    "l1-table.entry.past-eof": ([(L1 + 8, word(1 << 40))], L1 + 8),
    "l1-table.entry.copied": ([(L1, word(L2))], L1),
    "l2-table.entry.reserved": ([(L2, word(COPIED | DATA | 1 << 58))], L2),
    "l2-table.entry.past-eof": ([(L2 + 8, word(COPIED | 1 << 40))], L2 + 8),
    "l2-table.entry.copied": ([(L2, word(DATA))], L2),
    "l2-table.entry.compressed": ([(L2 + 16, word(COPIED | 1 << 62 | DATA))], L2 + 16),
}
"""The fault, and where check finds it."""


def test_the_image_they_are_planted_in_is_sound() -> None:
    assert checked(with_disk()) == Check((), 0, True, 26)
    assert checked(image()) == Check((), 0, True, 12)


@pytest.mark.spec("CHECK-2")
@pytest.mark.parametrize("id", FOUND)
def test_each_fault_is_found_where_it_is(id: str) -> None:
    patches, offset = FOUND[id]
    found = checked(with_disk(*patches))
    places = [(problem.id, problem.offset) for problem in found.problems]
    assert (id, offset) in places
    problem = found.problems[places.index((id, offset))]
    assert f" at {offset:#x} " in problem.message
    assert (problem.severity, problem.structure) == (
        CHECKED_KINDS[id].severity,
        CHECKED_KINDS[id].structure,
    )
    assert found.is_complete == (id in ("cluster.refcount.leak", "cluster.refcount.too-low"))


@pytest.mark.spec("CHECK-2")
def test_unaligned_entries_and_subclusters() -> None:
    size = 1 << 14
    built = build_image(cluster_bits=14, size=1 << 20).data
    with qcow2bm.open(built) as opened:
        l1 = opened.header.l1_table_offset
    l2 = len(built) + (-len(built) % size)
    data = l2 + size
    for patches, id, place in (
        ([(l1, word(l2 + 512))], "l1-table.entry.unaligned", l1),
        ([(l1, word(l2)), (l2, word(data + 1024))], "l2-table.entry.unaligned", l2),
        (
            [*in_header(incompatible_features=1 << 4), (l1, word(l2)), (l2 + 24, word(1))],
            "l2-table.entry.subclusters",
            l2 + 16,
        ),
        (
            [
                *in_header(incompatible_features=1 << 4),
                *((l1, word(l2)), (l2, word(data)), (l2 + 8, word(1 << 32 | 1))),
            ],
            "l2-table.entry.subclusters",
            l2,
        ),
    ):
        found = checked(patched(bytes(built), (data + size - 1, b"\0"), *patches))
        assert (id, place) in [(problem.id, problem.offset) for problem in found.problems]


@pytest.mark.spec("CHECK-3")
@pytest.mark.spec("STAT-7")
@pytest.mark.parametrize(
    ("patches", "id", "index"),
    [
        ([(TABLES[DAILY], word(DATA))], "bitmap-data.overlap", DAILY),
        ([(TABLES[DAILY], word(L2))], "bitmap-data.overlap", DAILY),
        (in_entry(DAILY, bitmap_table_offset=DATA), "bitmap-table.overlap", DAILY),
        ([(L2, word(COPIED | 0xC00))], "bitmap-directory.overlap", None),
    ],
)
def test_bitmaps_that_share_clusters_with_the_disk(
    patches: Sequence[Patch], id: str, index: int | None
) -> None:
    data = with_disk((DATA, bytes(CLUSTER)), *patches)
    found = [problem for problem in checked(data).problems if problem.id == id]
    assert [problem.bitmap_index for problem in found] == [index]
    assert "also used by the disk itself" in found[0].message
    with qcow2bm.open(data) as opened:
        for number, entry in enumerate(opened.directory):
            bitmap = opened.bitmap(number)
            if index in (None, number) and bitmap.status == "valid":
                assert (bitmap.verdict().reason, entry.index) == ("broken", number)
                assert found[0].message in bitmap.verdict().message


@pytest.mark.spec("STAT-7")
@pytest.mark.parametrize("bit", [160, 161, 500, 4095])
def test_bits_behind_the_disk(bit: int) -> None:
    octets = bytearray(512)
    octets[bit // 8] |= 1 << bit % 8
    data = build_image(Stored(b"b", [bytes(octets)]), size=160 * 65536, cluster_bits=9).data
    (problem,) = checked(data).problems
    # QEMU leaves bits set in the last word of 64, and no program does behind it.
    assert problem.id == ("bitmap-data.tail" if bit < 192 else "bitmap-data.beyond")
    assert problem.bitmap_index == 0
    with qcow2bm.open(data) as opened:
        assert opened.verdict("b").reason == ("usable" if bit < 192 else "broken")
    octets[bit // 8] = 0
    octets[0] = 255
    data = build_image(Stored(b"b", [bytes(octets)]), size=160 * 65536, cluster_bits=9).data
    assert checked(data).problems == ()


@pytest.mark.spec("CHECK-5")
def test_many_alike_are_listed_in_part() -> None:
    leaks = [refcount(27 + 2 * n, 1) for n in range(20)]
    found = checked(with_disk(*leaks, (BEHIND + 60 * CLUSTER, b"x")))
    ids = [problem.id for problem in found.problems]
    assert ids == ["cluster.refcount.leak"] * MAX_LISTED + ["cluster.refcount.more"]
    assert found.problems[-1].message.endswith("is not the last: 4 more are like it")
    assert found.leaked_clusters == 20
    entries = [(L2 + 8 * n, word(1 << 40)) for n in range(1, 40)]
    ids = [problem.id for problem in checked(with_disk(*entries)).problems]
    assert ids == ["l2-table.entry.past-eof"] * MAX_LISTED + ["l2-table.entry.more"]


@pytest.mark.spec("CHECK-5")
def test_whatever_there_can_be_many_of_has_an_id_for_those_not_listed() -> None:
    for id, kind in CHECKED_KINDS.items():
        if not kind.structure.startswith("bitmap"):
            structure, field, *_ = id.split(".")
            more = (
                f"{structure}.refcount.more" if field == "refcount" else f"{structure}.entry.more"
            )
            assert CHECKED_KINDS[more].severity == "note"
            assert summary_of(kind.structure) == CHECKED_KINDS[more]
    entries = [(REFCOUNT_TABLE + 8 * n, word(0x401)) for n in range(20, 40)]
    found = checked(with_disk(*entries)).problems
    ids = [problem.id for problem in found]
    assert ids == ["refcount-table.entry.invalid"] * MAX_LISTED + ["refcount-table.entry.more"]
    assert found[0].message == "refcount table: entry 20 at 0x2a0 is 0x401"


@pytest.mark.spec("CHECK-5")
def test_problems_of_bitmaps_are_listed_for_all_bitmaps() -> None:
    count = MAX_LISTED + 4
    stored = [Stored(b"b%d" % n, [bytes(20) + b"\1" + bytes(491)]) for n in range(count)]
    data = build_image(*stored, size=160 * 65536, cluster_bits=9).data
    found = checked(data).problems
    assert {problem.id for problem in found} == {"bitmap-data.tail"}
    assert [problem.bitmap_index for problem in found] == list(range(count))
    plan = plan_repair(MemoryStorage(data)).plan
    assert checked(after(data, plan.steps)).problems == ()


def test_many_shared_clusters_of_one_bitmap_hide_no_other() -> None:
    """The disk uses 20 clusters of the first bitmap, and one of the second."""
    octets = [b"\5".ljust(512, b"\0")] * (MAX_LISTED + 4)
    size = 65536 * 8 * 512 * len(octets)
    few: list[int | bytes] = [octets[0], *[0] * (len(octets) - 1)]
    built = build_image(Stored(b"a", octets), Stored(b"b", few), size=size, cluster_bits=9)
    data = bytearray(built.data)
    with qcow2bm.open(bytes(data)) as opened:
        l1 = opened.header.l1_table_offset
        words = [
            word_
            for entry in opened.directory
            for word_ in struct.unpack_from(f">{len(octets)}Q", data, entry.bitmap_table_offset)
            if word_
        ]
    l2 = len(data)
    data[l1 : l1 + 8] = word(COPIED | l2)
    data += b"".join(word(COPIED | offset) for offset in words).ljust(512, b"\0")
    found = [p for p in checked(data).problems if p.id == "bitmap-data.overlap"]
    assert [problem.bitmap_index for problem in found] == [0, 1]
    assert [name for name, _ in plan_repair(MemoryStorage(bytes(data))).lost] == ["a", "b"]


def test_clusters_that_follow_one_another_are_one_problem() -> None:
    leaks = [refcount(27 + n, 1) for n in range(5)]
    found = checked(with_disk(*leaks, (BEHIND + 60 * CLUSTER, b"x")))
    (problem,) = found.problems
    assert problem.message.endswith("has refcount 1, and 0 references, and so do the next 4")
    assert found.leaked_clusters == 5


@pytest.mark.spec("CHECK-5")
def test_memory_does_not_grow_with_what_an_image_claims(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    path.write_bytes(with_disk())
    with path.open("r+b") as file:
        file.truncate(1 << 42)
    checked(with_disk())  # loads all there is to load
    with traced_memory() as memory, qcow2bm.open(path) as opened:
        assert opened.check().problems == ()
    assert memory.peak < 4 << 20


@given(
    st.lists(st.tuples(st.integers(0, 3 * CHUNK), st.integers(0, CHUNK + 5)), max_size=5),
    st.lists(st.integers(0, 3 * CHUNK), max_size=20),
    st.integers(0, 3 * CHUNK),
    st.integers(1, 2 * CHUNK),
)
def test_references_are_counted(
    ranges: list[tuple[int, int]], clusters: list[int], first: int, count: int
) -> None:
    import numpy as np

    file = ClusterFile(MemoryStorage(image()), force_share=True)
    file.file_size = 4 * CHUNK * CLUSTER
    references, expected = References(file), np.zeros(6 * CHUNK, int)
    for start, length in ranges:
        length = min(length, 4 * CHUNK - start)
        assert references.add(start * CLUSTER, length * CLUSTER)
        expected[start : start + length] += 1
    references.add_clusters(np.array(clusters, np.int64))
    np.add.at(expected, clusters, 1)
    assert np.array_equal(references.counts(first, first + count), expected[first : first + count])


# --- the command -----------------------------------------------------------------------------


@pytest.mark.spec("CHECK-4")
@pytest.mark.parametrize("id", IDS)
def test_whatever_is_wrong_the_command_says_what_it_means(id: str, tmp_path: Path) -> None:
    (tmp_path / "vm.qcow2").write_bytes(broken(id))
    done = run(["check", "vm.qcow2", "--output=json"], tmp_path)
    document = json.loads(done.out)
    check_check(document)
    (found, *_) = (problem for problem in document["problems"] if problem["id"] == id)
    assert found["meaning"].endswith(".")
    assert found["qemu-message"] == KINDS[id].qemu_message or found["severity"] != "refused"
    severities = {problem["severity"] for problem in document["problems"]}
    errors = bool(severities & {"refused", "unusable"})
    assert done.status == (2 if errors else 3 if "leak" in severities else 0)
    text = run(["check", "--all", "vm.qcow2"], tmp_path)
    assert (text.status, text.err) == (done.status, "")
    assert f"({id}" in text.out
    assert all(problem["message"] in text.out for problem in document["problems"])
    assert ("QEMU will not open this image" in text.out) == ("refused" in severities)


@pytest.mark.spec("CHECK-1")
def test_a_sound_image(tmp_path: Path) -> None:
    (tmp_path / "vm.qcow2").write_bytes(with_disk())
    assert run(["check", "vm.qcow2"], tmp_path) == (0, f"no errors\n{SALVAGE}", "")
    document = json.loads(run(["check", "vm.qcow2", "--output=json"], tmp_path).out)
    assert document == {
        "schema": 1,
        "filename": "vm.qcow2",
        "problems": [],
        "leaked-clusters": 0,
        "next": [["qcow2bm", "salvage", "vm.qcow2", "--all", "--all-dirty"]],
    }


SALVAGE = """\
writes may be missing from "crashed"
  next: qcow2bm salvage vm.qcow2 --all --all-dirty
        cost: the next incremental backup saves the whole disk
"""
TEXT = f"""\
leak: cluster at 0x3600 has refcount 1, and 0 references
    QEMU says "Leaked cluster"
    The cluster has a refcount, but nothing uses it. Space is lost, and nothing else. If the image
    has stale bitmaps, the cluster may be theirs: salvage them first. To free the cluster, run
    qemu-img check -r leaks.
    (cluster.refcount.leak)

1 cluster leaked: 512 bytes
no errors
{SALVAGE}"""


def test_the_text(tmp_path: Path) -> None:
    patches, _ = FOUND["cluster.refcount.leak"]
    (tmp_path / "vm.qcow2").write_bytes(with_disk(*patches))
    assert run(["check", "vm.qcow2"], tmp_path) == (3, TEXT, "")
    (tmp_path / "vm.qcow2").write_bytes(broken("directory-entry.type.unknown"))
    done = run(["check", "vm.qcow2"], tmp_path)
    assert done.status == 2
    assert 'refused: bitmap "daily": bitmap directory entry 0: type at' in done.out
    assert "\n1 error\nQEMU will not open this image\n" in done.out


def test_what_is_no_image(tmp_path: Path) -> None:
    (tmp_path / "vm.qcow2").write_bytes(b"no image")
    done = run(["check", "vm.qcow2"], tmp_path)
    assert (done.status, done.out) == (1, "")
    assert len(done.err.splitlines()) == 1


@pytest.mark.spec("CLI-46")
def test_what_follows_is_counted_and_each_kind_is_explained_once(tmp_path: Path) -> None:
    def lines(*options: str) -> list[str]:
        done = run(["check", "vm.qcow2", *options], tmp_path)
        assert (done.status, done.err) == (2, "")
        return done.out.splitlines()

    entries = [(L2 + 8 * n, word(1 << 40)) for n in range(1, 10)]
    (tmp_path / "vm.qcow2").write_bytes(
        with_disk(*entries, refcount(27, 1), (BEHIND + 60 * CLUSTER, b"x"))
    )
    shown, every = lines(), lines("--all")
    fault, more, following = "unusable: l2 table", "like these (--all", "1 more problem of clusters"
    assert [sum(line.lower().startswith(fault) for line in each) for each in (shown, every)] == [
        *(3, 9)
    ]
    assert "    and 6 more like these (--all lists them)" in shown
    assert not any(more in line or following in line for line in every)
    assert shown.count("    (l2-table.entry.past-eof)") == 1
    assert every.count("    (l2-table.entry.past-eof)") == 1
    (line,) = [line for line in shown if line.startswith(following)]
    assert line.endswith("may follow from these: 1 cluster.refcount.leak (--all lists them)")
    assert any("(cluster.refcount.leak)" in line for line in every)
    assert not any("(cluster.refcount.leak)" in line for line in shown)
    assert [line for line in shown if "errors" in line] == ["9 errors"]
    shared = with_disk((DATA, bytes(CLUSTER)), (TABLES[DAILY], word(DATA)))
    (tmp_path / "vm.qcow2").write_bytes(shared)
    assert any("these: 1 cluster.refcount.too-low" in line for line in lines())
