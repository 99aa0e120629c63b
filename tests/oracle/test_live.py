"""Bitmaps are taken out of a running QEMU, and put back: none misses a write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from support.offloaded import (
    BEFORE,
    CASES,
    GRANULARITIES,
    MEANWHILE,
    SIZE,
    TAIL,
    Range,
    make_disk,
    offloaded,
)
from support.qemu import Disk
from support.specreader import page
from support.vm import Machine

import qcow2bm
from qcow2bm import live
from qcow2bm.qmp.answers import Answer

pytestmark = pytest.mark.usefixtures("system_emulator")


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return make_disk(tmp_path)


def widened(ranges: Sequence[Range], granularity: int) -> set[int]:
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


def assert_back(disk: Disk, meanwhile: Sequence[Range] = MEANWHILE) -> None:
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


ROWS = {row["case"]: row["bitmaps"] for row in page("live.md").table("Cases").rows}


def test_the_table_has_the_cases() -> None:
    assert [*ROWS] == [name.replace("`", "") for name in CASES]


@pytest.mark.spec("LIVE-6")
@pytest.mark.spec("LIVE-7")
@pytest.mark.spec("LIVE-8")
@pytest.mark.spec("LIVE-10")
@pytest.mark.spec("LIVE-12")
@pytest.mark.spec("LIVE-14")
@pytest.mark.parametrize("case", CASES)
def test_what_becomes_of_the_bitmaps(case: str, tmp_path: Path) -> None:
    outcome = ROWS[case.replace("`", "")]
    with offloaded(tmp_path) as scene:
        if outcome == "every write":
            CASES[case](scene)
            assert_back(scene.disk, scene.written)
            return
        reason = REASONS[outcome.removeprefix("refused: ")]
        with pytest.raises(qcow2bm.EvidenceError, match=reason):
            CASES[case](scene)
        scene.source.kill()
    with qcow2bm.open(scene.disk.path) as image:
        valid = {name for name, bitmap in image.bitmaps.items() if bitmap.status == "valid"}
    assert not valid & {*GRANULARITIES}


REASONS = {
    "no tail": "tail is gone|no tail of this file",
    "another size": "the disk has 269485056 bytes, and had 268435968",
    "another machine may have written": "the tail may lack what the destination wrote",
    "no canary": "the canary of the tail is gone or was changed",
}


class Interrupted(BaseException):
    """The tool was killed."""


class CutMonitor(live.Monitor):
    """A connection that is lost before or after a command, by its number."""

    def __init__(self, address: Path, number: int, *, is_sent: bool) -> None:
        self._left, self._is_sent = number, is_sent
        super().__init__(str(address))

    def execute(self, command: str, arguments: dict[str, Any] | None = None) -> Answer:
        self._left -= 1
        if self._left == -1 and not self._is_sent:
            raise Interrupted
        if self._left < -1:  # whatever the library does about it, it is gone
            raise Interrupted
        answer = super().execute(command, arguments)
        if self._left == -1:
            raise Interrupted
        return answer


def is_interrupted(
    work: Callable[[live.Monitor], object], address: Path, number: int, *, is_sent: bool
) -> bool:
    """Does work with a tool that is killed at a command; returns whether there were so many."""
    with CutMonitor(address, number, is_sent=is_sent) as monitor:
        try:
            work(monitor)
        except Interrupted:
            return True
    return False


def put_back_offline(disk: Disk, path: Path) -> None:
    """Restores if the offload has begun; otherwise the bitmaps have recorded everything."""
    with qcow2bm.open(disk.path) as image:
        has_tail = any(name.startswith("qcow2bm-tail-") for name in image.bitmaps)
    if has_tail:
        with qcow2bm.open(disk.path, "r+") as image:
            live.restore_offline(str(path), image)


Ending = Literal["again", "restore", "offline", "killed"]
ENDINGS: tuple[Ending, ...] = ("again", "restore", "offline", "killed")
COMMANDS = 120  # more than there are


def after_an_interruption(
    machine: Machine, disk: Disk, address: Path, path: Path, ending: Ending
) -> None:
    """Writes, and then puts the bitmaps back, or lets QEMU die."""
    write(machine)
    if ending == "again":
        offload(address, path)
        write(machine)
    if ending in ("again", "restore") and path.exists():
        assert all(one.is_safe for one in restore(address, path).bitmaps)
    if ending == "killed":
        machine.kill()
        assert_nothing_is_wrong(disk, path)
        return
    machine.quit()
    if ending == "offline":
        put_back_offline(disk, path)
    assert_back(disk)


def assert_nothing_is_wrong(disk: Disk, path: Path) -> None:
    """QEMU died: what recorded is not valid, as without an offload, and cannot be put back."""
    with qcow2bm.open(disk.path) as image:
        valid = {name for name, bitmap in image.bitmaps.items() if bitmap.status == "valid"}
    assert valid <= {"off"}
    if path.exists():
        with (
            qcow2bm.open(disk.path, "r+") as image,
            pytest.raises(qcow2bm.EvidenceError, match="tail"),
        ):
            live.restore_offline(str(path), image)


def interrupt_each(
    disk: Disk,
    folder: Path,
    ending: Ending,
    step: int,
    work: Callable[..., object],
    prepare: Callable[[Machine, Path, Path], None] = lambda machine, address, path: None,
) -> int:
    """Kills the tool before and after each command, or each so many; returns how often it did.

    Each time the bitmaps come back then, or QEMU dies.
    """
    original = disk.path.read_bytes()
    runs = 0
    for number in range(0, COMMANDS, step):
        for is_sent in (False, True):
            address, path = folder / f"qmp{runs}", folder / f"offloaded{runs}"
            disk.path.write_bytes(original)
            with Machine(disk.path, monitor=address) as machine:
                prepare(machine, address, path)
                begun = partial(work, path=str(path))
                if not is_interrupted(begun, address, number, is_sent=is_sent):
                    return runs
                after_an_interruption(machine, disk, address, path, ending)
            runs += 1
    raise AssertionError("there are more commands")


every_step = pytest.mark.parametrize(
    "step", [pytest.param(1, marks=pytest.mark.deep), pytest.param(17, id="some")]
)


@pytest.mark.spec("LIVE-3")
@pytest.mark.spec("LIVE-11")
@pytest.mark.parametrize("ending", ENDINGS)
@every_step
def test_every_interruption_of_an_offload(
    disk: Disk, tmp_path: Path, ending: Ending, step: int
) -> None:
    runs = interrupt_each(disk, tmp_path, ending, step, live.offload)
    assert runs
    print(f"{ending}: {runs} interruptions of an offload, no write missing")


@pytest.mark.spec("LIVE-3")
@pytest.mark.spec("LIVE-11")
@pytest.mark.parametrize("ending", ["restore", "offline", "killed"])
@every_step
def test_every_interruption_of_a_restore(
    disk: Disk, tmp_path: Path, ending: Ending, step: int
) -> None:
    def prepare(machine: Machine, address: Path, path: Path) -> None:
        offload(address, path)
        write(machine)

    runs = interrupt_each(disk, tmp_path, ending, step, live.restore, prepare)
    assert runs
    print(f"{ending}: {runs} interruptions of a restore, no write missing")
