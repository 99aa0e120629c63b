"""Bitmaps are taken out of a running QEMU, and put back: none misses a write."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
from support.offloaded import (
    CASES,
    GRANULARITIES,
    MEANWHILE,
    SIZE,
    Interrupted,
    WritingMonitor,
    assert_back,
    granules,
    killed,
    make_disk,
    offloaded,
    widened,
)
from support.qemu import Disk
from support.specreader import page
from support.twin import MiB
from support.vm import NOWHERE, Machine, until_deadline

import qcow2bm
from qcow2bm import live
from qcow2bm.live.offload_file import OffloadFile
from qcow2bm.qmp.answers import Answer

pytestmark = pytest.mark.usefixtures("system_emulator")


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return make_disk(tmp_path)


def offload(address: Path, path: Path, *, is_exact: bool = False) -> live.OffloadReport:
    with live.Monitor(str(address)) as monitor:
        return live.offload(monitor, str(path), exact=is_exact)


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
@pytest.mark.spec("LIVE-14", "LIVE-24")
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
    "not stored": "the tail is inconsistent: a QEMU that had the disk did not store it",
    "read-only": "the node is read-only",
    "no tail": "tail is gone|no tail of this file",
    "another size": "the disk has 134217728 bytes, and had 268435968",
    "another machine may have written": "the tail may lack what the destination wrote",
    "no canary": "the canary of the tail is gone or was changed",
}


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
COMMANDS = 400  # more than there are


def after_an_interruption(
    machine: Machine,
    disk: Disk,
    address: Path,
    path: Path,
    ending: Ending,
    *,
    is_exact: bool = False,
) -> None:
    """Writes, and then puts the bitmaps back, or lets QEMU die."""
    write(machine)
    if ending == "again":
        offload(address, path, is_exact=is_exact)
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
    assert_back(disk, is_exact=is_exact and ending != "offline")


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
    *,
    is_exact: bool = False,
) -> int:
    """Kills the tool before and after one command in ``step``; returns how often it did.

    Each time the bitmaps come back then, or QEMU dies. The endings begin with different commands.
    """
    original = disk.path.read_bytes()
    runs = 0
    for number in range(ENDINGS.index(ending) % step, COMMANDS, step):
        for is_sent in (False, True):
            address, path = folder / f"qmp{runs}", folder / f"offloaded{runs}"
            disk.path.write_bytes(original)
            with Machine(disk.path, monitor=address) as machine:
                prepare(machine, address, path)
                begun = partial(work, path=str(path))
                if not is_interrupted(begun, address, number, is_sent=is_sent):
                    return runs
                after_an_interruption(machine, disk, address, path, ending, is_exact=is_exact)
            runs += 1
    raise AssertionError("there are more commands")


every_step = pytest.mark.parametrize(
    "step", [pytest.param(3, marks=pytest.mark.deep), pytest.param(17, id="some")]
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


@pytest.mark.spec("LIVE-11", "LIVE-17")
@pytest.mark.parametrize("ending", ENDINGS)
@every_step
def test_every_interruption_of_an_exact_offload(
    disk: Disk, tmp_path: Path, ending: Ending, step: int
) -> None:
    work = partial(live.offload, exact=True)
    runs = interrupt_each(disk, tmp_path, ending, step, work, is_exact=True)
    assert runs
    print(f"{ending}: {runs} interruptions of an exact offload, no write missing")


@pytest.mark.spec("LIVE-11", "LIVE-17")
@pytest.mark.parametrize("ending", ["restore", "offline", "killed"])
@every_step
def test_every_interruption_of_an_exact_restore(
    disk: Disk, tmp_path: Path, ending: Ending, step: int
) -> None:
    def prepare(machine: Machine, address: Path, path: Path) -> None:
        offload(address, path, is_exact=True)
        write(machine)

    runs = interrupt_each(disk, tmp_path, ending, step, live.restore, prepare)
    assert runs
    print(f"{ending}: {runs} interruptions of an exact restore, no write missing")


@pytest.mark.spec("LIVE-11", "LIVE-20")
@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("step", [pytest.param(8, marks=pytest.mark.deep), 47])
def test_every_interruption_of_new_tails(
    disk: Disk, tmp_path: Path, ending: Ending, step: int
) -> None:
    """Nothing fits the limit, and the guest writes, so that a new tail follows."""
    machines: list[Machine] = []

    def prepare(machine: Machine, address: Path, path: Path) -> None:
        machines[:] = [machine]

    def work(monitor: live.Monitor, path: str) -> None:
        live.offload(monitor, path, max_stop_seconds=1e-9, on_progress=lambda *_: write(*machines))

    runs = interrupt_each(disk, tmp_path, ending, step, work, prepare)
    assert runs
    print(f"{ending}: {runs} interruptions of an offload with new tails, no write missing")


@pytest.mark.spec("LIVE-3", "LIVE-8", "LIVE-17", "LIVE-20")
@pytest.mark.parametrize("is_exact", [False, True])
def test_the_guest_writes_between_all_commands(disk: Disk, tmp_path: Path, is_exact: bool) -> None:
    address, path = tmp_path / "qmp", str(tmp_path / "offloaded")
    chance, written = random.Random(7), []
    with Machine(disk.path, monitor=address) as machine:

        def write_somewhere() -> None:
            written.append((chance.randrange(SIZE >> 9) << 9, 512))
            machine.write(*written[-1])

        with WritingMonitor(address, write_somewhere) as monitor:
            done = live.offload(monitor, path, exact=is_exact, max_stop_seconds=1e-9)
            assert done.limited
            assert done.limited.rounds == 10
            back = live.restore(monitor, path)
        assert {one.outcome for one in back.bitmaps} == {"restored"}
        facts = [one.written for one in back.bitmaps if one.written]
        assert {one.is_exact for one in facts} == {is_exact}
        machine.quit()
    assert len(written) > 100
    assert_back(disk, written, is_exact=is_exact)


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


@pytest.mark.spec("LIVE-22")
def test_a_migration_that_never_converges_does_after_an_offload(tmp_path: Path) -> None:
    """With the capability, QEMU takes each bit of a bitmap for a byte that is still to be sent.

    A guest that is idle sends little, and QEMU takes that for what the network can do.
    """
    disk = Disk.create(tmp_path / "disk.qcow2", 16 << 40)
    disk.add("daily", 64 << 10)
    address, path = tmp_path / "qmp", str(tmp_path / "offloaded")
    with Machine(disk.path, monitor=address) as source:
        source.enable("dirty-bitmaps")
        assert source.execute("query-migrate-parameters")["downtime-limit"] == 300
        source.migrate(NOWHERE)
        rounds = 0
        for _ in until_deadline("the memory is not sent"):
            found = source.execute("query-migrate")
            assert found["status"] in ("setup", "active")
            rounds += found.get("ram", {}).get("remaining") == 0
            if rounds == 100:  # there is nothing else to send
                break
        source.execute("migrate_cancel")
        source.wait_for_migration("cancelled")
        with live.Monitor(str(address)) as monitor:
            live.offload(monitor, path, tail_granularity=128 * MiB)
        source.migrate(NOWHERE)
        source.wait_for_migration("completed")


@pytest.mark.parametrize("is_off", [False, True])
def test_a_disk_on_a_raw_data_file(tmp_path: Path, is_off: bool) -> None:
    data_file = tmp_path / "disk.raw"
    options = f"data_file={data_file},data_file_raw=on"
    disk = make_disk(tmp_path, "-o", options)
    address, path = tmp_path / "qmp", tmp_path / "offloaded"
    with Machine(disk.path, monitor=address) as machine:
        offload(address, path)
        write(machine)
        if not is_off:
            restore(address, path)
        machine.quit()
    if is_off:
        put_back_offline(disk, path)
    assert_back(disk)


def out(machine: Machine, name: str, granularity: int) -> None:
    """Lets another program add a bitmap that was taken out."""
    assert name not in machine.bitmaps()
    machine.add(name, granularity)


@pytest.mark.spec("LIVE-9")
def test_a_bitmap_that_another_program_made_meanwhile_gets_every_write(tmp_path: Path) -> None:
    """Its bits were those of the copy: there were none."""
    disk = Disk.create(tmp_path / "disk.qcow2", SIZE)
    disk.add("daily", GRANULARITIES["daily"])
    address, path = tmp_path / "qmp", tmp_path / "offloaded"
    with Machine(disk.path, monitor=address) as machine:
        offload(address, path)
        write(machine)
        out(machine, "daily", GRANULARITIES["daily"])
        assert {one.outcome for one in restore(address, path).bitmaps} == {"restored"}
        machine.quit()
    for start, length in MEANWHILE:
        assert widened([(start, length)], 64 << 10) <= granules(disk.path, "daily")


@pytest.mark.spec("LIVE-6")
@pytest.mark.parametrize("is_off", [False, True])
def test_a_tail_that_was_cleared_is_not_merged_whatever_else_is_there(
    disk: Disk, tmp_path: Path, is_off: bool
) -> None:
    """Another program has cleared all bitmaps, and added those that were taken out."""
    address, path = tmp_path / "qmp", tmp_path / "offloaded"
    with Machine(disk.path, monitor=address) as machine:
        offload(address, path)
        write(machine)
        for name in machine.bitmaps():
            machine.execute("block-dirty-bitmap-clear", {"node": "disk", "name": name})
        for name, granularity in GRANULARITIES.items():
            out(machine, name, granularity)
        machine.execute("block-dirty-bitmap-disable", {"node": "disk", "name": "off"})
        if not is_off:
            with pytest.raises(qcow2bm.EvidenceError, match="canary"):
                restore(address, path)
        machine.quit()
    if is_off:
        with (
            qcow2bm.open(disk.path, "r+") as image,
            pytest.raises(qcow2bm.EvidenceError, match="canary"),
        ):
            live.restore_offline(str(path), image)
    with qcow2bm.open(disk.path) as image:
        assert image.bitmaps["daily"].count() == 0  # as that program made it


@pytest.mark.spec("LIVE-11")
def test_a_second_restore_into_the_image_changes_nothing(
    disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one was killed before the file says that the bitmaps are back."""
    address, path = tmp_path / "qmp", tmp_path / "offloaded"
    with Machine(disk.path, monitor=address) as machine:
        offload(address, path)
        write(machine)
        machine.quit()
    with monkeypatch.context() as patch:
        patch.setattr(OffloadFile, "append_restored", killed)
        with pytest.raises(Interrupted), qcow2bm.open(disk.path, "r+") as image:
            live.restore_offline(str(path), image)
    before = disk.path.read_bytes()
    with qcow2bm.open(disk.path, "r+") as image:
        done = live.restore_offline(str(path), image)
    assert {one.outcome for one in done.bitmaps} == {"kept"}
    assert disk.path.read_bytes() == before
    assert_back(disk)


@pytest.mark.spec("LIVE-10")
def test_an_image_that_has_other_bitmaps_since_they_were_put_back(
    disk: Disk, tmp_path: Path
) -> None:
    address, path = tmp_path / "qmp", tmp_path / "offloaded"
    with Machine(disk.path, monitor=address) as machine:
        offload(address, path)
        machine.quit()
    put_back_offline(disk, path)
    with qcow2bm.open(disk.path, "r+") as image:
        with image.edit() as edit:
            edit.remove("daily")
        with pytest.raises(qcow2bm.TailError, match="were put back, and they are not here"):
            live.restore_offline(str(path), image)


@pytest.mark.spec("LIVE-8")
def test_a_scratch_node_of_another_command_is_not_taken_for_ours(
    disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through libvirt another command can come between, and remove our scratch node."""
    address, other, path = tmp_path / "qmp", tmp_path / "other", tmp_path / "offloaded"
    with Machine(disk.path, monitor=address, second_monitor=other) as machine:
        offload(address, path)
        write(machine)
        real = live.Monitor.transaction

        def interleaved(monitor: live.Monitor, work: Any) -> None:
            kinds = [action["type"] for action in work]
            if kinds[0] == "block-dirty-bitmap-add" and "merge" in kinds[1]:
                scratch = {"driver": "null-co", "size": SIZE, "node-name": "qcow2bm-scratch"}
                monitor.execute("blockdev-del", {"node-name": "qcow2bm-scratch"})
                monitor.execute("blockdev-add", scratch)
                for name, granularity in GRANULARITIES.items():
                    bitmap = {"node": "qcow2bm-scratch", "name": name, "granularity": granularity}
                    monitor.execute("block-dirty-bitmap-add", bitmap)
            real(monitor, work)

        with monkeypatch.context() as patch:
            patch.setattr(live.Monitor, "transaction", interleaved)
            assert {one.outcome for one in restore(address, path).bitmaps} == {"left"}
        assert {one.outcome for one in restore(address, path).bitmaps} == {"restored"}
        machine.quit()
    assert_back(disk)
