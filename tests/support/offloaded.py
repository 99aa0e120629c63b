"""Plays what happens to a machine between live offload and live restore, with real QEMUs."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from support.qemu import Disk, run_ok
from support.twin import KiB, MiB
from support.vm import NOWHERE, Machine

import qcow2bm
from qcow2bm import live
from qcow2bm.qmp.answers import Answer
from qcow2bm.qmp.names import TAIL_PREFIX

SIZE = 256 * MiB + 512
TAIL = 4 * MiB
GRANULARITIES = {"daily": 64 * KiB, "fine": 4 * KiB, "off": 64 * KiB, "größe \N{SNOWMAN}": MiB}

Range = tuple[int, int]  # start, length

BEFORE: tuple[Range, ...] = ((MiB, 3 * MiB), (SIZE - 512, 512))
MEANWHILE: tuple[Range, ...] = ((70 * MiB + 512, 512), (133 * MiB, 64 * KiB))
LATER: Range = (200 * MiB, 4 * KiB)


def make_disk(folder: Path, *options: str) -> Disk:
    """A disk with bitmaps that record, and the bitmap ``off``, which does not."""
    disk = Disk.create(folder / "disk.qcow2", SIZE, *options)
    for name, granularity in GRANULARITIES.items():
        disk.add(name, granularity)
    disk.io(*(f"write {start} {length}" for start, length in BEFORE))
    disk.bitmap("off", "--disable")
    return disk


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


def assert_back(
    disk: Disk, meanwhile: Sequence[Range] = MEANWHILE, *, is_exact: bool = False
) -> None:
    """Every bitmap is as before, and has every write, and no more than the tail's granularity.

    If ``is_exact``, it has no more than what was written.
    """
    assert disk.check().returncode == 0
    with qcow2bm.open(disk.path) as image:
        found = {name: (b.granularity, b.auto, b.status) for name, b in image.bitmaps.items()}
        size = image.virtual_size
    assert found == {
        name: (granularity, name != "off", "valid") for name, granularity in GRANULARITIES.items()
    }
    for name, granularity in GRANULARITIES.items():
        bits = granules(disk.path, name)
        ours = widened(BEFORE, granularity)
        if name == "off":
            assert bits == ours
            continue
        if is_exact:
            assert bits == ours | widened(meanwhile, granularity), name
            continue
        coarse = [
            (place * TAIL, min(TAIL, size - place * TAIL)) for place in widened(meanwhile, TAIL)
        ]
        assert ours | widened(meanwhile, granularity) <= bits
        assert bits <= ours | widened(coarse, granularity)


def assert_no_write_is_missing(disk: Disk, written: Sequence[Range]) -> None:
    """Every bitmap that is valid, and records, has every write; bitmaps may be lost."""
    with qcow2bm.open(disk.path) as image:
        valid = [name for name, bitmap in image.bitmaps.items() if bitmap.status == "valid"]
    for name in {*valid} & {*GRANULARITIES}:
        meanwhile = () if name == "off" else written
        wanted = widened([*BEFORE, *meanwhile], GRANULARITIES[name])
        assert wanted <= granules(disk.path, name), name


@dataclass
class Scene:
    """A disk, the file with its bitmaps, and what was written since they were taken out."""

    disk: Disk
    path: Path
    address: Path
    source: Machine
    written: list[Range] = field(default_factory=list)

    @property
    def tails(self) -> list[str]:
        return [name for name in self.source.bitmaps() if name.startswith(TAIL_PREFIX)]

    def write(self, machine: Machine, *ranges: Range) -> None:
        for start, length in ranges:
            machine.write(start, length)
            self.written.append((start, length))

    def restore(self, address: Path | None = None, *, is_alone: bool = False) -> None:
        with live.Monitor(str(address or self.address)) as monitor:
            done = live.restore(monitor, str(self.path), is_alone=is_alone)
        assert {(one.outcome, one.reason) for one in done.bitmaps} == {("restored", "")}

    def restore_into_the_image(self) -> None:
        with qcow2bm.open(self.disk.path, "r+") as image:
            live.restore_offline(str(self.path), image)

    @contextmanager
    def destination(
        self, *capabilities: str, disk: Path | None = None
    ) -> Iterator[tuple[Machine, Path]]:
        """The machine to which the source has migrated, and where its QMP server is.

        If it has a ``disk`` of its own, the storage is not shared.
        """
        address = self.path.with_name("destination")
        with Machine(disk or self.disk.path, incoming=True, monitor=address) as machine:
            for one in (self.source, machine):
                one.enable(*capabilities)
            ours, theirs = socket.socketpair()
            machine.receive(theirs)
            self.source.migrate(ours)
            self.source.wait_for_migration("completed")
            self.source.wait_for("postmigrate")
            machine.wait_for_migration("completed")
            machine.wait_for("running")
            yield machine, address


class Interrupted(BaseException):
    """The tool was killed."""


def killed(*_: object) -> None:
    """Stands for a function before which the tool is killed."""
    raise Interrupted


class WritingMonitor(live.Monitor):
    """A connection beside which the guest writes, before every command."""

    def __init__(self, address: Path, write: Callable[[], None]) -> None:
        self._write: Callable[[], None] | None = None
        super().__init__(str(address))
        self._write = write

    def execute(self, command: str, arguments: dict[str, Any] | None = None) -> Answer:
        if self._write:
            self._write()
        return super().execute(command, arguments)


CASES: dict[str, Callable[[Scene], None]] = {}


def case(name: str) -> Callable[[Callable[[Scene], None]], None]:
    """Names a case, as the table of spec/live.md does."""

    def register(play: Callable[[Scene], None]) -> None:
        CASES[name] = play

    return register


@contextmanager
def offloaded(folder: Path, **options: Any) -> Iterator[Scene]:
    """A machine whose bitmaps were taken out, and which has written since."""
    disk, path, address = make_disk(folder), folder / "offloaded", folder / "qmp"
    with Machine(disk.path, monitor=address) as source:
        with live.Monitor(str(address)) as monitor:
            live.offload(monitor, str(path), **options)
        scene = Scene(disk, path, address, source)
        scene.write(source, *MEANWHILE)
        yield scene


@case("same machine")
def _(scene: Scene) -> None:
    scene.restore()
    scene.write(scene.source, LATER)
    scene.source.quit()


@case("quit")
def _(scene: Scene) -> None:
    scene.source.quit()
    scene.restore_into_the_image()


@case("quit and start")
def _(scene: Scene) -> None:
    scene.source.quit()
    address = scene.path.with_name("again")
    with Machine(scene.disk.path, monitor=address) as again:
        scene.write(again, LATER)
        scene.restore(address)
        again.quit()


def _at_the_destination(scene: Scene, *capabilities: str) -> None:
    with scene.destination(*capabilities) as (machine, address):
        scene.write(machine, LATER)
        scene.restore(address)
        machine.quit()
    scene.source.kill()


@case("migrated, shared storage")
def _(scene: Scene) -> None:
    _at_the_destination(scene)


@case("migrated with the capability `dirty-bitmaps`")
def _(scene: Scene) -> None:
    _at_the_destination(scene, "dirty-bitmaps")


@case("migrated with the capability, storage not shared")
def _(scene: Scene) -> None:
    """The content of the disk, which is copied meanwhile, makes no difference here."""
    disk = Disk.create(scene.path.with_name("other.qcow2"), SIZE)
    with scene.destination("dirty-bitmaps", disk=disk.path) as (machine, address):
        scene.write(machine, LATER)
        scene.restore(address)
        machine.quit()
    scene.source.kill()
    scene.disk = disk


@case("destination killed")
def _(scene: Scene) -> None:
    with scene.destination() as (machine, _):
        scene.write(machine, LATER)
        machine.kill()
    scene.source.quit()
    scene.restore_into_the_image()


@case("destination killed, source goes on")
def _(scene: Scene) -> None:
    with scene.destination() as (machine, _):
        scene.write(machine, LATER)
        machine.kill()
    scene.source.execute("cont")
    scene.restore()


@case("source and destination killed")
def _(scene: Scene) -> None:
    with scene.destination() as (machine, _):
        scene.source.kill()
        machine.kill()
    scene.restore_into_the_image()


def _cancelled(scene: Scene) -> None:
    source = scene.source
    source.execute("migrate_cancel")
    source.wait_for_migration("cancelled")
    source.wait_for("running")
    scene.write(source, LATER)
    scene.restore()
    source.quit()


@case("cancelled")
def _(scene: Scene) -> None:
    scene.source.enable("dirty-bitmaps")
    scene.source.migrate(NOWHERE, slowly=True)
    scene.source.wait_for_migration("active")
    _cancelled(scene)


@case("cancelled in pre-switchover")
def _(scene: Scene) -> None:
    scene.source.enable("dirty-bitmaps", "pause-before-switchover")
    scene.source.migrate(NOWHERE)
    scene.source.wait_for_migration("pre-switchover")
    _cancelled(scene)


def _goes_on(scene: Scene, *, is_alone: bool) -> None:
    scene.source.enable("dirty-bitmaps")
    scene.source.migrate(NOWHERE)
    scene.source.wait_for_migration("completed")
    scene.source.wait_for("postmigrate")
    scene.source.execute("cont")
    scene.write(scene.source, LATER)
    scene.restore(is_alone=is_alone)
    scene.source.quit()


@case("source goes on")
def _(scene: Scene) -> None:
    _goes_on(scene, is_alone=False)


@case("source goes on, and no other machine ran")
def _(scene: Scene) -> None:
    _goes_on(scene, is_alone=True)


@case("killed")
def _(scene: Scene) -> None:
    scene.source.kill()
    scene.restore_into_the_image()


@case("tail removed")
def _(scene: Scene) -> None:
    (name,) = scene.tails
    scene.source.execute("block-dirty-bitmap-remove", {"node": "disk", "name": name})
    scene.restore()


@case("all bitmaps cleared")
def _(scene: Scene) -> None:
    for name in scene.source.bitmaps():
        scene.source.execute("block-dirty-bitmap-clear", {"node": "disk", "name": name})
    scene.restore()


def _snapshot(scene: Scene) -> Disk:
    """Lets the guest write to an overlay from now on."""
    path = scene.path.with_name("overlay.qcow2")
    base = str(scene.disk.path)
    overlay = Disk.create(path, SIZE, "-u", "-b", base, "-F", "qcow2")
    below = {"driver": "file", "filename": str(path)}
    node = {"node-name": "overlay", "driver": "qcow2", "backing": None, "file": below}
    scene.source.execute("blockdev-add", node)
    scene.source.execute("blockdev-snapshot", {"node": "disk", "overlay": "overlay"})
    return overlay


@case("snapshot, as libvirt makes it")
def _(scene: Scene) -> None:
    """Each bitmap that records goes on in the overlay, as a new one of the same name."""
    overlay, source = _snapshot(scene), scene.source
    for name, found in scene.source.bitmaps().items():
        assert found["recording"]  # the tail and its canary
        bitmap = {"node": "overlay", "name": name, "granularity": found["granularity"]}
        source.execute("block-dirty-bitmap-add", {**bitmap, "persistent": True})
    source.write(*LATER)
    source.quit()
    scene.disk = overlay
    scene.restore_into_the_image()


@case("snapshot")
def _(scene: Scene) -> None:
    """The disk is a backing file then, to which QEMU does not write."""
    _snapshot(scene)
    scene.restore()


@case("snapshot, then committed")
def _(scene: Scene) -> None:
    _snapshot(scene)
    scene.write(scene.source, (150 * MiB, 512))
    scene.source.execute("block-commit", {"device": "overlay", "job-id": "commit"})
    scene.source.wait_for_job("commit", "ready")
    scene.source.execute("job-complete", {"id": "commit"})
    scene.source.wait_for_job("commit", None)
    scene.write(scene.source, LATER)
    scene.restore()
    scene.source.quit()


@case("backup job")
def _(scene: Scene) -> None:
    target = Disk.create(scene.path.with_name("target.qcow2"), SIZE)
    below = {"driver": "file", "filename": str(target.path)}
    source = scene.source
    source.execute("blockdev-add", {"node-name": "target", "driver": "qcow2", "file": below})
    job = {"device": "disk", "target": "target", "sync": "full", "job-id": "backup", "speed": 1}
    source.execute("blockdev-backup", job)
    scene.write(source, (150 * MiB, 512))
    scene.restore()
    source.execute("job-cancel", {"id": "backup"})
    source.wait_for_job("backup", None)
    source.quit()


GROWN = SIZE + 64 * MiB + 512


def _resize(machine: Machine, size: int) -> None:
    machine.execute("block_resize", {"node-name": "disk", "size": size})


@case("disk grown")
def _(scene: Scene) -> None:
    _resize(scene.source, GROWN)
    scene.write(scene.source, (GROWN - 512, 512), LATER)
    scene.restore()
    scene.write(scene.source, (SIZE, 512))
    scene.source.quit()


@case("disk grown, then quit")
def _(scene: Scene) -> None:
    _resize(scene.source, GROWN)
    scene.write(scene.source, (GROWN - 512, 512), LATER)
    scene.source.quit()
    scene.restore_into_the_image()


@case("quit, then disk grown")
def _(scene: Scene) -> None:
    scene.source.quit()
    run_ok("qemu-img", "resize", "-f", "qcow2", str(scene.disk.path), str(GROWN))
    scene.restore_into_the_image()


@case("disk grown, then migrated")
def _(scene: Scene) -> None:
    _resize(scene.source, GROWN)
    _at_the_destination(scene)


@case("disk made smaller")
def _(scene: Scene) -> None:
    _resize(scene.source, 128 * MiB)
    scene.restore()


@case("disk made smaller, then larger than before")
def _(scene: Scene) -> None:
    _resize(scene.source, SIZE - 64 * MiB)
    _resize(scene.source, SIZE + 128 * MiB)
    scene.write(scene.source, (SIZE, 128 * MiB))
    scene.restore()
