"""The commands ``rescue``: their output and exit statuses."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.console import Result, run
from support.fakeqemu import SIZE, FakeBitmap, FakeQemu
from support.images import Stored, build_image
from support.jsonspec import check_rescue, failure_in

import qcow2bm
from qcow2bm.format.directory import FLAG_AUTO, FLAG_IN_USE
from qcow2bm.migration.sentinel import is_sentinel
from qcow2bm.qmp.names import copy_of


@pytest.fixture
def qemu(tmp_path: Path) -> Iterator[FakeQemu]:
    fake = FakeQemu()
    fake.bitmaps["daily"] = FakeBitmap(bits={1, 2}, vetoed=True)
    with fake.serving(tmp_path / "vm.sock"):
        yield fake


def rescue(folder: Path, arguments: str) -> Result:
    """One command; START, ARM and VERDICT stand for the word and the socket."""
    words = []
    for word in arguments.split():
        is_command = word in ("START", "ARM", "VERDICT")
        words += [word.lower(), "--qmp", "vm.sock"] if is_command else [word]
    return run(["rescue", *words], folder)


def document(folder: Path, action: str, arguments: str, status: int = 0) -> Any:
    done = rescue(folder, f"{arguments} --output=json")
    assert (done.status, done.err) == (status, "")
    found = json.loads(done.out)
    check_rescue(action, found)
    return found


@pytest.mark.spec("CLI-27")
def test_start(qemu: FakeQemu, tmp_path: Path) -> None:
    qemu.bitmaps["old"] = FakeBitmap(inconsistent=True)
    dry = rescue(tmp_path, "START --dry-run")
    assert (dry.status, qemu.changes()) == (2, [])
    assert '"daily" of node "disk" would be rescued\n' in dry.out
    done = rescue(tmp_path, "START")
    assert (done.status, done.err) == (2, "")
    assert done.out.splitlines() == [
        '"daily" of node "disk" rescued, 128 KiB (131072 bytes) dirty, verified by sha256',
        '"old" of node "disk" left: it is inconsistent: writes are missing from it; remove it, and '
        "take a full backup",
        "1 of 2 persistent bitmaps will be stored when the VM quits",
        "(which of them QEMU would have dropped cannot be seen: all are treated alike)",
        "the others may be stored or lost",
    ]
    del qemu.bitmaps["old"]
    qemu.migration = "completed"
    done = rescue(tmp_path, "START --node disk --node disk")
    assert done.status == 0
    assert "note: the last migration completed" in done.out
    found = document(tmp_path, "start", "START")
    (bitmap,) = found["bitmaps"]
    assert (bitmap["outcome"], bitmap["verified-by"]) == ("rescued", "sha256")
    assert bitmap["sha256"] == qemu.bitmaps["daily"].digest(SIZE)
    (bitmap,) = document(tmp_path, "start", "START --dry-run")["bitmaps"]
    assert (bitmap["outcome"], bitmap["verified-by"], bitmap["sha256"]) == ("planned", None, None)


def test_without_bitmaps_there_is_nothing_to_do(qemu: FakeQemu, tmp_path: Path) -> None:
    qemu.bitmaps.clear()
    assert rescue(tmp_path, "START") == Result(
        0, "0 of 0 persistent bitmaps will be stored when the VM quits\n", ""
    )
    assert rescue(tmp_path, "VERDICT") == Result(0, "no node is armed\n", "")
    assert document(tmp_path, "start", "START")["bitmaps"] == []
    assert document(tmp_path, "arm", "ARM")["nodes"] == []
    assert document(tmp_path, "verdict", "VERDICT")["nodes"] == []


def test_arm(qemu: FakeQemu, tmp_path: Path) -> None:
    first = rescue(tmp_path, "ARM")
    lines = first.out.splitlines()
    assert (first.status, first.err) == (2, "")
    assert (
        lines[0]
        == "not armed yet: send this to QEMU and repeat the command, or repeat it with --set"
    )
    command = json.loads(lines[1])
    found = document(tmp_path, "arm", "ARM --node disk", 2)
    assert found["block-bitmap-mapping"] == command["arguments"]["block-bitmap-mapping"]
    assert (found["set"], found["nodes"], qemu.mapping) == (False, [], None)
    done = rescue(tmp_path, "ARM --set")
    lines = done.out.splitlines()
    assert (done.status, done.err) == (0, "")
    assert lines[0].startswith('node "disk" armed: qcow2bm-sentinel-')
    assert lines[1] == "the block-bitmap-mapping is set; migrate with the capability dirty-bitmaps"
    assert qemu.mapping == found["block-bitmap-mapping"]
    last = rescue(tmp_path, "ARM").out.splitlines()
    assert last[0].startswith('node "disk" was armed already: ')
    assert document(tmp_path, "arm", "ARM")["nodes"][0]["new"] is False


@pytest.mark.spec("CLI-27")
def test_arm_says_what_keeps_qemu_from_migrating(qemu: FakeQemu, tmp_path: Path) -> None:
    qemu.bitmaps["old"] = FakeBitmap(inconsistent=True)
    done = rescue(tmp_path, "ARM --set")
    assert done.status == 2
    assert 'migrate: "old" of node "disk" is inconsistent: remove it\n' in done.out
    found = document(tmp_path, "arm", "ARM --set", 2)
    assert [one["name"] for one in found["obstacles"]] == ["old"]


def armed(qemu: FakeQemu, folder: Path) -> FakeBitmap:
    """Returns the sentinel of a disk that was armed, and went to another VM and back."""
    assert rescue(folder, "ARM --set").status == 0
    qemu.migration = "completed"
    return next(bitmap for name, bitmap in qemu.bitmaps.items() if is_sentinel(name))


@pytest.mark.spec("CLI-27")
def test_verdict(qemu: FakeQemu, tmp_path: Path) -> None:
    armed(qemu, tmp_path)
    assert rescue(tmp_path, "VERDICT") == Result(
        0,
        'node "disk" untouched: this machine wrote to every place that was written to\n'
        '  "daily" kept\n',
        "",
    )
    armed(qemu, tmp_path)
    qemu.migration = "cancelled"
    assert rescue(tmp_path, "VERDICT").out.endswith("  now run rescue start\n")
    armed(qemu, tmp_path).inconsistent = True
    done = rescue(tmp_path, "VERDICT")
    assert (done.status, done.err) == (2, "")
    assert done.out.splitlines()[1:] == [
        '  "daily" may miss writes',
        "  decide before the VM quits, or these are stored as valid: --remove or --all-dirty",
        "  what the guest remembers of the disk may be wrong: decide, then shut it down",
    ]
    (node,) = document(tmp_path, "verdict", "VERDICT", 2)["nodes"]
    assert (node["verdict"], node["armed"]) == ("touched", True)
    (node,) = document(tmp_path, "verdict", "VERDICT --all-dirty", 2)["nodes"]
    assert (node["verdict"], node["armed"]) == ("touched", False)
    assert [one["outcome"] for one in node["bitmaps"]] == ["all-dirty"]
    armed(qemu, tmp_path).inconsistent = True
    done = rescue(tmp_path, "VERDICT --remove")
    assert done.status == 2
    assert '  "daily" removed\n' in done.out
    assert qemu.bitmaps == {}


def test_a_verdict_that_has_to_wait(qemu: FakeQemu, tmp_path: Path) -> None:
    armed(qemu, tmp_path)
    qemu.bitmaps["daily"].busy = True
    done = rescue(tmp_path, "VERDICT")
    assert done.status == 2
    said = (
        '  nothing was done: "daily" is busy: try again when the job that uses it has ended\n'
        '  "daily" left\n'
    )
    assert said in done.out
    assert "--remove" not in done.out


@pytest.mark.spec("CLI-27")
def test_a_verdict_where_nothing_tells(qemu: FakeQemu, tmp_path: Path) -> None:
    qemu.migration = "completed"
    done = rescue(tmp_path, "VERDICT")
    assert (done.status, done.err) == (2, "")
    assert done.out.startswith("no node is armed, though the last migration completed\n")
    found = document(tmp_path, "verdict", "VERDICT", 2)
    assert (found["migration"], found["nodes"]) == ("completed", [])
    qemu.migration = "cancelled"
    assert rescue(tmp_path, "VERDICT") == Result(0, "no node is armed\n", "")


VERDICT_COMMAND = "judge it: qcow2bm rescue verdict --qmp SOCKET"


@pytest.mark.parametrize(
    "command", ["rescue arm --qmp=vm.sock", "sidecar save --qmp=vm.sock saved"]
)
def test_a_verdict_that_is_due_is_named_as_a_command(
    qemu: FakeQemu, tmp_path: Path, command: str
) -> None:
    armed(qemu, tmp_path).recording = False
    done = run(command.split(), tmp_path)
    assert (done.status, done.out) == (1, "")
    assert done.err.endswith(f", but must be judged first; {VERDICT_COMMAND}\n")


def test_a_bitmap_that_is_left_names_the_command_that_helps(qemu: FakeQemu, tmp_path: Path) -> None:
    armed(qemu, tmp_path)
    done = rescue(tmp_path, "START")
    assert done.status == 2
    assert f"left: the node is armed, and not judged: its bits may be wrong; {VERDICT_COMMAND}" in (
        done.out
    )
    (bitmap,) = document(tmp_path, "start", "START", 2)["bitmaps"]
    assert bitmap["reason"].endswith(VERDICT_COMMAND)
    assert rescue(tmp_path, "VERDICT").status == 0
    qemu.bitmaps[copy_of("daily")] = qemu.bitmaps.pop("daily")
    qemu.refuse = lambda command, _: "no room" if command.endswith("-add") else None
    done = rescue(tmp_path, "START")
    assert done.status == 2
    assert (
        "left: QEMU refuses: no room; try again, or when the VM is off, run: "
        "qcow2bm rescue finish IMAGE\n" in done.out
    )


def test_the_word_is_said_before_the_evidence_goes(qemu: FakeQemu, tmp_path: Path) -> None:
    armed(qemu, tmp_path).inconsistent = True
    qemu.hang_up_after = 0
    done = rescue(tmp_path, "VERDICT --remove")
    assert done.status == 1
    assert done.out.startswith('node "disk" touched: ')


@pytest.mark.parametrize("command", ["START", "ARM", "VERDICT"])
@pytest.mark.parametrize("output", ["human", "json"])
def test_what_cannot_be_done_is_one_line(
    qemu: FakeQemu, tmp_path: Path, command: str, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(more: str = "") -> str:
        done = rescue(tmp_path, f"{command} --output={output} {more}")
        assert done.status == 1
        if output == "json":
            assert failure_in(done.out, done.err)["filename"] == "vm.sock"
        else:
            assert done.out == ""
        (line,) = done.err.splitlines()
        return line

    assert failing("--node x") == (
        'qcow2bm: vm.sock: there is no node "x"; persistent bitmaps are on: disk'
    )
    qemu.status = "postmigrate"
    assert failing() == (
        "qcow2bm: vm.sock: the machine is in state postmigrate, without its disks, but must be "
        "running: use the QMP socket of the destination; or cont here, if no other machine runs on "
        "the disks"
    )
    qemu.status = "running"
    qemu.answers["query-block"] = 1
    assert "the QMP command query-block failed: the answer is not an array" in failing()
    (tmp_path / "vm.sock").unlink()
    assert failing() == ("qcow2bm: vm.sock: connecting to QMP failed: No such file or directory")
    monkeypatch.setitem(sys.modules, "qemu.qmp", None)
    assert failing() == (
        "qcow2bm: vm.sock: not supported: QMP without the package qemu.qmp; install it: "
        'pip install "qcow2bm[qmp]"'
    )


@pytest.mark.spec("CLI-27")
def test_an_interruption_is_status_1(qemu: FakeQemu, tmp_path: Path) -> None:
    qemu.hang_up_after = 0
    done = rescue(tmp_path, "START")
    assert (done.status, done.out) == (1, "")
    assert "the QMP command transaction failed: the connection is lost" in done.err
    assert rescue(tmp_path, "START").status == 0


@pytest.mark.parametrize(
    "arguments",
    ["start", "arm --set", "verdict --qmp vm.sock --remove --all-dirty", "finish", "nonsense",
     "START extra", "start vm.sock"],
)  # fmt: skip
def test_wrong_usage(tmp_path: Path, arguments: str) -> None:
    done = rescue(tmp_path, arguments)
    assert (done.status, done.out) == (64, "")
    assert len(done.err.splitlines()) == 1


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Makes two valid copies: the original of one is inconsistent, that of the other is gone."""
    bitmaps = [
        Stored(copy_of("a").encode(), (b"\x01",)),
        Stored(b"a", flags=FLAG_AUTO | FLAG_IN_USE),
        Stored(copy_of("b").encode(), (b"\x02",), flags=0),
    ]
    path = tmp_path / "vm.qcow2"
    path.write_bytes(build_image(*bitmaps, cluster_bits=12).data)
    return path


def bits(path: Path) -> dict[str, tuple[str, bool, int]]:
    with qcow2bm.open(path) as opened:
        return {n: (b.status, b.auto, int(b.stale_bits()[0])) for n, b in opened.bitmaps.items()}


@pytest.mark.spec("RESCUE-18")
def test_finish(image: Path, tmp_path: Path) -> None:
    before = image.read_bytes()
    dry = document(tmp_path, "finish", "finish vm.qcow2 --dry-run")
    assert [one["outcome"] for one in dry["bitmaps"]] == ["renamed", "renamed"]
    assert (
        '"qcow2bm-rescue-a" would be renamed to "a"'
        in rescue(tmp_path, "finish vm.qcow2 --dry-run").out
    )
    assert image.read_bytes() == before
    done = rescue(tmp_path, "finish vm.qcow2")
    assert done == Result(
        0, '"qcow2bm-rescue-a" renamed to "a"\n"qcow2bm-rescue-b" renamed to "b"\n', ""
    )
    assert bits(image) == {"a": ("valid", True, 1), "b": ("valid", False, 2)}
    after = image.read_bytes()
    assert rescue(tmp_path, "finish vm.qcow2") == Result(0, "nothing to finish\n", "")
    assert image.read_bytes() == after


@pytest.mark.spec("RESCUE-18")
def test_finish_leaves_what_it_cannot_judge(tmp_path: Path) -> None:
    bitmaps = [
        Stored(copy_of("a").encode()),
        Stored(b"a"),
        Stored(copy_of("b").encode(), flags=FLAG_AUTO | FLAG_IN_USE),
        Stored(copy_of("c").encode()),
    ]
    path = tmp_path / "vm.qcow2"
    path.write_bytes(build_image(*bitmaps, cluster_bits=12).data)
    for outcomes in (["left", "left", "renamed"], ["left", "left"]):
        found = document(tmp_path, "finish", "finish vm.qcow2", 2)
        assert [one["outcome"] for one in found["bitmaps"]] == outcomes
    done = rescue(tmp_path, "finish vm.qcow2")
    assert "the original is there as well" in done.out
    assert "it is inconsistent: remove it, and take a full backup" in done.out


def test_finish_of_what_is_no_image(tmp_path: Path) -> None:
    (tmp_path / "vm.qcow2").write_bytes(b"nothing")
    done = rescue(tmp_path, "finish vm.qcow2 --output=json")
    assert done.status == 1
    assert failure_in(done.out, done.err)["error"]["id"] == "format"
