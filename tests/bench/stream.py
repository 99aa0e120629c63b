"""Measures how fast bitmaps go into a migration stream and come out of it, and the memory for that.

    .venv/bin/python tests/bench/stream.py [--rounds 5] [--only WORD]

A bitmap of a disk of 16 TiB at 64 KiB has 32 MiB of bits. A chunk is 1024 bytes of bits, which a
stream has as one record; "1 % of the chunks not clear" means that the others are all zeros.

Speeds are megabytes (10^6 bytes) of bits a second: the median of some rounds, after one that is
thrown away. The stream comes in pieces of 128 KiB, as the command line reads it. Memory is the most
that was in use beyond what was in use before. Nothing else is measured for comparison, so the
numbers say something only beside those of another version on the same machine. Needs nothing but
this library.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from qcow2bm.migration.stream_bitmaps import read_stream  # noqa: E402
from qcow2bm.migration.stream_writer import OutgoingBitmap, write_stream  # noqa: E402

MIB, TIB = 1 << 20, 1 << 40
SIZE, GRANULARITY = 16 * TIB, 64 << 10
LENGTH = SIZE // GRANULARITY // 8
PIECE = 128 << 10


def bitmap(number: int, density: float) -> OutgoingBitmap:
    """32 MiB of bits, of which so many chunks have random ones; seeded."""
    random = np.random.default_rng(number)
    bits = random.integers(0, 256, (LENGTH // 1024, 1024), np.uint8)
    bits[random.random(len(bits)) >= density] = 0
    return OutgoingBitmap("disk", f"b{number}", GRANULARITY, True, True, bits.tobytes(), SIZE)


def pieces(data: bytes) -> Iterator[bytes]:
    return (data[start : start + PIECE] for start in range(0, len(data), PIECE))


def seconds(run: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return median(times[1:])


def show(title: str, result: str) -> None:
    print(f"{title:<50}{result:>16}", flush=True)


def bench_speed(rounds: int, only: str) -> None:
    """Prints how many megabytes of bits are written and read in a second."""
    for count, density in ((1, 1.0), (1, 0.01), (1, 0.0), (4, 1.0)):
        title = f"{count} x 32 MiB, {density:.0%} of the chunks not clear"
        if only not in title:
            continue
        bitmaps = [bitmap(number, density) for number in range(count)]
        data = b"".join(write_stream(bitmaps, "pc"))
        found = read_stream(pieces(data))
        assert [b.packed().tobytes() for b in found.complete] == [b.packed for b in bitmaps]
        del found

        def write(bitmaps: list[OutgoingBitmap] = bitmaps) -> None:
            for _ in write_stream(bitmaps, "pc"):
                pass

        def read(data: bytes = data) -> None:
            read_stream(pieces(data))

        for what, run in (("write", write), ("read", read)):
            speed = count * LENGTH / 1e6 / seconds(run, rounds)
            show(f"{what} {title}", f"{speed:.0f} MB/s")


_MEMORY = """
import re, sys, numpy
from qcow2bm.migration.stream_bitmaps import read_stream
from qcow2bm.migration.stream_writer import OutgoingBitmap, write_stream
def peak():  # not ru_maxrss, which a process inherits
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
bits = numpy.full(int(sys.argv[2]), int(sys.argv[3]), numpy.uint8)
bits[1000] = 1
bitmap = OutgoingBitmap("disk", "b", 65536, True, True, bits.data, len(bits) * 8 * 65536)
before = peak()
def pieces():
    part = bytearray()
    for piece in write_stream([bitmap], "pc"):
        part += piece
        if len(part) > 131072:
            yield bytes(part)
            part.clear()
    yield bytes(part)
if sys.argv[1] == "write":
    for piece in pieces(): pass
else:
    found, = read_stream(pieces()).complete
    found.sha256(), found.dirty_bytes
    if sys.argv[1] == "packed": found.packed()
print(peak() - before)
"""


def bench_memory(only: str) -> None:
    """Prints the most memory above what was in use before, each in a process of its own."""
    for what, fill in (("write", 0xAA), ("read", 0xAA), ("packed", 0xAA), ("read", 0)):
        title = f"memory to {what} 32 MiB{'' if fill else ', nearly all clear'}"
        if only not in title:
            continue
        done = subprocess.run(
            [sys.executable, "-c", _MEMORY, what, str(LENGTH), str(fill)],
            check=True,
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"},
        )
        peak = int(done.stdout) / MIB
        show(title, f"{peak:.1f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="how often each command is measured")
    parser.add_argument("--only", default="", help="only benchmarks with this in their title")
    arguments = parser.parse_args()
    bench_speed(arguments.rounds, arguments.only)
    bench_memory(arguments.only)


if __name__ == "__main__":
    main()
