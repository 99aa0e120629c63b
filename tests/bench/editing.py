"""Measures how fast editing is, and what it writes, compared with qemu-img.

    .venv/bin/python tests/bench/editing.py [--rounds 5] [--only WORD]

Each line has two times of a whole process: first that of qcow2bm, then that of qemu-img bitmap, or
of qemu-io if the line says so. "2x faster" means that QEMU took twice as long, "2x slower" that
qcow2bm did. Both are run in turn on copies of one image (A B A B ...), after one round that is
thrown away, and the medians of the rounds are compared: times depend on the machine and its load,
ratios hardly do. The next two lines say how many bytes and barriers (fdatasync, fsync) each of the
two writes, as strace sees the system calls. The results of one machine are in README.md,
"Measured".

Needs qemu-utils and strace, and 2 GB in the folder for temporary files.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import qcow2bm  # noqa: E402
from qcow2bm.bitmaps.draft_bits import PackedSource  # noqa: E402

TIB = 1 << 40
OURS = (sys.executable, "-m", "qcow2bm")
THEIRS = ("qemu-img", "bitmap")
_CALL = re.compile(r"(pwrite64|pwritev2?|fdatasync|fsync)\(.*\)\s+= (\d+)")


class Case(NamedTuple):
    """One operation, as both programs are asked for it; IMAGE is the image's path."""

    title: str
    bitmaps: tuple[int, ...]  # their granularities: the first is "a", the second "b"
    ours: tuple[str, ...]
    theirs: tuple[str, ...]


def qemu(*words: str) -> tuple[str, ...]:
    return (*THEIRS, *words)


def ours(*words: str) -> tuple[str, ...]:
    return (*OURS, *words)


K4, K8, K64 = 4 << 10, 8 << 10, 64 << 10
CASES = (
    Case("add, 16 TiB at 4 KiB", (K4,), ours("add", "IMAGE", "new"),
         qemu("--add", "IMAGE", "new")),
    Case("remove, 16 TiB at 4 KiB", (K4,), ours("remove", "IMAGE", "a"),
         qemu("--remove", "IMAGE", "a")),
    Case("disable, 16 TiB at 4 KiB", (K4,), ours("disable", "IMAGE", "a"),
         qemu("--disable", "IMAGE", "a")),
    Case("add, 16 TiB at 64 KiB", (K64,), ours("add", "IMAGE", "new"),
         qemu("--add", "IMAGE", "new")),
    Case("remove, 16 TiB at 64 KiB", (K64,), ours("remove", "IMAGE", "a"),
         qemu("--remove", "IMAGE", "a")),
    Case("disable, 16 TiB at 64 KiB", (K64,), ours("disable", "IMAGE", "a"),
         qemu("--disable", "IMAGE", "a")),
    Case("merge, 16 TiB at 64 KiB", (K64, K64), ours("merge", "IMAGE", "a", "b"),
         qemu("--merge", "b", "IMAGE", "a")),
    Case("one bit of 256 MiB / a guest write", (K8,), ours("set", "IMAGE", "a", "5M:1"),
         ("qemu-io", "-f", "qcow2", "-c", "write -q 5M 512", "IMAGE")),
)  # fmt: skip


def make_image(path: Path, granularities: tuple[int, ...]) -> None:
    """A disk of 16 TiB with bitmaps of which half the bits are set, at random; seeded."""
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", str(path), str(16 * TIB)], check=True
    )
    random = np.random.default_rng(1)
    with qcow2bm.open(path, "r+") as image:
        for name, granularity in zip("ab", granularities, strict=False):
            bits = random.integers(0, 256, 16 * TIB // granularity // 8, np.uint8)
            with image.edit() as edit:
                edit.add(name, granularity)
                edit._draft.merge(name, PackedSource(bits, granularity, 16 * TIB), "or")
                edit.reset(name, 5 << 20, granularity)  # the one bit that will be set


def run(command: tuple[str, ...], image: Path, *before: str) -> str:
    """Standard error of a command that must succeed."""
    words = [str(image) if word == "IMAGE" else word for word in command]
    done = subprocess.run(
        [*before, *words],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": ""},
    )
    return done.stderr


def written(command: tuple[str, ...], image: Path) -> tuple[int, int]:
    """Bytes written to files, and barriers."""
    log = image.with_suffix(".strace")
    calls = "trace=pwrite64,pwritev,pwritev2,fdatasync,fsync"
    run(command, image, "strace", "-f", "-qq", "-e", calls, "-e", "signal=none", "-o", str(log))
    found = _CALL.findall(_whole_calls(log.read_text()))
    size = sum(int(count) for call, count in found if "write" in call)
    return size, sum("sync" in call for call, _ in found)


def _whole_calls(text: str) -> str:
    """Joins the lines that strace splits in two when threads interrupt each other."""
    waiting: dict[str, str] = {}
    lines = []
    for line in text.splitlines():
        thread, _, rest = line.partition(" ")
        if "<unfinished" in rest:
            waiting[thread] = rest.partition(" <unfinished")[0]
        elif "resumed>" in rest:
            lines.append(waiting.pop(thread, "") + rest.partition("resumed>")[2])
        else:
            lines.append(rest)
    return "\n".join(lines)


def compare(case: Case, folder: Path, rounds: int) -> None:
    """Prints times, bytes and barriers of both."""
    pristine = folder / f"{'-'.join(map(str, case.bitmaps))}.qcow2"
    if not pristine.exists():
        make_image(pristine, case.bitmaps)
    image = folder / "image.qcow2"
    commands = case.ours, case.theirs
    times: tuple[list[float], list[float]] = [], []
    for round_ in range(rounds + 1):
        for command, taken in zip(commands, times, strict=True):
            shutil.copyfile(pristine, image)
            os.sync()  # or the first barrier would wait for the copy
            start = time.perf_counter()
            run(command, image)
            if round_:
                taken.append(time.perf_counter() - start)
    a, b = (median(taken) for taken in times)
    ratio = f"{b / a:.1f}x faster" if b > a else f"{a / b:.1f}x slower"
    print(f"{case.title:<36}{a * 1e3:8.0f} ms{b * 1e3:8.0f} ms  {ratio}")
    for who, command in zip(("qcow2bm", "QEMU"), commands, strict=True):
        shutil.copyfile(pristine, image)
        size, barriers = written(command, image)
        print(f"{who:>16}: {size:12,} bytes, {barriers} barriers", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="how often each command is measured")
    parser.add_argument("--only", default="", help="only benchmarks with this in their title")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            if arguments.only in case.title:
                compare(case, Path(folder), arguments.rounds)


if __name__ == "__main__":
    main()
