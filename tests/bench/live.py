"""Measures how long a machine on QEMU stops for a migration, with its bitmaps and without them.

    .venv/bin/python tests/bench/live.py [--rounds 3] [--only WORD] [--folder FOLDER]

The disk has 16 TiB, and 1, 4 or 8 bitmaps of 64 KiB granularity whose 32 MiB of bits are random.
In each round two machines migrate, one after the other: one as it is ("plain"), the other after
``live offload``. Each writes 64 KiB at 300 random places before it migrates. The stop is the time
from QEMU's event STOP to the event that the migration completed. After an offload, the bitmaps are
put back into the source, which runs on.

All times are medians, in milliseconds. "Longest answer" is how long QEMU took at most to answer
another command during the offload ("out"), or while the bitmaps were put back ("back"): so long a
guest waits. It is compared with how long QEMU stops to store one bitmap.

--folder is where images and temporary files are, such as a tmpfs; by default the folder for
temporary files. Needs QEMU.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support.qemu import Disk  # noqa: E402
from support.vm import NOWHERE, Machine  # noqa: E402

import qcow2bm  # noqa: E402
from qcow2bm import live  # noqa: E402

KIB, MIB, TIB = 1 << 10, 1 << 20, 1 << 40
SIZE, GRANULARITY = 16 * TIB, 64 * KIB
WRITES = 300
SPAWN = multiprocessing.get_context("spawn")


class TimedMachine(Machine):
    """A machine that keeps the times of QEMU's events, in seconds."""

    def __init__(
        self, image: Path, monitor: Path | None = None, second_monitor: Path | None = None
    ) -> None:
        super().__init__(image, monitor=monitor, second_monitor=second_monitor)
        self.times: dict[str, float] = {}

    def _message(self) -> dict[str, Any]:
        message = super()._message()
        if "event" in message:
            stamp = message["timestamp"]
            name = message["event"] + message.get("data", {}).get("status", "")
            self.times[name] = stamp["seconds"] + stamp["microseconds"] / 1e6
        return message


def make(folder: Path, count: int) -> Path:
    """An image with so many bitmaps, whose bits are random; seeded."""
    disk = Disk.create(folder / f"original{count}.qcow2", SIZE)
    random = np.random.default_rng(count)
    with qcow2bm.open(disk.path, "r+") as image, image.edit() as edit:
        for number in range(count):
            bits = random.integers(0, 256, SIZE // GRANULARITY // 8, np.uint8)
            edit.load(f"b{number}", GRANULARITY, bits)
    return disk.path


def write(machine: Machine, seed: int) -> None:
    """Writes at random places; the guest does nothing else."""
    random = Random(seed)
    for _ in range(WRITES):
        machine.write(random.randrange(SIZE // GRANULARITY) * GRANULARITY, GRANULARITY)


def stop(machine: TimedMachine) -> float:
    """Migrates, and returns how many milliseconds the machine was stopped for the migration."""
    machine.enable("events")
    machine.migrate(NOWHERE)
    machine.wait_for_migration("completed")
    machine.wait_for("postmigrate")
    return 1000 * (machine.times["MIGRATIONcompleted"] - machine.times["STOP"])


def ask(address: str, waits: Any, ended: Any) -> None:
    """Asks a machine for its status until the end; notes the longest wait, in milliseconds."""
    with live.Monitor(address) as monitor:
        while not ended.is_set():
            began = time.perf_counter()
            monitor.execute("query-status")
            waits.value = max(waits.value, 1000 * (time.perf_counter() - began))


@contextmanager
def longest_answer(address: Path) -> Iterator[Callable[[], float]]:
    """Asks a machine for its status all the time, from a process of its own.

    Yields a function that returns the longest wait, in milliseconds.
    """
    waits, ended = SPAWN.Value("d", 0.0), SPAWN.Event()
    process = SPAWN.Process(target=ask, args=(str(address), waits, ended))
    process.start()
    while not waits.value:
        time.sleep(0.01)
    waits.value = 0
    try:
        yield lambda: float(waits.value)
    finally:
        ended.set()
        process.join()


def plain(folder: Path, original: Path, seed: int) -> float:
    image = folder / "plain.qcow2"
    shutil.copyfile(original, image)
    with TimedMachine(image) as machine:
        write(machine, seed)
        return stop(machine)


def offloaded(folder: Path, original: Path, seed: int) -> tuple[float, float, float]:
    """Returns the stop, and the longest waits during the offload and the restore."""
    image, address, path = folder / "live.qcow2", folder / "live.sock", folder / "live.bitmaps"
    other = folder / "other.sock"
    shutil.copyfile(original, image)
    path.unlink(missing_ok=True)
    with TimedMachine(image, monitor=address, second_monitor=other) as machine:
        with longest_answer(other) as out, live.Monitor(str(address)) as monitor:
            live.offload(monitor, str(path))
        write(machine, seed)
        took = stop(machine)
        machine.execute("cont")
        with longest_answer(other) as back, live.Monitor(str(address)) as monitor:
            done = live.restore(monitor, str(path), is_alone=True)
        assert all(one.outcome == "restored" for one in done.bitmaps)
        machine.quit()
    return took, out(), back()


def bench(folder: Path, count: int, rounds: int, one: float | None) -> float:
    """Returns how long the machine stops as it is; ``one`` is that time with one bitmap."""
    original = make(folder, count)
    plains, lives = [], []
    for seed in range(rounds):
        plains.append(plain(folder, original, seed))
        lives.append(offloaded(folder, original, seed))
    before, (after, out, back) = median(plains), map(median, zip(*lives, strict=True))
    one = one or before
    print(
        f"{count} x 32 MiB: plain {before:8.1f}, after offload {after:6.1f}: "
        f"{before / after:5.0f} times shorter; longest answer out {out:5.0f} ({out / one:.2f} x one"
        f" bitmap), back {back:5.0f} ({back / one:.2f} x)",
        flush=True,
    )
    original.unlink()
    return before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="only the number of bitmaps that has this")
    parser.add_argument("--folder", default=None)
    arguments = parser.parse_args()
    tempfile.tempdir = arguments.folder
    one = None
    with tempfile.TemporaryDirectory() as folder:
        for count in (1, 4, 8):
            if arguments.only in str(count):
                before = bench(Path(folder), count, arguments.rounds, one)
                one = before if count == 1 else one


if __name__ == "__main__":
    main()
