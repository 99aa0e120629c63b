"""Followed word for word, the advice ends with an image that QEMU opens, or says why not.

No byte of the guest is lost, and no bitmap that was not named as the cost beforehand.
"""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import pytest
from support.broken_images import broken_images
from support.console import Result, environment, run
from support.following import Followed, advised, follow, names_in
from support.problem_images import in_version_2
from support.qemu import Disk, StorageDaemon, held_by_storage_daemon, run_ok
from support.qemu import run as run_tool
from support.spec_image import Patch, in_header, patched
from support.twin import KiB, MiB

import qcow2bm

STATES: dict[str, list[Patch]] = {
    "as it is": [],
    "the dirty bit": in_header(incompatible_features=1),
    "the corrupt bit": in_header(incompatible_features=2),
    "stale": in_header(autoclear_features=0),
    "version 2": in_version_2(),
}
IMAGES = list(broken_images())
PARTS = 12
MOST_COMMANDS = 4
KNOWN = {"daily", "weekly", "crashed"}
MAKING = "add", "set", "disable"
"""The commands that make a bitmap anew; each bitmap takes two or three of them."""


def tool(folder: Path, words: Sequence[str]) -> Result:
    done = subprocess.run(
        words, cwd=folder, capture_output=True, encoding="utf-8", timeout=60, check=False
    )
    return Result(done.returncode, done.stdout, done.stderr)


def content(path: Path) -> str | None:
    """The digest of the disk as QEMU reads it; None if QEMU cannot."""
    raw = path.with_suffix(".raw")
    if run_tool("qemu-img", "convert", "-O", "raw", path, raw).returncode:
        return None
    return sha256(raw.read_bytes()).hexdigest()


def require_done(path: Path, followed: Followed, what: str) -> str:
    """How it ended: QEMU opens the image for writing, or the last word says what to do."""
    making = [words for words in map(str.split, followed.commands) if words[1] in MAKING]
    assert len(followed.commands) - len(making) <= MOST_COMMANDS, what
    if run_tool("qemu-io", "-c", "read 0 512", path).returncode == 0:
        return "opens"
    text = " ".join(followed.last.out.split())
    assert "from a copy" in text or "from a backup" in text, (what, followed)
    return "needs a copy"


@pytest.mark.spec("CLI-43", "CLI-44", "CLI-45")
@pytest.mark.parametrize(
    "part", [pytest.param(n, marks=pytest.mark.deep) if n % 3 else n for n in range(PARTS)]
)
def test_the_advice_for_every_broken_image(part: int, tmp_path: Path) -> None:
    path = tmp_path / "vm.qcow2"
    ends: Counter[str] = Counter()
    for number, (what, data) in list(enumerate(IMAGES))[part::PARTS]:
        state = list(STATES)[number // PARTS % len(STATES)]
        path.write_bytes(patched(data, *STATES[state]))
        before = content(path)
        try:
            names = names_in(path)
        except qcow2bm.Qcow2BmError:
            ends["no image"] += 1
            continue
        followed = follow(tmp_path, lambda words: tool(tmp_path, words))
        ends[require_done(path, followed, f"{what}, {state}")] += 1
        if before is not None:
            assert content(path) == before, (what, state)
        lost = (names & KNOWN) - names_in(path)
        assert all(f'"{name}"' in followed.costs for name in lost), (what, state, lost, followed)
        for undo in tmp_path.glob("vm.qcow2.undo*"):
            undo.unlink()
    print(f"advice followed to its end, part {part}: {dict(ends)}")
    assert ends["opens"] > ends.total() // 2


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    """A disk with data, a bitmap that is inconsistent since a crash, and one that is sound."""
    made = Disk.create(tmp_path / "vm.qcow2", 64 * MiB)
    made.io("write -P 1 0 4M")
    made.add("daily", 64 * KiB)
    made.crash("write -P 2 8M 1M")
    made.add("sound", 64 * KiB)
    return made


def follow_in_a_shell(folder: Path, first: str) -> list[str]:
    """Follows the advice with a real shell, which gets the lines as they are printed."""
    commands: list[str] = []
    for _ in range(5):
        found = [command for command, _ in advised(_shell(folder, first).stdout)]
        if not found:
            return commands
        for command in found:
            done = _shell(folder, command)
            assert done.returncode == 0, (command, done)
            commands.append(command)
    raise AssertionError(f"the advice goes round in a circle: {commands}")


def _shell(folder: Path, command: str) -> subprocess.CompletedProcess[str]:
    """Runs a line in a shell, which finds qcow2bm as a function: it need not be installed."""
    return subprocess.run(
        ["sh", "-c", f'qcow2bm() {{ "$PYTHON" -m qcow2bm "$@"; }}\n{command}\n'],
        cwd=folder,
        env=environment() | {"PYTHON": sys.executable},
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        check=False,
    )


@pytest.mark.spec("CLI-41")
@pytest.mark.parametrize("command", ["dump", "check"])
def test_in_a_real_shell(disk: Disk, tmp_path: Path, command: str) -> None:
    folder = tmp_path / "it's; here"
    folder.mkdir()
    path = folder / "a $(vm).qcow2"
    path.write_bytes(disk.path.read_bytes())
    followed = follow_in_a_shell(folder, f"qcow2bm {command} 'a $(vm).qcow2'")
    assert followed == ["qcow2bm salvage 'a $(vm).qcow2' --all --all-dirty"]
    assert Disk(path).extents("daily") == [(0, 64 * MiB)]


@pytest.mark.spec("CLI-42")
@pytest.mark.parametrize("command", ["dump", "check"])
def test_while_a_process_writes_to_the_image_no_command_is_advised(
    disk: Disk, tmp_path: Path, command: str
) -> None:
    with held_by_storage_daemon(disk):
        done = run([command, "-U", "vm.qcow2"], tmp_path)
        assert advised(done.out) == []
        assert "ask the VM with the QMP command query-block" in " ".join(done.out.split())
        before = disk.path.read_bytes()
        assert run([command, "vm.qcow2"], tmp_path).status == 1
        assert disk.path.read_bytes() == before


@pytest.mark.spec("CLI-42")
@pytest.mark.parametrize("command", ["dump", "check"])
def test_while_a_process_reads_the_image_no_command_is_advised(
    disk: Disk, tmp_path: Path, command: str
) -> None:
    """A VM, for example, that has the image as the backing file of its disk."""
    with StorageDaemon() as daemon:
        daemon.open(disk, read_only=True)
        done = run([command, "vm.qcow2"], tmp_path)
        assert advised(done.out) == []
        assert "end that process, and look again" in " ".join(done.out.split())
        salvage = ["salvage", "vm.qcow2", "--all", "--all-dirty"]
        assert run(salvage, tmp_path).status == 1
    assert [words for words, _ in advised(run([command, "vm.qcow2"], tmp_path).out)] == [
        "qcow2bm salvage vm.qcow2 --all --all-dirty"
    ]
    assert run(salvage, tmp_path).status == 0


@pytest.mark.spec("CLI-44")
@pytest.mark.parametrize("kind", ["snapshot", "data file", "encrypted"])
def test_after_a_crash_of_other_images(tmp_path: Path, kind: str) -> None:
    options: dict[str, object] = {}
    if kind == "data file":
        options = {"data_file": str(tmp_path / "data"), "data_file_raw": "on"}
    if kind == "encrypted":
        options = {"encrypt.format": "luks"}
    disk = Disk.create(tmp_path / "vm.qcow2", 16 * MiB, **options)
    disk.io("write -P 1 0 4M")
    if kind == "snapshot":
        run_ok("qemu-img", "snapshot", "-c", "before", disk.path)
    disk.add("daily", 64 * KiB)
    disk.crash("write -P 2 8M 1M")
    followed = follow(tmp_path)
    assert followed.commands == ["qcow2bm salvage vm.qcow2 --all --all-dirty"]
    assert disk.check().returncode == 0
    assert disk.extents("daily") == [(0, 16 * MiB)]
    disk.io("read -P 1 0 4M", "read -P 2 8M 1M")
