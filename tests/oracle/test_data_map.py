"""``map --data`` says of every range of a disk what ``qemu-img map`` says."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support.console import run
from support.images import Built
from support.jsonspec import check_map
from support.mapped_images import (
    COMPRESSED,
    COPIED,
    EXTENDED,
    WITH_DATA_FILE,
    ZERO,
    mapped_image,
)
from support.qemu import Disk, run_ok
from support.qemu import run as run_tool

import qcow2bm

KIB = 1 << 10


class Said(NamedTuple):
    """What is said of a range: each key of qemu-img map."""

    present: bool
    data: bool
    zero: bool
    compressed: bool


class Range(NamedTuple):
    """A range of the disk in bytes, and what is said of it."""

    start: int
    length: int
    said: Said


def joined(ranges: Iterable[Range]) -> list[Range]:
    """Neighbours of which the same is said as one range."""
    found: list[Range] = []
    for part in ranges:
        if found and found[-1].said == part.said:
            found[-1] = found[-1]._replace(length=found[-1].length + part.length)
        else:
            found.append(part)
    return found


def by_qemu(disk: Disk, *, has_backing_file: bool) -> list[Range]:
    """What the image itself has, by qemu-img map, which also looks into the backing file.

    Of data that lie in a hole of the file, QEMU says now and then that they are zeros, too.
    """

    def said(row: dict[str, Any]) -> Said:
        if not row["present"] or row["depth"]:
            return Said(False, False, not has_backing_file, False)
        # Before version 8.2, QEMU does not say what is compressed.
        compressed = row.get("compressed", row["data"] and "offset" not in row)
        return Said(True, row["data"], row["zero"] and not row["data"], compressed)

    rows = json.loads(run_ok("qemu-img", "map", "--output=json", *disk.arguments))
    return joined(Range(row["start"], row["length"], said(row)) for row in rows)


def by_us(disk: Disk) -> list[Range]:
    """What the command says; the library for an image of version 2, which can have no bitmap."""
    with qcow2bm.open(disk.path) as image:
        has_backing_file = image.backing_file is not None
        if image.version == 2:
            found = rows(image.data_extents())
            return [
                Range(start, length, of_kind(qcow2bm.DataKind(kind), has_backing_file))
                for start, length, kind in found
            ]
        dirty = [tuple(row) for row in rows(image.bitmaps["b"].extents())]
    done = run(["map", "--data", "--json", disk.path.name, "b"], disk.path.parent)
    assert (done.status, done.err) == (0, "")
    listed = json.loads(done.out)
    check_map(listed)
    marked = joined(Range(row["offset"], row["length"], row["type"]) for row in listed)
    assert [(part.start, part.length) for part in marked if part.said] == dirty
    return joined(
        Range(row["offset"], row["length"], Said(*(row[key] for key in Said._fields)))
        for row in listed
    )


def of_kind(kind: qcow2bm.DataKind, has_backing_file: bool) -> Said:
    is_zero = kind.reads_as_zeros(has_backing_file=has_backing_file)
    return Said(kind.is_present, kind.has_data, is_zero, kind is qcow2bm.DataKind.COMPRESSED)


def rows(parts: Iterable[Any]) -> Iterator[list[int]]:
    for part in parts:
        yield from part.tolist()


class Made(NamedTuple):
    """A disk, whether it has a backing file, and what is special about it."""

    disk: Disk
    has_backing_file: bool
    traits: list[str]


def make(folder: Path, seed: int) -> Made:
    """A disk of any shape with writes of every kind; the same for the same seed."""
    choose = random.Random(seed)
    bits = 9 + seed % 13
    cluster = 1 << bits
    is_extended = bits >= 14 and choose.random() < 0.5
    storage = choose.choice(["", "", "", "data file", "raw data file", "backing file", "version 2"])
    if storage == "version 2" and is_extended:
        storage = ""
    options: dict[str, object] = {"cluster_size": cluster}
    if is_extended:
        options["extended_l2"] = "on"
    if "data file" in storage:
        options["data_file"] = folder / "data"
        options["data_file_raw"] = "on" if storage.startswith("raw") else "off"
    covered = cluster * (cluster // (16 if is_extended else 8))
    size = min(choose.randrange(1, 4) * covered, 1 << 40)
    size -= 512 * choose.randrange(min(3 * cluster, size) // 512)
    arguments: list[str] = []
    if storage == "backing file":
        base_size = max(512, size // 2 // 512 * 512)
        base = Disk.create(folder / "base", base_size)
        base.io(f"write 0 {min(base_size, 64 * KIB)}")
        arguments = ["-b", str(base.path), "-F", "qcow2"]
    elif storage == "version 2":
        options["compat"] = "0.10"
    elif choose.random() < 0.15 and size <= 1 << 30:
        options["preallocation"] = "metadata"
    disk = Disk.create(folder / "disk", size, *arguments, **options)
    if storage != "version 2":
        disk.add("b", max(512, min(1 << 20, cluster << choose.randrange(5) >> 2)))
    may_compress = "data file" not in storage and "preallocation" not in options
    disk.io(*writes(choose, size, cluster, may_compress=may_compress))
    if choose.random() < 0.2 and "data file" not in storage:
        run_ok("qemu-img", "snapshot", "-q", "-c", "s", disk.path)
        disk.io(*writes(choose, size, cluster, may_compress=False))
    kinds = [f"2^{bits}", storage, *map(str, options)]
    return Made(disk, storage == "backing file", [kind for kind in kinds if kind])


def writes(choose: random.Random, size: int, cluster: int, *, may_compress: bool) -> list[str]:
    """Commands of qemu-io that write, write zeros and discard; most of them near each other."""
    some = choose.randrange(max(1, size // cluster - 16)) * cluster
    commands = []
    if may_compress and size >= 32 * cluster:
        # QEMU compresses only what was never written.
        places = {some + cluster * choose.randrange(16) for _ in range(choose.randrange(6))}
        commands = [f"write -c {place} {cluster}" for place in sorted(places)]
    for _ in range(choose.randrange(4, 16)):
        near = some + choose.randrange(16 * cluster)
        place = min(choose.choice([near, choose.randrange(size), size - 512]), size - 512)
        length = min(choose.randrange(1, 3 * cluster), size - place, 4 << 20)
        place, length = place // 512 * 512, max(512, length // 512 * 512)
        command = choose.choice(["write", "write", "write -z", "write -z -u", "discard"])
        if command != "write" and choose.random() < 0.5 and size > 2 * cluster:
            place, length = min(place, size - 2 * cluster) // cluster * cluster, 2 * cluster
        commands.append(f"{command} {place} {length}")
    return commands


def compare(folder: Path, seeds: range) -> Counter[str]:
    """Compares images; returns how many had each trait, and how many ranges were of each kind."""
    found: Counter[str] = Counter()
    for seed in seeds:
        here = folder / str(seed)
        here.mkdir()
        made = make(here, seed)
        ours = by_us(made.disk)
        expected = by_qemu(made.disk, has_backing_file=made.has_backing_file)
        assert ours == expected, (seed, made.traits)
        found.update(made.traits)
        found.update(
            "/".join(key for key, value in part.said._asdict().items() if value) or "backing"
            for part in ours
        )
        for path in here.iterdir():
            path.unlink()
    return found


@pytest.mark.spec("MAP-1")
def test_random_images_are_as_qemu_maps_them(tmp_path: Path) -> None:
    found = compare(tmp_path, range(26))  # two of each cluster size
    assert all(found[kind] for kind in ("present/zero", "present/data", "zero"))


@pytest.mark.deep
def test_many_random_images_are_as_qemu_maps_them(tmp_path: Path) -> None:
    found = compare(tmp_path, range(100, 100 + 13 * 24))
    print(dict(found))
    wanted = ("present/data/compressed", "backing", "extended_l2", "raw data file", "version 2")
    assert all(found[trait] for trait in (*wanted, "data file", "preallocation"))


def damage(image: qcow2bm.Image, data: bytearray, choose: random.Random) -> None:
    """Changes a bit of the L1 table, or of an L2 table, mostly of an entry that is in use."""
    start = image.header.l1_table_offset
    l1_entries = range(start, start + 8 * image.header.l1_size, 8)
    words = [int.from_bytes(data[place : place + 8], "big") for place in l1_entries]
    tables = [word & ~(1 << 63) for word in words if word]
    l2_entries = [
        place
        for table in tables
        for place in range(table, min(table + image.cluster_size, len(data)) - 7, 8)
        if any(data[place : place + 8]) or place < table + 64
    ]
    is_l2 = l2_entries and choose.random() < 0.8
    place = choose.choice(l2_entries if is_l2 else l1_entries)
    bit = choose.randrange(64)
    data[place + bit // 8] ^= 1 << bit % 8


@pytest.mark.deep
@pytest.mark.spec("MAP-6")
def test_a_damaged_table_is_refused_or_is_as_qemu_maps_it(tmp_path: Path) -> None:
    found: Counter[str] = Counter()
    for seed in range(500, 500 + 13 * 2):
        here = tmp_path / str(seed)
        here.mkdir()
        made = make(here, seed)
        path = made.disk.path
        sound = path.read_bytes() if path.stat().st_size < 64 << 20 else b""
        for number in range(6 if sound else 0):
            data = bytearray(sound)
            with qcow2bm.open(sound) as image:
                damage(image, data, random.Random(6 * seed + number))
            path.write_bytes(data)
            done = run_tool("qemu-img", "map", "--output=json", *made.disk.arguments)
            try:
                with qcow2bm.open(path) as image:
                    list(image.data_extents())
            except qcow2bm.FormatError:
                found["refused by both" if done.returncode else "refused here"] += 1
                continue
            assert not done.returncode, (seed, number, done.stderr)
            ours = by_us(made.disk)
            assert ours == by_qemu(made.disk, has_backing_file=made.has_backing_file)
            found["the same map"] += 1
        for other in here.iterdir():
            other.unlink()
    print(dict(found))
    assert all(found[what] > 5 for what in ("refused by both", "refused here", "the same map"))


FAULTS: dict[str, Callable[[], Built]] = {
    "an offset in the data file that is not that of the disk": lambda: mapped_image(
        {0: {5: COPIED | 512}}, size=32 * KIB, **WITH_DATA_FILE
    ),
    "the offset 0 in the data file, not at the start of the disk": lambda: mapped_image(
        {0: {5: COPIED}}, size=32 * KIB, **WITH_DATA_FILE
    ),
    "a compressed cluster in an image with a data file": lambda: mapped_image(
        {0: {5: COMPRESSED | 700}}, size=32 * KIB, **WITH_DATA_FILE
    ),
    "the bit zero in version 2": lambda: mapped_image({0: {5: ZERO}}, size=32 * KIB, version=2),
    "a place that is not the start of a cluster": lambda: mapped_image(
        {0: {5: COPIED | 512}}, cluster_bits=12, size=64 * KIB
    ),
    "a subcluster both allocated and zero": lambda: mapped_image(
        {0: {0: (COPIED | 1 << 14, 1 << 32 | 1)}}, cluster_bits=14, size=64 * KIB, **EXTENDED
    ),
    "a subcluster without a cluster": lambda: mapped_image(
        {0: {0: (0, 1)}}, cluster_bits=14, size=64 * KIB, **EXTENDED
    ),
}


@pytest.mark.spec("MAP-6")
@pytest.mark.parametrize("fault", FAULTS)
def test_qemu_maps_no_disk_with_these_faults_either(tmp_path: Path, fault: str) -> None:
    path = tmp_path / "disk"
    path.write_bytes(FAULTS[fault]().data)
    (tmp_path / "disk.raw").write_bytes(bytes(64 * KIB))
    with qcow2bm.open(path) as image, pytest.raises(qcow2bm.FormatError):
        list(image.data_extents())
    assert run_tool("qemu-img", "map", "--output=json", "-f", "qcow2", path).returncode
