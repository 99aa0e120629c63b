"""The verdict on images that QEMU made, changed, crashed on, or holds."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from support.console import run
from support.jsonspec import check_verdict
from support.qemu import LEAKS, Disk, held_by_storage_daemon

import qcow2bm

MiB = 1 << 20
GRANULE = 65536
SIZE = 64 * MiB
AUTOCLEAR_BYTE = 88 + 7

Holder = Callable[[Disk], AbstractContextManager[None]]


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    disk = Disk.create(tmp_path / "disk", SIZE)
    disk.add("daily", GRANULE)
    disk.add("base", GRANULE)
    disk.io("write 1M 64k", "write 33M 128k")
    disk.bitmap("base", "--disable")
    return disk


def ask(disk: Disk, name: str) -> tuple[int, Any]:
    done = run(["verdict", "--output=json", disk.path.name, name], disk.path.parent)
    document = json.loads(done.out)
    check_verdict(document)
    assert done.err == ""
    return done.status, document


def help_it(disk: Disk, document: Any) -> None:
    """Runs the commands of the answer."""
    assert document["next"]
    for argv in document["next"]:
        assert run(argv[1:], disk.path.parent).status == 0


@pytest.mark.parametrize("holder", [Disk.held_by_qemu_io, held_by_storage_daemon])
@pytest.mark.parametrize("name", ["daily", "base", "never there"])
def test_the_status_is_8_while_qemu_writes_to_the_image(
    disk: Disk, holder: Holder, name: str
) -> None:
    with holder(disk):
        status, document = ask(disk, name)
        assert (status, document["reason"], document["usable"]) == (8, "running", False)
        assert (document["next"], document["dirty-bytes"]) == ([], None)
        assert "is writing to it" in document["message"]
    assert ask(disk, name)[0] == {"daily": 0, "base": 3, "never there": 7}[name]


def test_a_qemu_that_only_reads_does_not_matter(disk: Disk) -> None:
    with disk.held_by_qemu_io(read_only=True):
        assert ask(disk, "daily")[0] == 0


@pytest.mark.spec("STAT-5")
def test_a_usable_bitmap_has_what_qemu_says_is_dirty(disk: Disk) -> None:
    status, document = ask(disk, "daily")
    assert status == 0
    assert document["dirty-bytes"] == sum(length for _, length in disk.extents("daily"))


@pytest.mark.spec("CLI-39")
@pytest.mark.parametrize(
    ("what", "name", "expected"),
    [
        ("disabled", "base", 3),
        ("crash", "daily", 4),
        ("crash", "base", 4),
        ("stale", "daily", 5),
        ("missing", "never there", 7),
    ],
)
def test_after_the_commands_of_the_answer_the_next_backup_has_the_whole_disk(
    disk: Disk, what: str, name: str, expected: int
) -> None:
    if what == "crash":
        disk.crash("write 40M 64k")
    if what == "stale":
        data = bytearray(disk.path.read_bytes())
        data[AUTOCLEAR_BYTE] &= ~1
        disk.path.write_bytes(data)
    status, document = ask(disk, name)
    assert status == expected
    help_it(disk, document)
    status, document = ask(disk, name)
    if status:  # salvage leaves a disabled bitmap disabled
        assert (what, name, status) == ("crash", "base", 3)
        help_it(disk, document)
        status, document = ask(disk, name)
    assert status == 0
    assert document["dirty-bytes"] == SIZE
    assert disk.extents(name) == [(0, SIZE)]
    # The clusters of stale bitmaps leak.
    assert disk.check().returncode == (LEAKS if what == "stale" else 0)
    with qcow2bm.open(disk.path, "r+") as image, image.edit() as edit:
        edit.clear(name)  # the backup was taken
    disk.io("write 7M 64k")
    assert disk.extents(name) == [(7 * MiB, GRANULE)]
    assert ask(disk, name)[1]["dirty-bytes"] == GRANULE


def test_a_bitmap_misses_what_was_written_while_it_was_disabled(disk: Disk) -> None:
    """A disabled bitmap must miss the writes that were made meanwhile, even after it is enabled."""
    disk.io("write 50M 64k")
    done = run(["enable", "disk", "base"], disk.path.parent)
    assert done.status == 0
    assert '"base" was disabled: all that was written meanwhile is missing from it' in done.err
    assert (50 * MiB, GRANULE) in disk.extents("daily")
    assert (50 * MiB, GRANULE) not in disk.extents("base")
