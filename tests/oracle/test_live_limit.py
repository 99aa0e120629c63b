"""New tails follow until a stop is short enough."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from support.offloaded import (
    LATER,
    WritingMonitor,
    assert_back,
    assert_no_write_is_missing,
    offloaded,
)
from support.qemu import Disk
from support.twin import GiB, KiB, MiB
from support.vm import Machine

from qcow2bm import Qcow2BmError, live
from qcow2bm.live.offload_file import OffloadFile
from qcow2bm.live.stop_limit import Limited, Pace, limit_stop

pytestmark = pytest.mark.usefixtures("system_emulator")

CLUSTER = 64 * KiB
MIB_PER_SECOND = Pace(1 << 50, 1 << 30)  # what QEMU takes here counts for nothing beside this
SPREAD = [(place * 2 * GiB, 512) for place in range(8)]
"""Writes that make every cluster of a fine tail count."""


@pytest.mark.spec("LIVE-20")
@pytest.mark.parametrize("ending", ["restore", "offline", "again"])
def test_former_tails_are_put_back_too(tmp_path: Path, ending: str) -> None:
    with offloaded(tmp_path) as scene:
        for number in (1, 2):
            with live.Monitor(str(scene.address)) as monitor:
                done = live.offload(monitor, str(scene.path), max_stop_seconds=1e-9)
            assert done.limited
            assert done.limited == Limited(False, CLUSTER, done.limited.stop_seconds, 1, None)
            assert len(scene.tails) == 1
            assert scene.tails[0].endswith(f"-{number}")
            scene.write(scene.source, (number * 20 * MiB, 512))
        if ending == "restore":
            scene.restore()
            scene.write(scene.source, LATER)
        scene.source.quit()
        if ending == "offline":
            scene.restore_into_the_image()
        if ending == "again":
            with Machine(scene.disk.path, monitor=scene.path.with_name("again")) as machine:
                scene.write(machine, LATER)
                scene.restore(scene.path.with_name("again"))
                machine.quit()
        assert_back(scene.disk, scene.written)


@pytest.mark.spec("LIVE-20")
@pytest.mark.parametrize(
    "number",
    [pytest.param(n, marks=[] if n % 6 == 3 else [pytest.mark.deep]) for n in range(40)],
)
def test_a_tail_that_is_cleared_while_a_new_one_begins(tmp_path: Path, number: int) -> None:
    """Another program clears all bitmaps before a command: no write counts as known that is not."""
    with offloaded(tmp_path) as scene:
        left = [number]

        def clear_and_write() -> None:
            if not left[0]:
                for name in scene.source.bitmaps():
                    where = {"node": "disk", "name": name}
                    scene.source.execute("block-dirty-bitmap-clear", where)
                scene.write(scene.source, LATER)
            left[0] -= 1

        with WritingMonitor(scene.address, clear_and_write) as monitor, suppress(Qcow2BmError):
            live.offload(monitor, str(scene.path), max_stop_seconds=1e-9)
        with suppress(Qcow2BmError):
            scene.restore()
        scene.source.quit()
        assert_no_write_is_missing(scene.disk, scene.written)


@pytest.mark.spec("LIVE-20")
def test_a_stop_that_is_short_enough_gets_no_new_tail(tmp_path: Path) -> None:
    with offloaded(tmp_path, max_stop_seconds=60) as scene:
        assert not scene.tails[0].endswith("-1")
        scene.restore()
        scene.source.quit()
        assert_back(scene.disk, scene.written)


@pytest.fixture
def wide(tmp_path: Path) -> Iterator[tuple[Machine, Path, str]]:
    """A machine whose tail has eight clusters, all of which have a bit; its QMP, and the file."""
    disk = Disk.create(tmp_path / "disk.qcow2", 16 * GiB)
    disk.add("daily", 64 * KiB)
    disk.io("write 0 512")
    address, path = tmp_path / "qmp", str(tmp_path / "offloaded")
    with Machine(disk.path, monitor=address) as machine:
        with live.Monitor(str(address)) as monitor:
            live.offload(monitor, path, tail_granularity=4 * KiB)
        yield machine, address, path


def write_widely(machine: Machine) -> None:
    for start, length in SPREAD:
        machine.write(start, length)


@pytest.mark.spec("LIVE-20")
@pytest.mark.parametrize(("clusters", "rounds"), [(9, 0), (8, 1), (1, 1)])
def test_new_tails_make_the_stop_short(
    wide: tuple[Machine, Path, str], clusters: int, rounds: int
) -> None:
    machine, address, path = wide
    write_widely(machine)
    most = clusters * CLUSTER / MiB
    with live.Monitor(str(address)) as monitor:
        done = limit_stop(monitor, OffloadFile.read(path), ["disk"], MIB_PER_SECOND, most)
    kept = 1 if rounds else 9
    assert (done.fits, done.rounds, done.stop_bytes) == (True, rounds, kept * CLUSTER)
    assert done.fitting_granularity is None


@pytest.mark.spec("LIVE-21")
@pytest.mark.parametrize(
    ("clusters", "granularity"),
    [(8, 8 * KiB), (5, 8 * KiB), (4, 16 * KiB), (2, 32 * KiB), (1, None)],
)
def test_a_guest_that_writes_too_widely(
    wide: tuple[Machine, Path, str], clusters: int, granularity: int | None
) -> None:
    machine, address, path = wide
    most = clusters * CLUSTER / MiB
    with WritingMonitor(address, lambda: write_widely(machine)) as monitor:
        done = limit_stop(monitor, OffloadFile.read(path), ["disk"], MIB_PER_SECOND, most)
    assert (done.fits, done.rounds, done.stop_bytes) == (False, 10, 9 * CLUSTER)
    assert done.fitting_granularity == granularity
    with live.Monitor(str(address)) as monitor:
        assert {one.outcome for one in live.restore(monitor, path).bitmaps} == {"restored"}
    daily = machine.bitmaps()["daily"]
    assert daily["count"] == 8 * 64 * KiB
