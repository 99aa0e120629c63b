"""Exact offloads: the bitmaps get what was written and no more, or the message says why not."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from support.offloaded import LATER, MEANWHILE, Scene, assert_back, offloaded
from support.twin import KiB, MiB
from support.vm import NOWHERE, Machine

import qcow2bm
from qcow2bm import live
from qcow2bm.qmp.names import ARRIVAL_PREFIX, RECORDER_PREFIX

pytestmark = pytest.mark.usefixtures("system_emulator")


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    with offloaded(tmp_path, exact=True) as scene:
        yield scene


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


def migrate(source: Machine, destination: Machine, *capabilities: str) -> None:
    for machine in (source, destination):
        machine.enable(*capabilities)
    ours, theirs = socket.socketpair()
    destination.receive(theirs)
    source.migrate(ours)
    source.wait_for_migration("completed")
    source.wait_for("postmigrate")
    destination.wait_for_migration("completed")


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


@pytest.mark.spec("LIVE-17")
def test_on_the_same_machine(scene: Scene) -> None:
    assert restore(scene) == "exact"
    scene.write(scene.source, LATER)
    end(scene, scene.source)


@pytest.mark.spec("LIVE-17")
def test_the_source_goes_on_after_a_cancelled_migration(scene: Scene) -> None:
    scene.source.migrate(NOWHERE, slowly=True)
    scene.source.wait_for_migration("active")
    scene.source.execute("migrate_cancel")
    scene.source.wait_for_migration("cancelled")
    scene.source.wait_for("running")
    scene.write(scene.source, LATER)
    assert restore(scene) == "exact"
    end(scene, scene.source)


@pytest.mark.spec("LIVE-17")
def test_the_source_goes_on_after_its_disk_was_inactive(scene: Scene) -> None:
    scene.source.migrate(NOWHERE)
    scene.source.wait_for("postmigrate")
    collect(scene)  # which must not make the source's own recorder count for less
    scene.source.execute("cont")
    scene.write(scene.source, LATER)
    assert restore(scene, is_alone=True) == "exact"
    end(scene, scene.source)


@pytest.mark.spec("LIVE-18", "LIVE-19")
def test_recorded_at_the_destination_and_collected_at_the_source(scene: Scene) -> None:
    with waiting(scene, "destination") as (machine, address):
        ((node, granularity, dirty_bytes),) = record(scene, address)
        assert (node, granularity, dirty_bytes) == ("disk", 4 * KiB, 0)
        assert record(scene, address) == ((node, granularity, dirty_bytes),)  # nothing is new
        migrate(scene.source, machine)
        machine.wait_for("running")
        scene.write(machine, LATER)
        ((_, _, dirty_bytes),) = collect(scene)
        assert dirty_bytes == 4 * KiB + 64 * KiB
        scene.source.quit()
        assert restore(scene, address) == "exact"
        scene.write(machine, (9 * MiB, 512))
        end(scene, machine)


@pytest.mark.spec("LIVE-18")
def test_without_a_recorder_at_the_destination_the_tail_is_taken(scene: Scene) -> None:
    with waiting(scene, "destination") as (machine, address):
        migrate(scene.source, machine)
        machine.wait_for("running")
        scene.write(machine, LATER)
        collect(scene)
        assert restore(scene, address) == "no recorder has recorded here from the start"
        end(scene, machine, is_exact=False)


@pytest.mark.spec("LIVE-19")
def test_what_is_not_collected_is_taken_from_the_tail(scene: Scene) -> None:
    with waiting(scene, "destination") as (machine, address):
        record(scene, address)
        migrate(scene.source, machine)
        machine.wait_for("running")
        scene.source.kill()
        assert restore(scene, address) == "the recorder of the source was not collected"
        end(scene, machine, is_exact=False)


@pytest.mark.spec("LIVE-17")
def test_the_recorder_travels_with_the_capability(scene: Scene) -> None:
    with waiting(scene, "destination") as (machine, address):
        migrate(scene.source, machine, "dirty-bitmaps")
        machine.wait_for("running")
        scene.write(machine, LATER)
        assert restore(scene, address) == "exact"
        end(scene, machine)


@pytest.mark.spec("LIVE-18")
def test_both_recorders_travel_with_the_capability(scene: Scene) -> None:
    with waiting(scene, "destination") as (machine, address):
        record(scene, address)
        migrate(scene.source, machine, "dirty-bitmaps")
        machine.wait_for("running")
        scene.write(machine, LATER)
        assert restore(scene, address) == "exact"
        end(scene, machine)


@pytest.mark.spec("LIVE-18")
def test_a_destination_that_has_the_disk_already_is_refused(scene: Scene) -> None:
    with waiting(scene, "destination", paused=True) as (machine, address):
        migrate(scene.source, machine)
        with pytest.raises(qcow2bm.StateError, match="the destination is in state paused"):
            record(scene, address)
        collect(scene)
        machine.execute("cont")
        scene.write(machine, LATER)
        assert restore(scene, address) == "no recorder has recorded here from the start"
        end(scene, machine, is_exact=False)


@pytest.mark.spec("LIVE-18")
def test_a_machine_in_between_leaves_no_gap(scene: Scene) -> None:
    """Its writes are in no recorder: the last machine gets none, although it waited all along."""
    with waiting(scene, "last") as last, waiting(scene, "between") as between:
        migrate(scene.source, between.machine)
        between.machine.wait_for("running")
        scene.write(between.machine, (MEANWHILE[0][0] + 512, 512))  # in a region that is dirty
        with pytest.raises(qcow2bm.StateError, match="the source is in state postmigrate"):
            record(scene, last.address)
        assert not last.machine.bitmaps()
        with pytest.raises(qcow2bm.EvidenceError, match="the source has no recorder"):
            record(scene, last.address, between.address)
        collect(scene)
        with pytest.raises(qcow2bm.StateError, match="not migrated"):
            collect(scene, between.address)
        migrate(between.machine, last.machine)
        last.machine.wait_for("running")
        with pytest.raises(qcow2bm.EvidenceError, match="no recorder of this file"):
            collect(scene, between.address)
        assert restore(scene, last.address) != "exact"
        end(scene, last.machine, is_exact=False)


@pytest.mark.spec("LIVE-17")
@pytest.mark.parametrize("way", ["clear", "disable"])
def test_a_recorder_that_was_changed_is_not_taken(scene: Scene, way: str) -> None:
    name = next(name for name in scene.source.bitmaps() if name.startswith(RECORDER_PREFIX))
    scene.source.execute(f"block-dirty-bitmap-{way}", {"node": "disk", "name": name})
    scene.write(scene.source, LATER)
    reason = restore(scene)
    assert reason in (
        "the recorders lack something that the tail has",
        "no recorder has recorded here from the start",
    )
    end(scene, scene.source, is_exact=False)


@pytest.mark.spec("LIVE-19")
def test_a_source_that_goes_on_is_not_collected(scene: Scene) -> None:
    with pytest.raises(qcow2bm.StateError, match="not migrated"):
        collect(scene)
    scene.source.migrate(NOWHERE)
    scene.source.wait_for("postmigrate")
    scene.source.execute("cont")
    with pytest.raises(qcow2bm.StateError, match="it goes on, and writes"):
        collect(scene)


@pytest.mark.spec("LIVE-17")
def test_once_the_machine_is_off_the_tail_is_taken(scene: Scene) -> None:
    scene.source.quit()
    with qcow2bm.open(scene.disk.path, "r+") as image:
        done = live.restore_offline(str(scene.path), image)
    assert {one.written and one.written.is_exact for one in done.bitmaps} == {None, False}
    assert_back(scene.disk, scene.written)
