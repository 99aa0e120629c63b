"""Writes that fail and disks that are full: no bitmap that misses a write is valid."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from support.offloaded import (
    GRANULARITIES,
    MEANWHILE,
    Range,
    assert_back,
    assert_no_write_is_missing,
    make_disk,
)
from support.qemu import Disk, ToolError
from support.vm import Machine

import qcow2bm
from qcow2bm import live
from qcow2bm.qmp.answers import Answer

pytestmark = pytest.mark.usefixtures("system_emulator")

HEADER = 64 << 10
MOST = 400  # writes or commands: more than there are


def write(machine: Machine) -> list[Range]:
    """Writes as a guest does, which goes on after an error; returns what was written."""
    written = []
    for start, length in MEANWHILE:
        try:
            machine.write(start, length)
        except ToolError:
            continue
        written.append((start, length))
    return written


def out_and_back(monitor: live.Monitor, machine: Machine, path: Path) -> list[Range]:
    """Takes the bitmaps out and puts them back, with writes in between."""
    written = write(machine)
    live.offload(monitor, str(path), exact=True, max_stop_seconds=1e-9)
    written += write(machine)
    live.restore(monitor, str(path))
    return written


def attempts(disk: Disk, folder: Path, step: int) -> Iterator[tuple[int, Path, Path]]:
    """Numbers of writes or commands, each with places for a QMP server and for an offload file.

    The disk is as it was each time. Raises if there are more than the test can try.
    """
    original = disk.path.read_bytes()
    for number in range(1, MOST, step):
        disk.path.write_bytes(original)
        yield number, folder / f"qmp{number}", folder / f"offloaded{number}"
    raise AssertionError("there are more of them")


@pytest.mark.spec("LIVE-3", "LIVE-9", "LIVE-11")
@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.deep), 11])
def test_any_write_of_qemu_fails(tmp_path: Path, step: int) -> None:
    """Afterwards the next command puts back whatever is still out."""
    disk = make_disk(tmp_path)
    failed = fine = 0
    for number, address, path in attempts(disk, tmp_path, step):
        with ExitStack() as stack:
            try:
                machine = stack.enter_context(
                    Machine(disk.path, monitor=address, failing_write=number)
                )
            except ToolError:
                continue  # QEMU could not open the image
            written = write(machine)
            with live.Monitor(str(address)) as monitor:
                error = None
                try:
                    written += out_and_back(monitor, machine, path)
                except qcow2bm.QmpError as caught:
                    error = caught
                written += write(machine)
                if path.exists():
                    live.restore(monitor, str(path))
            names = set(machine.bitmaps())
            machine.quit()
        assert {*GRANULARITIES} <= names, number
        with qcow2bm.open(disk.path) as image:
            is_stored = all(
                name in image.bitmaps and image.bitmaps[name].status == "valid"
                for name in GRANULARITIES
            )
        assert_no_write_is_missing(disk, written)
        if error is None and is_stored and written == 4 * [*MEANWHILE]:
            assert_back(disk, written)
            fine += 1
            if fine == 5:
                break  # there are fewer writes than that
            continue
        fine = 0
        failed += 1
    assert failed
    print(f"{failed} writes of QEMU failed: no bitmap that misses a write is valid")


class FullMonitor(live.Monitor):
    """A connection during which QEMU becomes unable to write, but to the start of files.

    This concerns the image and the files that QEMU is lent.
    """

    def __init__(self, address: Path, machine: Machine, number: int) -> None:
        self._machine, self._left = machine, number
        super().__init__(str(address))

    def execute(self, command: str, arguments: dict[str, Any] | None = None) -> Answer:
        self._left -= 1
        if self._left == 0:
            self._machine.limit_files(HEADER)
        return super().execute(command, arguments)

    @property
    def is_full(self) -> bool:
        return self._left <= 0


@pytest.mark.spec("LIVE-3", "LIVE-9", "LIVE-11")
@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.deep), 17])
def test_the_disk_is_full_at_any_command(tmp_path: Path, step: int) -> None:
    disk = make_disk(tmp_path)
    runs = failed = 0
    for number, address, path in attempts(disk, tmp_path, step):
        with Machine(disk.path, monitor=address) as machine:
            with FullMonitor(address, machine, number) as monitor:
                written: list[Range] = []
                try:
                    written = out_and_back(monitor, machine, path)
                except (qcow2bm.QmpError, qcow2bm.StorageError):
                    failed += 1
                if not monitor.is_full:
                    break
            runs += 1
            machine.limit_files(None)
            with live.Monitor(str(address)) as monitor:
                written += write(machine)
                if path.exists():
                    done = live.restore(monitor, str(path))
                    assert all(one.is_safe for one in done.bitmaps)
            machine.quit()
        assert_back(disk, [*written, *MEANWHILE])
    assert failed
    print(f"the disk was full at {runs} commands, {failed} of which failed: all bitmaps are back")
