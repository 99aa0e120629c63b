"""Exact offloads: the bitmaps get what was written and no more, or the message says why not."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.exact_offload import (
    begin,
    collect,
    complete,
    end,
    migrate,
    migrate_and_write,
    record,
    restore,
    waiting,
)
from support.offloaded import (
    LATER,
    MEANWHILE,
    SIZE,
    Interrupted,
    Scene,
    assert_back,
    killed,
    offloaded,
)
from support.twin import KiB, MiB
from support.vm import NOWHERE

import qcow2bm
from qcow2bm import live
from qcow2bm.live.offload_file import OffloadFile
from qcow2bm.qmp.answers import Answer
from qcow2bm.qmp.names import ARRIVAL_PREFIX, RECORDER_PREFIX

NEAR = (MEANWHILE[0][0] + 256 * KiB, 512)
"""A write in a granule of the tail that is dirty: only a recorder tells it from the others."""

pytestmark = pytest.mark.usefixtures("system_emulator")


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    with offloaded(tmp_path, exact=True) as scene:
        yield scene


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
    # Whether another machine had the disk meanwhile, QEMU does not tell.
    reason = "another machine had the disk, and the recorder is older than that"
    assert restore(scene, is_alone=True) == reason
    end(scene, scene.source, is_exact=False)


@pytest.mark.spec("LIVE-18", "LIVE-19")
def test_recorded_at_the_destination_and_collected_at_the_source(scene: Scene) -> None:
    with waiting(scene, "destination") as (machine, address):
        begin(scene.source, machine)
        ((node, granularity, dirty_bytes),) = record(scene, address)
        assert (node, granularity, dirty_bytes) == ("disk", 4 * KiB, 0)
        assert record(scene, address) == ((node, granularity, dirty_bytes),)  # in its place
        complete(scene.source, machine)
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
    with waiting(scene, "destination") as hop:
        machine, address = hop
        migrate_and_write(scene, hop, LATER)
        collect(scene)
        assert restore(scene, address) == "live record was not run, or not in time"
        end(scene, machine, is_exact=False)


@pytest.mark.spec("LIVE-19")
def test_what_is_not_collected_is_taken_from_the_tail(scene: Scene) -> None:
    with waiting(scene, "destination") as hop:
        machine, address = hop
        migrate_and_write(scene, hop, is_recorded=True)
        scene.source.kill()
        assert restore(scene, address) == "live collect was not run at the source"
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
def test_with_the_capability_there_is_nothing_to_record(scene: Scene) -> None:
    with waiting(scene, "destination") as (machine, address):
        begin(scene.source, machine, "dirty-bitmaps")
        # The bitmaps of the source are busy until the migration has ended.
        with pytest.raises(qcow2bm.StateError, match="the source is without a recorder"):
            record(scene, address)
        complete(scene.source, machine)
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
        assert restore(scene, address) == "live record was not run, or not in time"
        end(scene, machine, is_exact=False)


@pytest.mark.spec("LIVE-18")
def test_a_destination_that_does_not_receive_yet_is_refused(scene: Scene) -> None:
    """Another machine could still come first."""
    with (
        waiting(scene, "destination") as (machine, address),
        pytest.raises(qcow2bm.StateError, match="must be receiving a migration"),
    ):
        record(scene, address)
    assert not machine.is_running


@pytest.mark.spec("LIVE-18")
def test_a_machine_in_between_leaves_no_gap(scene: Scene) -> None:
    """Its writes are in no recorder, so the last machine gets none."""
    with waiting(scene, "last") as last, waiting(scene, "between") as between:
        begin(scene.source, between.machine)
        with pytest.raises(qcow2bm.StateError, match="must be receiving a migration"):
            record(scene, last.address)
        record(scene, between.address)
        complete(scene.source, between.machine)
        between.machine.wait_for("running")
        scene.write(between.machine, NEAR)
        collect(scene)
        begin(between.machine, last.machine)
        for source in (scene.address, between.address):
            with pytest.raises(qcow2bm.StateError, match="the source is"):
                record(scene, last.address, source)
        complete(between.machine, last.machine)
        last.machine.wait_for("running")
        with pytest.raises(qcow2bm.StateError, match="without a recorder of this file"):
            collect(scene, between.address)
        assert restore(scene, last.address) == "live record was not run, or not in time"
        end(scene, last.machine, is_exact=False)


@pytest.mark.spec("LIVE-18")
def test_recorded_while_the_source_waits_to_hand_over(scene: Scene) -> None:
    scene.source.enable("pause-before-switchover")
    with waiting(scene, "destination") as (machine, address):
        ours, theirs = socket.socketpair()
        machine.receive(theirs)
        scene.source.migrate(ours)
        scene.source.wait_for_migration("pre-switchover")
        record(scene, address)
        scene.source.execute("migrate-continue", {"state": "pre-switchover"})
        complete(scene.source, machine)
        machine.wait_for("running")
        scene.write(machine, LATER)
        collect(scene)
        assert restore(scene, address) == "exact"
        end(scene, machine)


@pytest.mark.spec("LIVE-18", "LIVE-24")
def test_a_disk_that_grows_on_the_way(scene: Scene) -> None:
    resize = {"node-name": "disk", "size": SIZE + 32 * MiB}
    scene.source.execute("block_resize", resize)
    scene.write(scene.source, (SIZE + MiB, 512))
    with waiting(scene, "destination") as hop:
        machine, address = hop
        migrate_and_write(scene, hop, LATER, is_recorded=True)
        collect(scene)
        machine.execute("block_resize", {**resize, "size": SIZE + 64 * MiB})
        scene.write(machine, (SIZE + 63 * MiB, 512))
        assert restore(scene, address) == "exact"
        end(scene, machine)


class Mute(live.Monitor):
    """A connection to a machine that does not answer."""

    def execute(self, command: str, arguments: dict[str, Any] | None = None) -> Answer:
        if arguments is None and command == "qmp_capabilities":
            return super().execute(command, arguments)
        raise qcow2bm.QmpTimeoutError(command, 1)


@pytest.mark.spec("LIVE-18")
def test_of_two_machines_the_one_that_does_not_answer_is_named(scene: Scene) -> None:
    with waiting(scene, "destination") as (machine, address):
        begin(scene.source, machine)
        with (
            live.Monitor(str(address)) as ours,
            Mute(str(scene.address)) as theirs,
            pytest.raises(qcow2bm.QmpError, match="failed: the source: no answer within"),
        ):
            live.record(ours, theirs, str(scene.path))


@pytest.mark.spec("LIVE-18")
def test_a_recorder_that_the_file_does_not_name_does_not_count(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tool was killed before it knew whether the source still had the disk."""
    with waiting(scene, "destination") as (machine, address):
        begin(scene.source, machine)
        with monkeypatch.context() as patch:
            patch.setattr(OffloadFile, "append_recorded", killed)
            with pytest.raises(Interrupted):
                record(scene, address)
        complete(scene.source, machine)
        machine.wait_for("running")
        assert any(name.startswith(ARRIVAL_PREFIX) for name in machine.bitmaps())
        collect(scene)
        assert restore(scene, address) == "live record was not run, or not in time"
        end(scene, machine, is_exact=False)


@pytest.mark.spec("LIVE-19")
def test_what_was_collected_after_another_migration_does_not_count(scene: Scene) -> None:
    """There was no destination, and the source went on and wrote."""
    scene.source.migrate(NOWHERE)
    scene.source.wait_for("postmigrate")
    collect(scene)
    scene.source.execute("cont")
    scene.write(scene.source, NEAR)
    with waiting(scene, "second") as (machine, address):
        begin(scene.source, machine)
        # Nothing tells that this time no other machine had the disk.
        with pytest.raises(qcow2bm.StateError, match="not the only machine that had the disk"):
            record(scene, address)
        complete(scene.source, machine)
        machine.wait_for("running")
        assert restore(scene, address) == "live record was not run, or not in time"
        end(scene, machine, is_exact=False)


@pytest.mark.spec("LIVE-17")
def test_a_source_that_goes_on_gets_what_the_destination_wrote(scene: Scene) -> None:
    """QEMU only remembers the last migration, which failed; but it loaded the tail anew."""
    with waiting(scene, "destination") as hop:
        migrate_and_write(scene, hop, NEAR)
        hop.machine.quit()
    scene.source.execute("cont")
    scene.source.migrate("exec:false")
    scene.source.wait_for_migration("failed")
    scene.write(scene.source, LATER)
    reason = "another machine had the disk, and the recorder is older than that"
    assert restore(scene) == reason
    end(scene, scene.source, is_exact=False)


@pytest.mark.spec("LIVE-18")
def test_a_recorder_that_missed_another_machine_is_not_carried_on(scene: Scene) -> None:
    """Another machine had the disk, wrote, and ended; the source goes on, and migrates again."""
    with waiting(scene, "first") as hop:
        migrate_and_write(scene, hop, NEAR)
        hop.machine.quit()
    scene.source.execute("cont")
    with waiting(scene, "second") as (machine, address):
        begin(scene.source, machine)
        with pytest.raises(qcow2bm.StateError, match="not the only machine that had the disk"):
            record(scene, address)
        complete(scene.source, machine)
        machine.wait_for("running")
        collect(scene)
        assert restore(scene, address) == "live record was not run, or not in time"
        end(scene, machine, is_exact=False)


@pytest.mark.spec("LIVE-17")
def test_a_destination_that_gave_the_disk_away_gets_what_was_written_there(scene: Scene) -> None:
    """Its recorder lacks what the next machine wrote, and QEMU only remembers a failure."""
    with waiting(scene, "destination") as hop, waiting(scene, "next") as following:
        migrate_and_write(scene, hop, LATER, is_recorded=True)
        collect(scene)
        migrate(hop.machine, following.machine)
        following.machine.wait_for("running")
        scene.write(following.machine, NEAR)
        following.machine.quit()
        hop.machine.execute("cont")
        hop.machine.migrate("exec:false")
        hop.machine.wait_for_migration("failed")
        reason = restore(scene, hop.address)
        assert reason == "another migration began here since, and another machine may have written"
        end(scene, hop.machine, is_exact=False)


@pytest.mark.spec("LIVE-17")
@pytest.mark.parametrize("way", ["clear", "disable"])
def test_a_recorder_that_was_changed_is_not_taken(scene: Scene, way: str) -> None:
    name = next(name for name in scene.source.bitmaps() if name.startswith(RECORDER_PREFIX))
    scene.source.execute(f"block-dirty-bitmap-{way}", {"node": "disk", "name": name})
    scene.write(scene.source, LATER)
    reason = restore(scene)
    assert reason in (
        "the recorders lack something that the tail has",
        "live record was not run, or not in time",
    )
    end(scene, scene.source, is_exact=False)


@pytest.mark.spec("LIVE-17", "LIVE-20")
def test_former_tails_tell_of_a_recorder_that_was_cleared(scene: Scene) -> None:
    name = next(name for name in scene.source.bitmaps() if name.startswith(RECORDER_PREFIX))
    scene.source.execute("block-dirty-bitmap-clear", {"node": "disk", "name": name})
    with live.Monitor(str(scene.address)) as monitor:
        live.offload(monitor, str(scene.path), max_stop_seconds=1e-9)
    assert restore(scene) == "the recorders lack something that the tail has"
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
