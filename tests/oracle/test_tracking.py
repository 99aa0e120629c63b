"""QEMU and this library record the same writes: the bits are the same, and QEMU trusts them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import numpy as np
import pytest
from support.qemu import Disk, StorageDaemon, run_ok

import qcow2bm

KiB, MiB = 1 << 10, 1 << 20
SIZE = 96 * MiB + 512

GRANULARITIES = {
    "512": (512,),
    "4 KiB": (4 * KiB,),
    "1 MiB": (MiB,),
    "mixed": (64 * KiB, 512, 2 << 30, 4 * KiB),
}
CLUSTER_SIZES = (4 * KiB, 64 * KiB)

Write = tuple[int, int]


def writes(seed: str, count: int) -> list[Write]:
    """Short ones all over the disk, some long ones, and its last bytes."""
    random = Random(seed)
    found = [(SIZE - 1, 1)]
    while len(found) < count:
        length = random.choice((1, 512, 513, 4 * KiB, random.randrange(1, 20 * KiB)))
        if len(found) % 500 == 0:
            length = random.randrange(MiB)
        start = random.choice((random.randrange(SIZE), random.randrange(SIZE) // 512 * 512))
        found.append((start, min(length, SIZE - start)))
    return found


def through_qemu(disk: Disk, listed: list[Write]) -> None:
    """Writes them to the disk, with the bitmaps loaded and stored by QEMU some times meanwhile."""
    for first in range(0, len(listed), 2500):
        part = listed[first : first + 2500]
        data = [f"write {start} {length}" for start, length in part[:100]]
        disk.io(*data, *(f"write -z {start} {length}" for start, length in part[100:]))


def through_the_tracker(path: Path, listed: list[Write], random: Random) -> None:
    """Marks them in all the ways there are, and flushes now and then."""
    place = 0
    while place < len(listed):
        stop = place + random.randrange(1, len(listed))  # then opened again
        with qcow2bm.open(path, "r+") as image, image.track() as tracker:
            while place < min(stop, len(listed)):
                count = random.choice((1, 1, 1, 100))
                part = listed[place : place + count]
                place += len(part)
                if count > 1:
                    tracker.mark_many(np.array(part))
                elif random.random() < 0.5:
                    tracker.mark(*part[0])
                else:
                    with tracker.writing(*part[0]):
                        pass
                if random.random() < 0.01:
                    tracker.flush(random.choice((None, 8 * KiB)))


def hashes_by_qemu(disk: Disk) -> dict[str, str]:
    """The hashes of all bitmaps, as QEMU reads them."""
    with StorageDaemon() as daemon:
        daemon.open(disk)
        found = {name: daemon.sha256(name) for name in daemon.bitmaps()}
        daemon.close()
    return found


def hashes(path: Path) -> dict[str, str]:
    """The hashes of all bitmaps, as this library reads them."""
    with qcow2bm.open(path) as image:
        return {name: bitmap.sha256() for name, bitmap in image.bitmaps.items()}


def assert_sound(disk: Disk, granularities: tuple[int, ...], *flags: str) -> None:
    done = disk.check()
    assert done.returncode == 0, done.stdout + done.stderr
    assert [(b["granularity"], sorted(b["flags"])) for b in disk.listed()] == [
        (granularity, sorted(("auto", *flags))) for granularity in granularities
    ]


@pytest.mark.parametrize("cluster_size", CLUSTER_SIZES)
@pytest.mark.parametrize("kind", GRANULARITIES)
def test_ten_thousand_writes(kind: str, cluster_size: int, tmp_path: Path) -> None:
    granularities = GRANULARITIES[kind]
    disk = Disk.create(tmp_path / "qemu", SIZE, cluster_size=cluster_size)
    for number, granularity in enumerate(granularities):
        disk.add(f"b{number}", granularity)
    disk.io("write -z 0 70000", "write -z 50M 1000")  # so that some clusters are there already
    copy = Disk(Path(shutil.copy(disk.path, tmp_path / "tracked")))
    seed = f"{kind} {cluster_size}"
    listed = writes(seed, 10_000)
    through_qemu(disk, listed)
    through_the_tracker(copy.path, listed, Random(seed))

    expected = hashes_by_qemu(disk)
    assert len({*expected.values()}) == len(granularities) == len(expected)
    assert hashes_by_qemu(copy) == hashes(copy.path) == hashes(disk.path) == expected
    assert_sound(copy, granularities)


def test_taking_turns(tmp_path: Path) -> None:
    """Each goes on in the bitmaps as the other left them."""
    granularities = (4 * KiB, 512)
    tracked = Disk.create(tmp_path / "tracked", SIZE, cluster_size=4 * KiB)
    for number, granularity in enumerate(granularities):
        tracked.add(f"b{number}", granularity)
    alone = Disk(Path(shutil.copy(tracked.path, tmp_path / "alone")))
    for turn in range(6):
        listed = writes(f"turn {turn}", 50)
        alone.io(*(f"write -z {start} {length}" for start, length in listed))
        if turn % 2:
            tracked.io(*(f"write -z {start} {length}" for start, length in listed))
        else:
            through_the_tracker(tracked.path, listed, Random(turn))
        assert_sound(tracked, granularities)
        assert hashes_by_qemu(tracked) == hashes_by_qemu(alone)


SCRIPT = """
import sys
import qcow2bm

with qcow2bm.open(sys.argv[1], "r+") as image:
    tracker = image.track()
    for moment in ("tracked", "marked", "flushed", "marked again"):
        if moment.startswith("marked"):
            tracker.mark(0, image.virtual_size // (3 if moment == "marked" else 2))
        elif moment == "flushed":
            tracker.flush()
        print(moment, flush=True)
        if moment == sys.argv[2]:
            sys.stdin.read()
"""
MOMENTS = ("tracked", "marked", "flushed", "marked again")


@contextmanager
def tracking(path: Path, moment: str) -> Iterator[subprocess.Popen[str]]:
    """A process that tracks a disk, as far as that moment; killed as by kill -9."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, path, moment],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout
        try:
            while (line := process.stdout.readline()) != f"{moment}\n":
                assert line, "the process has ended"
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_while_it_tracks(moment: str, tmp_path: Path) -> None:
    """QEMU sees in_use, before and after, and nothing is lost but the bitmaps."""
    granularities = (64 * KiB, 512)
    disk = Disk.create(tmp_path / "disk", SIZE, cluster_size=4 * KiB)
    for number, granularity in enumerate(granularities):
        disk.add(f"b{number}", granularity)
    disk.io("write -P 7 1M 64k")
    with tracking(disk.path, moment):
        shared = run_ok("qemu-img", "info", "--force-share", str(disk.path))
        assert shared.count("in-use") == len(granularities)
        assert '"write" lock' in disk.check().stderr
    assert_sound(disk, granularities, "in-use")
    with StorageDaemon() as daemon:
        daemon.open(disk)
        assert all(bitmap["inconsistent"] for bitmap in daemon.bitmaps().values())
        daemon.close()
    disk.bitmap("b0", "--remove")
    disk.bitmap("b1", "--remove")
    disk.add("b0", 64 * KiB)
    disk.io("read -P 7 1M 64k", "write -z 0 1")
    with qcow2bm.open(disk.path, "r+") as image, image.track() as tracker:
        tracker.mark(1 * MiB, 1)
    assert_sound(disk, (64 * KiB,))
    assert disk.extents("b0") == [(0, 64 * KiB), (MiB, 64 * KiB)]


def test_qemu_keeps_away_while_it_is_tracked(tmp_path: Path) -> None:
    disk = Disk.create(tmp_path / "disk", SIZE)
    disk.add("b0", 64 * KiB)
    with qcow2bm.open(disk.path, "r+") as image, image.track():
        for options in ((), ("-r",)):
            command = ("qemu-io", *options, "-c", "length", str(disk.path))
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 1
            assert "lock" in done.stderr
    disk.io("write 0 512")
    assert disk.extents("b0") == [(0, 64 * KiB)]
