"""A crash of a tracker with intent, and then QEMU: what `recover` makes of it has every write."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.console import ROOT, environment, run
from support.qemu import Disk
from support.specreader import page
from support.twin import KiB, MiB

import qcow2bm
from qcow2bm.migration.intent import is_intent

SIZE = 256 * MiB
GRANULARITIES = {"daily": 64 * KiB, "fine": 4 * KiB}
BEFORE, UNSTORED, LATER = 3 * MiB, 70 * MiB + 512, 200 * MiB

DIES = f"""
import os, sys, qcow2bm
image = qcow2bm.open(sys.argv[1], "r+")
tracker = image.track(intent=True)
with tracker.writing({BEFORE}, 1):
    pass
for _ in range(3):
    tracker.flush()
with tracker.writing({UNSTORED}, 1):
    os.kill(os.getpid(), 9)
"""


def crash(folder: Path) -> Disk:
    """A disk whose tracker was killed inside a write."""
    disk = Disk.create(folder / "disk.qcow2", SIZE)
    for name, granularity in GRANULARITIES.items():
        disk.add(name, granularity)
    command = [sys.executable, "-c", DIES, str(disk.path)]
    done = subprocess.run(command, env=environment(), cwd=ROOT, check=False)
    assert done.returncode == -9
    return disk


def helpers(disk: Disk) -> list[str]:
    """The names of the intent bitmap and of its canary."""
    with qcow2bm.open(disk.path) as image:
        return sorted(filter(is_intent, image.bitmaps))


def valid_bitmaps(disk: Disk) -> set[str]:
    """The bitmaps that QEMU takes for valid."""
    return {found["name"] for found in disk.listed() if "in-use" not in found["flags"]}


def assert_recovered(disk: Disk, *names: str, later: int | None = None) -> None:
    """The bitmaps are valid, for QEMU as well, have every write, and little more."""
    with qcow2bm.open(disk.path, "r+") as image:
        assert {*image.recover().names} == {*names}
        assert not any(map(is_intent, image.bitmaps))
    assert disk.check().returncode == 0
    assert {*names} <= valid_bitmaps(disk)
    written = [BEFORE, UNSTORED, *([later] if later is not None else [])]
    with qcow2bm.open(disk.path) as image:
        for name in names:
            granularity = GRANULARITIES[name]
            bits = np.unpackbits(image.bitmaps[name].packed(), bitorder="little")
            found = set(np.flatnonzero(bits).tolist())
            assert {start // granularity for start in written} <= found
            regions = {start // MiB for start in written}
            assert {place * granularity // MiB for place in found} <= regions


def killed(disk: Disk) -> None:
    """The tracker is killed."""


def booted(disk: Disk) -> None:
    disk.io(f"write {LATER} 4k")


def booted_and_killed(disk: Disk) -> None:
    disk.crash(f"write {LATER} 4k")


def cleared(disk: Disk) -> None:
    for name in helpers(disk):
        disk.bitmap(name, "--clear")


def made_again(disk: Disk) -> None:
    disk.bitmap("fine", "--remove")
    disk.add("fine", 4 * KiB)
    disk.io(f"write {LATER} 4k")


CASES = (killed, booted, booted_and_killed, cleared, made_again)


@pytest.mark.spec("INTENT-5", "INTENT-6")
@pytest.mark.parametrize("number", range(len(CASES)))
def test_what_becomes_of_the_bitmaps(tmp_path: Path, number: int) -> None:
    row = page("intent.md").table("Recovery").rows[number]
    disk = crash(tmp_path)
    play = CASES[number]
    play(disk)
    if row["bitmaps"].startswith("not"):
        with (
            qcow2bm.open(disk.path, "r+") as image,
            pytest.raises(qcow2bm.IntentError, match=r"in_use|canary"),
        ):
            image.recover()
        assert not valid_bitmaps(disk) & {*GRANULARITIES}
    elif play is made_again:
        assert_recovered(disk, "daily", later=LATER)
        with qcow2bm.open(disk.path) as image:
            assert image.bitmaps["fine"].count() == 4 * KiB
    else:
        assert_recovered(disk, *GRANULARITIES, later=LATER if play is booted else None)


def test_the_table_has_the_cases() -> None:
    assert len(page("intent.md").table("Recovery").rows) == len(CASES)


@pytest.mark.spec("INTENT-5", "CLI-52")
def test_the_command_that_is_advised_works(tmp_path: Path) -> None:
    disk = crash(tmp_path)
    for command in (["dump", "disk.qcow2"], ["check", "disk.qcow2"]):
        assert "next: qcow2bm recover disk.qcow2\n" in run(command, tmp_path).out
    said = run(["verdict", "disk.qcow2", "daily"], tmp_path)
    assert said.status == 4
    assert "next: qcow2bm recover disk.qcow2 daily" in said.out
    before = disk.path.read_bytes()
    done = run(["recover", "disk.qcow2", "--dry-run"], tmp_path)
    assert (done.status, done.err) == (0, "")
    assert disk.path.read_bytes() == before
    done = run(["recover", "disk.qcow2", "daily"], tmp_path)
    assert (done.status, done.err) == (0, "")
    assert done.out.startswith('"daily" is valid, with every write: 1.1 MiB')
    assert run(["verdict", "disk.qcow2", "daily"], tmp_path).status == 0
    done = run(["recover", "disk.qcow2", "--json"], tmp_path)
    assert (done.status, done.err) == (0, "")
    assert run(["verdict", "disk.qcow2", "fine"], tmp_path).status == 0
    assert disk.check().returncode == 0


@pytest.mark.spec("INTENT-7")
def test_qemu_reads_what_the_next_tracker_recovered(tmp_path: Path) -> None:
    disk = crash(tmp_path)
    with qcow2bm.open(disk.path, "r+") as image, image.track() as tracker:
        assert tracker.names == [*GRANULARITIES]
    assert valid_bitmaps(disk) == {*GRANULARITIES}
    assert disk.check().returncode == 0
