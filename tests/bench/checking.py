"""Measures how fast checking and comparing two disks are, compared with qemu-img and cmp.

    .venv/bin/python tests/bench/checking.py [--rounds 5]

Each line has two times: first that of this library, then that of the program after the slash.
"2x faster" means that the other program took twice as long, "2x slower" that this library did.
Both are run in turn (A B A B ...), after one round that is thrown away, and the medians of the
rounds are compared: times depend on the machine and its load, ratios hardly do. The results of one
machine are in README.md, "Measured".

The image is of a disk of 16 TiB, of which 10 GiB are allocated, with a bitmap of 32 MiB that is
random. Then come sparse images of less than 1 MB that claim much, which are made by
tests/support/sparse_images.py. Two raw files of 4 GiB are compared as `salvage --compare` does:
equal, full of random bytes, in the page cache if there is room for them; one also as a qcow2 image.
Then `verify` compares them, as a whole process, with a bitmap that is clean, or of which every
other MiB is dirty; and the process's peak of memory is shown. With --comparing, nothing else is
measured.
Needs qemu-utils, and 13 GB in the folder for temporary files.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support.sparse_images import IMAGES  # noqa: E402

import qcow2bm  # noqa: E402
from qcow2bm.compare.content import Content, RawContent  # noqa: E402
from qcow2bm.compare.differences import find_differences  # noqa: E402
from qcow2bm.compare.pieces import WORKERS  # noqa: E402
from qcow2bm.compare.qemu_nbd import served  # noqa: E402
from qcow2bm.storage.file import FileStorage  # noqa: E402

DISK, ALLOCATED, GRANULARITY = 16 << 40, "10G", 64 << 10
COMPARED = 4 << 30
SPARSE = (
    "20,000 refcount blocks in holes",
    "clusters of the disk that are far apart",
    "an L1 table that leads to one L2 table",
)


def make_image(path: Path) -> None:
    """Made by QEMU, but for the bits."""
    preallocated = ["-o", "preallocation=metadata"]
    run("qemu-img", "create", "-q", "-f", "qcow2", *preallocated, path, ALLOCATED)
    run("qemu-img", "resize", "-q", path, str(DISK))
    bits = np.random.default_rng(1).integers(1, 255, DISK // GRANULARITY // 8, np.uint8)
    with qcow2bm.open(path, "r+") as image, image.edit() as edit:
        edit.load("daily", GRANULARITY, bits)


def run(*command: str | Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": ""}
    subprocess.run([*map(str, command)], check=True, stdout=subprocess.DEVNULL, env=environment)


def check(path: Path) -> None:
    with qcow2bm.open(path) as image:
        assert not image.problems
        assert not image.check().problems


def differing(old: Path, new: Path) -> None:
    with closing(FileStorage(old)) as one, ExitStack() as opened:
        if new.suffix == ".qcow2":
            content: Content = opened.enter_context(served(str(new), WORKERS))
        else:
            content = RawContent(opened.enter_context(closing(FileStorage(new))))
        assert not find_differences(RawContent(one), content, GRANULARITY).any()


def make_disks(folder: Path) -> tuple[Path, Path, Path]:
    """Two raw files, and a qcow2 image, that hold the same."""
    old, new, image = folder / "old.raw", folder / "new.raw", folder / "new.qcow2"
    random = np.random.default_rng(1)
    with old.open("wb") as file:
        for _ in range(COMPARED >> 26):
            file.write(random.bytes(1 << 26))
    shutil.copyfile(old, new)
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", old, image)
    return old, new, image


def bitmaps(folder: Path, image: Path) -> Path:
    """Adds a clean and a half-dirty bitmap to an image, and to a new one for the raw disk."""
    empty = folder / "bitmaps.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", empty, str(COMPARED))
    for path in (image, empty):
        with qcow2bm.open(path, "r+") as opened, opened.edit() as edit:
            edit.add("clean", GRANULARITY)
            edit.add("half", GRANULARITY)
            edit.set_many("half", [(at, 1 << 20) for at in range(0, COMPARED, 2 << 20)])
    return empty


def verify(*arguments: str | Path) -> None:
    run(sys.executable, "-m", "qcow2bm", "verify", *arguments)


def print_memory(*arguments: str | Path) -> None:
    """Prints the peak of a verification, and how much of that a start takes."""
    program = "import sys; from qcow2bm.cli import main; main(sys.argv[1:]); "
    program += "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    peaks = []
    for command in (["map", arguments[0], "clean"], ["verify", *arguments]):
        done = subprocess.run(
            [sys.executable, "-c", program, *map(str, command)],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        peaks.append(int(done.stdout.split()[-1]) / 1024)
    print(f"memory of verify: {peaks[1]:.0f} MiB, {peaks[1] - peaks[0]:.0f} MiB more than map")


def compare_disks(folder: Path, rounds: int) -> None:
    """Measures comparisons of two disks."""
    old, new, image = make_disks(folder)
    title = "two raw files of 4 GiB / cmp"
    compare(title, lambda: differing(old, new), lambda: run("cmp", old, new), rounds)
    both = "qemu-img", "compare", "-f", "raw", "-F"

    def theirs_raw() -> None:
        run(*both, "raw", old, new)

    def theirs() -> None:
        run(*both, "qcow2", old, image)

    title = "two raw files of 4 GiB / qemu-img compare"
    compare(title, lambda: differing(old, new), theirs_raw, rounds)
    title = "raw and qcow2, 4 GiB / qemu-img compare"
    compare(title, lambda: differing(old, image), theirs, rounds)
    empty = bitmaps(folder, image)
    raw = "--new", new, "--assert-current"
    for name in ("clean", "half"):
        title = f"verify raw disk, {name} / qemu-img compare"
        compare(title, partial(verify, empty, name, old, *raw), theirs_raw, rounds)
        title = f"verify qcow2 disk, {name} / qemu-img compare"
        compare(title, partial(verify, image, name, old), theirs, rounds)
    print_memory(image, "half", old)


def compare(
    title: str, ours: Callable[[], object], theirs: Callable[[], object], rounds: int
) -> None:
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    for round_ in range(rounds + 1):
        for name, work in (("ours", ours), ("theirs", theirs)):
            start = time.perf_counter()
            work()
            if round_:
                times[name].append(time.perf_counter() - start)
    a, b = median(times["ours"]), median(times["theirs"])
    ratio = f"{b / a:5.2f}x faster" if b > a else f"{a / b:5.2f}x slower"
    print(f"{title:<65}{a * 1e3:9.1f} ms {b * 1e3:9.1f} ms  {ratio}")


def compare_sparse(path: Path, name: str, rounds: int) -> None:
    """Measures how long a sparse image takes that hardly stores anything."""
    IMAGES[name](path)

    def ours() -> None:
        qcow2bm.check(path)

    def theirs() -> None:  # the status says what is wrong with the image
        subprocess.run(["qemu-img", "check", path], capture_output=True)

    compare(f"{name}: check / qemu-img check", ours, theirs, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="how often each command is measured")
    parser.add_argument("--comparing", action="store_true", help="measure only the comparisons")
    arguments = parser.parse_args()
    rounds = arguments.rounds
    with tempfile.TemporaryDirectory(prefix="qcow2bm-bench-") as folder:
        if arguments.comparing:
            compare_disks(Path(folder), rounds)
            return
        path = Path(folder, "vm.qcow2")
        make_image(path)

        def theirs() -> None:
            run("qemu-img", "check", path)

        compare("check, in process / qemu-img check", lambda: check(path), theirs, rounds)
        python = sys.executable, "-m", "qcow2bm"
        compare("check / qemu-img check", lambda: run(*python, "check", path), theirs, rounds)
        dry_run = "repair", path, "--dry-run"
        compare("repair --dry-run / qemu-img check", lambda: run(*python, *dry_run), theirs, rounds)
        for name in SPARSE:
            compare_sparse(Path(folder, "sparse.qcow2"), name, rounds)
        compare_disks(Path(folder), rounds)


if __name__ == "__main__":
    main()
