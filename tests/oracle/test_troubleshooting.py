"""The messages of QEMU in spec/troubleshooting.md come when the page says so, and its advice helps.

Each test provokes a message, and then follows the commands of its row, word for word.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.console import Result, run
from support.qemu import Disk, QmpError, StorageDaemon, run_ok
from support.qemu import run as run_tool
from support.qemu_facts import fact
from support.specreader import SPEC, page
from support.twin import KiB, MiB
from support.vm import NOWHERE, Machine

import qcow2bm

pytestmark = pytest.mark.usefixtures("system_emulator")

SIZE = 64 * MiB
GRANULARITY = 64 * KiB
WRITTEN = [(MiB, 64 * KiB)]
WRITE = "write -P 5 1M 64k"
WORDS = {
    "IMAGE": "disk.qcow2",
    "NAME": "daily",
    "BACKUP": "backup",
    "SOCKET": "qmp",
    "NODE": "disk",
}

COMMAND = re.compile(r"`((?:qcow2bm|qemu-img|fuser) [^`]*[A-Z][^`]*|\{[^`]*\})`")
HEADINGS = "A running machine, or a tool beside it", "libvirt refuses a backup"


class Advice:
    """The commands of the row of a message; ``left`` are those that were not yet followed."""

    def __init__(self, message: str, folder: Path) -> None:
        text = (SPEC / "troubleshooting.md").read_text("utf-8")
        text = text.partition(f"## {HEADINGS[0]}\n")[2]
        (row,) = re.findall(rf"^\| `{re.escape(message)}` \|(.*)$", text, re.MULTILINE)
        self.left = set(COMMAND.findall(row))
        self._known = frozenset(self.left)
        self._folder = folder

    def _words(self, command: str, more: dict[str, str]) -> str:
        assert command in self._known, f"{command} is not among the advised: {self._known}"
        self.left.discard(command)
        words = WORDS | more
        return re.sub(r"[A-Z]{2,}", lambda found: words[found[0]], command)

    def follow(self, command: str, status: int = 0, **words: str) -> Result:
        """Runs a command of the row, with these words instead of those in capital letters."""
        program, *arguments = shlex.split(self._words(command, words))
        if program == "qcow2bm":
            done = run(arguments, self._folder)
        else:
            folder = self._folder
            places = [str(folder / word) if word == WORDS["IMAGE"] else word for word in arguments]
            ended = run_tool(program, *places)
            done = Result(ended.returncode, ended.stdout, ended.stderr)
        assert done.status == status, done
        return done

    def send(self, begin: str, execute: Callable[[str, dict[str, Any]], Any], **words: str) -> Any:
        """Sends the command of the row that has this name to a machine or a storage daemon."""
        (command,) = (known for known in self._known if f'"execute": "{begin}"' in known)
        message = json.loads(self._words(command, words))
        return execute(message["execute"], message.get("arguments", {}))


@contextmanager
def advised(message: str, folder: Path) -> Iterator[Advice]:
    """Gives the advice about a message; at the end, every command in it must have been followed."""
    advice = Advice(message, folder)
    yield advice
    assert advice.left == set()


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    """A disk with data and the bitmap "daily", and a raw backup of it."""
    made = Disk.create(tmp_path / "disk.qcow2", SIZE)
    made.io("write -P 1 0 4M")
    made.add("daily", GRANULARITY)
    run_ok("qemu-img", "convert", "-O", "raw", made.path, tmp_path / "backup")
    return made


def statuses(disk: Disk) -> dict[str, str]:
    """The status of each bitmap; the image is sound to QEMU."""
    assert disk.check().returncode == 0
    with qcow2bm.open(disk.path) as image:
        return {name: bitmap.status for name, bitmap in image.bitmaps.items()}


def refused(work: Callable[[], object], message: str) -> None:
    with pytest.raises(QmpError, match=re.escape(message)):
        work()


def test_every_message_of_the_page_has_a_test() -> None:
    tree = ast.parse(Path(__file__).read_text("utf-8"))
    tested = {
        node.args[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "advised"
        and isinstance(node.args[0], ast.Constant)
    }
    tables = [page("troubleshooting.md").table(heading) for heading in HEADINGS]
    assert tested == {row[table.columns[0]] for table in tables for row in table.rows}


def test_bitmaps_that_a_machine_could_not_store(disk: Disk, tmp_path: Path) -> None:
    with advised("Lost persistent bitmaps during inactivation", tmp_path) as advice:
        with Machine(disk.path) as machine:
            machine.add("new", GRANULARITY)
            machine.io(WRITE)
            machine.limit_files(disk.path.stat().st_size)
            machine.quit()
            assert "Lost persistent bitmaps during inactivation" in machine.printed
        assert statuses(disk) == {"daily": "inconsistent"}
        before = disk.path.read_bytes()
        advice.follow("qcow2bm salvage IMAGE NAME --all-dirty")
        assert disk.extents("daily") == [(0, SIZE)]
        disk.path.write_bytes(before)
        advice.follow("qcow2bm salvage IMAGE NAME --compare BACKUP IMAGE")
        assert disk.extents("daily") == WRITTEN
        advice.follow("qcow2bm add IMAGE NAME", NAME="new")
        assert statuses(disk) == {"daily": "valid", "new": "valid"}
        advice.left -= {"qcow2bm rescue start --qmp SOCKET"}  # the next test


def test_bitmaps_that_a_failed_migration_could_not_store(disk: Disk, tmp_path: Path) -> None:
    """A bitmap that travels is not stored, and one that stays cannot be stored; both are saved."""
    advice = Advice("Lost persistent bitmaps during inactivation", tmp_path)
    with Machine(disk.path, monitor=tmp_path / "qmp") as machine:
        machine.add("travels", GRANULARITY)
        machine.io(WRITE)
        machine.enable("dirty-bitmaps")
        mapping = [
            {"node-name": "disk", "alias": "disk", "bitmaps": [{"name": "travels", "alias": "t"}]}
        ]
        machine.execute("migrate-set-parameters", {"block-bitmap-mapping": mapping})
        machine.limit_files(disk.path.stat().st_size)
        machine.migrate(NOWHERE)
        machine.wait_for_migration("failed")
        machine.wait_for("running")
        assert "Lost persistent bitmaps during inactivation" in machine.printed
        machine.limit_files(None)
        advice.follow("qcow2bm rescue start --qmp SOCKET")
        machine.quit()
    assert statuses(disk) == {"daily": "valid", "travels": "valid"}
    assert disk.extents("daily") == disk.extents("travels") == WRITTEN


def test_an_image_that_another_program_changed_meanwhile(disk: Disk, tmp_path: Path) -> None:
    """The bitmap looks valid, and misses a write."""
    with advised("already exists in the image", tmp_path) as advice:
        disk.add("weekly", GRANULARITY)
        with Machine(disk.path) as machine:
            machine.io(WRITE)
            with qcow2bm.open(disk.path, force_share=True) as image:
                flags = image.directory[0].offset_of("flags")
            with disk.path.open("r+b") as file:
                file.seek(flags)
                file.write((2).to_bytes(4, "big"))
            machine.quit()
            assert "'daily' already exists in the image" in machine.printed
        assert statuses(disk) == {"daily": "valid", "weekly": "inconsistent"}
        assert disk.extents("daily") == []
        advice.follow("qcow2bm check IMAGE")
        advice.follow("qcow2bm invalidate IMAGE --all")
        for name in ("daily", "weekly"):
            advice.follow("qcow2bm salvage IMAGE NAME --all-dirty", NAME=name)
            assert disk.extents(name) == [(0, SIZE)]


def test_a_name_that_an_older_qemu_does_not_show(disk: Disk, tmp_path: Path) -> None:
    """QEMU 7.2 shows inconsistent bitmaps, and does not print this message."""
    with advised("same name is already stored", tmp_path) as advice:
        disk.crash(WRITE)
        assert "inconsistent" in advice.follow("qcow2bm dump IMAGE").out
        before = disk.path.read_bytes()
        advice.follow("qcow2bm salvage IMAGE NAME --all-dirty")
        assert disk.extents("daily") == [(0, SIZE)]
        disk.path.write_bytes(before)
        advice.follow("qcow2bm remove IMAGE NAME")
        with Machine(disk.path) as machine:
            machine.add("daily", GRANULARITY)
            machine.quit()
        assert statuses(disk) == {"daily": "valid"}


@pytest.mark.parametrize("is_inconsistent", [False, True])
def test_a_name_that_a_machine_has(is_inconsistent: bool, disk: Disk, tmp_path: Path) -> None:
    with advised("Bitmap already exists", tmp_path) as advice:
        if is_inconsistent:
            disk.crash(WRITE)
        before = disk.path.read_bytes()
        with Machine(disk.path, monitor=tmp_path / "qmp") as machine:
            refused(partial(machine.add, "daily", GRANULARITY), "Bitmap already exists: daily")
            found = advice.follow("qcow2bm live status --qmp SOCKET").out
            assert 'bitmap "daily" of node "disk"' in found
            assert ("inconsistent" in found) == is_inconsistent
            (shown,) = advice.send("query-block", machine.execute)
            (bitmap,) = shown["inserted"]["dirty-bitmaps"]
            assert (bitmap["name"], "inconsistent" in bitmap) == ("daily", is_inconsistent)
            advice.send("block-dirty-bitmap-remove", machine.execute)
            machine.add("daily", GRANULARITY)
            advice.follow("qcow2bm live remove --qmp SOCKET NAME")
            machine.add("daily", GRANULARITY)
            machine.quit()
        assert statuses(disk) == {"daily": "valid"}
        disk.path.write_bytes(before)
        advice.follow("qcow2bm remove IMAGE NAME")
        disk.add("daily", GRANULARITY)


def test_a_snapshot_beside_bitmaps(disk: Disk, tmp_path: Path) -> None:
    """Going back is refused to the tool and to the machine; after the advice it works."""
    message = "Device has active dirty bitmaps"
    with advised("Device has active dirty bitmaps", tmp_path) as advice:
        run_ok("qemu-img", "snapshot", "-c", "monday", disk.path)
        disk.io(WRITE)
        back = ("qemu-img", "snapshot", "-a", "monday", disk.path)
        assert message in run_tool(*back).stderr
        assert (statuses(disk), disk.extents("daily")) == ({"daily": "valid"}, WRITTEN)
        with Machine(disk.path) as machine:
            execute, monitor = machine.execute, "human-monitor-command"
            assert execute(monitor, {"command-line": "savevm tuesday"}) == ""
            assert message in execute(monitor, {"command-line": "loadvm tuesday"})
            machine.quit()
        assert disk.extents("daily") == WRITTEN
        run(["invalidate", "disk.qcow2", "--all"], tmp_path)
        assert message in run_tool(*back).stderr
        advice.follow("qcow2bm remove IMAGE --all")
        advice.follow("qemu-img snapshot -a SNAPSHOT IMAGE", SNAPSHOT="monday")
        assert "verification failed" not in disk.io("read -P 1 1M 64k")
        disk.io("write -P 7 2M 64k")
        advice.follow("qcow2bm add IMAGE NAME")
        assert disk.extents("daily") == []
        advice.follow("qcow2bm invalidate IMAGE NAME")
        advice.follow("qcow2bm salvage IMAGE NAME --compare BACKUP IMAGE")
        assert disk.extents("daily") == [(2 * MiB, 64 * KiB)]


def test_a_bitmap_of_an_image_open_for_reading(disk: Disk, tmp_path: Path) -> None:
    message = "Bitmap 'daily' is readonly and cannot be modified"
    with advised("is readonly and cannot be modified", tmp_path) as advice:
        disk.io(WRITE)
        place: dict[str, Any] = {"node": "disk", "name": "daily"}
        with StorageDaemon() as daemon:
            daemon.open(disk)
            refused(partial(daemon.execute, "block-dirty-bitmap-clear", place), message)
            remove = partial(daemon.execute, "block-dirty-bitmap-remove", place)
            refused(remove, fact("read-only-remove"))
            daemon.execute(
                "block-dirty-bitmap-add", {"node": "disk", "name": "other", "persistent": False}
            )
            merging = {"node": "disk", "target": "daily", "bitmaps": ["other"]}
            refused(partial(daemon.execute, "block-dirty-bitmap-merge", merging), message)
        assert disk.extents("daily") == WRITTEN
        before = disk.path.read_bytes()
        advice.follow("qcow2bm clear IMAGE NAME")
        assert disk.extents("daily") == []
        disk.path.write_bytes(before)
        with StorageDaemon() as daemon:
            daemon.open(disk)
            advice.send("blockdev-reopen", daemon.execute, IMAGE=str(disk.path))
            daemon.execute("block-dirty-bitmap-clear", place)
        assert disk.extents("daily") == []


def test_an_image_of_version_2(tmp_path: Path) -> None:
    message = "Cannot store dirty bitmaps in qcow2 v2 files"
    with advised("Cannot store dirty bitmaps in qcow2 v2 files", tmp_path) as advice:
        disk = Disk.create(tmp_path / "disk.qcow2", SIZE, compat="0.10")
        disk.io(WRITE)
        assert message in run_tool("qemu-img", "bitmap", "--add", disk.path, "daily").stderr
        with Machine(disk.path) as machine:
            refused(partial(machine.add, "daily", GRANULARITY), message)
            machine.quit()
        advice.follow("qemu-img amend -o compat=1.1 IMAGE")
        advice.follow("qcow2bm add IMAGE NAME")
        disk.io(WRITE)
        assert disk.extents("daily") == WRITTEN


def test_an_image_that_a_machine_has_open(disk: Disk, tmp_path: Path) -> None:
    with advised('"write" lock', tmp_path) as advice:
        with Machine(disk.path) as machine:
            machine.io(WRITE)
            for command, lock in (
                (("qemu-img", "bitmap", "--add", disk.path, "new"), 'Failed to get "write" lock'),
                (("qemu-img", "info", disk.path), 'Failed to get shared "write" lock'),
            ):
                assert lock in run_tool(*command).stderr
            said = advice.follow("qcow2bm verdict IMAGE NAME", 8).out
            assert "another process is writing to it" in said
            (shown,) = advice.send("query-block", machine.execute)
            (bitmap,) = shown["inserted"]["dirty-bitmaps"]
            assert (bitmap["name"], bitmap["count"]) == ("daily", 64 * KiB)
            assert "inconsistent" in advice.follow("qcow2bm dump -U IMAGE").out
            if shutil.which("fuser"):
                advice.follow("fuser IMAGE")
            advice.left.discard("fuser IMAGE")
            machine.quit()
        assert statuses(disk) == {"daily": "valid"}


def verdict(folder: Path) -> tuple[str, list[list[str]]]:
    """The reason of a verdict on the bitmap "daily", and the commands that it names."""
    document = json.loads(run(["verdict", "--json", "disk.qcow2", "daily"], folder).out)
    return document["reason"], document["next"]


@pytest.mark.parametrize("reason", ["inconsistent", "disabled", "missing"])
def test_a_bitmap_that_libvirt_refuses(reason: str, disk: Disk, tmp_path: Path) -> None:
    """libvirt prints the message; here is only the state in which it does."""
    with advised("missing or broken bitmap", tmp_path) as advice:
        if reason == "inconsistent":
            disk.crash(WRITE)
        else:
            disk.bitmap("daily", {"disabled": "--disable", "missing": "--remove"}[reason])
            disk.io(WRITE)
        before = disk.path.read_bytes()
        assert verdict(tmp_path)[0] == reason
        said = advice.follow(
            "qcow2bm verdict IMAGE NAME", {"inconsistent": 4, "disabled": 3, "missing": 7}[reason]
        )
        assert "; next: qcow2bm " in said.out
        for _, *command in verdict(tmp_path)[1]:
            assert run(command, tmp_path).status == 0
        assert verdict(tmp_path) == ("usable", [])
        assert disk.extents("daily") == [(0, SIZE)]
        disk.path.write_bytes(before)
        compare = "qcow2bm salvage IMAGE NAME --compare BACKUP IMAGE"
        if reason == "inconsistent":
            advice.follow(compare)
            assert disk.extents("daily") == WRITTEN
        advice.left.discard(compare)


def test_a_bitmap_that_libvirt_does_not_find(disk: Disk, tmp_path: Path) -> None:
    """libvirt prints the message; here is only the state in which it does."""
    with advised("not found in backing chain", tmp_path) as advice:
        old = disk.path.read_bytes()
        disk.add("checkpoint", GRANULARITY)
        disk.io(WRITE)
        disk.path.write_bytes(old)
        assert '"checkpoint"' not in advice.follow("qcow2bm dump IMAGE").out
        advice.follow("qcow2bm invalidate IMAGE --all")
        assert statuses(disk) == {"daily": "inconsistent"}
