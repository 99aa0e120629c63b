"""The commands ``live`` with a real QEMU: their output and exit statuses, and what they leave."""

from __future__ import annotations

import json
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.console import Result, environment, run
from support.jsonspec import check_live, failure_in
from support.offloaded import GRANULARITIES, MEANWHILE, assert_back, make_disk
from support.qemu import Disk
from support.vm import Machine

import qcow2bm
from qcow2bm import live
from qcow2bm.live.offload_file import OffloadFile
from qcow2bm.storage import new_file

pytestmark = pytest.mark.usefixtures("system_emulator")

CLUSTER = 64 << 10


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    disk = make_disk(tmp_path)
    with Machine(disk.path, monitor=tmp_path / "vm.sock") as machine:
        yield machine


class Stopped(Exception):
    """The tool ends."""


class StoppingMonitor(live.Monitor):
    """Ends the tool before, or after, the first transaction that begins with an action."""

    def __init__(self, folder: Path, action: str, *, is_sent: bool = False) -> None:
        super().__init__(str(folder / "vm.sock"))
        self._action, self._is_sent = action, is_sent

    def transaction(self, actions: Any) -> None:
        is_last = actions[0]["type"] == self._action
        if self._is_sent or not is_last:
            super().transaction(actions)
        if is_last:
            raise Stopped


def stopped_offload(folder: Path, action: str, *, is_sent: bool = False) -> None:
    """An offload into ``file`` that ends early."""
    monitor = StoppingMonitor(folder, action, is_sent=is_sent)
    with monitor, pytest.raises(Stopped):
        live.offload(monitor, str(folder / "file"))


def command(folder: Path, line: str) -> Result:
    """One command; SOCKET stands for the option with the machine's socket."""
    return run(["live", *shlex.split(line.replace("SOCKET", "--qmp vm.sock"))], folder)


def document(folder: Path, line: str, status: int = 0) -> Any:
    done = command(folder, f"{line} --json")
    assert (done.status, done.err) == (status, ""), done
    found = json.loads(done.out)
    check_live(line.split()[0], found)
    return found


def steps(folder: Path) -> list[str]:
    return [node["step"] for node in document(folder, "status SOCKET file")["nodes"]]


@pytest.mark.spec("LIVE-1")
@pytest.mark.spec("CLI-50")
def test_out_and_back(machine: Machine, tmp_path: Path) -> None:
    before = document(tmp_path, "status SOCKET")
    assert (before["status"], before["migration"], before["nodes"], before["next"]) == (
        "running", None, [], []
    )  # fmt: skip
    assert {b["name"]: b["granularity"] for b in before["bitmaps"]} == GRANULARITIES
    # One cluster each covers the disk, and each bitmap has something.
    assert before["stop-bytes"] == len(GRANULARITIES) * CLUSTER

    planned = document(tmp_path, "offload SOCKET file --dry-run")
    assert not (tmp_path / "file").exists()
    assert planned["dry-run"]
    assert planned["stop-bytes-before"] == before["stop-bytes"]
    assert planned["stop-bytes"] == 2 * CLUSTER  # the tail and its canary
    assert "would then store at most 128 KiB" in command(tmp_path, "offload SOCKET f --dry-run").out

    done = command(tmp_path, "offload SOCKET file")
    lines = [f'"{name}" of node "disk" is in the file, and out of the VM' for name in GRANULARITIES]
    assert (done.status, done.err) == (0, "")
    assert sorted(done.out.splitlines()[:4]) == sorted(lines)
    following = "qcow2bm live restore --qmp vm.sock file"
    assert " ".join(done.out.split()).endswith(following)
    for start, length in MEANWHILE:
        machine.write(start, length)

    found = document(tmp_path, "status SOCKET file")
    assert [node["step"] for node in found["nodes"]] == ["offloaded"]
    assert {one["where"] for one in found["nodes"][0]["bitmaps"]} == {"file"}
    assert found["next"] == [following.split()]
    assert found["stop-bytes"] == 2 * CLUSTER
    text = command(tmp_path, "status SOCKET file").out
    assert 'offload of node "disk": the bitmaps are in the file' in text
    assert f"disks, {following}" in " ".join(text.split())

    done = run(following.split()[1:], tmp_path)
    assert (done.status, done.err) == (0, "")
    assert done.out.count("is back, with every write") == len(GRANULARITIES)
    assert steps(tmp_path) == ["restored"]
    assert 'next: remove "file"' in command(tmp_path, "status SOCKET file").out
    again = document(tmp_path, "restore SOCKET file")
    assert {one["outcome"] for one in again["bitmaps"]} == {"kept"}
    assert command(tmp_path, "restore SOCKET file").out.count("is as it was") == 4
    assert command(tmp_path, "remove SOCKET daily").status == 0
    gone = document(tmp_path, "restore SOCKET file", status=2)
    assert {(one["outcome"], one["reason"]) for one in gone["bitmaps"]} == {
        ("left", "the file says that it was put back, and it is not here as it was")
    }


@pytest.mark.spec("LIVE-10")
def test_back_into_the_image(machine: Machine, tmp_path: Path) -> None:
    assert command(tmp_path, "offload SOCKET file").status == 0
    machine.quit()
    before = (tmp_path / "disk.qcow2").read_bytes()
    assert "nothing was written" in command(tmp_path, "restore file disk.qcow2 --dry-run").out
    assert (tmp_path / "disk.qcow2").read_bytes() == before
    found = document(tmp_path, "restore file disk.qcow2")
    assert (found["qmp"], found["image"]) == (None, "disk.qcow2")
    assert [one["outcome"] for one in found["bitmaps"]] == ["restored"] * len(GRANULARITIES)
    with qcow2bm.open(tmp_path / "disk.qcow2") as image:
        assert {*image.bitmaps} == {*GRANULARITIES}


def test_an_image_and_a_file_that_changed_places(machine: Machine, tmp_path: Path) -> None:
    assert command(tmp_path, "offload SOCKET file").status == 0
    machine.quit()
    done = command(tmp_path, "restore disk.qcow2 file")
    assert done.status == 1
    assert "an offload file of qcow2bm" in done.err
    assert "qcow2bm live restore FILE IMAGE" in done.err


def test_of_bitmaps_that_cannot_be_taken_out_each_is_named(tmp_path: Path) -> None:
    disk = make_disk(tmp_path)
    with Machine(disk.path) as killed:
        killed.kill()
    with Machine(disk.path, monitor=tmp_path / "vm.sock"):
        done = command(tmp_path, "offload SOCKET file")
    assert done.status == 1
    assert "there is no bitmap that can be taken out: " in done.err
    assert done.err.count(" is inconsistent") == len(GRANULARITIES)
    assert not (tmp_path / "file").exists()


@pytest.mark.spec("LIVE-5")
@pytest.mark.spec("CLI-50")
def test_what_cannot_be_taken_out_stays(tmp_path: Path) -> None:
    disk = Disk.create(tmp_path / "disk.qcow2", 64 << 20)
    disk.add("lost", CLUSTER)
    disk.crash("write 0 64k")
    disk.add("daily", CLUSTER)
    with Machine(disk.path, monitor=tmp_path / "vm.sock"):
        found = document(tmp_path, "offload SOCKET file", status=2)
        assert [one["name"] for one in found["bitmaps"]] == ["daily"]
        assert [(one["name"], one["reason"]) for one in found["left"]] == [("lost", "inconsistent")]
        done = command(tmp_path, "offload SOCKET file")
        assert done.status == 2
        assert '"lost" of node "disk" stays: inconsistent' in done.out
        assert command(tmp_path, "restore SOCKET file").status == 0


@pytest.mark.spec("LIVE-2")
@pytest.mark.spec("LIVE-9")
@pytest.mark.spec("LIVE-11")
def test_an_offload_that_has_only_begun(machine: Machine, tmp_path: Path) -> None:
    """After the first step the bitmaps are in the machine, and the tail records as they do."""
    stopped_offload(tmp_path, "block-dirty-bitmap-add", is_sent=True)
    assert steps(tmp_path) == ["begun"]
    found = machine.bitmaps()
    (tail,) = found.keys() - GRANULARITIES.keys()
    recording = {name for name, bitmap in found.items() if bitmap["recording"]}
    assert recording == {tail, *GRANULARITIES} - {"off"}
    assert found[tail]["persistent"]
    offers = document(tmp_path, "status SOCKET file")["next"]
    assert [words[2] for words in offers] == ["offload", "restore"]
    assert command(tmp_path, "restore SOCKET file").status == 0
    assert steps(tmp_path) == ["restored"]
    assert 'next: remove "file"' in command(tmp_path, "status SOCKET file").out
    assert machine.bitmaps().keys() == GRANULARITIES.keys()


@pytest.mark.spec("LIVE-4")
def test_a_bitmap_that_is_still_in_the_machine_is_copied_again(
    machine: Machine, tmp_path: Path
) -> None:
    stopped_offload(tmp_path, "block-dirty-bitmap-remove")
    machine.write(*MEANWHILE[0])
    digest = machine.sha256("daily")
    assert command(tmp_path, "offload SOCKET file").status == 0
    file = OffloadFile.read(str(tmp_path / "file"))
    number = [bitmap.name for _, bitmap in file.plan.bitmaps].index("daily")
    assert file.read_copy(number, file.plan.nodes[0].disk_size).sha256() == digest


@pytest.mark.spec("LIVE-4")
@pytest.mark.parametrize(
    ("command_name", "arguments"),
    [
        ("block-dirty-bitmap-disable", {"node": "disk", "name": "daily"}),
        ("block-dirty-bitmap-remove", {"node": "disk", "name": "daily"}),
        ("block_resize", {"node-name": "disk", "size": 512 << 20}),
    ],
)
def test_a_plan_is_not_begun_on_what_has_changed(
    machine: Machine, tmp_path: Path, command_name: str, arguments: dict[str, object]
) -> None:
    stopped_offload(tmp_path, "block-dirty-bitmap-add")
    assert steps(tmp_path) == ["planned"]
    machine.execute(command_name, arguments)
    before = machine.bitmaps()
    done = command(tmp_path, "offload SOCKET file")
    assert done.status == 1
    assert "file: is a plan for other bitmaps than the machine has now: remove it" in done.err
    assert machine.bitmaps() == before


@pytest.mark.spec("LIVE-6")
@pytest.mark.parametrize("change", ["disable", "clear"])
def test_no_bitmap_leaves_a_machine_whose_tail_was_changed(
    machine: Machine, tmp_path: Path, change: str
) -> None:
    """Otherwise a bitmap would be lost that QEMU alone keeps."""

    class ChangingMonitor(live.Monitor):
        def lend(self, descriptor: int) -> int:
            for name in machine.bitmaps():
                if name.startswith(("qcow2bm-tail-", "qcow2bm-canary-")):
                    machine.execute(f"block-dirty-bitmap-{change}", {"node": "disk", "name": name})
            return super().lend(descriptor)

    path = str(tmp_path / "file")
    with (
        ChangingMonitor(str(tmp_path / "vm.sock")) as monitor,
        pytest.raises(qcow2bm.EvidenceError, match="the tail"),
    ):
        live.offload(monitor, path)
    there = machine.bitmaps()
    assert GRANULARITIES.keys() <= there.keys()
    assert command(tmp_path, "offload SOCKET file").status == 1
    assert machine.bitmaps() == there


@pytest.mark.spec("LIVE-16")
@pytest.mark.usefixtures("machine")
def test_a_file_that_another_process_uses_is_refused(tmp_path: Path) -> None:
    assert command(tmp_path, "offload SOCKET file").status == 0
    for line in ("offload SOCKET file", "restore SOCKET file"):
        with new_file.held(str(tmp_path / "file")):
            done = command(tmp_path, line)
        assert done.status == 1
        assert "file: is in use by another process" in done.err
    assert command(tmp_path, "restore SOCKET file").status == 0


@pytest.mark.spec("LIVE-5")
@pytest.mark.usefixtures("machine")
def test_a_second_offload_on_top_is_refused(tmp_path: Path) -> None:
    assert command(tmp_path, "offload SOCKET file").status == 0
    done = command(tmp_path, "offload SOCKET another")
    assert done.status == 1
    assert "has the tail of another offload" in done.err
    assert not (tmp_path / "another").exists()


@pytest.mark.spec("LIVE-9")
def test_what_stands_in_the_way_of_one_bitmap_does_not_keep_the_others(
    machine: Machine, tmp_path: Path
) -> None:
    assert command(tmp_path, "offload SOCKET file").status == 0
    other = {"node": "disk", "name": "daily", "granularity": 512, "persistent": True}
    machine.execute("block-dirty-bitmap-add", other)
    found = document(tmp_path, "restore SOCKET file", status=2)
    outcomes = {one["name"]: one["outcome"] for one in found["bitmaps"]}
    assert outcomes == {name: "left" if name == "daily" else "restored" for name in GRANULARITIES}
    assert command(tmp_path, "remove SOCKET daily") == Result(0, "", "")
    found = document(tmp_path, "restore SOCKET file")
    assert {one["outcome"] for one in found["bitmaps"]} == {"restored"}
    assert machine.bitmaps().keys() == GRANULARITIES.keys()


@pytest.mark.spec("LIVE-2")
def test_two_disks_one_of_them_in_an_iothread(tmp_path: Path) -> None:
    """One transaction begins on both, and one file has the bitmaps of both."""
    disk = make_disk(tmp_path)
    second = Disk.create(tmp_path / "second.qcow2", 64 << 20)
    second.add("daily", CLUSTER)
    second.io("write 1M 64k")
    first_steps: list[set[str]] = []

    class WatchingMonitor(live.Monitor):
        def transaction(self, actions: Any) -> None:
            first_steps.append({action["data"].get("node", "") for action in actions})
            super().transaction(actions)

    address = tmp_path / "vm.sock"
    with Machine(disk.path, monitor=address, second_disk=second.path) as machine:
        with WatchingMonitor(str(address)) as monitor:
            report = live.offload(monitor, str(tmp_path / "file"))
        assert first_steps[0] == {"disk", "second"}
        assert len(report.plan.bitmaps) == len(GRANULARITIES) + 1
        assert steps(tmp_path) == ["offloaded", "offloaded"]
        machine.write(*MEANWHILE[0])
        done = document(tmp_path, "restore SOCKET file")
        assert {one["outcome"] for one in done["bitmaps"]} == {"restored"}
        assert {one["node"] for one in done["bitmaps"]} == {"disk", "second"}
        machine.quit()
    assert second.extents("daily") == [(1 << 20, CLUSTER)]
    with qcow2bm.open(disk.path) as image:
        assert {bitmap.status for bitmap in image.bitmaps.values()} == {"valid"}


@pytest.mark.spec("LIVE-4")
def test_the_file_of_an_offload_that_ended_is_not_used_again(
    machine: Machine, tmp_path: Path
) -> None:
    assert command(tmp_path, "offload SOCKET file").status == 0
    assert command(tmp_path, "offload SOCKET file").status == 0  # it goes on, with nothing to do
    assert command(tmp_path, "restore SOCKET file").status == 0
    before = machine.bitmaps()
    done = command(tmp_path, "offload SOCKET file")
    assert done.status == 1
    assert "file: is of an offload whose bitmaps were put back" in done.err
    assert machine.bitmaps() == before


@pytest.mark.spec("LIVE-1")
@pytest.mark.spec("LIVE-15")
def test_what_an_offload_says_of_the_stop(machine: Machine, tmp_path: Path) -> None:
    mapping = [{"node-name": "disk", "alias": "disk", "bitmaps": []}]
    machine.execute("migrate-set-parameters", {"block-bitmap-mapping": mapping})
    found = document(tmp_path, "offload SOCKET file")
    assert not found["tails-travel"]
    assert 0 < found["stop-seconds"] < found["stop-seconds-before"]
    done = command(tmp_path, "offload SOCKET file")
    assert "note: a block-bitmap-mapping is set" in done.out


def test_removing(machine: Machine, tmp_path: Path) -> None:
    done = command(tmp_path, "remove SOCKET daily nope")
    assert (done.status, done.err) == (1, 'qcow2bm: vm.sock: bitmap "nope" not found\n')
    assert {*machine.bitmaps()} == {*GRANULARITIES}
    assert command(tmp_path, "remove SOCKET daily fine") == Result(0, "", "")
    assert {*machine.bitmaps()} == GRANULARITIES.keys() - {"daily", "fine"}
    found = document(tmp_path, "remove SOCKET off")
    assert found["removed"] == [{"node": "disk", "name": "off"}]
    assert "off" not in machine.bitmaps()


@pytest.mark.spec("LIVE-23")
def test_the_tail_of_an_offload_is_not_removed_by_mistake(machine: Machine, tmp_path: Path) -> None:
    assert command(tmp_path, "offload SOCKET file").status == 0
    names = [*machine.bitmaps()]
    for name in names:
        done = command(tmp_path, f"remove SOCKET {name}")
        message = "belongs to an offload, whose bitmaps cannot be put back without it; give"
        assert done.status == 1
        assert f'qcow2bm: vm.sock: bitmap "{name}" {message} --assert-lost' in done.err
    assert [*machine.bitmaps()] == names
    assert command(tmp_path, f"remove SOCKET --assert-lost {' '.join(names)}").status == 0
    assert machine.bitmaps() == {}


@pytest.mark.spec("LIVE-4")
def test_an_offload_that_fails_says_how_it_goes_on(machine: Machine, tmp_path: Path) -> None:
    stopped_offload(tmp_path, "block-dirty-bitmap-remove")
    machine.limit_files(CLUSTER)
    done = command(tmp_path, "offload SOCKET file")
    assert done.status == 1
    assert "; run the same command again to go on, or live restore to go back" in done.err
    assert len(done.err.splitlines()) == 1
    machine.limit_files(None)
    assert command(tmp_path, "offload SOCKET file").status == 0
    assert command(tmp_path, "restore SOCKET file").status == 0


def test_an_offload_that_is_interrupted_says_how_it_goes_on(
    machine: Machine, tmp_path: Path
) -> None:
    """Ctrl-C, before the second bitmap leaves the machine."""
    program = (
        "import signal, sys\n"
        "from qcow2bm import live\n"
        "from qcow2bm.cli import console\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # it may have been ignored\n"
        "real, removals = live.Monitor.transaction, []\n"
        "def transaction(monitor, actions):\n"
        "    removals.extend(a for a in actions if a['type'].endswith('remove'))\n"
        "    if len(removals) == 2:\n"
        "        signal.raise_signal(signal.SIGINT)\n"
        "    real(monitor, actions)\n"
        "live.Monitor.transaction = transaction\n"
        "sys.argv = 'qcow2bm live offload --qmp vm.sock file'.split()\n"
        "console.run()\n"
    )
    command_line = [sys.executable, "-c", program]
    done = subprocess.run(
        command_line,
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    advice = "run the same command again to go on, or live restore to go back"
    assert done.stderr == f"qcow2bm: file: interrupted; {advice}\n"
    assert done.returncode == -signal.SIGINT
    assert steps(tmp_path) == ["begun"]
    assert len({*machine.bitmaps()} & {*GRANULARITIES}) == len(GRANULARITIES) - 1
    assert command(tmp_path, "offload SOCKET file").status == 0
    assert steps(tmp_path) == ["offloaded"]
    assert command(tmp_path, "restore SOCKET file").status == 0
    machine.quit()
    assert_back(Disk(tmp_path / "disk.qcow2"), ())


@pytest.mark.parametrize("action", ["restore", "status", "collect", "offload"])
@pytest.mark.usefixtures("machine")
def test_a_file_that_is_wrong_is_named(tmp_path: Path, action: str) -> None:
    (tmp_path / "file").write_text(100 * "x")
    done = command(tmp_path, f"{action} SOCKET file")
    assert done.status == 1
    subject = "the machine is not migrated" if action == "collect" else "file: offload file: magic"
    assert done.err.startswith(f"qcow2bm: vm.sock: {subject}"), done.err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("offload SOCKET file --tail-granularity 256M", "from 512 to 128 MiB"),
        ("offload SOCKET file --tail-granularity 100", "must be a power of two"),
        ("offload SOCKET file --node nope", 'there is no node "nope"'),
        ("offload SOCKET vm.sock", "not the magic|is not a regular|No such device"),
        ("restore SOCKET nothing", "No such file"),
        ("status SOCKET nothing", "No such file"),
        ("remove SOCKET daily --node nope", 'there is no node "nope"'),
        ("status SOCKET empty", "empty: offload file at 0x0 is empty: remove it"),
        ("record --qmp other --source vm.sock nothing", "No such file"),
    ],
)
@pytest.mark.usefixtures("machine")
def test_what_is_refused(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "empty").touch()
    done = command(tmp_path, line)
    assert done.status == 1
    (text, *_) = done.err.splitlines()
    assert text.startswith("qcow2bm: ")
    assert re.search(message, done.err), done.err
    assert failure_in(command(tmp_path, f"{line} --json").out, done.err)


@pytest.mark.parametrize(
    "line",
    [
        "restore SOCKET file image",
        "restore file",
        "restore SOCKET file --dry-run",
        "restore SOCKET file --no-lock",
        "status SOCKET one two",
        "offload file",
        "offload SOCKET file --max-downtime 0",
        "record SOCKET file",
        "record SOCKET --source vm.sock file",
        "remove SOCKET",
    ],
)
def test_wrong_usage(tmp_path: Path, line: str) -> None:
    assert command(tmp_path, line).status == 64


def test_every_copy_is_in_the_file_before_the_first_bitmap_leaves_the_file_system(
    machine: Machine, tmp_path: Path
) -> None:
    """A bitmap is removed only once its copy can be read again."""

    class CheckingMonitor(live.Monitor):
        def transaction(self, actions: Any) -> None:
            for action in actions:
                if action["type"] == "block-dirty-bitmap-remove":
                    file = OffloadFile.read(str(tmp_path / "file"))
                    names = [bitmap.name for _, bitmap in file.plan.bitmaps]
                    assert file.has_copy(names.index(action["data"]["name"]))
                    removed.append(action["data"]["name"])
            super().transaction(actions)

    removed: list[str] = []
    with CheckingMonitor(str(tmp_path / "vm.sock")) as monitor:
        live.offload(monitor, str(tmp_path / "file"))
    assert sorted(removed) == sorted(GRANULARITIES)
    assert machine.is_running


@pytest.mark.spec("LIVE-17", "LIVE-18", "LIVE-19")
def test_the_commands_that_an_exact_offload_advises(machine: Machine, tmp_path: Path) -> None:
    said = " ".join(command(tmp_path, "offload SOCKET file --exact").out.split())
    advised = re.findall(r"run (qcow2bm live (?:record|collect) .*?)(?:;| to put)", said)
    assert [line.split()[2] for line in advised] == ["record", "collect"]
    before, after = (line.replace("DESTINATION", "d.sock").split()[1:] for line in advised)
    address = tmp_path / "d.sock"
    with Machine(tmp_path / "disk.qcow2", incoming=True, monitor=address) as destination:
        for start, length in MEANWHILE:
            machine.write(start, length)
        ours, theirs = socket.socketpair()
        destination.receive(theirs)
        machine.migrate(ours, slowly=True)
        destination.wait_for_migration("active")
        done = run(before, tmp_path)
        expected = 'recorder of node "disk": granularity 4 KiB, 0 bytes recorded\n'
        assert (done.status, done.out, done.err) == (0, expected, "")
        (recorder,) = json.loads(run([*before, "--json"], tmp_path).out)["recorders"]
        assert recorder == {"node": "disk", "granularity": 4096, "dirty-bytes": 0}
        machine.execute("migrate-set-parameters", {"max-bandwidth": 1 << 30})
        machine.wait_for("postmigrate")
        assert document(tmp_path, "status SOCKET file")["next"] == [["qcow2bm", *after]]
        destination.wait_for("running")
        found = json.loads(run([*after, "--json"], tmp_path).out)
        check_live("collect", found)
        assert found["recorders"] == [
            {"node": "disk", "granularity": 4096, "dirty-bytes": 68 << 10}
        ]
        machine.quit()
        done = run(["live", "restore", "--qmp", "d.sock", "file"], tmp_path)
        assert (done.status, done.err) == (0, "")
        text = "is back, with every write and no more: 68 KiB were written since the offload"
        assert " ".join(done.out.split()).count(text) == len(GRANULARITIES) - 1


@pytest.mark.spec("LIVE-17")
def test_a_restore_says_what_it_was_made_of(machine: Machine, tmp_path: Path) -> None:
    assert command(tmp_path, "offload SOCKET file").status == 0
    machine.write(0, 512)
    done = document(tmp_path, "restore SOCKET file")
    written = {one["name"]: one["written"] for one in done["bitmaps"]}
    assert written.pop("off") is None
    for facts in written.values():
        assert facts == {"exact": False, "dirty-bytes": 4 << 20, "reason": None}
    assert command(tmp_path, "offload SOCKET exact --exact").status == 0
    for name in machine.bitmaps():
        if name.startswith("qcow2bm-recorder-"):
            machine.execute("block-dirty-bitmap-remove", {"node": "disk", "name": name})
    machine.write(0, 512)
    text = " ".join(command(tmp_path, "restore SOCKET exact").out.split())
    assert text.count("because live record was not run, or not in time") == 3


@pytest.mark.spec("LIVE-21")
@pytest.mark.spec("CLI-50")
def test_a_stop_that_stays_too_long(machine: Machine, tmp_path: Path) -> None:
    done = document(tmp_path, "offload SOCKET file --max-downtime 0.000001", status=2)
    assert done["limit"] == {"fits": False, "rounds": 0, "fitting-granularity": None}
    again = command(tmp_path, "offload SOCKET file --max-downtime 0.000001")
    assert again.status == 2
    assert "warning: this is longer than --max-downtime" in again.out
    fine = document(tmp_path, "offload SOCKET file --max-downtime 60000")
    assert fine["limit"] == {"fits": True, "rounds": 0, "fitting-granularity": None}
    assert command(tmp_path, "restore SOCKET file").status == 0


@pytest.mark.spec("LIVE-4")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--tail-granularity 1M", "was begun with the tail granularity 4194304"),
        ("--exact", "was not begun as an exact one"),
    ],
)
def test_an_offload_goes_on_as_it_was_begun(
    machine: Machine, tmp_path: Path, options: str, message: str
) -> None:
    stopped_offload(tmp_path, "block-dirty-bitmap-remove")
    done = command(tmp_path, f"offload SOCKET file {options}")
    assert done.status == 1
    assert message in done.err
    assert command(tmp_path, "offload SOCKET file --tail-granularity 4M --node disk").status == 0
