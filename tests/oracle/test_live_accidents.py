"""The tool or a QEMU dies at any command around a migration of an exact offload."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from support.exact_offload import begin, complete, end, restore, waiting
from support.offloaded import LATER, Interrupted, Scene, offloaded
from support.vm import Machine

import qcow2bm
from qcow2bm import live
from qcow2bm.qmp.answers import Answer

pytestmark = pytest.mark.usefixtures("system_emulator")

COMMANDS = 100  # more than there are


@dataclass
class Accident:
    """Something that ``happens`` before or after a command, by its number."""

    number: int
    is_sent: bool
    happens: Callable[[], None]
    has_happened: bool = False
    is_tool_dead: bool = False

    def at(self, *, is_sent: bool) -> None:
        """Is called before and after each command."""
        if self.is_tool_dead:
            raise Interrupted
        if self.number == 0 and is_sent == self.is_sent and not self.has_happened:
            self.has_happened = True
            self.happens()
        self.number -= is_sent

    def kill_tool(self) -> None:
        """Nothing is sent any more, whatever the library does about it."""
        self.is_tool_dead = True
        raise Interrupted


class Connection(live.Monitor):
    """A connection to a machine, in which an accident happens."""

    def __init__(self, accident: Accident, address: Path) -> None:
        self._accident: Accident | None = None
        super().__init__(str(address))
        self._accident = accident

    def execute(self, command: str, arguments: dict[str, Any] | None = None) -> Answer:
        if self._accident:
            self._accident.at(is_sent=False)
        answer = super().execute(command, arguments)
        if self._accident:
            self._accident.at(is_sent=True)
        return answer


def attempts(folder: Path, step: int) -> Iterator[tuple[int, Scene]]:
    """A new scene for each number, or each so many, until the caller has enough."""
    for number in range(0, COMMANDS, step):
        place = folder / str(number)
        place.mkdir()
        with offloaded(place, exact=True) as scene:
            yield number, scene
    raise AssertionError("there are more commands")


def carry(scene: Scene, accident: Accident, address: Path, machine: Machine) -> bool:
    """Runs live record, completes the migration, lets the guest write, and runs live collect.

    If the tool dies in one of the two, that command is not run again. Returns whether the migration
    was completed.
    """
    try:
        with Connection(accident, address) as there, Connection(accident, scene.address) as here:
            live.record(there, here, str(scene.path))
    except Interrupted:
        accident.is_tool_dead = False
    except qcow2bm.Qcow2BmError:
        assert not (scene.source.is_running and machine.is_running)
    if not (scene.source.is_running and machine.is_running):
        return False
    complete(scene.source, machine)
    machine.wait_for("running")
    scene.write(machine, LATER)
    try:
        with Connection(accident, scene.address) as here:
            live.collect(here, str(scene.path))
    except Interrupted:
        accident.is_tool_dead = False
    except qcow2bm.Qcow2BmError:
        assert not scene.source.is_running
    return True


def outcome_of(scene: Scene, machine: Machine, address: Path, *, is_moved: bool) -> str:
    """Puts the bitmaps back where the disk is; returns how exact that was, or "refused"."""
    if is_moved and machine.is_running:
        outcome = restore(scene, address)
        end(scene, machine, is_exact=outcome == "exact")
        return outcome
    if not is_moved and scene.source.is_running:
        scene.source.wait_for_migration("failed")
        scene.source.wait_for("running")
        scene.write(scene.source, LATER)
        outcome = restore(scene)
        end(scene, scene.source, is_exact=outcome == "exact")
        return outcome
    scene.source.kill()
    machine.kill()
    assert_refused(scene)
    return "refused"


def assert_refused(scene: Scene) -> None:
    """Nobody stored the tail: what recorded is not valid, and cannot be put back."""
    with (
        qcow2bm.open(scene.disk.path, "r+") as image,
        pytest.raises(qcow2bm.EvidenceError, match="tail"),
    ):
        live.restore_offline(str(scene.path), image)
    with qcow2bm.open(scene.disk.path) as image:
        valid = {name for name, bitmap in image.bitmaps.items() if bitmap.status == "valid"}
    assert not valid & {"daily", "fine"}


@pytest.mark.spec("LIVE-11", "LIVE-12", "LIVE-18", "LIVE-19")
@pytest.mark.parametrize("dies", ["tool", "source", "destination"])
@pytest.mark.parametrize("is_sent", [False, True])
@pytest.mark.parametrize("step", [pytest.param(2, marks=pytest.mark.deep), 7])
def test_an_accident_on_the_way(
    tmp_path: Path, dies: Literal["tool", "source", "destination"], is_sent: bool, step: int
) -> None:
    found: dict[str, int] = {}
    for number, scene in attempts(tmp_path, step):
        with waiting(scene, "destination") as (machine, address):
            begin(scene.source, machine)
            accident = Accident(number, is_sent, lambda: None)
            accident.happens = {
                "tool": accident.kill_tool,
                "source": scene.source.kill,
                "destination": machine.kill,
            }[dies]
            is_moved = carry(scene, accident, address, machine)
            outcome = outcome_of(scene, machine, address, is_moved=is_moved)
        if not accident.has_happened:
            assert outcome == "exact"
            break
        found[outcome] = found.get(outcome, 0) + 1
    assert found
    print(f"{dies} dies, {'after' if is_sent else 'before'} a command: {found}")
