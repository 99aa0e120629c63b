"""Plays migrations of a shared image in which this library keeps the persistent bitmaps.

`handed_over` plays a case with a `Tracker` as the source, and judges as `alone` does. The other
side, which opens the same file, is a real QEMU. In the end QEMU reads the image as well.

A destination gets its machine from a stream that was recorded once, from a source with a disk of
its own: a stream has nothing of a disk that is shared. It has no bitmaps either, so those that are
carried do not arrive.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Literal, NamedTuple
from uuid import uuid4

import numpy as np
import pytest
from support.migration_alone import (
    AFTER,
    BEFORE,
    EARLY,
    FOREIGN,
    GRANULARITY,
    LATE,
    OLD,
    SIZE,
    WRITE_LOCK,
    Range,
    misses,
)
from support.qemu import LEAKS, Disk, QmpError, StorageDaemon, run, run_ok
from support.twin import KiB, MiB, held_lock_bytes
from support.vm import Machine, until_deadline

import qcow2bm
from qcow2bm.migration.sentinel import is_sentinel

FLUSHED: Range = (12 * MiB, 128 * KiB)  # by the source while it migrates, and stored by then
END: Range = (SIZE - KiB // 2, KiB // 2)  # by the program that has the disk
MERGED: Range = (32 * MiB, 192 * KiB)  # not written: from a bitmap of another image

OURS = "p0", "s0"
AUTOCLEAR_WORD = 88, 8  # offset and length in the header

Policy = Literal["drop", "merge"]


class Way(NamedTuple):
    """The way in which a case is played: each is one option of the library."""

    is_carried: bool
    generation: bool
    policy: Policy


class Result(NamedTuple):
    """The result of a case: a word as in `alone`, and the outcome of `activate`, if called."""

    word: str
    outcome: str


@dataclass
class Scene:
    """A tracker on an image with the bitmaps p0, which it found, and s0, which it added.

    The source is this process: it writes where QEMU has allocated clusters for it.
    """

    disk: Disk
    way: Way
    stream: Path
    image: qcow2bm.Image
    tracker: qcow2bm.Tracker
    offsets: dict[Range, int]
    patterns: dict[Range, int]
    written: list[Range] = field(default_factory=lambda: [BEFORE])
    missing: dict[str, int] = field(default_factory=lambda: {"p0": 0})
    """By bitmap, how many of the ranges were written before it was made, or cleared by hand."""
    foreign: list[Range] = field(default_factory=list)
    merged: list[Range] = field(default_factory=list)
    activation: qcow2bm.Activation | None = None
    has_evidence: bool = True
    """Whether the sentinel can tell what was written, so that the source has to know."""
    leaks: bool = False
    """Whether a program leaves clusters behind that nothing uses."""
    _numbers: Iterator[int] = field(default_factory=lambda: count(100))  # patterns not used yet

    # The source

    def begin(self) -> None:
        """The source writes, adds its bitmap, and begins to migrate."""
        self.write(EARLY)
        with self.tracker.edit() as edit:
            edit.add("s0", GRANULARITY)
        self.missing["s0"] = len(self.written)
        self.write(FLUSHED)
        self.tracker.begin_migration(carried=OURS if self.way.is_carried else ())
        self.tracker.flush()
        self.write(LATE)

    def write(self, what: Range) -> None:
        """The source writes."""
        with self.tracker.writing(*what):
            self.put(what)
        self.written.append(what)

    def put(self, what: Range) -> None:
        """Puts data where the image has them, and does nothing else."""
        pattern = self.pattern(what)
        with self.disk.path.open("r+b", buffering=0) as file:
            assert os.pwrite(file.fileno(), bytes([pattern]) * what[1], self.offsets[what])

    def pattern(self, what: Range) -> int:
        """The bytes to write to a range, new ones at each call."""
        self.patterns[what] = next(self._numbers)
        return self.patterns[what]

    def inactivate(self) -> None:
        """The source lets the image go."""
        self.tracker.inactivate()
        assert not held_lock_bytes(self.disk.path) - {100}  # that of a destination which waits
        assert self.missing.keys() == set(self.tracker.names)

    def activate(self) -> None:
        """The source takes the image back, and runs on."""
        self.activation = self.tracker.activate(self.way.policy)
        fates = self.activation.bitmaps
        assert fates.keys() == set(OURS)
        assert set(self.tracker.names) == {n for n in OURS if fates[n].kind != "dropped"}
        self.write(AFTER)

    # Others

    def write_by(self, machine: Machine, what: Range) -> None:
        """A machine that has the image writes."""
        said = machine.io(f"write -P {self.pattern(what)} {what[0]} {what[1]}")
        assert f"wrote {what[1]}/{what[1]} bytes" in said, said
        self.foreign.append(what)

    @contextmanager
    def destination(self, *, paused: bool = False) -> Iterator[Machine]:
        """A machine that waits for a migration, with the same image."""
        with Machine(self.disk.path, incoming=True, paused=paused) as machine:
            if self.way.is_carried:
                machine.enable("dirty-bitmaps")
            yield machine

    @contextmanager
    def half_arrived(self, machine: Machine) -> Iterator[None]:
        """Sends the first half of the stream; at the end of the block, there is no more."""
        ours, theirs = socket.socketpair()
        with ours:
            machine.receive(theirs)
            data = self.stream.read_bytes()
            ours.sendall(data[: len(data) // 2])
            yield

    def break_off(self, machine: Machine) -> None:
        """The stream ends too early, and so does the machine."""
        with self.half_arrived(machine):
            pass
        for _ in until_deadline("the destination goes on"):
            if not machine.is_running:
                break

    def arrive(self, machine: Machine) -> None:
        """Sends the stream."""
        machine.receive(f"exec:cat '{self.stream}'")
        machine.wait_for_migration("completed")

    def edit(self, *actions: str, name: str) -> bool:
        """Runs qemu-img bitmap; whether it could, as it always can unless we carry the bitmap."""
        done = run("qemu-img", "bitmap", *actions, *self.disk.arguments, name)
        is_refused = self.way.is_carried and name in OURS
        assert bool(done.returncode) == is_refused, done
        assert not is_refused or "inconsistent" in done.stderr
        return not is_refused

    def clear_all(self) -> None:
        """Clears every bitmap that can be; afterwards nothing tells what was written."""
        for entry in self.disk.listed():
            if self.edit("--clear", name=entry["name"]) and entry["name"] in OURS:
                self.missing[entry["name"]] = len(self.written)
        self.has_evidence = False

    # The end

    def result(self, daemon: StorageDaemon) -> Result:
        """Judges what the image has in the end, and asserts that QEMU finds the same."""
        self._ask_qemu()
        self._check_activation()
        with qcow2bm.open(self.disk.path) as image:
            sound = {name: b for name, b in image.bitmaps.items() if b.status == "valid"}
            left_behind = set(filter(is_sentinel, sound))
            if left_behind:  # where tracking could not begin again, there being nothing else
                assert sound.keys() == left_behind
                sound = {}
            assert sound.keys() <= self.missing.keys()
            hashes = {name: bitmap.sha256() for name, bitmap in sound.items()}
            found = {
                name: [tuple(row) for part in bitmap.extents() for row in part.tolist()]
                for name, bitmap in sound.items()
            }
            is_consistent = image.is_consistent
        daemon.open(self.disk)
        try:
            listed = {n for n, b in daemon.bitmaps().items() if not b.get("inconsistent")}
            assert listed == (sound.keys() | left_behind if is_consistent else set())
            assert {name: daemon.sha256(name) for name in sound} == hashes
        finally:
            daemon.close()
        return Result(self._word(found), self.activation.outcome if self.activation else "")

    def _word(self, found: dict[str, list[tuple[int, ...]]]) -> str:
        for name, extents in found.items():
            needed = [*self.written[self.missing[name] :], *self.foreign, *self.merged]
            if any(misses(extents, what) for what in needed):
                return "WRONG"
            self._check_nothing_more(name, extents)
        return "stored" if found.keys() == self.missing.keys() else "lost"

    def _check_nothing_more(self, name: str, extents: list[tuple[int, ...]]) -> None:
        """Every bit is there for a reason: a full backup is no feat."""
        allowed = np.zeros(SIZE // GRANULARITY, np.bool_)
        first = 0 if name == "p0" else 2  # s0 was added after two writes
        ranges = [*self.written[first:], *self.foreign, *self.merged]
        if self.activation and self.activation.changed is not None:
            ranges += [(s, n) for s, n in self.activation.changed.tolist()]
        for start, length in ranges:
            allowed[start // GRANULARITY : -(-(start + length) // GRANULARITY)] = True
        for start, length in extents:
            assert allowed[start // GRANULARITY : -(-(start + length) // GRANULARITY)].all()

    def _check_activation(self) -> None:
        """Asserts that `activate` told the source all changes it could know, and only those."""
        if not self.activation:
            return
        assert (self.activation.changed is not None) == self.has_evidence
        if self.activation.changed is not None:
            changed = [tuple(row) for row in self.activation.changed.tolist()]
            assert not any(misses(changed, what) for what in self.foreign)
        if self.foreign:
            assert self.activation.outcome == "changed"

    def _ask_qemu(self) -> None:
        """The image is sound, and the guest reads what was last written."""
        check = self.disk.check()
        assert check.returncode == (LEAKS if self.leaks else 0), check
        reads = [f"read -P {pattern} {r[0]} {r[1]}" for r, pattern in self.patterns.items()]
        said = self.disk.io(*reads, read_only=True)
        assert "verification failed" not in said, said


def host_offset(disk: Disk, what: Range) -> int:
    """Returns the place in the file of an allocated range that was written in one go."""
    mapped = json.loads(run_ok("qemu-img", "map", "--output", "json", disk.path))
    (part,) = (part for part in mapped if part["start"] == what[0])
    assert part["length"] == what[1]
    offset: int = part["offset"]
    return offset


CASES: dict[str, Callable[[Scene], None]] = {}


def case(name: str) -> Callable[[Callable[[Scene], None]], None]:
    """Names a case; a tracker that it leaves is stopped, or abandoned while it is inactive."""

    def register(play: Callable[[Scene], None]) -> None:
        CASES[name] = play

    return register


def handed_over(case: str, way: Way, folder: Path, stream: Path, daemon: StorageDaemon) -> Result:
    """Plays a case on a fresh image, and judges; the daemon reads what is there in the end."""
    disk = Disk.create(folder / "disk.qcow2", SIZE)
    patterns = {what: n for n, what in enumerate((OLD, EARLY, FLUSHED, LATE, AFTER), 1)}
    disk.io(*(f"write -P {n} {s} {length}" for (s, length), n in patterns.items()))
    offsets = {what: host_offset(disk, what) for what in patterns}
    disk.add("p0", GRANULARITY)
    disk.io(f"write -P {len(patterns) + 1} {BEFORE[0]} {BEFORE[1]}")
    patterns[BEFORE] = len(patterns) + 1
    generation = True if way.generation else None
    with (
        qcow2bm.open(disk.path, "r+") as image,
        image.track(generation=generation) as tracker,
    ):
        scene = Scene(disk, way, stream, image, tracker, offsets, patterns)
        scene.begin()
        CASES[case](scene)
    return scene.result(daemon)


# It fails


@case("cancelled before inactivation")
def _(scene: Scene) -> None:
    with scene.destination() as machine, scene.half_arrived(machine):
        machine.kill()
    scene.tracker.cancel_migration()
    scene.write(AFTER)


@case("failed before inactivation")
def _(scene: Scene) -> None:
    with scene.destination() as machine:
        scene.break_off(machine)
    scene.tracker.cancel_migration()
    scene.write(AFTER)


@case("cancelled in pre-switchover")
def _(scene: Scene) -> None:
    """The destination waits for the end of the stream when it is sent away."""
    with scene.destination() as machine, scene.half_arrived(machine):
        scene.inactivate()
        scene.activate()
        machine.kill()


@case("failed after inactivation")
def _(scene: Scene) -> None:
    with scene.destination() as machine:
        scene.inactivate()
        scene.break_off(machine)
    scene.activate()


# It succeeds, and there is no destination


@case("succeeded, source goes on")
def _(scene: Scene) -> None:
    scene.inactivate()
    scene.activate()


@case("succeeded, stop and start")
def _(scene: Scene) -> None:
    """QEMU starts the machine again, then this library does and finds the old sentinel."""
    scene.inactivate()
    scene.tracker.abandon()
    scene.image.close()
    with Machine(scene.disk.path) as again:
        scene.write_by(again, AFTER)
        again.quit()
    with qcow2bm.open(scene.disk.path, "r+") as image:
        if scene.way.is_carried:
            with pytest.raises(qcow2bm.BitmapError, match="no bitmap of the image is valid"):
                image.track()
            return
        with image.track() as scene.tracker:
            scene.write(OLD)


# It succeeds, and the source goes on although there is a destination


def migrate(scene: Scene, play: Callable[[Machine], None]) -> None:
    """The source migrates to a machine, which plays its part; then the source runs on."""
    with scene.destination() as machine:
        scene.inactivate()
        scene.arrive(machine)
        machine.wait_for("running")
        with pytest.raises(qcow2bm.ImageLockedError):
            scene.tracker.activate(scene.way.policy)  # which does no harm
        play(machine)
    scene.activate()


@case("destination loaded only")
def _(scene: Scene) -> None:
    migrate(scene, Machine.quit)


@case("destination loaded and was killed")
def _(scene: Scene) -> None:
    def play(machine: Machine) -> None:
        machine.kill()
        scene.has_evidence = False

    migrate(scene, play)


@case("destination wrote and stored")
def _(scene: Scene) -> None:
    def play(machine: Machine) -> None:
        scene.write_by(machine, FOREIGN)
        machine.quit()

    migrate(scene, play)


@case("destination wrote to the end of the disk")
def _(scene: Scene) -> None:
    """The destination writes behind the last whole granule, and nowhere else."""

    def play(machine: Machine) -> None:
        scene.write_by(machine, END)
        machine.quit()

    migrate(scene, play)


@case("destination wrote and was killed")
def _(scene: Scene) -> None:
    def play(machine: Machine) -> None:
        scene.write_by(machine, FOREIGN)
        del scene.patterns[FOREIGN]  # only the destination knew where the data are
        machine.kill()
        scene.has_evidence = False

    migrate(scene, play)


@case("destination never ran")
def _(scene: Scene) -> None:
    """The destination has received everything, and leaves the disk inactive, as with libvirt."""
    with scene.destination(paused=True) as machine:
        machine.enable("late-block-activate")
        scene.inactivate()
        scene.arrive(machine)
        assert WRITE_LOCK not in held_lock_bytes(scene.disk.path)
        machine.quit()
    scene.activate()


@case("destination came too late")
def _(scene: Scene) -> None:
    """The destination tries to run after the source took the disk back."""
    with scene.destination(paused=True) as machine:
        machine.enable("late-block-activate")
        scene.inactivate()
        scene.arrive(machine)
        scene.activate()
        with pytest.raises(QmpError, match="lock"):
            machine.execute("cont")
        machine.quit()


# It succeeds, and another program writes to the image before the source goes on


@case("unaware program wrote")
def _(scene: Scene) -> None:
    """The program does not know bitmaps. As it must, it clears all autoclear bits."""
    scene.inactivate()
    with scene.disk.path.open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), bytes(AUTOCLEAR_WORD[1]), AUTOCLEAR_WORD[0])
    scene.put(OLD)
    scene.foreign.append(OLD)
    scene.has_evidence = False
    scene.leaks = True  # what belongs to the bitmaps
    scene.activate()


@case("committed into")
def _(scene: Scene) -> None:
    scene.inactivate()
    path = scene.disk.path
    overlay = Disk.create(path.with_name("overlay.qcow2"), SIZE, "-b", str(path), "-F", "qcow2")
    overlay.io(f"write -P {scene.pattern(FOREIGN)} {FOREIGN[0]} {FOREIGN[1]}")
    run_ok("qemu-img", "commit", "-q", overlay.path)
    scene.foreign.append(FOREIGN)
    scene.activate()


@case("reopened from read-only to read-write")
def _(scene: Scene) -> None:
    scene.inactivate()
    path = str(scene.disk.path)
    with StorageDaemon() as daemon:
        file = {"node-name": "file", "driver": "file", "filename": path, "read-only": True}
        node = {"node-name": "disk", "driver": "qcow2", "file": "file", "read-only": True}
        daemon.execute("blockdev-add", file)
        daemon.execute("blockdev-add", node)
        options = [file | {"read-only": False}, node | {"read-only": False}]
        daemon.execute("blockdev-reopen", {"options": options})
        address = {"path": f"qcow2bm-{uuid4()}", "abstract": True}  # a socket without a file
        daemon.execute("nbd-server-start", {"addr": {"type": "unix", "data": address}})
        export = {"type": "nbd", "id": "disk", "node-name": "disk", "writable": True}
        daemon.execute("block-export-add", export)
        server = f"driver=nbd,export=disk,server.type=unix,server.path={address['path']}"
        write = f"write -P {scene.pattern(FOREIGN)} {FOREIGN[0]} {FOREIGN[1]}"
        run_ok("qemu-io", "-c", write, "--image-opts", f"{server},server.abstract=on")
        scene.foreign.append(FOREIGN)
    scene.activate()


# It succeeds, and another program changes the bitmaps before the source goes on


@case("qemu-img merged into them")
def _(scene: Scene) -> None:
    scene.inactivate()
    other = Disk.create(scene.disk.path.with_name("other.qcow2"), SIZE)
    other.add("b", GRANULARITY)
    other.io(f"write {MERGED[0]} {MERGED[1]}")
    for name in OURS:
        if scene.edit("--merge", "b", "-b", str(other.path), "-F", "qcow2", name=name):
            scene.merged = [MERGED]
    scene.activate()


@case("qemu-img cleared them")
def _(scene: Scene) -> None:
    scene.inactivate()
    for name in OURS:
        if scene.edit("--clear", name=name):
            scene.missing[name] = len(scene.written)
    scene.activate()


@case("qemu-img cleared all")
def _(scene: Scene) -> None:
    """The sentinel and its canary, too."""
    scene.inactivate()
    scene.clear_all()
    scene.activate()


@case("qemu-img cleared all between two writes")
def _(scene: Scene) -> None:
    """The first shows nowhere any more, but no write brings back what the canary had."""
    scene.inactivate()
    scene.disk.io(f"write -P {scene.pattern(FOREIGN)} {FOREIGN[0]} {FOREIGN[1]}")
    if scene.way.is_carried:  # the others were cleared by intent
        scene.foreign.append(FOREIGN)
    scene.clear_all()
    scene.disk.io(f"write -P {scene.pattern(END)} {END[0]} {END[1]}")
    scene.foreign.append(END)
    scene.activate()
