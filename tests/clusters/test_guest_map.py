"""The clusters that L1 and L2 tables lead to, and that no edit allocates one of them."""

from __future__ import annotations

import struct
from random import Random

import pytest
from support.images import build_image, extension
from support.layouts import append, set_refcount, with_snapshots, with_uncounted_guest_data

import qcow2bm
from qcow2bm.clusters import guest_map
from qcow2bm.clusters.cluster_runs import join_runs, subtract_runs
from qcow2bm.clusters.file import ClusterFile
from qcow2bm.clusters.guest_map import GuestMap
from qcow2bm.format.extensions import DATA_FILE
from qcow2bm.storage.memory import MemoryStorage

COPIED, COMPRESSED = 1 << 63, 1 << 62
SIZE = 4096
DATA_FILE_BIT, EXTENDED_BIT = 4, 16


def guest_map_of(data: bytes | bytearray) -> GuestMap:
    return GuestMap(ClusterFile(MemoryStorage(bytearray(data)), force_share=True))


def image_with(*words: int, features: int = 0) -> tuple[bytearray, int]:
    """An image whose only L2 table has these words, and the host offset of that table."""
    extensions = [extension(DATA_FILE, b"disk.raw")] if features & DATA_FILE_BIT else []
    header = {"incompatible_features": features}
    built = build_image(cluster_bits=12, size=1 << 20, header=header, extensions=extensions)
    data = built.data
    l2_table = append(data, struct.pack(f">{len(words)}Q", *words))
    (l1_offset,) = struct.unpack_from(">Q", data, 40)
    struct.pack_into(">Q", data, l1_offset, COPIED | l2_table)
    return data, l2_table


def numbers(runs: list[tuple[int, int]]) -> set[int]:
    return {number for first, stop in runs for number in range(first, stop)}


def found(*words: int, features: int = 0) -> set[int]:
    """The clusters of guest data that these words lead to."""
    data, l2_table = image_with(*words, features=features)
    clusters = numbers(guest_map_of(data).clusters())
    assert l2_table // SIZE in clusters
    return clusters - {l2_table // SIZE}


@pytest.mark.parametrize(
    ("word", "clusters"),
    [
        (0, set()),
        (1, set()),  # reads as zeros, without a cluster
        (COPIED | 100 * SIZE, {100}),
        (100 * SIZE, {100}),
        (COPIED | 100 * SIZE | 1, {100}),  # reads as zeros, and keeps its cluster
        (COPIED | 100 * SIZE | 2, {100}),  # a reserved bit
        (COPIED | 1 << 60 | 100 * SIZE, {100}),  # another reserved bit
        (COPIED | 100 * SIZE + 512, {100, 101}),  # not the start of a cluster
        (COMPRESSED | 100 * SIZE, {100}),
        (COMPRESSED | 100 * SIZE + 4095, {100}),
        (COMPRESSED | 1 << 58 | 100 * SIZE + 4095, {100, 101}),  # one sector more
    ],
)
@pytest.mark.spec("REF-8")
def test_where_an_entry_leads(word: int, clusters: set[int]) -> None:
    assert found(word) == clusters
    assert found(COPIED | 200 * SIZE, word) == clusters | {200}


@pytest.mark.spec("REF-8")
def test_extended_entries_are_words_in_pairs() -> None:
    bitmap = 0xFFFFFFFF
    words = (COPIED | 100 * SIZE, bitmap, 0, 0, COPIED | 101 * SIZE, bitmap << 32)
    assert found(*words, features=EXTENDED_BIT) == {100, 101}


@pytest.mark.spec("REF-8")
def test_a_data_file_has_the_guest_data() -> None:
    assert found(COPIED | 0, COPIED | SIZE, features=DATA_FILE_BIT) == set()


@pytest.mark.spec("REF-8")
def test_the_tables_of_snapshots_count() -> None:
    data = bytearray(with_snapshots())
    shared = guest_map_of(data).clusters()
    (place,) = struct.unpack_from(">Q", data, 64)
    (l1_table,) = struct.unpack_from(">Q", data, place)
    l2_table = append(data, struct.pack(">Q", 1000 * SIZE))
    struct.pack_into(">Q", data, l1_table, l2_table)
    assert numbers(guest_map_of(data).clusters()) == numbers(shared) | {l2_table // SIZE, 1000}


def test_an_entry_that_leads_to_no_table() -> None:
    """QEMU reads no table there, but no edit writes there either."""
    for l2_table in (1 << 40, 5 * SIZE + 512):
        data = build_image(cluster_bits=12, size=1 << 20).data
        (l1_offset,) = struct.unpack_from(">Q", data, 40)
        struct.pack_into(">Q", data, l1_offset, l2_table)
        first, last = l2_table // SIZE, (l2_table + SIZE - 1) // SIZE
        assert guest_map_of(data).clusters() == [(first, last + 1)]


def test_a_random_choice_of_clusters() -> None:
    random = Random(1)
    for _ in range(50):
        clusters = {random.randrange(1, 500) for _ in range(random.randrange(40))}
        flags = random.choice([0, COPIED])
        data, l2_table = image_with(*(flags | n * SIZE for n in clusters))
        found = guest_map_of(data)
        clusters.add(l2_table // SIZE)
        assert numbers(found.clusters()) == clusters
        runs = [(n, n + random.randrange(1, 9)) for n in random.sample(range(500), 20)]
        assert numbers(found.leads_to(runs)) == clusters & numbers(runs)


def test_subtracting_runs() -> None:
    random = Random(1)
    for _ in range(500):
        runs = [(n, n + random.randrange(9)) for n in random.sample(range(60), 5)]
        others = join_runs((n, n + random.randrange(9)) for n in random.sample(range(60), 5))
        expected = numbers(runs) - numbers(others)
        assert numbers(subtract_runs(runs, others)) == expected
        assert subtract_runs(runs, []) == [run for run in runs if run[0] < run[1]]


# --- edits ----------------------------------------------------------------------------------------


def guest_bytes(data: bytes | bytearray) -> dict[int, bytes]:
    """The bytes of all clusters that the tables of an image lead to, by their number."""
    clusters = numbers(guest_map_of(data).clusters())
    (bits,) = struct.unpack_from(">I", data, 20)
    return {n: bytes(data[n << bits : n + 1 << bits]) for n in clusters}


def fill(data: bytearray, *, size: int | None = None) -> None:
    """Adds bitmaps, and sets so many bits that all free clusters are needed."""
    with qcow2bm.open(data if size is None else Fixed(data), "r+") as image, image.edit() as edit:
        for number in range(6):
            edit.add(f"new{number}", 512)
            for start in range(0, image.virtual_size, 1 << 16):
                edit.set(f"new{number}", start, 512)


class Fixed(MemoryStorage):
    """A storage that cannot grow, like a block device."""

    def capacity(self) -> int | None:
        return self.size()


@pytest.mark.spec("REF-8")
@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize(("cluster_bits", "count"), [(9, 25), (12, 3)])
def test_guest_data_without_a_refcount_stay(cluster_bits: int, count: int, copied: bool) -> None:
    data = bytearray(with_uncounted_guest_data(cluster_bits, count, copied=copied))
    before = guest_bytes(data)
    fill(data)
    assert guest_bytes(data) == before
    with qcow2bm.open(data) as image:
        assert {bitmap.status for bitmap in image.bitmaps.values()} == {"valid"}


def with_two_l2_tables() -> bytearray:
    data = bytearray(with_uncounted_guest_data(12, 3))
    (l1_offset,) = struct.unpack_from(">Q", data, 40)
    (word,) = struct.unpack_from(">Q", data, l1_offset)
    start = word & ~COPIED
    second = append(data, bytes(data[start : start + SIZE]))
    struct.pack_into(">Q", data, l1_offset + 8, second)
    return data


@pytest.mark.spec("REF-8")
@pytest.mark.parametrize("is_cut_off", [False, True])
def test_the_l1_table_of_a_snapshot_stays(is_cut_off: bool) -> None:
    """A snapshot's L1 table and data must not be overwritten, even if their refcount is 0."""
    data = bytearray(with_snapshots())
    (place,) = struct.unpack_from(">Q", data, 64)
    (l1_table,) = struct.unpack_from(">Q", data, place)
    if is_cut_off:
        content = append(data, b"only the snapshot has this")
        append(data, b"a cluster in use behind it")
        l2_table = append(data, struct.pack(">Q", content))
        l1_table = append(data, struct.pack(">Q", l2_table))
        struct.pack_into(">QI", data, place, l1_table, 2 * SIZE // 8)
        cluster = content // SIZE
    else:
        cluster = l1_table // SIZE
    set_refcount(data, cluster, 0)
    before = bytes(data[cluster * SIZE : (cluster + 1) * SIZE])
    fill(data)
    assert data[cluster * SIZE : (cluster + 1) * SIZE] == before


@pytest.mark.spec("REF-8")
@pytest.mark.parametrize("structure", ["L1 table", "snapshot table"])
def test_what_only_invalidates_spares_fixed_structures(structure: str) -> None:
    """On a device, `invalidate` must not overwrite a last structure with the refcount 0."""
    data = bytearray(with_snapshots())
    if structure == "L1 table":
        l1_size, old = struct.unpack_from(">IQ", data, 36)
        place = append(data, bytes(data[old : old + 8 * l1_size]))
        struct.pack_into(">Q", data, 40, place)
    else:
        (old,) = struct.unpack_from(">Q", data, 64)
        place = append(data, bytes(data[old : old + SIZE]))
        struct.pack_into(">Q", data, 64, place)
    set_refcount(data, place // SIZE, 0)
    before = bytes(data[place : place + SIZE])
    data += bytes(64 * SIZE)
    with qcow2bm.open(Fixed(data), "r+") as image, image.edit() as edit:
        edit.invalidate("b00")
    assert data[place : place + SIZE] == before


@pytest.mark.spec("REF-9")
@pytest.mark.parametrize(("limit", "value"), [("MAX_BYTES", 1000), ("MAX_L2_TABLES", 1)])
def test_with_more_tables_new_clusters_lie_behind_all_others(
    limit: str, value: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = with_two_l2_tables()
    guest, end, free = guest_bytes(data), len(data), data.count(b"\xa5" * SIZE)
    with monkeypatch.context() as limited:
        limited.setattr(guest_map, limit, value)
        assert not guest_map_of(data).is_small
        fill(data)
    assert len(data) > end
    assert data.count(b"\xa5" * SIZE) == free
    assert guest_bytes(data) == guest


@pytest.mark.spec("REF-9")
@pytest.mark.parametrize("limit", [100, 1000])  # L1 tables alone are larger, or L2 tables are
def test_a_storage_that_cannot_grow_reads_all_tables(
    limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = with_two_l2_tables() + bytes(100 * SIZE)
    guest, before = guest_bytes(data), bytes(data)
    monkeypatch.setattr(guest_map, "MAX_BYTES", limit)
    with pytest.raises(qcow2bm.FormatError, match=r"refcount of the cluster at .* is 0, must be 1"):
        fill(data, size=len(data))
    assert data == before
    for number in guest:  # now no refcount is wrong
        set_refcount(data, number, 1)
    fill(data, size=len(data))
    monkeypatch.undo()
    assert guest_bytes(data) == guest


@pytest.mark.spec("REF-10")
@pytest.mark.parametrize("level", ["L1", "L2"])
@pytest.mark.parametrize(
    "structure", ["header", "refcount table", "refcount block", "directory", "bitmap table", "data"]
)
def test_a_table_that_leads_to_metadata_forbids_an_edit(level: str, structure: str) -> None:
    data = bytearray(with_uncounted_guest_data(12, 3))
    (table,) = struct.unpack_from(">Q", data, 48)
    (block,) = struct.unpack_from(">Q", data, table)
    with qcow2bm.open(data) as image:
        extension = image.bitmaps_extension
        assert extension
        entry = image.bitmaps["b00"].entry
        places = {
            "header": 0,
            "refcount table": table,
            "refcount block": block,
            "directory": extension.bitmap_directory_offset,
            "bitmap table": entry.bitmap_table_offset,
        }
    (content,) = struct.unpack_from(">Q", data, places["bitmap table"])
    place = {**places, "data": content & (1 << 56) - 512}[structure]
    (l1_offset,) = struct.unpack_from(">Q", data, 40)
    (l2_table,) = struct.unpack_from(">Q", data, l1_offset)
    if level == "L1":
        struct.pack_into(">Q", data, l1_offset + 8, place or 512)
    else:
        word = place or COMPRESSED  # an entry of 0 leads nowhere
        struct.pack_into(">Q", data, (l2_table & ~COPIED) + SIZE - 8, word)
    before = bytes(data)
    with qcow2bm.open(data, "r+") as image:
        refused = pytest.raises(qcow2bm.FormatError, match="an L1 or L2 table leads to it")
        with refused, image.edit() as edit:
            edit.disable("b00")
        with pytest.raises(qcow2bm.FormatError, match="an L1 or L2 table leads to it"):
            image.track()
    assert data == before
