"""The week of spec/backup.md: each of its lines is run, and each backup restores to the disk."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from random import Random

import pytest
from support.console import run
from support.qemu import Disk, run_ok
from support.specreader import SPEC

MiB = 1 << 20
SIZE = 200 * MiB


def lines() -> list[str]:
    text = (SPEC / "backup.md").read_text()
    found = re.search(r"^## A week\n.*?^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert found
    return found[1].splitlines()


def write(path: Path, chance: Random, *, crashes: bool = False) -> None:
    """The guest writes anywhere; then its QEMU ends, or dies."""
    size = Disk(path).info()["virtual-size"]
    places = [chance.randrange(size // 512 - 600) * 512 for _ in range(12)]
    places.append(size - 512)
    commands = [f"write -P {chance.randrange(1, 256)} {place} 512" for place in places]
    commands += [f"write -z {places[0]} 300k", f"discard {places[1]} 256k"]
    listed = [word for command in commands for word in ("-c", command)]
    done = subprocess.run(
        ["qemu-io", "-d", "unmap", *listed, *(("-c", "abort") if crashes else ()), str(path)],
        capture_output=True,
        check=False,
    )
    assert (done.returncode != 0) == crashes, done.stderr


def happen(what: str, disk: Disk, chance: Random) -> None:
    """What a comment of the page says has happened."""
    if "has run" in what:
        path = disk.path.with_name("overlay.qcow2") if "on the overlay" in what else disk.path
        write(path, chance, crashes="has crashed" in what)
    if "was removed" in what:
        run_ok("qemu-img", "bitmap", "--remove", disk.path, "daily")


@pytest.mark.spec("BACKUP-1", "BACKUP-3", "BACKUP-4", "SALVAGE-7")
def test_a_week(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    chance = Random("a week")
    disk = Disk.create(tmp_path / "vm.qcow2", SIZE)
    write(disk.path, chance)
    happened: list[str] = []
    for line in lines():
        if line.startswith("#"):
            happened.append(line)
            happen(line, disk, chance)
            continue
        program, *arguments = shlex.split(line)
        if program == "qcow2bm":
            done = run(arguments, tmp_path)
            assert done.status == 0, (line, done.err)
        else:
            run_ok(program, *arguments)
        if arguments[0] == "backup":
            run_ok("qemu-img", "compare", "vm.qcow2", arguments[3])
            assert not disk.extents("daily")
    run_ok("qemu-img", "compare", "vm.qcow2", "restored.qcow2")
    assert len(happened) == 10
    for path in tmp_path.glob("*.qcow2"):
        assert Disk(path).check().returncode == 0
