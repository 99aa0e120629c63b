"""Plays a migration of an exact offload, with the commands that belong to it, and real QEMUs."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from support.offloaded import Range, Scene, assert_back
from support.vm import Machine

from qcow2bm import live
from qcow2bm.qmp.names import ARRIVAL_PREFIX, RECORDER_PREFIX


class Hop(NamedTuple):
    """A machine to which another migrates, and where its QMP server is."""

    machine: Machine
    address: Path


@contextmanager
def waiting(scene: Scene, name: str, *, paused: bool = False) -> Iterator[Hop]:
    """A machine that waits for a migration."""
    address = scene.path.with_name(name)
    with Machine(scene.disk.path, incoming=True, paused=paused, monitor=address) as machine:
        yield Hop(machine, address)


def begin(source: Machine, destination: Machine, *capabilities: str) -> None:
    """Begins a migration, which goes on until `complete`."""
    for machine in (source, destination):
        machine.enable(*capabilities)
    ours, theirs = socket.socketpair()
    destination.receive(theirs)
    source.migrate(ours, slowly=True)
    source.wait_for_migration("active")
    destination.wait_for_migration("active")


def complete(source: Machine, destination: Machine) -> None:
    source.execute("migrate-set-parameters", {"max-bandwidth": 1 << 30})
    source.wait_for_migration("completed")
    source.wait_for("postmigrate")
    destination.wait_for_migration("completed")


def migrate(source: Machine, destination: Machine, *capabilities: str) -> None:
    begin(source, destination, *capabilities)
    complete(source, destination)


def migrate_and_write(scene: Scene, hop: Hop, *written: Range, is_recorded: bool = False) -> None:
    """Migrates the source, and lets the destination write."""
    begin(scene.source, hop.machine)
    if is_recorded:
        record(scene, hop.address)
    complete(scene.source, hop.machine)
    hop.machine.wait_for("running")
    scene.write(hop.machine, *written)


def record(
    scene: Scene, destination: Path, source: Path | None = None
) -> tuple[live.RecorderFacts, ...]:
    from_where = str(source or scene.address)
    with live.Monitor(str(destination)) as ours, live.Monitor(from_where) as theirs:
        return live.record(ours, theirs, str(scene.path))


def collect(scene: Scene, address: Path | None = None) -> tuple[live.RecorderFacts, ...]:
    with live.Monitor(str(address or scene.address)) as monitor:
        return live.collect(monitor, str(scene.path))


def restore(scene: Scene, address: Path | None = None, *, is_alone: bool = False) -> str:
    """Puts the bitmaps back; returns why that was not exact, or "exact"."""
    with live.Monitor(str(address or scene.address)) as monitor:
        done = live.restore(monitor, str(scene.path), is_alone=is_alone)
    assert all(one.is_safe for one in done.bitmaps)
    written = {one.name: one.written for one in done.bitmaps}
    assert written.pop("off") is None
    (facts,) = set(written.values())
    assert facts is not None
    assert facts.dirty_bytes > 0
    assert facts.is_exact == (not facts.reason)
    return facts.reason or "exact"


def end(scene: Scene, machine: Machine, *, is_exact: bool = True) -> None:
    """Ends the machine that has the disk: its bitmaps have every write, and no more if exact."""
    names = machine.bitmaps()
    machine.quit()
    assert not [n for n in names if n.startswith((RECORDER_PREFIX, ARRIVAL_PREFIX))]
    assert_back(scene.disk, scene.written, is_exact=is_exact)
