"""Bitmaps are taken out of a running QEMU, and put back: none misses a write."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.qemu import Disk
from support.twin import KiB, MiB
from support.vm import Machine

import qcow2bm
from qcow2bm import live

pytestmark = pytest.mark.usefixtures("system_emulator")

SIZE = 256 * MiB + 512
GRANULARITIES = {"daily": 64 * KiB, "fine": 4 * KiB, "off": 64 * KiB, "größe \N{SNOWMAN}": MiB}
TAIL = 4 * MiB

Ranges = list[tuple[int, int]]

BEFORE: Ranges = [(MiB, 3 * MiB), (SIZE - 512, 512)]
MEANWHILE: Ranges = [(70 * MiB + 512, 512), (133 * MiB, 64 * KiB)]


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    """A disk with bitmaps that record, and the bitmap ``off``, which does not."""
    disk = Disk.create(tmp_path / "disk.qcow2", SIZE)
    for name, granularity in GRANULARITIES.items():
        disk.add(name, granularity)
    disk.io(*(f"write {start} {length}" for start, length in BEFORE))
    disk.bitmap("off", "--disable")
    return disk


def widened(ranges: Ranges, granularity: int) -> set[int]:
    """The numbers of the granules that ranges touch."""
    return {
        granule
        for start, length in ranges
        for granule in range(start // granularity, (start + length - 1) // granularity + 1)
    }


def granules(path: Path, name: str) -> set[int]:
    """The dirty granules of a bitmap that is valid in an image."""
    with qcow2bm.open(path) as image:
        bits = np.unpackbits(image.bitmaps[name].packed(), bitorder="little")
        return set(np.flatnonzero(bits).tolist())


def assert_back(disk: Disk, meanwhile: Ranges = MEANWHILE) -> None:
    """Every bitmap is as before, and has every write, and no more than the tail's granularity."""
    assert disk.check().returncode == 0
    with qcow2bm.open(disk.path) as image:
        found = {name: (b.granularity, b.auto, b.status) for name, b in image.bitmaps.items()}
    assert found == {
        name: (granularity, name != "off", "valid") for name, granularity in GRANULARITIES.items()
    }
    for name, granularity in GRANULARITIES.items():
        bits = granules(disk.path, name)
        ours = widened(BEFORE, granularity)
        if name == "off":
            assert bits == ours
            continue
        coarse = [
            (place * TAIL, min(TAIL, SIZE - place * TAIL)) for place in widened(meanwhile, TAIL)
        ]
        assert ours | widened(meanwhile, granularity) <= bits
        assert bits <= ours | widened(coarse, granularity)


def offload(address: Path, path: Path) -> live.OffloadReport:
    with live.Monitor(str(address)) as monitor:
        return live.offload(monitor, str(path))


def restore(address: Path, path: Path) -> live.RestoreReport:
    with live.Monitor(str(address)) as monitor:
        return live.restore(monitor, str(path))


def write(machine: Machine) -> None:
    for start, length in MEANWHILE:
        machine.write(start, length)


@pytest.mark.spec("LIVE-1")
def test_out_and_back_in_the_same_machine(disk: Disk, tmp_path: Path) -> None:
    address, path = tmp_path / "qmp", tmp_path / "offloaded"
    with Machine(disk.path, monitor=address) as machine:
        report = offload(address, path)
        assert report.left == ()
        (tail,) = machine.bitmaps()
        assert tail.startswith("qcow2bm-tail-")
        write(machine)
        done = restore(address, path).bitmaps
        assert {(one.outcome, one.reason) for one in done} == {("restored", "")}
        assert {*machine.bitmaps()} == {*GRANULARITIES}
        machine.quit()
    assert_back(disk)


@pytest.mark.spec("LIVE-2")
def test_back_into_the_image_of_a_machine_that_is_off(disk: Disk, tmp_path: Path) -> None:
    address, path = tmp_path / "qmp", tmp_path / "offloaded"
    with Machine(disk.path, monitor=address) as machine:
        offload(address, path)
        write(machine)
        machine.quit()
    with qcow2bm.open(disk.path, "r+") as image:
        live.restore_offline(str(path), image)
    assert_back(disk)
