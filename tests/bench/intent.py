"""Measures what tracking with intent costs, compared with tracking without.

    .venv/bin/python tests/bench/intent.py [--rounds 5] [--folder FOLDER]

A disk of 64 GiB on a raw data file, with one bitmap of 64 KiB granularity, is written to through
`qcow2bm.serve.disk.Disk`, as the nbdkit plugin does it; the bitmap is flushed every 0.2 seconds.

- again: four threads write 4 KiB at random places of a set of 20,000 that was written to before.
- sequential: one thread writes 1 GiB in pieces of 256 KiB, where nothing was written before.
- first: 32 threads write 4 KiB each at 50 places where nothing was written before. It also says how
  many first writes share one barrier.

Both kinds run in turn (A B A B ...). Times are medians, in milliseconds; "slower" compares them.
The folder is where image and data file are; by default the folder for temporary files.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from statistics import median

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT)]

import qcow2bm  # noqa: E402
from qcow2bm.serve.disk import Disk  # noqa: E402

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
SIZE = 64 * GIB
PIECE = bytes(4 * KIB)
PLACES, WRITES = 20_000, 100_000


def make(folder: Path) -> tuple[Path, Path]:
    """An image with a bitmap, and its data file, which has holes only."""
    data, image = folder / "disk.raw", folder / "disk.qcow2"
    with data.open("wb") as file:
        file.truncate(SIZE)
    command = [sys.executable, "-m", "qcow2bm", "attach", str(data), str(image)]
    command += ["--bitmap", "daily"]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return image, data


def in_threads(count: int, work: Callable[[int], None]) -> float:
    """Runs work in threads; returns how many milliseconds all of it took."""
    with ThreadPoolExecutor(count) as threads:
        begun = time.perf_counter()
        for one in [threads.submit(work, number) for number in range(count)]:
            one.result()
        return 1000 * (time.perf_counter() - begun)


def again(disk: Disk, seed: int) -> float:
    """Times writes to places that were written to before, and flushed."""
    places = [Random(7).randrange(SIZE >> 12) << 12 for _ in range(PLACES)]
    for place in places:
        disk.write(place, PIECE)
    time.sleep(1)  # until all of it is stored, and taken out of the intent bitmap

    def write(number: int) -> None:
        chance = Random(f"{seed} {number}")
        for _ in range(WRITES // 4):
            disk.write(chance.choice(places), PIECE)

    return in_threads(4, write)


def sequential(disk: Disk, seed: int) -> float:
    """Times writes from one end of a part of the disk to the other."""
    piece = bytes(256 * KIB)

    def write(number: int) -> None:
        for start in range(seed * GIB, (seed + 1) * GIB, len(piece)):
            disk.write(start, piece)

    return in_threads(1, write)


def first(disk: Disk, seed: int) -> float:
    """Times writes to places where nothing was written before."""

    def write(number: int) -> None:
        chance = Random(f"{seed} {number}")
        for _ in range(50):
            disk.write(chance.randrange(SIZE >> 12) << 12, PIECE)

    return in_threads(32, write)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default=None)
    arguments = parser.parse_args()
    tempfile.tempdir = arguments.folder
    for work in (again, sequential, first):
        times: dict[bool, list[float]] = {False: [], True: []}
        costs: list[qcow2bm.IntentReport] = []
        for seed in range(arguments.rounds):
            for intent in (False, True):
                with tempfile.TemporaryDirectory() as folder:
                    image, data = make(Path(folder))
                    with Disk(image, data, flush_interval=0.2, intent=intent) as disk:
                        times[intent].append(work(disk, seed))
                        if disk.intent:
                            costs.append(disk.intent)
        without, with_intent = median(times[False]), median(times[True])
        waits, barriers = (sum(each) for each in zip(*costs, strict=True))
        print(
            f"{work.__name__:11}: without {without:8.1f}, with intent {with_intent:8.1f}: "
            f"{100 * (with_intent / without - 1):+6.1f} % slower; {waits / max(1, barriers):.1f} "
            f"waits a barrier ({waits} and {barriers})",
            flush=True,
        )


if __name__ == "__main__":
    main()
