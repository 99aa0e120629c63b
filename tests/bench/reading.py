"""Measures how fast reading is, compared with QEMU's tools and with the naive way in numpy.

    .venv/bin/python tests/bench/reading.py [--rounds 5] [--only WORD]

Each line has two times: first that of this library or its command line, then that of the work
after the slash. "2x faster" means that the other took twice as long, "2x slower" that this library
did. Both are run in turn (A B A B ...), after one round that is thrown away, and the medians of the
rounds are compared: times depend on the machine and its load, ratios hardly do. The last lines are
the most memory that reading 512 MiB of bits takes. The results of one machine are in README.md,
"Measured".

Needs qemu-utils and libnbd-bin, and 600 MB in the folder for temporary files.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from array import array
from collections.abc import Callable
from functools import partial
from pathlib import Path

import construct
import numpy as np

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support.benchmarks import PYTHON, Bench, command, folder, nbdinfo, ours  # noqa: E402
from support.images import Stored, build_image  # noqa: E402

import qcow2bm  # noqa: E402
from qcow2bm.format.bitmap_table import ENTRY_LENGTH, MASKS, build_bitmap_table  # noqa: E402

TIB = 1 << 40
CLUSTER_BITS = 16
CLUSTER_SIZE = 1 << CLUSTER_BITS
IMPORTS = "import argparse, json, dataclasses, construct"


def make_image(path: Path, size: int, granularity_bits: int, density: float) -> Path:
    """An image with one bitmap, of which so many bits are set at random; seeded.

    The bitmap's clusters stand at the end, uncounted: a reader does not look at refcounts.
    """
    image = build_image(
        Stored(b"b", granularity_bits=granularity_bits), cluster_bits=CLUSTER_BITS, size=size
    )
    entries = image.entries[0].bitmap_table_size
    start = len(image.data)
    words = array("Q", (start + i * CLUSTER_SIZE for i in range(entries)))
    table = image.offset("bitmap-table")
    image.data[table : table + ENTRY_LENGTH * entries] = build_bitmap_table(words)
    random = np.random.default_rng(1)
    left = -(-size >> granularity_bits) // 8
    with path.open("wb") as file:
        file.write(image.data)
        for _ in range(entries):
            bits = min(left, CLUSTER_SIZE)
            file.write(random_bits(random, bits, density).tobytes().ljust(CLUSTER_SIZE, b"\0"))
            left -= bits
    return path


def random_bits(
    random: np.random.Generator, length_bytes: int, density: float
) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """Packed bits, each set with that probability."""
    if density == 0.5:
        return random.integers(0, 256, length_bytes, np.uint8)
    return np.packbits(random.random(8 * length_bytes, np.float32) < density)


def bench_commands(bench: Bench, folder: Path) -> None:
    small = make_image(folder / "10g", 10 << 30, 16, 0.1)
    baseline = command(PYTHON, "-c", IMPORTS)
    bench.compare("dump 10 GiB / python -c imports", ours("dump", small), baseline)
    for name, granularity_bits in (("16 TiB at 64 KiB dense", 16), ("16 TiB at 4 KiB dense", 12)):
        image = make_image(folder / "dense", 16 * TIB, granularity_bits, 0.5)
        info = command("qemu-img", "info", image)
        bench.compare(
            f"dump --no-count {name} / qemu-img info",
            ours("dump", "--no-count", image),
            info,
        )
        bench.compare(f"dump {name} / qemu-img info", ours("dump", image), info)
    for name, size, density in (
        ("16 TiB, 1 %", 16 * TIB, 0.01),
        ("16 TiB, 0.1 %", 16 * TIB, 0.001),
        ("1 TiB, 10 %", TIB, 0.1),
        ("1 TiB, 50 %", TIB, 0.5),
    ):
        image = make_image(folder / "map", size, 16, density)
        bench.compare(
            f"map --output=json {name} / qemu-nbd + nbdinfo",
            ours("map", "--output=json", image, "b"),
            nbdinfo(image),
        )


def bench_process(bench: Bench, folder: Path) -> None:
    from qcow2bm.bits import table_runs
    from qcow2bm.format.bitmap_table import parse_bitmap_table

    image = make_image(folder / "dense", 16 * TIB, 16, 0.5)
    length = 32 << 20
    with qcow2bm.open(image) as opened, image.open("rb", buffering=0) as file:
        bitmap = opened.bitmaps["b"]

        copy = np.zeros(length, np.uint8)

        def read_and_copy() -> None:
            fresh = np.empty(length, np.uint8)
            file.seek(CLUSTER_SIZE)
            file.readinto(fresh.data)
            np.copyto(copy, fresh)

        bench.compare("load 32 MiB / read + memcpy", bitmap.packed, read_and_copy)

    for density in (0.001, 0.01, 0.1):
        image = make_image(folder / "map", 16 * TIB, 16, density)
        with qcow2bm.open(image) as opened:
            bitmap = opened.bitmaps["b"]
            packed = bitmap.packed()

            def naive(packed: np.ndarray[tuple[int], np.dtype[np.uint8]] = packed) -> object:
                bits = np.unpackbits(packed, bitorder="little").view(np.int8)
                edges = np.diff(bits, prepend=0, append=0)
                starts, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
                return np.stack([starts << 16, (ends - starts) << 16], axis=1)

            def found(bitmap: qcow2bm.Bitmap = bitmap) -> int:
                return sum(len(extents) for extents in bitmap.extents())

            bench.compare(f"extents {density:.1%}, read included / naive", found, naive)

            def united(bitmap: qcow2bm.Bitmap = bitmap) -> int:
                return sum(len(extents) for extents in (bitmap | bitmap).extents())

            bench.compare(
                f"union of two, {density:.1%} / extents of both", united, partial(_twice, found)
            )

    entries = 262144
    contiguous = np.arange(1, entries + 1, dtype=np.uint64) << np.uint64(CLUSTER_BITS)
    mixed = contiguous.copy()
    kinds = np.random.default_rng(1).integers(0, 3, entries)
    mixed[kinds < 2] = kinds[kinds < 2]
    schema = construct.Array(entries, construct.Int64ub)
    for what, words in (("dense", contiguous), ("a random mixture", mixed)):
        data = words.astype(">u8").tobytes()

        def classify(data: bytes = data) -> object:
            return table_runs.table_runs(parse_bitmap_table(data), MASKS.offset, CLUSTER_SIZE)

        bench.compare(
            f"table of {entries} entries, {what}, parsed / construct Array",
            partial(parse_bitmap_table, data),
            partial(schema.parse, data),
            times_in_a_row=20,
        )
        bench.compare(
            "the same, classified into runs, too / construct Array",
            classify,
            partial(schema.parse, data),
            times_in_a_row=20,
        )


def _twice(run: Callable[[], object]) -> None:
    run()
    run()


_MEMORY = """
import re, sys, numpy, qcow2bm, qcow2bm.bits.extents, qcow2bm.bitmaps.bit_reader
import qcow2bm.bits.extent_streams
def peak():  # not ru_maxrss, which a process inherits
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
with qcow2bm.open(sys.argv[1]) as image:
    bitmap = image.bitmaps["b"]
    bitmap.status
    before = peak()
    if sys.argv[2] == "load":
        bitmap.packed()
    else:
        both = bitmap | bitmap
        for extents in (both if sys.argv[2] == "union" else bitmap).extents(): pass
    print(peak() - before)
"""


def bench_memory(bench: Bench, folder: Path) -> None:
    """Prints the most memory above what was in use before, each in a process of its own."""
    cases = [("stream extents", "extents", density) for density in (0.0, 0.01, 0.5, 1.0)]
    cases += [("stream the union of two bitmaps", "union", density) for density in (0.01, 0.5)]
    cases.append(("load 512 MiB", "load", 0.5))
    for title, what, density in cases:
        if bench.only not in title:
            continue
        image = make_image(folder / "memory", 16 * TIB, 12, density)
        done = subprocess.run(
            [PYTHON, "-c", _MEMORY, image, what],
            check=True,
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"},
        )
        peak = int(done.stdout) / (1 << 20)
        print(f"{title}, 512 MiB of bits, {density:.0%} set: {peak:.1f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="how often each command is measured")
    parser.add_argument("--only", default="", help="only benchmarks with this in their title")
    arguments = parser.parse_args()
    bench = Bench(arguments.rounds, arguments.only)
    print(f"{'':<58}{'ours':>12} {'other':>12}")
    with folder() as place:
        bench_process(bench, place)
        bench_commands(bench, place)
        bench_memory(bench, place)


if __name__ == "__main__":
    main()
