"""Backups of disks by the real QEMU: each restores to what the disk was, whatever goes wrong."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count, groupby
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.console import environment, run, run_on_terminal, start
from support.jsonspec import check_backup
from support.qemu import Disk, ToolError, run_ok

import qcow2bm
from qcow2bm import backup
from qcow2bm.backup.allocation import require_allocated, require_sound
from qcow2bm.backup.daemon import StorageDaemon
from qcow2bm.qmp.answers import Answer

KiB, MiB = 1 << 10, 1 << 20
SIZE = 24 * MiB + 512
NAME = "größe, \N{SNOWMAN}"

KINDS: dict[str, dict[str, object]] = {
    "plain": {},
    "overlay": {"backing_file": "under.qcow2", "backing_fmt": "qcow2"},
    "data file": {"data_file": "vm.data", "data_file_raw": "on"},
    "small clusters": {"cluster_size": 512},
    "large clusters": {"cluster_size": 2 * MiB},
}


def make(folder: Path, kind: str = "plain", granularity: int = 64 * KiB) -> Disk:
    """A disk with a bitmap that records."""
    options = dict(KINDS[kind])
    if kind == "overlay":
        Disk.create(folder / "under.qcow2", SIZE).io("write -P 9 0 6M")
        options["backing_file"] = str(folder / "under.qcow2")
    if kind == "data file":
        options["data_file"] = str(folder / "vm.data")
    disk = Disk.create(folder / "vm.qcow2", SIZE, **options)
    disk.add(NAME, granularity)
    return disk


def scribble(disk: Disk, random: Random) -> None:
    """The guest writes, writes zeros, and discards, anywhere."""
    commands = (
        [f"write -P {random.randrange(1, 256)} {SIZE - 512} 512"] if random.random() < 0.5 else []
    )
    for _ in range(6):
        start = random.randrange(0, SIZE - 512, 512)
        length = min(random.choice((512, 5 * KiB, 300 * KiB)), SIZE - start)
        what = random.choice((f"write -P {random.randrange(1, 256)}", "write -z", "discard"))
        commands.append(f"{what} {start} {length}")
    disk.io(*commands)


def content(path: Path) -> bytes:
    raw = path.with_name("content.raw")
    run_ok("qemu-img", "convert", "-O", "raw", path, raw)
    return raw.read_bytes()


def back_up(disk: Disk, target: str, *options: str) -> None:
    done = run(["backup", "vm.qcow2", NAME, target, *options], disk.path.parent)
    assert (done.status, done.err) == (0, "")


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.spec("BACKUP-1", "BACKUP-4")
@pytest.mark.parametrize("kind", KINDS)
def test_each_night_restores_to_the_disk_of_that_night(kind: str, tmp_path: Path) -> None:
    random = Random(kind)
    disk = make(tmp_path, kind, random.choice((512, 4 * KiB, 64 * KiB, MiB)))
    scribble(disk, random)
    nights = {"night 0:00": content(disk.path)}
    back_up(disk, "night 0:00", "--full")
    for number in range(1, 4):
        scribble(disk, random)
        target, previous = f"night {number}:00", f"night {number - 1}:00"
        nights[target] = content(disk.path)
        back_up(disk, target, "--base", previous, *(("--verify",) if number == 3 else ()))
        assert disk.extents(NAME) == []
        assert disk.check().returncode == 0
    for name, expected in nights.items():
        assert content(tmp_path / name) == expected
        assert Disk(tmp_path / name).check().returncode == 0
        assert run_ok("qemu-img", "info", "--backing-chain", tmp_path / name)


@pytest.mark.spec("BACKUP-12")
def test_a_base_with_the_data_file_of_the_disk_is_refused(tmp_path: Path) -> None:
    disk = make(tmp_path, "data file")
    shutil.copy(disk.path, tmp_path / "copy.qcow2")
    before, there = disk.path.read_bytes(), files(tmp_path)
    done = run(["backup", "vm.qcow2", NAME, "new", "--base", "copy.qcow2"], tmp_path)
    assert (done.status, done.out) == (1, "")
    assert "copy.qcow2: has the data file of the disk itself" in done.err
    assert (disk.path.read_bytes(), files(tmp_path)) == (before, there)


@pytest.mark.spec("BACKUP-2")
def test_a_folder_with_all_backups_can_be_moved(tmp_path: Path) -> None:
    disk = make(tmp_path)
    disk.io("write -P 1 0 1M")
    back_up(disk, "full:1", "--full")
    assert "backing-filename" not in Disk(tmp_path / "full:1").info()
    disk.io("write -P 2 5M 1M")
    back_up(disk, "one:1", "--base", "full:1", "--then", "keep")
    info = Disk(tmp_path / "one:1").info()
    assert (info["backing-filename"], info["backing-filename-format"]) == ("./full:1", "qcow2")
    (tmp_path / "moved").mkdir()
    for name in ("full:1", "one:1"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    assert content(tmp_path / "moved/one:1") == content(disk.path)
    with Disk(tmp_path / "moved/full:1").held_by_qemu_io(read_only=True):
        back_up(disk, "two", "--base", "moved/full:1")
    assert Disk(tmp_path / "two").info()["backing-filename"] == str(tmp_path / "moved/full:1")
    assert content(tmp_path / "two") == content(disk.path)


@pytest.mark.spec("BACKUP-4")
def test_a_bitmap_is_rotated_or_kept(tmp_path: Path) -> None:
    disk = make(tmp_path, granularity=4 * KiB)
    back_up(disk, "full", "--full")
    disk.io("write -P 1 0 4k")
    back_up(disk, "one", "--base", "full", "--then", "keep")
    disk.io("write -P 2 1M 4k")
    back_up(disk, "two", "--base", "full", "--then", "rotate", "new")
    disk.io("write -P 3 2M 4k")
    assert disk.extents(NAME) == [(0, 4 * KiB), (MiB, 4 * KiB)]
    assert disk.extents("new") == [(2 * MiB, 4 * KiB)]
    assert [found["granularity"] for found in disk.listed()] == [4 * KiB] * 2
    assert [found["flags"] for found in disk.listed()] == [[], ["auto"]]


def crashed(disk: Disk) -> None:
    disk.crash("write -P 1 3M 64k")


def stale(disk: Disk) -> None:
    with disk.path.open("r+b") as file:  # as a program leaves it that has no bitmaps
        file.seek(88)
        file.write(bytes(8))


STATES: dict[str, Callable[[Disk], object]] = {
    "inconsistent": crashed,
    "stale": stale,
    "disabled": lambda disk: disk.bitmap(NAME, "--disable"),
    "missing": lambda disk: disk.bitmap(NAME, "--remove"),
}


@pytest.mark.spec("BACKUP-3", "BACKUP-4", "BACKUP-5")
@pytest.mark.parametrize("state", STATES)
def test_a_bitmap_of_no_use_needs_a_full_backup(state: str, tmp_path: Path) -> None:
    disk = make(tmp_path)
    back_up(disk, "full", "--full")
    STATES[state](disk)
    before, there = disk.path.read_bytes(), files(tmp_path)
    command = ["backup", "vm.qcow2", NAME, "more"]
    done = run([*command, "--base", "full"], tmp_path)
    message, *_ = done.err.splitlines()
    assert (done.status, done.out) == (1, "")
    assert message.endswith("; to take a full backup, give --full instead of --base")
    verdict = json.loads(run(["verdict", "--json", "vm.qcow2", NAME], tmp_path).out)
    assert verdict["reason"] == state
    assert verdict["message"] in message
    if state != "disabled":  # what is disabled already can be rotated away
        done = run([*command, "--full", "--then", "rotate", "new"], tmp_path)
        assert done.status == 1
    assert (disk.path.read_bytes(), files(tmp_path)) == (before, there)

    back_up(disk, "more", "--full")
    assert disk.check().returncode == (3 if state == "stale" else 0)  # 3: leaks, no errors
    disk.io("write -P 7 9M 64k")
    assert disk.extents(NAME) == [(9 * MiB, 64 * KiB)]
    back_up(disk, "last", "--base", "more")
    assert content(tmp_path / "last") == content(disk.path)


@pytest.mark.spec("BACKUP-5", "BACKUP-6", "BACKUP-11")
def test_what_is_refused_changes_nothing(tmp_path: Path) -> None:
    disk = make(tmp_path)
    disk.io("write -P 1 0 1M")
    back_up(disk, "full", "--full")
    disk.io("write -P 2 1M 1M")
    disk.bitmap("taken", "--add")
    Disk.create(tmp_path / "empty", SIZE)
    on_disk = Disk.create(
        tmp_path / "on disk", SIZE, backing_file=str(disk.path), backing_fmt="qcow2"
    )
    (tmp_path / "raw").write_bytes(bytes(MiB))
    (tmp_path / "left.incomplete").write_bytes(b"mine")
    before, there = disk.path.read_bytes(), files(tmp_path)
    for arguments, expected in (
        (["full", "--base", "full"], "full: exists already and is not overwritten"),
        (["left", "--base", "full"], "left.incomplete: is being written by another process, or is"),
        (["no/target", "--base", "full"], "no/target.incomplete: No such file or directory"),
        (["new", "--base", "vm.qcow2"], "vm.qcow2: is the disk itself"),
        (["new", "--base", on_disk.path.name], "on disk: QEMU cannot open it: "),
        (["new", "--base", "raw"], "raw: header: magic"),
        (["new", "--base", "none"], "none: No such file"),
        (["new", "--base", "empty", "--verify"], "new.incomplete: the copy differs from the disk"),
        (["new", "--base", "full", "--then", "rotate", "taken"], '"taken" already exists'),
    ):
        done = run(["backup", "vm.qcow2", NAME, arguments[0], *arguments[1:]], tmp_path)
        assert (done.status, done.out, len(done.err.splitlines())) == (1, "", 1), arguments
        assert expected in done.err
        assert (disk.path.read_bytes(), files(tmp_path)) == (before, there), arguments
    for wrong in (["--full"], [], ["extra", "--full"], ["--full", "--then", "rotate"]):
        target = ["new"] if wrong[:1] != ["--full"] or len(wrong) > 1 else []
        assert run(["backup", "vm.qcow2", NAME, *target, *wrong], tmp_path).status == 64


def test_a_name_that_is_not_unicode_is_refused(tmp_path: Path) -> None:
    disk = Disk.create(tmp_path / "vm.qcow2", SIZE)
    name = os.fsdecode(b"day\xff")
    disk.bitmap(name, "--add")
    done = run(["backup", "vm.qcow2", name, "full", "--full"], tmp_path)
    assert done.status == 0
    before, there = disk.path.read_bytes(), files(tmp_path)
    done = run(["backup", "vm.qcow2", name, "new", "--base", "full"], tmp_path)
    assert (done.status, disk.path.read_bytes(), files(tmp_path)) == (1, before, there)
    assert "vm.qcow2: the QMP command blockdev-backup failed: QEMU takes no name that" in done.err
    done = run(["backup", "vm.qcow2", "daily", name, "--full"], tmp_path)
    assert (done.status, disk.path.read_bytes(), files(tmp_path)) == (1, before, there)
    assert r"day\xff.incomplete: QEMU cannot open it: QEMU takes no name that" in done.err


def test_what_is_encrypted_is_refused(tmp_path: Path) -> None:
    disk = Disk.create(tmp_path / "vm.qcow2", SIZE, **{"encrypt.format": "luks"})
    before = disk.path.read_bytes()
    done = run(["backup", "vm.qcow2", "daily", "full", "--full"], tmp_path)
    assert (done.status, disk.path.read_bytes(), files(tmp_path)) == (1, before, {"vm.qcow2"})
    assert "vm.qcow2: QEMU cannot open it: it is encrypted, and no secret" in done.err


def test_what_is_printed(tmp_path: Path) -> None:
    disk = make(tmp_path)
    disk.io("write -P 1 0 1M")
    shown = run_on_terminal(["backup", "vm.qcow2", NAME, "full", "--full"], tmp_path, 200)
    assert "copied: 100 % of 24 MiB\n" in shown or "100%" in shown
    assert "full is complete: the whole disk, 24.1 MiB (25231360 bytes) copied in " in shown
    disk.io("write -P 1 0 4k", "write -P 1 12M 128k")
    command = ["backup", "--json", "vm.qcow2", NAME, "one", "--base", "full"]
    before, there = disk.path.read_bytes(), files(tmp_path)
    dry = json.loads(run([*command, "--dry-run"], tmp_path).out)
    assert (disk.path.read_bytes(), files(tmp_path)) == (before, there)
    done = json.loads(run([*command, "--verify"], tmp_path).out)
    for document in (dry, done):
        check_backup(document)
        assert document["total-bytes"] == 192 * KiB
    assert dry["plan"]["steps"]
    assert (done["copied-bytes"], done["extents"], done["verified"]) == (192 * KiB, 2, True)
    assert (done["then"], done["recording"], done["plan"]) == ("clear", NAME, None)
    failed = run([*command, "--full"], tmp_path)
    assert failed.status == 64


# --- failures -----------------------------------------------------------------------------------


@pytest.fixture
def due(tmp_path: Path) -> Disk:
    """A disk of which a backup lies in ``full``, with some megabytes written since."""
    disk = make(tmp_path)
    back_up(disk, "full", "--full")
    disk.io("write -P 5 1M 20M")
    return disk


def interrupted(disk: Disk, event: Callable[[], object]) -> None:
    """Takes a backup, and lets something happen while QEMU copies."""
    happened: list[int] = []

    def progress(copied: int) -> None:
        assert copied > 0
        if not happened:
            happened.append(copied)
            assert (disk.path.parent / "new.incomplete").exists()
            event()

    target, base = (str(disk.path.parent / name) for name in ("new", "full"))
    with qcow2bm.open(disk.path, "r+") as image:
        planned = backup.plan_backup(image, NAME, target, base=base)
        backup.back_up(planned, progress=progress)
        assert happened


def daemons() -> list[int]:
    """The storage daemons that this process has started."""
    children = {
        int(pid)
        for path in Path("/proc/self/task").glob("*/children")
        for pid in path.read_text().split()
    }
    return [pid for pid in children if b"qemu-storage-daemon" in command_line(pid)]


def command_line(pid: int) -> bytes:
    """The command line of a process; empty if the process has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


@pytest.mark.spec("BACKUP-7")
def test_nobody_writes_to_the_disk_meanwhile(due: Disk) -> None:
    def write() -> None:
        with pytest.raises(ToolError, match="lock"):
            due.io("write -P 6 0 64k")

    interrupted(due, write)
    assert content(due.path.with_name("new")) == content(due.path)


@pytest.mark.spec("BACKUP-8", "BACKUP-10")
def test_a_failure_leaves_the_disk_as_it_was(due: Disk) -> None:
    before, there = due.path.read_bytes(), files(due.path.parent)

    def kill() -> None:
        (daemon,) = daemons()
        os.kill(daemon, signal.SIGKILL)

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(qcow2bm.QmpError, match="qemu-storage-daemon ended by SIGKILL"):
        interrupted(due, kill)
    assert (due.path.read_bytes(), files(due.path.parent)) == (before, there)
    with pytest.raises(KeyboardInterrupt):
        interrupted(due, interrupt)
    assert (due.path.read_bytes(), files(due.path.parent)) == (before, there)
    with pytest.raises(qcow2bm.StorageError, match="exists already"):
        interrupted(due, lambda: due.path.with_name("new").write_bytes(b"mine"))
    assert due.path.with_name("new").read_bytes() == b"mine"
    assert (due.path.read_bytes(), files(due.path.parent)) == (before, there | {"new"})
    assert daemons() == []


@pytest.mark.spec("BACKUP-8")
@pytest.mark.parametrize("how", ["kill", "interrupt"])
def test_a_failure_at_each_step(how: str, due: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Something happens before each command that the daemon is to do."""
    before, there = due.path.read_bytes(), files(due.path.parent)
    execute = StorageDaemon.execute

    def disturbed(last: int) -> Callable[..., Answer]:
        numbers = count()

        def call(*arguments: Any) -> Answer:
            if next(numbers) == last:
                if how == "interrupt":
                    raise KeyboardInterrupt
                (daemon,) = daemons()
                os.kill(daemon, signal.SIGKILL)
            return execute(*arguments)

        return call

    for number in count():
        with monkeypatch.context() as patched:
            patched.setattr(StorageDaemon, "execute", disturbed(number))
            try:
                interrupted(due, lambda: None)
                break
            except (KeyboardInterrupt, qcow2bm.QmpError):
                pass
        assert (due.path.read_bytes(), files(due.path.parent)) == (before, there)
        assert daemons() == []
    assert number > 8
    assert content(due.path.with_name("new")) == content(due.path)


@pytest.mark.spec("BACKUP-9")
def test_the_order_of_what_becomes_durable(due: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def noting(real: Callable[..., Any], what: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            done.append(what)
            return real(*arguments)

        return call

    wanted = {"fsync": "durable", "link": "named", "pwritev": "edited"}
    for call, what in wanted.items():
        monkeypatch.setattr(os, call, noting(getattr(os, call), what))
    interrupted(due, lambda: None)
    assert [what for what, _ in groupby(done)] == ["durable", "named", "durable", "edited"]


@pytest.mark.spec("BACKUP-8")
def test_a_full_disk_leaves_the_disk_as_it_was(due: Disk) -> None:
    before, there = due.path.read_bytes(), files(due.path.parent)
    limit = 8 * MiB
    command = [sys.executable, "-m", "qcow2bm", "backup", "vm.qcow2", NAME, "new", "--base", "full"]
    done = subprocess.run(
        command,
        cwd=due.path.parent,
        env=environment(),
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        check=False,
    )
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done.stderr
    assert (due.path.read_bytes(), files(due.path.parent)) == (before, there)


@pytest.mark.spec("BACKUP-8")
def test_a_failed_edit_leaves_the_backup(due: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    before = due.path.read_bytes()

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwritev", fail)
        done = run(["backup", "vm.qcow2", NAME, "new", "--base", "full"], due.path.parent)
    assert (done.status, done.out) == (1, "")
    note, message = done.err.splitlines()
    assert note == "qcow2bm: note: new is complete"
    assert message.startswith("qcow2bm: vm.qcow2: ")
    assert due.path.read_bytes() == before
    assert content(due.path.with_name("new")) == content(due.path)


class Extents(qcow2bm.DirtySet):
    """A set of ranges of the disk."""

    def __init__(self, ranges: list[tuple[int, int]]) -> None:
        self._ranges = ranges

    @property
    def disk_size(self) -> int:
        return SIZE

    def extents(self) -> Iterator[NDArray[np.int64]]:
        yield np.array(self._ranges, np.int64)


@pytest.mark.spec("BACKUP-11")
def test_a_copy_that_lacks_something_is_noticed(due: Disk, tmp_path: Path) -> None:
    back_up(due, "new", "--base", "full", "--then", "keep")
    path = str(tmp_path / "new")
    dirty = Extents([*due.extents(NAME)])
    require_allocated(path, dirty)
    with pytest.raises(qcow2bm.StorageError, match="lacks the guest bytes from 0x0"):
        require_allocated(path, Extents([(0, SIZE)]))
    for first in (21 * MiB, 22 * MiB):
        with pytest.raises(qcow2bm.StorageError, match=f"from {first:#x}"):
            require_allocated(path, dirty | Extents([(first, 512)]))
    require_sound(path)
    with qcow2bm.open(path) as image:
        l1_table = image.header.l1_table_offset
    with Path(path).open("r+b") as file:  # a table that was never written leaves leaks
        file.seek(l1_table)
        file.write(bytes(8))
    with pytest.raises(qcow2bm.StorageError, match="the copy is not whole: "):
        require_sound(path)


@pytest.mark.spec("BACKUP-8", "BACKUP-11")
@pytest.mark.parametrize("fault", ["lacks the guest bytes from 0x100000", "is not whole: "])
def test_a_bad_copy_is_not_kept(fault: str, due: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    before, there = due.path.read_bytes(), files(due.path.parent)
    part = due.path.with_name("new.incomplete")
    run_job, end_daemon = StorageDaemon.run_job, StorageDaemon.quit

    def skip(daemon: StorageDaemon, command: str, *arguments: Any) -> int:
        return 0 if command == "blockdev-backup" else run_job(daemon, command, *arguments)

    def forget(daemon: StorageDaemon) -> None:
        end_daemon(daemon)
        with part.open("r+b") as file:
            file.seek(int.from_bytes(part.read_bytes()[40:48]))  # the L1 table
            file.write(bytes(8))

    if "lacks" in fault:
        monkeypatch.setattr(StorageDaemon, "run_job", skip)
    else:
        monkeypatch.setattr(StorageDaemon, "quit", forget)
    done = run(["backup", "vm.qcow2", NAME, "new", "--base", "full"], due.path.parent)
    assert (done.status, done.out) == (1, "")
    assert done.err.startswith(f"qcow2bm: new.incomplete: the copy {fault}")
    assert (due.path.read_bytes(), files(due.path.parent)) == (before, there)


def left_over(folder: Path) -> list[str]:
    """The programs that run in a folder, except those that end within some seconds."""
    found: list[str] = []
    for _ in range(500):
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if (process / "cwd").readlink() == folder:
                    found.append((process / "comm").read_text())
        if not found:
            break
        time.sleep(0.01)
    return found


def end(disk: Disk, seconds: float, how: signal.Signals) -> str:
    """Ends a backup after some time, judges what is left, and puts everything back.

    Returns what became of the backup.
    """
    folder = disk.path.parent
    before, there, dirty = disk.path.read_bytes(), files(folder), disk.extents(NAME)
    process = start(["backup", "vm.qcow2", NAME, "new", "--base", "full"], folder)
    time.sleep(seconds)
    process.send_signal(how)
    process.communicate()
    assert left_over(folder) == []
    found = files(folder) - there
    assert found <= ({"new", "new.incomplete"} if how == signal.SIGKILL else {"new"})
    assert disk.check().returncode in (0, 3)  # 3: leaks, as a crash may leave them
    is_changed = disk.extents(NAME) != dirty
    if is_changed:
        assert disk.extents(NAME) == []
    elif disk.path.read_bytes() != before:
        assert process.returncode == -signal.SIGKILL
    if "new" in found:
        assert content(folder / "new") == content(disk.path)
        (folder / "content.raw").unlink()
    assert not is_changed or "new" in found
    if "new.incomplete" in found and "new" not in found:
        done = run(["backup", "vm.qcow2", NAME, "new", "--base", "full"], folder)
        assert (done.status, len(done.err.splitlines())) == (1, 1)
        assert done.err.startswith("qcow2bm: new.incomplete: ")
    for name in found:
        (folder / name).unlink()
    disk.path.write_bytes(before)
    return f"{'+'.join(sorted(found)) or 'nothing'}{', cleared' * is_changed}"


@pytest.fixture
def duration(due: Disk) -> float:
    """How long a backup of the disk takes, in seconds."""
    before, begin = due.path.read_bytes(), time.monotonic()
    process = start(["backup", "vm.qcow2", NAME, "new", "--base", "full"], due.path.parent)
    assert process.wait() == 0
    process.communicate()
    due.path.write_bytes(before)
    due.path.with_name("new").unlink()
    return time.monotonic() - begin


@pytest.mark.spec("BACKUP-6", "BACKUP-9", "BACKUP-10")
def test_a_command_that_is_killed(due: Disk, duration: float) -> None:
    for part in (0.5, 0.7, 0.9):
        end(due, part * duration, signal.SIGKILL)


@pytest.mark.deep
@pytest.mark.spec("BACKUP-6", "BACKUP-8", "BACKUP-9", "BACKUP-10")
def test_a_command_that_ends_at_any_moment(due: Disk, duration: float) -> None:
    random, outcomes = Random(1), Counter[str]()
    for number in range(60):
        how = signal.SIGKILL if number % 3 else signal.SIGINT
        outcomes[f"{how.name}: {end(due, random.uniform(0.3, 1.05) * duration, how)}"] += 1
    print(*sorted(outcomes.items()), sep="\n")
    assert len(outcomes) > 3
