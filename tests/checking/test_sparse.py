"""A sparse image costs what it stores, whatever it claims to have."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.console import environment
from support.sparse_images import (
    GIB,
    IMAGES,
    MIB,
    SOUND,
    SparseImage,
    refcount_blocks_in_holes,
    scattered_clusters,
    sparse_image,
    words,
)

import qcow2bm
from qcow2bm.checking import cluster_counts, guest, refcount_repair, stored_refcounts
from qcow2bm.checking.check import Check
from qcow2bm.checking.repair import plan_repair
from qcow2bm.clusters import parts
from qcow2bm.clusters.plan import Barrier, Plan, Write
from qcow2bm.storage.file import FileStorage
from qcow2bm.storage.memory import MemoryStorage

COMMANDS = (["check"], ["repair", "--dry-run"], ["add", "new", "--dry-run"], ["dump"])

MORE_MEMORY = {
    "refcount blocks far apart": 960 * MIB,  # the repair of which writes 200 MiB of refcounts
    "bitmap tables in holes": 480 * MIB,  # 65,535 bitmaps, each with problems of its own
    "one bitmap table of all bitmaps in a hole": 480 * MIB,
}

LONG = {
    "L2 tables far apart",
    "one bitmap table of all bitmaps in a hole",
    "bitmap tables in holes",
    "bitmap tables that overlap",
}
"""Images whose check takes more than a second."""

MEASURE = """
import sys
from qcow2bm.cli import main

def most():
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(status["VmHWM"].split()[0]) << 10

command, small, large = sys.argv[1:4]
begin = lambda path: [command, path, *sys.argv[4:]]
main(begin(small))  # loads all there is to load
before = most()
status = main(begin(large))
print(most() - before, file=sys.stderr)
sys.exit(status)
"""


class Counting(FileStorage):
    """A file that counts the calls for bytes and for holes, and the bytes that are read."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.calls = self.bytes_read = 0

    def read_into(self, offset: int, buffer: memoryview) -> int:
        self.calls += 1
        self.bytes_read += len(buffer)
        return super().read_into(offset, buffer)

    def next_data(self, offset: int) -> int:
        self.calls += 1
        return super().next_data(offset)

    def next_hole(self, offset: int) -> int:
        self.calls += 1
        return super().next_hole(offset)


def stored_bytes(path: Path) -> int:
    """The bytes of the file that are no holes."""
    return 512 * path.stat().st_blocks


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image that is not sound, so that all commands load all that they need."""
    path = tmp_path_factory.mktemp("small") / "small.qcow2"
    scattered_clusters(path, 1)
    return path


def memory(small: Path, path: Path, command: list[str]) -> tuple[int, int, str]:
    """Runs a command; returns the bytes it took beyond the start, the status, and its errors."""
    name, *options = command
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, name, small, path, *options],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    *errors, taken = done.stderr.splitlines()
    return int(taken), done.returncode, "\n".join(errors)


@pytest.mark.spec("CHECK-6")
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("name", SOUND)
def test_holes_take_no_memory(name: str, command: list[str], small: Path, tmp_path: Path) -> None:
    path = tmp_path / "vm.qcow2"
    IMAGES[name](path)
    taken, status, errors = memory(small, path, command)
    assert (status, errors) == (0, "")
    assert taken < 16 * MIB


@pytest.mark.spec("CHECK-6")
def test_clusters_that_are_far_apart_take_no_more_memory_than_others(
    small: Path, tmp_path: Path
) -> None:
    path = tmp_path / "vm.qcow2"
    scattered_clusters(path)
    taken, status, errors = memory(small, path, ["check"])
    assert (status, errors) == (2, "")
    assert taken < 32 * MIB


@pytest.mark.spec("CHECK-6")
@pytest.mark.spec("REF-12")
def test_an_edit_reads_no_holes_to_find_the_end(small: Path, tmp_path: Path) -> None:
    """The L1 table is so large that new clusters come behind all that have a refcount."""
    path = tmp_path / "vm.qcow2"
    refcount_blocks_in_holes(path, disk_size=128 << 40)
    taken, status, errors = memory(small, path, ["add", "new", "--dry-run", "-g", "64M"])
    assert (status, errors) == (0, "")
    assert taken < 16 * MIB


@pytest.mark.spec("CHECK-6")
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.deep) if name in LONG else name for name in IMAGES],
)
def test_little_more_is_read_than_is_stored(name: str, tmp_path: Path) -> None:
    """The limit is for what is read whole: a refcount table, and the metadata of bitmaps."""
    path = tmp_path / "vm.qcow2"
    IMAGES[name](path)
    storage = Counting(path)
    found = qcow2bm.check(storage)
    storage.close()
    limit = 320 * MIB if "bitmap" in name else 24 * MIB
    assert storage.bytes_read <= 3 * stored_bytes(path) + limit
    assert storage.calls <= 2500 + stored_bytes(path) // 1024
    assert bool(found.problems) == (name not in SOUND and name != "L1 table in a hole")


@pytest.mark.deep
@pytest.mark.spec("CHECK-6")
@pytest.mark.parametrize(
    ("name", "command"),
    [
        (name, command)
        for row, name in enumerate(IMAGES)
        for column, command in enumerate([*COMMANDS, ["verdict", "00000"]])
        if not column or (row + column) % 4 == 0
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_each_command_takes_memory_for_what_is_stored(
    name: str, command: list[str], small: Path, tmp_path: Path
) -> None:
    path = tmp_path / "vm.qcow2"
    IMAGES[name](path)
    taken, status, errors = memory(small, path, command)
    print(f"{name}: {' '.join(command)}: {taken / MIB:.0f} MiB of {stored_bytes(path) / MIB:.1f}")
    assert taken < MORE_MEMORY.get(name, 256 * MIB) + 24 * stored_bytes(path)
    messages = [line for line in errors.splitlines() if not line.startswith("  ")]
    assert len(messages) == (status == 1)


# --- what is shared ------------------------------------------------------------------------------


def checked(image: bytes | bytearray) -> Check:
    with qcow2bm.open(image) as opened:
        return opened.check()


def with_snapshots(path: Path, tables: list[tuple[int, int]], entries: list[int]) -> None:
    """Makes an image whose snapshots have L1 tables in one stretch of entries.

    ``tables`` are the clusters and the numbers of entries of these tables. An entry is the number
    of an L2 table, or 0. The refcounts are right.
    """
    lengths = [entries[64 * cluster :][:count] for cluster, count in tables]
    leads = Counter(entry for part in lengths for entry in part if entry)
    covered = Counter(
        cluster
        for first, count in tables
        for cluster in range(first, first + (8 * count + 511) // 512)
    )
    with sparse_image(path, 9, MIB) as image:
        start = image.allocate(8 * len(entries))
        for cluster in range(len(entries) // 64):
            image.refcounts[start // 512 + cluster] = covered[cluster]
        l2_tables = [0]
        for number in (1, 2, 3):
            data = image.allocate(512, 2 * leads[number]), image.allocate(512, leads[number])
            l2_tables.append(image.add(words(data[0], data[1], data[0]), leads[number]))
        image.write(start, words(*(l2_tables[entry] for entry in entries)))
        image.snapshots_with((start + 512 * cluster, count) for cluster, count in tables)


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 100)), min_size=1, max_size=5),
    st.lists(st.sampled_from([0, 0, 0, 1, 2, 3]), min_size=384, max_size=384),
)
@settings(max_examples=40)
def test_what_l1_tables_share_counts_for_each_of_them(
    small: Path, tables: list[tuple[int, int]], entries: list[int]
) -> None:
    path = small.with_name("shared.qcow2")
    with_snapshots(path, tables, entries)
    assert checked(path.read_bytes()) == qcow2bm.check(path)
    assert qcow2bm.check(path)[:2] == ((), 0)


def test_a_fault_that_tables_share_is_listed_once(tmp_path: Path) -> None:
    """The disk and two snapshots lead to one L2 table, which leads far behind the file."""
    path = tmp_path / "vm.qcow2"
    with sparse_image(path, 9, MIB, has_l1_table=False) as image:
        l2_table = image.add(words(1 << 40), 6)
        image.l1_table(32, words(l2_table, l2_table))
        l1_table = image.add(words(l2_table, l2_table, 1 << 41), 2)
        image.snapshots_with([(l1_table, 3), (l1_table, 3)])
    found = checked(path.read_bytes()).problems
    assert [(problem.id, problem.offset, problem.element) for problem in found] == [
        ("l1-table.entry.past-eof", l1_table + 16, 2),
        ("l2-table.entry.past-eof", l2_table, 0),
    ]


def with_shared_blocks(path: Path, entries: int) -> SparseImage:
    """Makes an image whose refcount table has many entries that lead to one block."""
    with sparse_image(path, 9, MIB) as image:
        block = image.allocate(512)
        image.refcount_table(words(block) * entries)
        image.write(block, np.ones(256, ">u2").tobytes())
        image.end = entries * 256 * 512
    return image


@pytest.mark.spec("CHECK-6")
@pytest.mark.parametrize("again", [0, 1, 5, 100])
def test_a_block_that_entries_share_counts_again_up_to_a_limit(
    again: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_refcounts, "MAX_SHARED_REFCOUNTS", 256 * again)
    path = tmp_path / "vm.qcow2"
    used = len(with_shared_blocks(path, 20).refcounts)
    found = qcow2bm.check(path)
    assert found.leaked_clusters == 256 * (1 + min(again, 19)) - used
    assert [problem.id for problem in found.problems].count("refcount-table.entry.shared") == 16
    assert not found.is_complete


@pytest.mark.spec("REF-11")
def test_free_clusters_are_counted_without_reading_holes_or_a_block_twice(tmp_path: Path) -> None:
    path = tmp_path / "vm.qcow2"
    made: list[tuple[Callable[[Path], object], int]] = [
        (refcount_blocks_in_holes, 0),
        (partial(with_shared_blocks, entries=10_000), 0),
        (IMAGES["one refcount block"], 64 * GIB - 512),  # every second cluster, but the last
    ]
    for make, free in made:
        make(path)
        storage = Counting(path)
        with qcow2bm.open(storage) as opened:
            before = storage.calls
            space = opened.file_space(count_free=True)
            calls = storage.calls - before
        storage.close()
        assert space.free == free
        assert calls < 100


@pytest.mark.spec("CHECK-5")
def test_differences_in_a_row_are_reported_by_refcount_blocks(tmp_path: Path) -> None:
    """A hole between two pages of a block does not divide what is reported."""
    path = tmp_path / "vm.qcow2"
    with sparse_image(path) as image:
        image.bitmaps_with([(GIB, 2)], granularity_bits=16)
        image.end = 12 * GIB
        image.extension(0x0537BE77, (GIB).to_bytes(8, "big") + (10 * GIB).to_bytes(8, "big"))
    low = [p for p in qcow2bm.check(path).problems if p.id == "cluster.refcount.too-low"]
    per_block, first = 32768, GIB // 65536
    counts = [per_block - first, *[per_block] * 4, first]
    assert [problem.offset // 65536 for problem in low] == [
        first,
        *(per_block * number for number in range(1, 6)),
    ]
    for problem, count in zip(low, counts, strict=True):
        assert problem.message.endswith(f"and so do the next {count - 1}")


# --- what a hole is believed to be ---------------------------------------------------------------


class Liar(MemoryStorage):
    """An image in memory that claims that a part of it is a hole, by default all of it."""

    def __init__(self, data: bytearray, start: int = 0, end: int = 1 << 62) -> None:
        super().__init__(data)
        self._start, self._end = start, end

    def next_data(self, offset: int) -> int:
        is_hidden = self._start <= offset < self._end
        return min(self._end if is_hidden else offset, self.size())

    def next_hole(self, offset: int) -> int:
        return min(max(offset, self._start) if offset < self._end else self.size(), self.size())


@pytest.mark.spec("REF-12")
def test_no_cluster_is_allocated_because_its_refcount_seems_to_be_a_hole(tmp_path: Path) -> None:
    """A file system with a fault may report holes where data are."""
    path = tmp_path / "vm.qcow2"
    with sparse_image(path, 9, MIB) as image:
        image.allocate(700 * 512)  # more than two refcount blocks count
    data = bytearray(path.read_bytes())
    with qcow2bm.open(Liar(data), "r+") as opened, opened.edit() as edit:
        edit.add("new")
    assert checked(bytes(data)) == checked(data)
    assert {problem.id for problem in checked(data).problems} <= {"cluster.refcount.leak"}
    assert len(data) > len(path.read_bytes())


@pytest.mark.spec("CHECK-6")
@pytest.mark.parametrize("structure", ["L1 table", "L2 table", "both", "refcounts"])
def test_no_cluster_is_freed_because_tables_seem_to_be_holes(
    structure: str, tmp_path: Path
) -> None:
    path = tmp_path / "vm.qcow2"
    with sparse_image(path, 9, MIB, has_l1_table=False) as image:
        image.allocate(512)
        data = image.allocate(512)
        l2_table = image.add(words(1 << 63 | data))
        image.l1_table(32, words(1 << 63 | l2_table))
    stored = path.read_bytes()
    plan = plan_repair(MemoryStorage(stored)).plan
    assert [type(step) for step in plan.steps] == [Write, Barrier]
    start, end = {
        "L1 table": (l2_table + 512, l2_table + 1024),
        "L2 table": (l2_table, l2_table + 512),
        "both": (l2_table, l2_table + 1024),
        "refcounts": (l2_table + 1024, len(stored)),
    }[structure]
    found = plan_repair(Liar(bytearray(stored), start, end)).plan
    assert found == (plan if structure != "refcounts" else Plan())


@pytest.mark.spec("CHECK-6")
def test_if_too_much_seems_to_be_a_hole_nothing_is_freed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "vm.qcow2"
    with sparse_image(path, 9, MIB) as image:
        image.allocate(512)
    for limit, is_repaired in ((32 * 8 - 1, False), (32 * 8, True)):
        monkeypatch.setattr(refcount_repair, "MAX_HOLE_BYTES", limit)
        planned = qcow2bm.plan_repair(Liar(bytearray(path.read_bytes())))
        assert bool(planned.plan.steps) == is_repaired


# --- a few at a time -----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_the_answer_is_the_same_however_little_is_looked_at_at_once(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(seed)
    path = tmp_path / "vm.qcow2"
    with sparse_image(path, 9, 4 * MIB, has_l1_table=False) as image:
        data = [image.allocate(512 * 200, int(random.integers(0, 3))) for _ in range(4)]
        entries = [0, *(place + 512 * n for place in data for n in range(200)), 1 << 40, 777]
        l2_tables = [
            image.add(words(*random.choice(entries, 64).tolist()), int(random.integers(0, 3)))
            for _ in range(20)
        ]
        image.l1_table(128, words(*random.choice([0, *l2_tables, 1 << 41], 128).tolist()))
        image.snapshots_with([(image.add(words(*l2_tables)), len(l2_tables))] * 2)
    expected = qcow2bm.check(path)
    assert {problem.id for problem in expected.problems} & {"cluster.refcount.leak"}
    monkeypatch.setattr(stored_refcounts, "_WINDOW", int(random.integers(1, 100)))
    monkeypatch.setattr(parts, "BATCH_BYTES", int(random.integers(1, 5)) * 512)
    monkeypatch.setattr(guest, "_TABLES_AT_ONCE", int(random.integers(1, 9)))
    monkeypatch.setattr(cluster_counts, "_MAX_WAITING_BYTES", int(random.integers(0, 9000)))
    monkeypatch.setattr(cluster_counts, "_MANY_STEPS", int(random.integers(2, 50)))
    assert qcow2bm.check(path) == expected
    assert checked(path.read_bytes()).problems == expected.problems
