"""``check`` and ``qemu-img check`` agree about images that both can open."""

from __future__ import annotations

import json
import random
import struct
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
from support.broken_images import broken_images
from support.console import run
from support.problem_images import IDS, broken
from support.qemu import Disk, run_ok
from support.qemu import run as run_tool
from support.qemu_facts import fact

import qcow2bm
from qcow2bm.cli.check import ERRORS, LEAKS

KiB, MiB = 1 << 10, 1 << 20


class Judged(NamedTuple):
    """The verdict of a program about an image: its exit status, and how many clusters leak."""

    status: int
    leaks: int


def by_qemu(path: Path) -> Judged:
    done = run_tool("qemu-img", "check", "--output=json", "-f", "qcow2", path)
    found = json.loads(done.stdout) if done.stdout else {}
    return Judged(done.returncode, found.get("leaks", 0))


def by_us(path: Path) -> Judged:
    done = run(["check", "--output=json", path.name], path.parent)
    assert done.err == ""
    document = json.loads(done.out)
    status = done.status
    if fact("reserved-bits") == "no":  # then QEMU does not see these problems
        unseen = "l1-table.entry.reserved", "l2-table.entry.reserved"
        seen = [problem for problem in document["problems"] if problem["id"] not in unseen]
        severities = {problem["severity"] for problem in seen}
        errors, leaks = severities & {"refused", "unusable"}, "leak" in severities
        status = ERRORS if errors else LEAKS if leaks else 0
    return Judged(status, document["leaked-clusters"])


DIFFERENT: dict[str, tuple[int, str]] = {
    "header.autoclear_features.no-bitmaps": (LEAKS, "QEMU notices with the next write"),
}
"""The problems for which qemu-img check has another status, and why; see spec/deviations.md."""


@pytest.mark.spec("CHECK-2")
@pytest.mark.parametrize("id", IDS)
def test_broken_images(id: str, tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(broken(id))
    qemu = by_qemu(path)
    if qemu.status == 1:  # it does not open it, or cannot check it
        assert by_us(path).status in (0, ERRORS, LEAKS)
        return
    expected, _ = DIFFERENT.get(id, (qemu.status, ""))
    ours = by_us(path)
    if id in DIFFERENT:
        assert (qemu.status, ours.status) == (expected, ERRORS)
    else:
        assert ours == qemu


EXCUSES = {
    "bitmap-data.beyond",
    "bitmap-table.entry.past-eof",
    "directory-entry.bitmap_table_offset.past-eof",
    "directory-entry.name.duplicate",
    "header.autoclear_features.no-bitmaps",
}
"""The problems that QEMU does not see when it opens the image; see spec/deviations.md."""


@pytest.mark.spec("CHECK-2")
def test_hundreds_of_broken_images(tmp_path: Path) -> None:
    path, same = tmp_path / "image", 0
    for what, data in broken_images():
        path.write_bytes(data)
        with qcow2bm.open(data) as image:
            excuses = EXCUSES & {p.id for p in (*image.problems, *image.check().problems)}
        qemu, ours = by_qemu(path), by_us(path)
        if qemu.status in (0, LEAKS) and excuses:
            assert ours.status == ERRORS, what
        elif qemu.status < 0:
            assert "bitmap_table_offset = 0xfffffffffffffe00" in what
        elif qemu.status == 1:
            assert ours.status == ERRORS, what
        else:
            assert ours == qemu, what
            same += 1
    print(same, "broken images opened by QEMU, and the same said of them")
    assert same > 90


BASES = {
    "plain": ["-o", "cluster_size=4k"],
    "1-bit": ["-o", "cluster_size=4k,refcount_bits=1"],
    "64-bit": ["-o", "cluster_size=512,refcount_bits=64"],
    "extended": ["-o", "cluster_size=16k,extended_l2=on"],
    "compressed": ["-o", "cluster_size=64k"],
    "data-file": ["-o", "cluster_size=4k,data_file={folder}/data,data_file_raw=on"],
    "v2": ["-o", "compat=0.10,cluster_size=4k"],
}


def made(base: str, folder: Path) -> Path:
    """An image with data, snapshots and bitmaps, as far as it can have them."""
    path = folder / "base"
    options = [option.format(folder=folder) for option in BASES[base]]
    run_ok("qemu-img", "create", "-q", "-f", "qcow2", *options, path, "3M")
    writes = [
        "write -P 1 0 200k",
        "write -P 2 1M 12k",
        "write -z 512k 64k",
        "write -P 3 2900k 100k",
    ]
    run_ok("qemu-io", "-f", "qcow2", *(f"-c{line}" for line in writes), path)
    if base == "compressed":
        run_ok(
            "qemu-io", "-f", "qcow2", "-cwrite -c -P 7 2M 64k", "-cwrite -c -P 8 2176k 64k", path
        )
    if base not in ("data-file", "1-bit"):
        run_ok("qemu-img", "snapshot", "-c", "first", path)
        run_ok("qemu-io", "-f", "qcow2", "-cwrite -P 4 8k 40k", path)
    if base != "v2":
        disk = Disk(path)
        disk.add("daily", 64 * KiB)
        disk.io("write -P 5 600k 128k")
    return path


@pytest.mark.spec("CHECK-1")
def test_the_first_cluster_of_a_data_file_with_extended_entries_is_sound(tmp_path: Path) -> None:
    disk = Disk.create(tmp_path / "disk", MiB, data_file=tmp_path / "data", extended_l2="on")
    disk.io("write 0 4k", "write 128k 4k")
    assert by_us(disk.path) == by_qemu(disk.path) == Judged(0, 0)


@pytest.fixture(scope="module", params=BASES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(request.param, tmp_path_factory.mktemp("check"))


@pytest.mark.spec("CHECK-1")
def test_sound_images(base: Path) -> None:
    assert by_us(base) == by_qemu(base) == Judged(0, 0)
    with qcow2bm.open(base) as image:
        assert image.check().problems == ()


def places(path: Path) -> list[tuple[int, int]]:
    """Returns the places of the L1 and L2 tables, refcount table and blocks: (offset, length)."""
    data = path.read_bytes()
    cluster = 1 << struct.unpack_from(">I", data, 20)[0]
    l1_size, l1, table, table_clusters, snapshots = struct.unpack_from(">IQQII", data, 36)
    tables = [(l1, 8 * l1_size)]
    start = struct.unpack_from(">Q", data, 64)[0]
    for _ in range(snapshots):
        offset, size, id_size, name_size = struct.unpack_from(">QIHH", data, start)
        extra = struct.unpack_from(">I", data, start + 36)[0]
        tables.append((offset, 8 * size))
        start += (40 + extra + id_size + name_size + 7) // 8 * 8
    found = [*tables, (table, 64)]
    for offset, length in tables:
        words = struct.unpack_from(f">{length // 8}Q", data, offset)
        found += [(word & 0x00FFFFFFFFFFFE00, cluster) for word in words if word]
    found += [(word, cluster) for word in struct.unpack_from(">8Q", data, table) if word]
    assert table_clusters
    return found


def mutated(data: bytes, where: list[tuple[int, int]], rng: random.Random) -> bytes:
    mutant = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2))):
        offset, length = rng.choice(where)
        used = [n for n in range(0, length, 8) if any(data[offset + n : offset + n + 8])]
        place = offset + (
            rng.choice(used) if used and rng.random() < 0.9 else rng.randrange(0, length, 8)
        )
        (word,) = struct.unpack_from(">Q", mutant, place)
        match rng.randrange(6):
            case 0:
                word ^= 1 << rng.randrange(64)
            case 1:
                word = 0
            case 2:
                word += rng.choice((512, 4096, 65536))
            case 3:
                word = rng.choice((1, 1 << 63, 1 << 62, 0x10000, 1 << 40, (1 << 64) - 1))
            case 4:
                other = rng.choice(where)[0]
                (word,) = struct.unpack_from(">Q", data, other)
            case _:
                word = (word & ~0xFFFF) | rng.randrange(1 << 16)
        struct.pack_into(">Q", mutant, place, word & (1 << 64) - 1)
    if rng.random() < 0.1:
        del mutant[rng.randrange(len(mutant) // 2, len(mutant)) & ~511 :]
    return bytes(mutant)


def compare(base: Path, folder: Path, seed: int, count: int) -> Counter[int]:
    rng, data, where = random.Random(seed), base.read_bytes(), places(base)
    path = folder / "mutant"
    ends: Counter[int] = Counter()
    for number in range(count):
        path.write_bytes(mutated(data, where, rng))
        qemu = by_qemu(path)
        ends[qemu.status] += 1
        if qemu.status in (0, ERRORS, LEAKS):
            ours = by_us(path)
            assert ours.status == qemu.status, (base, seed, number, qemu, ours)
            if qemu.status == LEAKS:
                assert ours.leaks == qemu.leaks
        elif qemu.status == 1:
            assert by_us(path).status in (0, ERRORS, LEAKS)
    return ends


@pytest.mark.parametrize("name", ["a", "abcdefgh", "a longer name of a snapshot"])
def test_a_snapshot_table_at_the_end_of_the_file(tmp_path: Path, name: str) -> None:
    """QEMU does not write the padding of the last entry, so the file ends before that."""
    path = Disk.create(tmp_path / "vm.qcow2", 1 << 20).path
    for number in range(2):
        run_ok("qemu-img", "snapshot", "-c", name + str(number), path)
        assert by_qemu(path).status == 0
        assert by_us(path).status == 0


@pytest.mark.spec("CHECK-2")
def test_damaged_images(base: Path, tmp_path: Path) -> None:
    ends = compare(base, tmp_path, 0, 40)
    assert ends[ERRORS]


@pytest.mark.deep
@pytest.mark.spec("CHECK-2")
def test_many_damaged_images(base: Path, tmp_path: Path) -> None:
    ends = compare(base, tmp_path, 1, 300)
    print("damaged images, by the status of qemu-img check:", dict(ends))
