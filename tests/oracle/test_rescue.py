"""Rescue with real QEMUs: the table of spec/rescue.md, interruptions, and what is refused."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support.console import Result as Printed
from support.console import run
from support.migration_alone import CASES
from support.migration_rescued import Result, Way, rescued
from support.qemu import Disk, run_ok
from support.qemu import QmpError as QmpRefused
from support.rescue import verdict
from support.specreader import ROOT, page
from support.twin import KiB, MiB
from support.vm import NOWHERE, Machine

import qcow2bm
from qcow2bm.cli import main
from qcow2bm.errors import QmpError
from qcow2bm.migration.sentinel import is_sentinel
from qcow2bm.qmp.arm import arm
from qcow2bm.qmp.client import Monitor
from qcow2bm.qmp.names import SCRATCH_NODE, copy_of, is_evidence
from qcow2bm.qmp.queries import query_bitmap, query_digest
from qcow2bm.qmp.veto import copy_and_rename, lift_vetoes

pytestmark = pytest.mark.usefixtures("system_emulator")

ROWS = {row["case"]: row for row in page("rescue.md").table("Cases").rows}
LIFECYCLE = {row["case"]: row for row in page("lifecycle.md").table("Cases").rows}

GRANULARITY = 64 * KiB
SIZE = 64 * MiB

CHANGES = {"transaction", "migrate-set-parameters", "blockdev-add", "blockdev-del",
           "block-dirty-bitmap-add", "human-monitor-command"}  # fmt: skip


def test_every_case_in_which_the_source_goes_on_has_a_row() -> None:
    assert list(ROWS) == [name for name in CASES if name != "succeeded, stop and start"]
    for name, row in ROWS.items():
        assert row["QEMU"] == LIFECYCLE[name]["QEMU, dirty-bitmaps on"]


@pytest.mark.spec("RESCUE-4", "RESCUE-7", "RESCUE-9", "RESCUE-13", "RESCUE-16")
@pytest.mark.parametrize("way", ["alone", "start", "remove", "all-dirty"])
@pytest.mark.parametrize("case", ROWS)
def test_case(case: str, way: Way, tmp_path: Path) -> None:
    row = ROWS[case]
    expected = row["QEMU" if way == "alone" else way]
    word = row["verdict"] if way in ("remove", "all-dirty") else ""
    assert rescued(case, way, tmp_path) == Result(expected, word)


# Interruptions


class Cut(Monitor):
    """A connection that is lost after so many commands that change something were done.

    The answer to the last of them is lost, too.
    """

    def __init__(self, address: str, left: int) -> None:
        super().__init__(address)
        self.left, self.changes = left, 0

    def execute(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        try:
            return super().execute(command, arguments)
        finally:
            if command in CHANGES and not _is_question(arguments or {}):
                self.changes += 1
                if self.changes > self.left:
                    raise QmpError(command, "the connection is lost")


def _is_question(arguments: dict[str, Any]) -> bool:
    """Whether it is an empty write, by which it is found out if a disk is active."""
    return '"write 0 0"' in arguments.get("command-line", "")


@contextmanager
def cancelled(folder: Path, *, is_armed: bool = False) -> Iterator[tuple[Machine, str, Disk]]:
    """A machine whose migration was cancelled, so that its bitmaps a and b would be lost."""
    disk = Disk.create(folder / "disk.qcow2", SIZE)
    disk.add("a", GRANULARITY)
    with Machine(disk.path, monitor=folder / "qmp") as machine:
        machine.add("b", 4 * KiB)
        machine.write(2 * MiB, 128 * KiB)
        if is_armed:
            with Monitor(str(folder / "qmp")) as monitor:
                arm(monitor, set_mapping=True)
        machine.enable("dirty-bitmaps")
        machine.migrate(NOWHERE, slowly=True)
        machine.wait_for_migration("active")
        machine.execute("migrate_cancel")
        machine.wait_for_migration("cancelled")
        machine.wait_for("running")
        machine.write(8 * MiB, 64 * KiB)
        yield machine, str(folder / "qmp"), disk


def stored(disk: Disk) -> dict[str, str]:
    """The valid bitmaps in an image and their digests; the image is sound."""
    assert disk.check().returncode == 0
    with qcow2bm.open(disk.path) as image:
        return {n: b.sha256() for n, b in image.bitmaps.items() if b.status == "valid"}


def interrupted(work: Callable[[Monitor], object], address: str, commands: int) -> bool:
    """Does the work up to so many changes and one more; whether there was anything left to do."""
    monitor = Cut(address, commands)
    try:
        work(monitor)
    except QmpError:
        return True
    finally:
        monitor.close()
    return False


@pytest.mark.spec("RESCUE-19")
@pytest.mark.parametrize("commands", range(3))
def test_start_is_interrupted_after_each_command(commands: int, tmp_path: Path) -> None:
    with cancelled(tmp_path) as (machine, address, disk):
        hashes = {name: machine.sha256(name) for name in ("a", "b")}
        assert interrupted(lift_vetoes, address, commands) == (commands < 2)
        assert {name: machine.sha256(name) for name in machine.bitmaps()} == hashes
        with Monitor(address) as monitor:
            assert all(one.outcome == "rescued" for one in lift_vetoes(monitor).bitmaps)
        machine.quit()
    assert stored(disk) == hashes


def by_copy(monitor: Monitor) -> list[str]:
    """Rescues both bitmaps as if their removal could not be aborted."""
    outcomes: list[str] = []
    for name in ("a", "b"):
        if bitmap := query_bitmap(monitor, "disk", name):
            digest = query_digest(monitor, bitmap)
            done = copy_and_rename(monitor, bitmap, digest, is_running=True)
            outcomes.append(done.outcome)
            assert done.proof == "sha256"
    return outcomes


@pytest.mark.spec("RESCUE-6")
def test_copies_are_as_good(tmp_path: Path) -> None:
    with cancelled(tmp_path) as (machine, address, disk):
        machine.execute("block-dirty-bitmap-disable", {"node": "disk", "name": "b"})
        before = machine.bitmaps()
        hashes = {name: machine.sha256(name) for name in before}
        with Monitor(address) as monitor:
            assert by_copy(monitor) == ["copied", "copied"]
        assert machine.bitmaps() == before
        machine.write(32 * MiB, 4 * KiB)
        hashes["a"] = machine.sha256("a")
        machine.quit()
    assert stored(disk) == hashes


@pytest.mark.spec("RESCUE-7", "RESCUE-18", "RESCUE-19")
@pytest.mark.parametrize("way", ["start", "finish", "start anew"])
@pytest.mark.parametrize("commands", range(4))
def test_a_copy_is_interrupted_after_each_command(
    commands: int, way: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``rescue start`` ends what is left, also in the next machine, or offline."""
    with cancelled(tmp_path) as (machine, address, disk):
        hashes = {name: machine.sha256(name) for name in ("a", "b")}
        assert interrupted(by_copy, address, commands)
        if commands in (0, 2):
            assert copy_of("ab"[commands // 2]) in machine.bitmaps()
        if way == "start":
            with Monitor(address) as monitor:
                assert all(one.is_safe for one in lift_vetoes(monitor).bitmaps)
        machine.quit()
    if way == "start anew":
        with (
            Machine(disk.path, monitor=tmp_path / "qmp") as machine,
            Monitor(address) as monitor,
        ):
            rescues = {one.bitmap.name: one for one in lift_vetoes(monitor).bitmaps}
            assert rescues["a"].is_safe
            machine.quit()
    if way == "finish":
        assert main(["rescue", "finish", str(disk.path)]) == 0
        assert main(["rescue", "finish", str(disk.path)]) == 0
        assert "nothing to finish" in capsys.readouterr().out
    if commands < 2 and way != "start":
        del hashes["b"]  # no command had reached it
    assert stored(disk) == hashes


@pytest.mark.spec("RESCUE-19")
@pytest.mark.parametrize("commands", range(3))
def test_arm_is_interrupted_after_each_command(commands: int, tmp_path: Path) -> None:
    disk = Disk.create(tmp_path / "disk.qcow2", SIZE)
    disk.add("a", GRANULARITY)
    with Machine(disk.path, monitor=tmp_path / "qmp") as machine:
        address = str(tmp_path / "qmp")

        def work(monitor: Monitor) -> object:
            return arm(monitor, set_mapping=True)

        assert interrupted(work, address, commands) == (commands < 2)
        with Monitor(address) as monitor:
            done = arm(monitor, set_mapping=True)
        assert [node.is_new for node in done.nodes] == [commands < 1]
        assert len([name for name in machine.bitmaps() if is_evidence(name)]) == 2
        mapped = [{"name": "a", "alias": "a"}]
        assert done.mapping == [{"node-name": "disk", "alias": "disk", "bitmaps": mapped}]
        found = machine.execute("query-migrate-parameters")["block-bitmap-mapping"]
        assert found == done.mapping


@pytest.mark.spec("RESCUE-19")
@pytest.mark.parametrize("commands", range(8))
def test_a_verdict_is_interrupted_after_each_command(commands: int, tmp_path: Path) -> None:
    """After a write by another machine, the scratch node makes two bitmaps all dirty."""
    with armed_and_touched(tmp_path) as (machine, address, disk):

        def work(monitor: Monitor) -> object:
            return verdict(monitor, remedy="all-dirty")

        assert interrupted(work, address, commands) == (commands < 7)
        counts = {b["count"] for n, b in machine.bitmaps().items() if n in "ab"}
        assert (counts == {SIZE}) == (commands >= 5)
        with Monitor(address) as monitor:
            assert {found.verdict.word for found in verdict(monitor, remedy="all-dirty")} <= {
                "touched"
            }
        assert {n: b["count"] for n, b in machine.bitmaps().items()} == {"a": SIZE, "b": SIZE}
        nodes = machine.execute("query-named-block-nodes", {"flat": True})
        assert SCRATCH_NODE not in [node["node-name"] for node in nodes]
        machine.quit()
    assert disk.extents("a") == disk.extents("b") == [(0, SIZE)]


@contextmanager
def armed_and_touched(folder: Path) -> Iterator[tuple[Machine, str, Disk]]:
    """A machine that goes on after a program wrote to its disk that keeps bitmaps."""
    disk = Disk.create(folder / "disk.qcow2", SIZE)
    with Machine(disk.path, monitor=folder / "qmp") as machine:
        machine.add("a", GRANULARITY)
        machine.add("b", 4 * KiB)
        with Monitor(str(folder / "qmp")) as monitor:
            arm(monitor, set_mapping=True)
        migrate(machine)
        commit(disk, (16 * MiB, 64 * KiB))
        machine.execute("cont")
        yield machine, str(folder / "qmp"), disk


def migrate(machine: Machine) -> None:
    machine.enable("dirty-bitmaps")
    machine.migrate(NOWHERE)
    machine.wait_for_migration("completed")
    machine.wait_for("postmigrate")


def commit(disk: Disk, what: tuple[int, int]) -> None:
    """Writes to an image by committing into it, as a program that stores what bitmaps it has."""
    path = disk.path
    overlay = Disk.create(path.with_name("overlay.qcow2"), SIZE, "-b", str(path), "-F", "qcow2")
    overlay.io(f"write {what[0]} {what[1]}")
    run_ok("qemu-img", "commit", "-q", overlay.path)


# What the README says


@pytest.mark.spec("RESCUE-16")
def test_before_the_source_goes_on_the_image_tells_and_quitting_stores_nothing(
    tmp_path: Path,
) -> None:
    disk = Disk.create(tmp_path / "vm.qcow2", SIZE)
    disk.add("daily", GRANULARITY)
    with Machine(disk.path, monitor=tmp_path / "qmp") as machine:
        with Monitor(str(tmp_path / "qmp")) as monitor:
            arm(monitor, set_mapping=True)
        machine.enable("dirty-bitmaps")
        hand_over(machine, disk, Machine.kill)
        with qcow2bm.open(disk.path, force_share=True) as image:
            found = {name: bitmap.status for name, bitmap in image.bitmaps.items()}
        assert [found[name] for name in found if is_sentinel(name)] == ["inconsistent"]
        machine.quit()
    with qcow2bm.open(disk.path) as image:
        assert {bitmap.status for bitmap in image.bitmaps.values()} == {"inconsistent"}


@pytest.mark.spec("RESCUE-5")
def test_the_readme_shows_what_is_printed(tmp_path: Path) -> None:
    """Runs the examples one after the other, on the machine they were made with."""
    started, *touched = commands_of_the_readme()
    disk = Disk.create(tmp_path / "vm.qcow2", SIZE)
    disk.add("daily", GRANULARITY)
    disk.io(f"write {2 * MiB} {MiB}")
    with Machine(disk.path, monitor=tmp_path / "vm.sock") as machine:
        machine.add("weekly", MiB)
        machine.write(8 * MiB, MiB)
        machine.enable("dirty-bitmaps")
        machine.migrate(NOWHERE, slowly=True)
        machine.wait_for_migration("active")
        with pytest.raises(QmpRefused, match=README_MESSAGES[2]):
            machine.execute("block-dirty-bitmap-remove", {"node": "disk", "name": "daily"})
        machine.execute("migrate_cancel")
        machine.wait_for_migration("cancelled")
        machine.wait_for("running")
        assert run(started.arguments, tmp_path) == Printed(0, started.output, "")
        with Monitor(str(tmp_path / "vm.sock")) as monitor:
            arm(monitor, set_mapping=True)
        machine.execute("migrate-set-parameters", {"max-bandwidth": 1 << 30})
        hand_over(machine, disk, Machine.kill)
        machine.execute("cont")
        for command in touched:
            assert run(command.arguments, tmp_path) == Printed(2, command.output, "")
        hand_over(machine, disk, Machine.quit)
        with pytest.raises(QmpRefused, match=README_MESSAGES[0]):
            machine.execute("cont")
        with pytest.raises(QmpRefused, match=README_MESSAGES[1]):
            machine.bitmaps()
    text = README.read_text("utf-8")
    for message in README_MESSAGES:
        assert f"`{message.replace('.*', '...')}" in text


README = ROOT / "README.md"
README_MESSAGES = (
    "Could not reopen qcow2 layer: Bitmap already exists: .*",
    "Block device .* is ejected",
    "Bitmap '.*' is currently in use by another operation and cannot be used",
)


class Command(NamedTuple):
    """A command in the README, and what it prints there."""

    arguments: list[str]
    output: str


def commands_of_the_readme() -> list[Command]:
    section = README.read_text("utf-8").partition("## After a failed migration\n")[2]
    section = section.partition("\n## ")[0]
    blocks = "".join(re.findall(r"```text\n(.*?)```", section, re.DOTALL))
    return [
        Command(line.split()[1:], output)
        for line, output in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", blocks, re.MULTILINE)
    ]


def hand_over(machine: Machine, disk: Disk, end: Callable[[Machine], None]) -> None:
    """The machine migrates to another one, which writes and ends in some way."""
    with Machine(disk.path, incoming=True) as other:
        other.enable("dirty-bitmaps")
        ours, theirs = socket.socketpair()
        other.receive(theirs)
        machine.migrate(ours)
        other.wait_for_migration("completed")
        other.wait_for("running")
        machine.wait_for("postmigrate")
        other.write(16 * MiB, 64 * KiB)
        end(other)


# What else there is


@pytest.mark.spec("RESCUE-4", "RESCUE-11")
def test_several_nodes(tmp_path: Path) -> None:
    disks = [Disk.create(tmp_path / f"{name}.qcow2", SIZE) for name in ("disk", "second")]
    for disk in disks:
        disk.add("a", GRANULARITY)
        disk.io(f"write 0 {GRANULARITY}")
    address = tmp_path / "qmp"
    with Machine(disks[0].path, monitor=address) as machine, Monitor(str(address)) as monitor:
        file = {"driver": "file", "filename": str(disks[1].path)}
        node = {"driver": "qcow2", "node-name": "second", "file": file}
        machine.execute("blockdev-add", node)
        assert [one.node for one in arm(monitor, set_mapping=True).nodes] == ["disk", "second"]
        machine.enable("dirty-bitmaps")
        machine.migrate(NOWHERE, slowly=True)
        machine.wait_for_migration("active")
        machine.execute("migrate_cancel")
        machine.wait_for_migration("cancelled")
        machine.wait_for("running")
        assert [one.verdict.word for one in verdict(monitor)] == ["untouched", "untouched"]
        assert [one.outcome for one in lift_vetoes(monitor).bitmaps] == ["rescued", "rescued"]
        machine.quit()
    assert [list(stored(disk)) for disk in disks] == [["a"], ["a"]]
    assert disks[0].extents("a") == disks[1].extents("a") == [(0, GRANULARITY)]


@pytest.mark.spec("RESCUE-15")
def test_a_write_elsewhere_to_where_the_machine_had_written_is_not_missed(tmp_path: Path) -> None:
    """A write of another machine must not be missed, also where this machine had written before."""
    place = 4 * MiB, 64 * KiB
    disk = Disk.create(tmp_path / "disk.qcow2", SIZE)
    with Machine(disk.path, monitor=tmp_path / "qmp") as machine:
        machine.add("a", GRANULARITY)
        with Monitor(str(tmp_path / "qmp")) as monitor:
            arm(monitor, set_mapping=True)
            machine.write(*place)
            machine.execute("block-dirty-bitmap-clear", {"node": "disk", "name": "a"})
            migrate(machine)
            commit(disk, place)
            machine.execute("cont")
            assert machine.bitmaps()["a"]["count"] == 0
            (found,) = verdict(monitor)
        assert found.verdict.word == "untouched"
        machine.quit()
    assert disk.extents("a") == [place]


@pytest.mark.spec("RESCUE-1")
def test_a_destination_that_has_not_run_yet_is_left_alone(tmp_path: Path) -> None:
    """The disk of the machine is inactive: QEMU would end by an assertion."""
    disk = Disk.create(tmp_path / "disk.qcow2", SIZE)
    disk.add("a", GRANULARITY)
    address = tmp_path / "qmp"
    with (
        Machine(disk.path) as source,
        Machine(disk.path, incoming=True, paused=True, monitor=address) as machine,
        Monitor(str(address)) as monitor,
    ):
        with pytest.raises(qcow2bm.StateError, match="waiting for a migration"):
            lift_vetoes(monitor)
        machine.enable("dirty-bitmaps", "late-block-activate")
        source.enable("dirty-bitmaps")
        ours, theirs = socket.socketpair()
        machine.receive(theirs)
        source.migrate(ours)
        machine.wait_for_migration("completed")
        for command in (lift_vetoes, arm, verdict):
            asked: Callable[[Monitor], object] = command
            with pytest.raises(qcow2bm.StateError, match="a disk is inactive"):
                asked(monitor)
        source.wait_for("postmigrate")
        source.quit()
        machine.execute("cont")
        assert [one.outcome for one in lift_vetoes(monitor).bitmaps] == ["rescued"]
        machine.quit()
    assert "a" in stored(disk)


@pytest.mark.spec("RESCUE-1")
def test_nothing_is_done_while_a_migration_is_under_way(tmp_path: Path) -> None:
    disk = Disk.create(tmp_path / "disk.qcow2", SIZE)
    disk.add("a", GRANULARITY)
    with Machine(disk.path, monitor=tmp_path / "qmp") as machine:
        machine.enable("dirty-bitmaps")
        machine.migrate(NOWHERE, slowly=True)
        machine.wait_for_migration("active")
        with (
            Monitor(str(tmp_path / "qmp")) as monitor,
            pytest.raises(qcow2bm.StateError, match="migrating"),
        ):
            lift_vetoes(monitor)


@pytest.mark.spec("RESCUE-8", "RESCUE-12")
def test_an_inconsistent_bitmap_is_left_and_keeps_its_entry(tmp_path: Path) -> None:
    disk = Disk.create(tmp_path / "disk.qcow2", SIZE)
    disk.add("a", GRANULARITY)
    disk.crash(f"write 0 {GRANULARITY}")
    with Machine(disk.path, monitor=tmp_path / "qmp") as machine:
        machine.add("b", GRANULARITY)
        with Monitor(str(tmp_path / "qmp")) as monitor:
            for _ in range(2):
                found = [(one.bitmap.name, one.outcome) for one in lift_vetoes(monitor).bitmaps]
                assert found == [("a", "left"), ("b", "rescued")]
            assert [o.bitmap.name for o in arm(monitor, set_mapping=True).obstacles] == ["a"]
            assert [found.verdict.word for found in verdict(monitor)] == ["untouched"]
        machine.quit()
    assert [(b["name"], b["flags"]) for b in disk.listed()] == [
        ("a", ["in-use", "auto"]),
        ("b", ["auto"]),
    ]
