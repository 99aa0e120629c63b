"""Comparing how long two things take, run in turn, such as a command and one of QEMU's tools."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[2]
PYTHON = sys.executable


class Bench:
    """Runs pairs in turn and prints a line for each."""

    def __init__(self, rounds: int, only: str) -> None:
        self.rounds = rounds
        self.only = only

    def compare(
        self,
        title: str,
        ours: Callable[[], object],
        theirs: Callable[[], object],
        *,
        times_in_a_row: int = 1,
    ) -> None:
        """Runs both in turn, ``ours`` so often in a row if once is too short to be measured."""
        if self.only not in title:
            return
        times: dict[Callable[[], object], list[float]] = {ours: [], theirs: []}
        for round_ in range(self.rounds + 1):
            for run, count in ((ours, times_in_a_row), (theirs, 1)):
                start = time.perf_counter()
                for _ in range(count):
                    run()
                if round_:
                    times[run].append((time.perf_counter() - start) / count)
        a, b = median(times[ours]), median(times[theirs])
        ratio = f"{b / a:5.2f}x faster" if b > a else f"{a / b:5.2f}x slower"
        print(f"{title:<58}{a * 1e3:9.1f} ms {b * 1e3:9.1f} ms  {ratio}")


def command(*arguments: str | Path) -> Callable[[], object]:
    def run() -> None:
        subprocess.run(
            [*map(str, arguments)],
            check=True,
            stdout=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": ""},
        )

    return run


def is_listening(socket: Path) -> bool:
    """Returns whether a server listens at the path: the path is there shortly before that."""
    lines = Path("/proc/net/unix").read_text().splitlines()
    return any(line.endswith(f" {socket}") and " 00010000 " in line for line in lines)


def nbdinfo(image: Path) -> Callable[[], object]:
    """Returns a function that serves the image with its bitmap, and lists the map as JSON."""

    def run() -> None:
        socket = image.with_suffix(".sock")
        server = subprocess.Popen(
            ["qemu-nbd", "-r", "-f", "qcow2", "-B", "b", "-k", socket, "-t", image]
        )
        try:
            while not is_listening(socket):
                time.sleep(0.001)
            subprocess.run(
                ["nbdinfo", "--map=qemu:dirty-bitmap:b", "--json", f"nbd+unix:///?socket={socket}"],
                check=True,
                stdout=subprocess.DEVNULL,
            )
        finally:
            server.terminate()
            server.wait()
            socket.unlink(missing_ok=True)

    return run


def ours(*arguments: str | Path) -> Callable[[], object]:
    return command(PYTHON, "-m", "qcow2bm", *arguments)


@contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="qcow2bm-bench-") as name:
        yield Path(name)
