"""Measures what tracking with intent costs, compared with tracking without.

    .venv/bin/python tests/bench/intent.py [--rounds 5] [--folder FOLDER] [--nbdkit]

A disk of 64 GiB on a raw data file, with one bitmap of 64 KiB granularity, is written to through
`qcow2bm.serve.disk.Disk`, as the nbdkit plugin does it; the bitmap is flushed every 0.2 seconds.

- again: four threads write 4 KiB at random places of a set of 20,000 that was written to before.
- sequential: one thread writes 1 GiB in pieces of 256 KiB, where nothing was written before.
- first: 32 threads write 4 KiB each at 50 places where nothing was written before. It also says how
  many first writes share one barrier.

With --nbdkit, `qemu-img bench` writes to nbdkit with the plugin instead: 98,304 times 4 KiB in turn
to 32,768 places (32 at a time), 1 GiB in pieces of 256 KiB (one at a time), and 1,600 times 4 KiB
to as many places (32 at a time). It needs nbdkit, and the Python that nbdkit runs.

Both kinds run in turn (A B A B ...). Times are medians, in milliseconds; "slower" compares them.
The folder is where image and data file are; by default the folder for temporary files.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import sysconfig
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
from qcow2bm import serve  # noqa: E402
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


def in_process(name: str, folder: Path, seed: int, *, intent: bool) -> tuple[float, int, int]:
    """Returns the milliseconds that one kind of work took, the waits, and the barriers."""
    image, data = make(folder)
    with Disk(image, data, flush_interval=0.2, intent=intent) as disk:
        taken = {"again": again, "sequential": sequential, "first": first}[name](disk, seed)
        report = disk.intent or qcow2bm.IntentReport(0, 0)
    return taken, report.waits, report.barriers


BENCHES = {
    "again": ["-c 32768 -s 4096 -S 2097152 -d 32", "-c 98304 -s 4096 -S 2097152 -d 32"],
    "sequential": ["-c 4096 -s 262144 -d 1"],
    "first": ["-c 1600 -s 4096 -S 33554432 -d 32"],
}
"""The arguments of `qemu-img bench`; the last run of each is measured."""


def through_nbdkit(name: str, folder: Path, seed: int, *, intent: bool) -> tuple[float, int, int]:
    """The same with nbdkit; waits and barriers are not known."""
    image, data = make(folder)
    socket = '"nbd+unix:///?socket=$unixsocket"'
    runs = [f"qemu-img bench -w -f raw -t none {bench} {socket}" for bench in BENCHES[name]]
    script = Path(serve.__file__).with_name("nbdkit_plugin.py")
    command = ["nbdkit", "-U", "-", "-t", "32", "python", str(script), f"image={image}"]
    command += [f"data={data}", "flush-interval=0.2", f"intent={'yes' if intent else 'no'}"]
    command += ["--run", "set -e; " + "; sleep 1; ".join(runs)]
    path = os.pathsep.join([str(ROOT), sysconfig.get_path("purelib")])
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    return 1000 * float(re.findall(r"completed in ([\d.]+) seconds", done.stdout)[-1]), 0, 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default=None)
    parser.add_argument("--nbdkit", action="store_true")
    arguments = parser.parse_args()
    tempfile.tempdir = arguments.folder
    measure = through_nbdkit if arguments.nbdkit else in_process
    for name in BENCHES:
        times: dict[bool, list[float]] = {False: [], True: []}
        waits = barriers = 0
        for seed in range(arguments.rounds):
            for intent in (False, True):
                with tempfile.TemporaryDirectory() as folder:
                    taken, *counts = measure(name, Path(folder), seed, intent=intent)
                times[intent].append(taken)
                waits, barriers = waits + counts[0], barriers + counts[1]
        without, with_intent = median(times[False]), median(times[True])
        line = f"{name:11}: without {without:8.1f}, with intent {with_intent:8.1f}: "
        line += f"{100 * (with_intent / without - 1):+6.1f} % slower"
        if barriers:
            line += f"; {waits / barriers:.1f} waits a barrier ({waits} and {barriers})"
        print(line, flush=True)


if __name__ == "__main__":
    main()
