"""This library reads what QEMU stores: names, flags, order, bits, hashes."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray
from support.qemu import LEAKS, Disk, StorageDaemon, ToolError, run, run_ok
from support.qemu_facts import fact

import qcow2bm

KiB, MiB, GiB = 1 << 10, 1 << 20, 1 << 30


class Config(NamedTuple):
    """A kind of image: its size, its bitmaps' granularities, how QEMU is told to create it."""

    size: int
    granularities: tuple[int, ...]
    options: dict[str, object]
    arguments: tuple[str, ...] = ()


def _config(size: int, *granularities: int, **options: object) -> Config:
    return Config(size, granularities or (512, 4 * KiB, 64 * KiB), options)


ODD = 10 * MiB + 512  # no multiple of any granularity but the smallest

CONFIGS = {
    # Tables of several entries each, and a last cluster of bits that is not full.
    "cluster-512": _config(ODD, cluster_size=512),
    "cluster-4k": _config(100 * MiB + 512, cluster_size="4k"),
    "cluster-64k": _config(GiB + 512, cluster_size="64k"),
    "cluster-2M": _config(20 * GiB + 512, cluster_size="2M"),
    "every-granularity": _config(5 * GiB + 1536, *(512 << n for n in range(23))),
    "whole-words": _config(64 * 64 * KiB, 64 * KiB, 4 * KiB),
    "one-sector": _config(512, 512, 64 * KiB, 2 * GiB),
    **{
        f"refcount-{1 << order}": _config(ODD, cluster_size="4k", refcount_bits=1 << order)
        for order in range(7)
    },
    "extended-l2": _config(ODD, extended_l2="on"),
    "data-file": _config(ODD, data_file="{folder}/data"),
    "data-file-raw": _config(ODD, data_file="{folder}/data", data_file_raw="on"),
    "luks": Config(ODD, (512, 64 * KiB), {"encrypt.format": "luks"}),
    "zstd": _config(ODD, compression_type="zstd"),
    "lazy-refcounts": _config(ODD, lazy_refcounts="on"),
    "preallocated": _config(ODD, preallocation="metadata"),
    "overlay": _config(ODD)._replace(arguments=("-b", "{folder}/base", "-F", "qcow2")),
    "overlay-512": _config(ODD, cluster_size=512)._replace(
        arguments=("-b", "{folder}/base", "-F", "qcow2")
    ),
}


def create(config: Config, folder: Path) -> Disk:
    def fill_in(value: object) -> object:
        return value.replace("{folder}", str(folder)) if isinstance(value, str) else value

    base = Disk.create(folder / "base", config.size)
    base.add("b0", 64 * KiB)  # of the same name as one in the overlay, with other bits
    base.io("write 0 512")
    options = {key: fill_in(value) for key, value in config.options.items()}
    arguments = [str(fill_in(argument)) for argument in config.arguments]
    return Disk.create(folder / "disk", config.size, *arguments, **options)


def single_sectors(random: Random, size: int, granularity: int) -> list[str]:
    """One sector here and there, alone in its granule: a byte of ones would hide a bit order."""
    granules = range(1, -(-size // granularity), 2) or range(1)
    starts = [random.choice(granules) * granularity for _ in range(6)]
    return [f"write {min(start, (size - 1) // 512 * 512)} 512" for start in starts]


def long_runs(random: Random, size: int, granularity: int) -> list[str]:
    """Runs that fill words and end inside them, and the very last sector of the disk."""
    sectors = size // 512
    commands = [f"write {(sectors - 1) * 512} 512"]
    for _ in range(3):
        length = min(random.randrange(1, 300) * granularity // 512, sectors // 3) or 1
        start = random.randrange(sectors - length + 1)
        commands.append(f"write -z {512 * start} {512 * length}")
    return commands


def fill(disk: Disk, config: Config, random: Random) -> None:
    """Adds the bitmaps one after the other, with guest writes between them."""
    size = config.size
    for index, granularity in enumerate(config.granularities):
        name = f"b{index}"
        disk.add(name, granularity)
        disk.io(*random.choice((single_sectors, long_runs))(random, size, granularity))
        if random.random() < 0.3:
            disk.bitmap(name, "--disable")
    disk.io(*single_sectors(random, size, config.granularities[0]))


def listed(image: qcow2bm.Image) -> list[dict[str, object]]:
    """The bitmaps in the form of qemu-img info."""
    if not image.is_consistent:
        return []
    return [
        {
            "flags": ["in-use"] * entry.in_use + ["auto"] * entry.auto,
            "name": (entry.name or "").encode("utf-8", "surrogateescape").decode(errors="replace"),
            "granularity": entry.granularity,
        }
        for entry in image.directory
    ]


def extents(bitmap: qcow2bm.Bitmap) -> list[tuple[int, int]]:
    return [(start, length) for array in bitmap.extents() for start, length in array.tolist()]


def pack(extents: list[tuple[int, int]], granularity: int, size: int) -> NDArray[np.uint8]:
    bits = np.zeros(-(-size // granularity), np.uint8)
    for start, length in extents:
        assert start % granularity == 0
        bits[start // granularity : -(-(start + length) // granularity)] = 1
    return np.packbits(bits, bitorder="little")


def assert_reads_as_qemu_does(disk: Disk) -> None:
    """Everything QEMU tells of the valid bitmaps of a disk, and of the list of all of them."""
    with qcow2bm.open(disk.path) as image, StorageDaemon() as daemon:
        assert image.problems == ()
        assert listed(image) == disk.listed()
        assert len(image.bitmaps) == len(image.directory)
        daemon.open(disk)
        in_memory = daemon.bitmaps()
        for name, bitmap in image.bitmaps.items():
            if bitmap.in_use:
                assert bitmap.status == "inconsistent"
                assert in_memory[name]["inconsistent"]
                continue
            assert bitmap.status == "valid"
            expected = disk.extents(name)
            assert extents(bitmap) == expected
            assert bitmap.count() == sum(length for _, length in expected)
            assert bitmap.totals().extents == len(expected)
            packed = pack(expected, bitmap.granularity, image.virtual_size)
            assert bitmap.packed().tobytes() == packed.tobytes()
            if name in in_memory:  # in JSON a name that is not UTF-8 is another one
                assert bitmap.sha256() == daemon.sha256(name)
                assert bitmap.auto == in_memory[name]["recording"]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", CONFIGS)
def test_every_kind_of_image(tmp_path: Path, name: str, seed: int) -> None:
    config = CONFIGS[name]
    if name == "zstd" and fact("zstd") == "no":
        with pytest.raises(ToolError, match="zstd"):
            create(config, tmp_path)
        return
    disk = create(config, tmp_path)
    fill(disk, config, Random(f"{name} {seed}"))

    assert len(disk.listed()) == len(config.granularities)
    assert_reads_as_qemu_does(disk)


@pytest.mark.parametrize("clusters", range(1, 32))
def test_all_zeroes_clusters_in_every_place(tmp_path: Path, clusters: int) -> None:
    """Long stretches of zeros are skipped, not read: before, between and after stored bits."""
    disk = Disk.create(tmp_path / "disk", 5 * 256 * MiB - 512, cluster_size="64k")
    disk.add("b", 512)  # each of its five clusters covers 256 MiB
    places = [256 * place + 77 for place in range(5) if clusters >> place & 1]
    disk.io(*(f"write {place}M 512" for place in places))

    assert_reads_as_qemu_does(disk)


@pytest.mark.spec("INV-NOPATH")
def test_what_an_image_names_is_never_touched(tmp_path: Path) -> None:
    """INV-NOPATH."""
    overlay = CONFIGS["overlay"]
    mixed = overlay._replace(options={"data_file": "{folder}/data"})
    disk = create(mixed, tmp_path)
    fill(disk, mixed, Random(0))
    expected = {bitmap["name"]: disk.extents(bitmap["name"]) for bitmap in disk.listed()}
    (tmp_path / "base").unlink()
    (tmp_path / "data").unlink()

    with qcow2bm.open(disk.path, strict=True) as image:
        assert {name: extents(bitmap) for name, bitmap in image.bitmaps.items()} == expected


NAMES = {
    "shortest": "n",
    "longest": "N" * 1023,
    "longest-in-utf-8": "ü" * 511 + "n",
    "unicode": "täglich-日次-💾",
    "not-utf-8": b"caf\xe9-\xff".decode("utf-8", "surrogateescape"),
    "newline": "two\nlines",
    "escape": "\x1b[31mred\x1b[0m",
    "quote-and-comma": 'a "b", \\c=,d',
    "looks-like-an-index": "@0",
}


@pytest.mark.parametrize("kind", NAMES)
def test_names(tmp_path: Path, kind: str) -> None:
    disk = Disk.create(tmp_path / "disk", ODD)
    disk.add(NAMES[kind], 4 * KiB)
    disk.io("write 4k 512")

    assert_reads_as_qemu_does(disk)
    with qcow2bm.open(disk.path) as image:
        assert list(image.bitmaps) == [NAMES[kind]]
        assert image.bitmaps[NAMES[kind]].count() == 4 * KiB


def test_many_bitmaps_in_the_order_of_the_directory(tmp_path: Path) -> None:
    disk = Disk.create(tmp_path / "disk", ODD, cluster_size="4k")
    with StorageDaemon() as daemon:
        daemon.open(disk, read_only=False)
        for number in range(700):
            daemon.add(f"bitmap {number}", 512 << number % 23, disabled=number % 3 == 0)
        daemon.close()

    with qcow2bm.open(disk.path, strict=True) as image:
        assert len(image.bitmaps) == 700
        assert listed(image) == disk.listed()
        assert {bitmap.status for bitmap in image.bitmaps.values()} == {"valid"}


def test_a_disk_without_room_for_a_bitmap(tmp_path: Path) -> None:
    disk = Disk.create(tmp_path / "disk", 0)
    # QEMU complains, and stores nothing.
    done = run("qemu-img", "bitmap", "--add", "-g", "4k", *disk.arguments, "lost")
    assert done.returncode == int(fact("not-stored"))

    assert_reads_as_qemu_does(disk)
    with qcow2bm.open(disk.path) as image:
        assert image.virtual_size == 0
        assert not image.bitmaps


def grow(disk: Disk) -> Disk:
    run_ok("qemu-img", "resize", "-q", *disk.arguments, str(300 * MiB + 512))
    return disk


def shrink(disk: Disk) -> Disk:
    run_ok("qemu-img", "resize", "-q", "--shrink", *disk.arguments, str(33 * MiB + 1536))
    return disk


def snapshot(disk: Disk) -> Disk:
    run_ok("qemu-img", "snapshot", "-c", "before", str(disk.path))
    disk.io("write 1M 512")
    return disk


def convert(disk: Disk) -> Disk:
    target = disk.path.with_name("converted")
    run_ok("qemu-img", "convert", "--bitmaps", "-O", "qcow2", str(disk.path), str(target))
    return Disk(target)


def merge_clear_remove(disk: Disk) -> Disk:
    disk.bitmap("b2", "--merge", "b0")
    disk.bitmap("b0", "--clear")
    disk.bitmap("b1", "--remove")
    return disk


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("operation", [grow, shrink, snapshot, convert, merge_clear_remove])
def test_after_other_operations(
    tmp_path: Path, operation: Callable[[Disk], Disk], seed: int
) -> None:
    config = CONFIGS["cluster-4k"]
    disk = create(config, tmp_path)
    fill(disk, config, Random(seed))

    assert_reads_as_qemu_does(operation(disk))


def die_in_qemu_io(disk: Disk) -> None:
    disk.crash("write 0 1M", "write 5M 512")


def die_in_storage_daemon(disk: Disk) -> None:
    with StorageDaemon() as daemon:
        daemon.open(disk, read_only=False)
        daemon.add("never stored", 64 * KiB)
        daemon.kill()


@pytest.mark.parametrize("die", [die_in_qemu_io, die_in_storage_daemon])
def test_after_kill_9(tmp_path: Path, die: Callable[[Disk], None]) -> None:
    config = CONFIGS["cluster-4k"]
    disk = create(config, tmp_path)
    fill(disk, config, Random(9))
    with qcow2bm.open(disk.path) as image:
        before = {name: bitmap.packed().tobytes() for name, bitmap in image.bitmaps.items()}
    die(disk)
    disk.add("fresh", 64 * KiB)  # a bitmap may be sound beside others that are not
    disk.io("write 7M 512")

    assert_reads_as_qemu_does(disk)
    with qcow2bm.open(disk.path) as image:
        assert image.bitmaps["fresh"].status == "valid"
        for name, stored in before.items():
            bitmap = image.bitmaps[name]
            assert bitmap.status == "inconsistent"
            with pytest.raises(qcow2bm.BitmapInconsistentError):
                bitmap.packed()
            assert bitmap.stale_bits().tobytes() == stored


def clear_the_autoclear_bit(disk: Disk) -> None:
    with disk.path.open("r+b") as file:
        file.seek(88)
        file.write(bytes(8))


def downgrade(disk: Disk) -> None:
    """Version 2 has no autoclear bits, but QEMU leaves the extension where it is."""
    run_ok("qemu-img", "amend", "-q", "-o", "compat=0.10", *disk.arguments)


@pytest.mark.parametrize("outdate", [clear_the_autoclear_bit, downgrade])
def test_outdated_bitmaps(tmp_path: Path, outdate: Callable[[Disk], None]) -> None:
    config = CONFIGS["cluster-4k"]
    disk = create(config, tmp_path)
    fill(disk, config, Random(2))
    outdate(disk)

    assert disk.listed() == []
    check = disk.check()
    assert check.returncode == LEAKS
    with qcow2bm.open(disk.path) as image:
        assert not image.is_consistent
        assert {bitmap.status for bitmap in image.bitmaps.values()} == {"stale"}
        stale = next(problem for problem in image.problems if problem.qemu_message)
        fault = "autoclear.off" if image.version == 3 else "version.too-old"
        assert stale.id == f"bitmaps-extension.{fault}"
        assert str(stale.qemu_message) in check.stderr
        assert "refused" not in {problem.severity for problem in image.problems}


def test_version_2_without_bitmaps(tmp_path: Path) -> None:
    assert_reads_as_qemu_does(Disk.create(tmp_path / "disk", ODD, compat="0.10"))


ZEROES, ONES, BITS = 0, 1, -1  # BITS: leave the cluster that QEMU wrote


@pytest.mark.parametrize("size", [64 * MiB, 50 * MiB + 512])
@pytest.mark.parametrize(
    "kinds",
    [
        (ONES, BITS, ZEROES, BITS),
        (BITS, ONES, ONES, ZEROES),
        (ZEROES, BITS, ONES, ONES),
        (ONES, ONES, ONES, ONES),
    ],
)
def test_all_ones_clusters_which_qemu_reads_but_never_writes(
    tmp_path: Path, kinds: tuple[int, ...], size: int
) -> None:
    disk = Disk.create(tmp_path / "disk", size, cluster_size="4k")
    disk.add("b", 512)  # each of its clusters covers 16 MiB
    disk.io(*(f"write {start}M 512" for start in range(3, 64, 5) if start << 20 < size))
    with qcow2bm.open(disk.path) as image:
        table_offset = image.directory[0].bitmap_table_offset
    with disk.path.open("r+b") as file:
        for index, kind in enumerate(kinds):
            if kind != BITS:
                file.seek(table_offset + 8 * index)
                file.write(struct.pack(">Q", kind))

    with qcow2bm.open(disk.path, strict=True) as image, StorageDaemon() as daemon:
        bitmap = image.bitmaps["b"]
        expected = disk.extents("b")
        assert extents(bitmap) == expected
        assert bitmap.packed().tobytes() == pack(expected, 512, size).tobytes()
        assert bitmap.clusters == (kinds.count(ZEROES), kinds.count(ONES), kinds.count(BITS))
        if size % (64 * 512) and kinds[-1] == ONES:
            return  # QEMU sets the bits past the disk in its last word, and hashes them
        daemon.open(disk)
        assert bitmap.sha256() == daemon.sha256("b")
