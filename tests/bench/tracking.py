"""Measures how long a stop after tracking takes, compared with QEMU's, and what marking costs.

    .venv/bin/python tests/bench/tracking.py [--rounds 5] [--only WORD]

The disk has 16 TiB. Each line says first what is measured, then the result:

- stop, inactivate + activate: two times, first that of this library, then that of
  qemu-storage-daemon, which stores all persistent bitmaps when it closes the same image, and loads
  them when it opens the image. "2x faster" means that QEMU took twice as long. Both are run in turn
  (A B A B ...), after one round that is thrown away, and the medians of the rounds are compared.
  "flat" is the time for a bitmap of 512 MiB as a multiple of the time for one of 32 MiB.
- mark: millions of marks a second, and this rate as a multiple of the rate of the work after the
  slash. The bare bytearray sets the bit and checks the bounds, and does nothing else.
- p99.9 of mark: 99.9 % of the marks took no longer than this, while another thread flushes.
- memory: the most that Python had allocated, and the size of the bits for comparison.

Times depend on the machine and its load, ratios hardly do. The results of one machine are in
README.md, "Measured". Needs qemu-storage-daemon and qemu-img, and 2 GB in the folder for temporary
files.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support.qemu import Disk, StorageDaemon  # noqa: E402

import qcow2bm  # noqa: E402
from qcow2bm.bitmaps.draft_bits import PackedSource  # noqa: E402
from qcow2bm.tracker.reports import StopReport  # noqa: E402
from qcow2bm.tracker.tracker import Tracker  # noqa: E402

MIB, TIB = 1 << 20, 1 << 40
SIZE = 16 * TIB
K4, K64 = 4 << 10, 64 << 10
MARKS = 200_000  # in a row, of different granules

_FLAT = "stop, flat: 1 x 512 MiB / 1 x 32 MiB"
_random = np.random.default_rng(1)


class Bench:
    """Prints a line for each measurement whose title has the word asked for."""

    def __init__(self, folder: Path, rounds: int, only: str) -> None:
        self.folder = folder
        self.rounds = rounds
        self._only = only

    def wants(self, *titles: str) -> bool:
        return any(self._only in title for title in titles)

    def show(self, title: str, result: str) -> None:
        if self.wants(title):
            print(f"{title:<50}{result:>42}", flush=True)


class Image:
    """An image with bitmaps of which the same half of the bits is set, at random; seeded."""

    def __init__(self, folder: Path, bitmaps: int, granularity: int, *, is_dense: bool) -> None:
        self.disk = Disk.create(folder / f"{bitmaps}-{granularity}-{is_dense}.qcow2", SIZE)
        self.granularity = granularity
        granules = SIZE // granularity
        self._bits = bits = _random.integers(0, 256 if is_dense else 1, granules // 8, np.uint8)
        with qcow2bm.open(self.disk.path, "r+") as image, image.edit() as edit:
            for number in range(bitmaps):
                edit.add(f"b{number}", granularity)
                edit._draft.merge(f"b{number}", PackedSource(bits, granularity, SIZE), "or")

    def starts(self, count: int) -> NDArray[np.int64]:
        """Guest offsets in so many granules that are clean, and count as dirty from now on."""
        granules = 8 * len(self._bits)
        places = np.unique(_random.integers(0, granules, 4 * count + 100))
        is_clean = self._bits[places >> 3] >> (places & 7).astype(np.uint8) & 1 == 0
        places = _random.permutation(places[is_clean])[:count]
        assert len(places) == count
        np.bitwise_or.at(self._bits, places >> 3, (1 << (places & 7)).astype(np.uint8))
        return places * self.granularity

    @contextmanager
    def tracked(self) -> Iterator[Tracker]:
        """A tracker of all the bitmaps, which are stored when the block ends."""
        with qcow2bm.open(self.disk.path, "r+") as image, image.track() as tracker:
            yield tracker


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def tracked_stop(image: Image) -> tuple[float, StopReport]:
    """A stop with 100 new marks since the last flush."""
    with image.tracked() as tracker:
        for marks in (1000, 100):
            tracker.flush()
            for start in image.starts(marks).tolist():
                tracker.mark(start, 4096)
        os.sync()  # or the first barrier would wait for what others wrote
        start_of_stop = time.perf_counter()
        report = tracker.stop()
        return time.perf_counter() - start_of_stop, report


def qemu_stop(image: Image, daemon: StorageDaemon) -> float:
    daemon.open(image.disk, read_only=False)
    os.sync()
    return seconds(daemon.close)


def bench_stops(bench: Bench) -> None:
    taken: dict[tuple[int, int], float] = {}
    for bitmaps, granularity in ((1, K64), (4, K64), (8, K64), (1, K4)):
        size = SIZE // granularity // 8 // MIB
        title = f"stop, {bitmaps} x {size} MiB / QEMU"
        if not bench.wants(title, *([_FLAT] if bitmaps == 1 else [])):
            continue
        image = Image(bench.folder, bitmaps, granularity, is_dense=True)
        ours, theirs = [], []
        with StorageDaemon() as daemon:
            for round_ in range(bench.rounds + 1):
                stop, report = tracked_stop(image)
                qemu = qemu_stop(image, daemon)
                if round_:
                    ours.append(stop)
                    theirs.append(qemu)
        a, b = median(ours), median(theirs)
        taken[bitmaps, granularity] = a
        result = f"{a * 1e3:8.1f} ms{b * 1e3:8.0f} ms {b / a:6.1f}x faster"
        bench.show(title, result)
        pieces = f"{report.bytes_written:12,} bytes ({report.pieces} pieces)"
        print(f"{'':>16}{pieces}, {report.barriers} barriers", flush=True)
        image.disk.path.unlink()
    if bench.wants(_FLAT):
        ratio = taken[1, K4] / taken[1, K64]
        bench.show(_FLAT, f"{ratio:.2f}x as long")


def given_and_taken_back(image: Image, daemon: StorageDaemon | None) -> tuple[float, float, float]:
    """Seconds of the stop, of taking back, and of storing what that makes due once more.

    With a daemon, that opens the image for writing and closes it in between.
    """
    with image.tracked() as tracker:
        for start in image.starts(1000).tolist():
            tracker.mark(start, 4096)
        tracker.flush()
        tracker.begin_migration()
        for start in image.starts(100).tolist():
            tracker.mark(start, 4096)
        os.sync()
        stop = seconds(tracker.inactivate)
        if daemon:
            qemu_stop(image, daemon)
        begun = time.perf_counter()
        activation = tracker.activate()
        back = time.perf_counter() - begun
        assert activation.outcome == "unchanged", activation
        return stop, back, seconds(tracker.flush)


def bench_handover(bench: Bench) -> None:
    title = "inactivate + activate, 8 x 32 MiB / QEMU"
    between = "the same, opened by QEMU in between / QEMU"
    if not bench.wants(title, between):
        return
    image = Image(bench.folder, 8, K64, is_dense=True)
    taken: dict[str, list[tuple[float, float, float]]] = {title: [], between: []}
    theirs = []
    with StorageDaemon() as daemon:
        for round_ in range(bench.rounds + 1):
            found = {
                title: given_and_taken_back(image, None),
                between: given_and_taken_back(image, daemon),
            }
            stop = qemu_stop(image, daemon)
            load = seconds(lambda: daemon.open(image.disk, read_only=False))
            daemon.close()
            if round_:
                theirs.append((stop, load))
                for name, times in found.items():
                    taken[name].append(times)
    qemu_stop_time, qemu_load = (median(column) for column in zip(*theirs, strict=True))
    qemu = qemu_stop_time + qemu_load
    for name, rows in taken.items():
        stop, back, again = (median(column) for column in zip(*rows, strict=True))
        ratio = qemu / (stop + back)
        result = f"{(stop + back) * 1e3:.1f} ms {qemu * 1e3:.0f} ms {ratio:.1f}x faster"
        bench.show(name, result)
        ours = f"inactivate {stop * 1e3:.1f} ms, activate {back * 1e3:.1f} ms"
        print(f"{'':>16}{ours}, flush afterwards {again * 1e3:.0f} ms")
        theirs_too = f"store {qemu_stop_time * 1e3:.0f} ms, load {qemu_load * 1e3:.0f} ms"
        print(f"{'':>16}QEMU: {theirs_too}", flush=True)
    image.disk.path.unlink()


class Bare:
    """The cost of marking with no lock, no pieces and no flush."""

    def __init__(self) -> None:
        self.size = SIZE
        self.shift = K64.bit_length() - 1
        self.octets = bytearray(SIZE // K64 // 8)

    def mark(self, start: int, length: int) -> None:
        end = start + length
        if start < 0 or length < 0 or end > self.size:
            raise ValueError(start)
        first = start >> self.shift
        self.octets[first >> 3] |= 1 << (first & 7)


def marks_per_second(mark: Callable[[int, int], None], starts: list[int]) -> float:
    start_of_all = time.perf_counter()
    for start in starts:
        mark(start, 4096)
    return len(starts) / (time.perf_counter() - start_of_all)


def bench_marking(bench: Bench) -> None:
    titles = [
        "mark, 1 bitmap",
        "mark, 1 bitmap / bare bytearray",
        "mark, 1 bitmap, dirty already / bare bytearray",
        "mark, 8 bitmaps / 1 bitmap",
        "mark_many of 1,000 / mark",
    ]
    if not bench.wants(*titles):
        return
    names = ("bare", "one", "again", "eight", "many")
    rates: dict[str, list[float]] = {name: [] for name in names}
    one = Image(bench.folder, 1, K64, is_dense=False)
    eight = Image(bench.folder, 8, K64, is_dense=False)
    for _ in range(bench.rounds):
        starts = one.starts(MARKS).tolist()
        rates["bare"].append(marks_per_second(Bare().mark, starts))
        with one.tracked() as tracker:
            rates["one"].append(marks_per_second(tracker.mark, starts))
            rates["again"].append(marks_per_second(tracker.mark, starts))
            starts = one.starts(MARKS)
            ranges = np.stack([starts, np.full_like(starts, 4096)], axis=1)
            parts = np.split(ranges, MARKS // 1000)
            begun = time.perf_counter()
            for part in parts:
                tracker.mark_many(part)
            rates["many"].append(MARKS / (time.perf_counter() - begun))
        with eight.tracked() as tracker:
            starts = eight.starts(MARKS).tolist()
            rates["eight"].append(marks_per_second(tracker.mark, starts))
    bare, once, again, of_eight, many = (median(rates[name]) for name in names)
    rates_and_bases = (once, None), (once, bare), (again, bare), (of_eight, once), (many, once)
    for title, (rate, base) in zip(titles, rates_and_bases, strict=True):
        ratio = f" {rate / base:6.2f}x" if base else ""
        bench.show(title, f"{rate / 1e6:8.2f} M/s{ratio}")
    for image in (one, eight):
        image.disk.path.unlink()


def latencies(
    mark: Callable[[int, int], None], starts: list[int], pause: float
) -> NDArray[np.float64]:
    """The milliseconds that each mark takes, with so many seconds between them."""
    taken = []
    for start in starts:
        begun = time.perf_counter_ns()
        mark(start, 4096)
        taken.append(time.perf_counter_ns() - begun)
        if pause:
            time.sleep(pause)
    return np.array(taken) / 1e6


@contextmanager
def always_flushing(tracker: Tracker) -> Iterator[None]:
    """Another thread does nothing but flush meanwhile, each time about 1,000 pieces."""
    is_done = threading.Event()
    ranges = np.full((2000, 2), 4096)

    def flush() -> None:
        while not is_done.is_set():
            ranges[:, 0] = _random.integers(0, SIZE - 4096, len(ranges))
            tracker.mark_many(ranges)
            tracker.flush()

    with ThreadPoolExecutor(1) as threads:
        flusher = threads.submit(flush)
        try:
            yield
        finally:
            is_done.set()
    flusher.result()


def bench_latency(bench: Bench) -> None:
    """Marks in a row, and as a guest makes them.

    Of those in a row hardly one in a thousand is the one that waits for the interpreter.
    """
    for bitmaps in (1, 8):
        for how, count, pause in (("in a row", MARKS, 0.0), ("5,000 a second", 10_000, 2e-4)):
            title = f"p99.9 of mark while flushing {bitmaps}, {how}"
            if not bench.wants(title):
                continue
            image = Image(bench.folder, bitmaps, K64, is_dense=True)
            starts = image.starts(2 * count).tolist()
            with image.tracked() as tracker:
                alone = np.quantile(latencies(tracker.mark, starts[:count], pause), 0.999)
                with always_flushing(tracker):
                    taken = latencies(tracker.mark, starts[count:], pause)
            late = float(np.quantile(taken, 0.999))
            result = f"{late:.3f} ms, worst {taken.max():.1f} (not flushing: {alone:.3f})"
            bench.show(title, result)
            image.disk.path.unlink()


def bench_memory(bench: Bench) -> None:
    for bitmaps in (1, 8):
        for how, marks in (("1,000 pieces dirty", 1000), ("all pieces dirty", MARKS)):
            title = f"memory of {bitmaps}, {how}"
            if not bench.wants(title):
                continue
            image = Image(bench.folder, bitmaps, K64, is_dense=True)
            starts = image.starts(marks).tolist()
            gc.collect()
            tracemalloc.start()
            with image.tracked() as tracker:
                for start in starts:
                    tracker.mark(start, 4096)
                tracker.flush()
                tracker.stop()
                peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            bits = bitmaps * SIZE // K64 // 8
            bench.show(title, f"{peak / MIB:.0f} MiB for {bits // MIB} MiB of bits")
            image.disk.path.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="how often each command is measured")
    parser.add_argument("--only", default="", help="only benchmarks with this in their title")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), arguments.rounds, arguments.only)
        for part in (bench_stops, bench_handover, bench_marking, bench_latency, bench_memory):
            part(bench)


if __name__ == "__main__":
    main()
