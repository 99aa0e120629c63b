"""Plays migrations of a shared image in which QEMU alone keeps the persistent bitmaps.

`alone` plays one case of a migration with real QEMUs and judges by the image in the end. The disk
is shared: source and destination open the same file.

Locks do not prevent any of these cases. When the source inactivates the disk, it keeps only the
lock of a reader that lets others write (byte 100, as `qemu-img -U` holds it). A destination takes
its locks once it activates the disk. In between any program can open the image and write to it.
When that program has ended, nothing tells the source, and the source gets its locks again. `cont`
fails for a lock only while a destination that has activated the disk is running. That case is not
tried: after it the source reads the image wrongly and loses its disk, whatever else happens.
"""

from __future__ import annotations

import json
import os
import select
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from support.qemu import Disk, QmpError, run_ok
from support.twin import KiB, MiB, held_lock_bytes
from support.vm import NOWHERE, Machine, until_deadline

import qcow2bm

GRANULARITY = 64 * KiB
SIZE = 64 * MiB
WRITE_LOCK = 101
AUTOCLEAR = 95  # the byte of the header with autoclear bit 0

Range = tuple[int, int]  # start, length

OLD: Range = (40 * MiB, 64 * KiB)  # allocated before there are bitmaps
BEFORE: Range = (2 * MiB, 64 * KiB)  # by a program before the source starts
EARLY: Range = (4 * MiB, 128 * KiB)  # by the source, before it adds its bitmap
LATE: Range = (8 * MiB, 192 * KiB)  # by the source, before it migrates
FOREIGN: Range = (16 * MiB, 256 * KiB)  # by the program that has the disk after the migration
AFTER: Range = (24 * MiB, 320 * KiB)  # by the source when it goes on


class UnusableError(Exception):
    """The source cannot go on."""


@dataclass
class Scene:
    """A source on an image with the bitmaps p0, which it loaded, and s0, which it added."""

    disk: Disk
    source: Machine
    capability: bool
    written: list[Range] = field(default_factory=lambda: [BEFORE])
    missing: dict[str, int] = field(default_factory=lambda: {"p0": 0})
    """By bitmap, how many of the ranges were written before it was made."""

    def begin(self) -> None:
        """The source writes and adds its bitmap."""
        self.write(self.source, EARLY)
        self.source.add("s0", GRANULARITY)
        self.missing["s0"] = len(self.written)
        self.write(self.source, LATE)
        self.enable(self.source)

    def enable(self, machine: Machine, *capabilities: str) -> None:
        """Turns capabilities on, and dirty-bitmaps if the case is played with it."""
        machine.enable(*capabilities, *(["dirty-bitmaps"] if self.capability else []))

    def write(self, machine: Machine, what: Range) -> None:
        """A machine writes."""
        machine.write(*what)
        self.written.append(what)

    def migrate(self, target: socket.socket | str = NOWHERE) -> None:
        """The source migrates, and has given up the disk."""
        self.source.migrate(target)
        self.source.wait_for_migration("completed")
        self.source.wait_for("postmigrate")

    def cont(self) -> None:
        """The source runs on after it has migrated."""
        try:
            self.source.execute("cont")
        except QmpError as error:
            raise UnusableError(str(error)) from error

    def outcome(self) -> str:
        """One word for what the image has in the end."""
        with qcow2bm.open(self.disk.path) as image:
            sound = {name: b for name, b in image.bitmaps.items() if b.status == "valid"}
            for name, bitmap in sound.items():
                extents = [tuple(row) for part in bitmap.extents() for row in part.tolist()]
                if any(misses(extents, what) for what in self.written[self.missing[name] :]):
                    return "WRONG"
        return "stored" if sound.keys() == self.missing.keys() else "lost"


def misses(extents: list[tuple[int, ...]], what: Range) -> bool:
    """Whether the extents, which are merged, leave out any of a range."""
    start, length = what
    return not any(s <= start and start + length <= s + n for s, n in extents)


CASES: dict[str, Callable[[Scene], None]] = {}


def case(name: str) -> Callable[[Callable[[Scene], None]], None]:
    """Names a case; a source that it leaves running quits."""

    def register(play: Callable[[Scene], None]) -> None:
        CASES[name] = play

    return register


def alone(case: str, capability: bool, folder: Path) -> str:
    """Plays a case on a fresh image, with the capability dirty-bitmaps or without it.

    Returns:
        "stored": all bitmaps are valid and have all that was written since they were made;
        "lost": one is not valid or gone, and none that is valid misses a write;
        "WRONG": a valid one misses a write, so that a backup by it would;
        "unusable": the source cannot go on.
    """
    disk = Disk.create(folder / "disk.qcow2", SIZE)
    disk.io(f"write {OLD[0]} {OLD[1]}")
    disk.add("p0", GRANULARITY)
    disk.io(f"write {BEFORE[0]} {BEFORE[1]}")
    with Machine(disk.path) as source:
        scene = Scene(disk, source, capability)
        scene.begin()
        try:
            CASES[case](scene)
        except UnusableError:
            return "unusable"
        if source.is_running:
            source.quit()
    return scene.outcome()


# It fails


@case("cancelled before inactivation")
def _(scene: Scene) -> None:
    source = scene.source
    source.migrate(NOWHERE, slowly=True)
    source.wait_for_migration("active")
    source.execute("migrate_cancel")
    source.wait_for_migration("cancelled")
    source.wait_for("running")
    scene.write(source, AFTER)


@case("failed before inactivation")
def _(scene: Scene) -> None:
    source = scene.source
    ours, theirs = socket.socketpair()
    with ours:
        source.migrate(theirs, slowly=True)
        source.wait_for_migration("active")
        assert ours.recv(1)
    source.wait_for_migration("failed")
    source.wait_for("running")
    scene.write(source, AFTER)


@case("cancelled in pre-switchover")
def _(scene: Scene) -> None:
    source = scene.source
    source.enable("pause-before-switchover")
    source.migrate(NOWHERE)
    source.wait_for_migration("pre-switchover")
    assert WRITE_LOCK in held_lock_bytes(scene.disk.path)
    source.execute("migrate_cancel")
    source.wait_for_migration("cancelled")
    source.wait_for("running")
    scene.write(source, AFTER)


@case("failed after inactivation")
def _(scene: Scene) -> None:
    """The destination never confirms; with a return path, the migration then fails."""
    source = scene.source
    source.enable("return-path")
    ours, theirs = socket.socketpair()
    with ours:
        source.migrate(theirs)
        for _ in until_deadline("never inactive"):
            while select.select([ours], [], [], 0)[0]:
                assert ours.recv(MiB)
            if WRITE_LOCK not in held_lock_bytes(scene.disk.path):
                break  # given up with the inactivation
    source.wait_for_migration("failed")
    source.wait_for("running")
    scene.write(source, AFTER)


# It succeeds, and there is no destination


@case("succeeded, source goes on")
def _(scene: Scene) -> None:
    scene.migrate()
    scene.cont()
    scene.write(scene.source, AFTER)


@case("succeeded, stop and start")
def _(scene: Scene) -> None:
    scene.migrate()
    scene.source.quit()
    with Machine(scene.disk.path) as again:
        scene.write(again, AFTER)
        again.quit()


# It succeeds, and the source goes on although there is a destination


def destination(scene: Scene, play: Callable[[Machine], None]) -> None:
    """The machine migrates to another, which plays its part; then the source runs on."""
    with Machine(scene.disk.path, incoming=True) as machine:
        scene.enable(machine)
        ours, theirs = socket.socketpair()
        machine.receive(theirs)
        scene.migrate(ours)
        machine.wait_for_migration("completed")
        machine.wait_for("running")
        play(machine)
    scene.cont()


@case("destination loaded only")
def _(scene: Scene) -> None:
    destination(scene, Machine.quit)
    scene.write(scene.source, AFTER)


@case("destination loaded and was killed")
def _(scene: Scene) -> None:
    destination(scene, Machine.kill)
    scene.write(scene.source, AFTER)


@case("destination wrote and stored")
def _(scene: Scene) -> None:
    def play(machine: Machine) -> None:
        scene.write(machine, FOREIGN)
        machine.quit()

    destination(scene, play)
    scene.write(scene.source, AFTER)


@case("destination wrote and was killed")
def _(scene: Scene) -> None:
    def play(machine: Machine) -> None:
        scene.write(machine, FOREIGN)
        machine.kill()

    destination(scene, play)


@case("destination never ran")
def _(scene: Scene) -> None:
    """The destination has received everything, and leaves the disk inactive, as with libvirt."""
    with Machine(scene.disk.path, incoming=True, paused=True) as machine:
        scene.enable(machine, "late-block-activate")
        ours, theirs = socket.socketpair()
        machine.receive(theirs)
        scene.migrate(ours)
        machine.wait_for_migration("completed")
        assert WRITE_LOCK not in held_lock_bytes(scene.disk.path)
        machine.quit()
    scene.cont()
    scene.write(scene.source, AFTER)


# It succeeds, and another program writes to the image before the source goes on


@case("unaware program wrote")
def _(scene: Scene) -> None:
    """The program does not know bitmaps. As it must, it clears their autoclear bit."""
    scene.migrate()
    mapped = run_ok("qemu-img", "map", "--output", "json", scene.disk.path)
    (offset,) = (part["offset"] for part in json.loads(mapped) if part["start"] == OLD[0])
    with scene.disk.path.open("r+b", buffering=0) as file:
        (bits,) = os.pread(file.fileno(), 1, AUTOCLEAR)
        os.pwrite(file.fileno(), bytes([bits & ~1]), AUTOCLEAR)
        os.pwrite(file.fileno(), b"\xee" * OLD[1], offset)
    scene.written.append(OLD)
    scene.cont()
    scene.write(scene.source, AFTER)


@case("committed into")
def _(scene: Scene) -> None:
    scene.migrate()
    path = scene.disk.path
    overlay = Disk.create(path.with_name("overlay.qcow2"), SIZE, "-b", str(path), "-F", "qcow2")
    overlay.io(f"write {FOREIGN[0]} {FOREIGN[1]}")
    run_ok("qemu-img", "commit", "-q", overlay.path)
    scene.written.append(FOREIGN)
    scene.cont()
    scene.write(scene.source, AFTER)
