"""Measures how fast it is known what lies under the bits, compared with QEMU's tools.

    .venv/bin/python tests/bench/data_map.py [--rounds 5] [--only WORD]

Each disk has 16 TiB, of which 10 GiB are allocated in clusters of 64 KiB, and a bitmap in which a
tenth of these 10 GiB is dirty, at random. ``map --data`` is compared with ``qemu-img map`` and with
nbdinfo on qemu-nbd together, which make two lists that are still to be combined. The last lines are
about the library alone, in a process that has loaded it. See reading.py for the columns.

Needs qemu-utils and libnbd-bin. The data are holes, so that the images take little space.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support.benchmarks import Bench, command, folder, nbdinfo, ours  # noqa: E402
from support.images import ZEROES, Stored, Word, build_image  # noqa: E402

import qcow2bm  # noqa: E402

SIZE = 16 << 40
CLUSTER_BITS = 16
CLUSTER_SIZE = 1 << CLUSTER_BITS
ALLOCATED = (10 << 30) >> CLUSTER_BITS  # clusters
PER_TABLE = CLUSTER_SIZE // 8
BITS_PER_CLUSTER = 8 * CLUSTER_SIZE
COPIED = 1 << 63

Numbers = NDArray[np.int64]


def in_pieces(pieces: int) -> Numbers:
    """The numbers of the allocated clusters, in so many pieces at random over the disk."""
    length = ALLOCATED // pieces
    random = np.random.default_rng(1)
    places = np.sort(random.choice((SIZE >> CLUSTER_BITS) // length, pieces, replace=False))
    return np.repeat(places * length, length) + np.tile(np.arange(length), pieces)


SHAPES: dict[str, Numbers] = {
    "in one piece": np.arange(ALLOCATED),
    "every second cluster of 20 GiB": 2 * np.arange(ALLOCATED),
    "in 20 pieces": in_pieces(20),
    "in 2,000 pieces": in_pieces(2000),
}


def make_image(path: Path, clusters: Numbers) -> Path:
    """An image in which these clusters of the disk are allocated, one behind the other."""
    dirty = clusters[np.random.default_rng(2).random(len(clusters)) < 0.1]
    table: list[Word] = [ZEROES] * -(-(SIZE >> CLUSTER_BITS) // BITS_PER_CLUSTER)
    for number in np.unique(dirty // BITS_PER_CLUSTER).tolist():
        bits = np.zeros(BITS_PER_CLUSTER, bool)
        bits[dirty[dirty // BITS_PER_CLUSTER == number] % BITS_PER_CLUSTER] = True
        table[number] = np.packbits(bits, bitorder="little").tobytes()
    bitmap = Stored(b"b", table, granularity_bits=CLUSTER_BITS)
    image = build_image(bitmap, cluster_bits=CLUSTER_BITS, size=SIZE)
    tables, number_of_table = np.unique(clusters // PER_TABLE, return_inverse=True)
    first = len(image.data)
    data = first + len(tables) * CLUSTER_SIZE
    for number, l1_entry in enumerate(tables.tolist()):
        image.plant(COPIED | first + number * CLUSTER_SIZE, "l1-table", 0, l1_entry)
    entries = np.zeros(len(tables) * PER_TABLE, np.uint64)
    offsets = data + CLUSTER_SIZE * np.arange(len(clusters), dtype=np.uint64)
    entries[number_of_table * PER_TABLE + clusters % PER_TABLE] = offsets | np.uint64(COPIED)
    with path.open("wb") as file:
        file.write(image.data)
        file.write(entries.astype(">u8").tobytes())
        file.truncate(data + len(clusters) * CLUSTER_SIZE)
    return path


def both(first: Callable[[], object], second: Callable[[], object]) -> Callable[[], object]:
    def run() -> None:
        first()
        second()

    return run


def in_process(path: Path) -> Callable[[], object]:
    def run() -> int:
        with qcow2bm.open(path) as image:
            return sum(len(part) for part in image.data_extents())

    return run


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
        for name, clusters in SHAPES.items():
            image = make_image(place / "disk", clusters)
            qemu_map = command("qemu-img", "map", "--output=json", image)
            bench.compare(
                f"{name} / qemu-img map, nbdinfo",
                ours("map", "--data", "--json", image, "b"),
                both(qemu_map, nbdinfo(image)),
            )
            bench.compare(f"{name}, data_extents / qemu-img map", in_process(image), qemu_map)


if __name__ == "__main__":
    main()
