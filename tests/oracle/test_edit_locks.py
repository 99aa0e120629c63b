"""Editing next to others: QEMU stays out while we edit, we while it runs, and editors queue up."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from support.qemu import Disk, StorageDaemon, run
from support.twin import KiB, MiB, held_lock_bytes

import qcow2bm

Holder = Callable[[Disk], AbstractContextManager[None]]


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    disk = Disk.create(tmp_path / "disk", 64 * MiB, cluster_size=4096)
    disk.add("daily", 512)
    disk.io("write 1M 512", "write 33M 64k")
    return disk


def extents(bitmap: qcow2bm.Bitmap) -> list[tuple[int, int]]:
    return [(start, length) for array in bitmap.extents() for start, length in array.tolist()]


def test_qemu_stays_out_while_an_image_is_edited(disk: Disk) -> None:
    with qcow2bm.open(disk.path, "r+") as image:
        before = disk.path.read_bytes()
        for command in (
            ("info", disk.path),
            ("check", disk.path),
            ("bitmap", "--add", disk.path, "weekly"),
            ("bitmap", "--remove", disk.path, "daily"),
            ("resize", disk.path, "1G"),
        ):
            refused = run("qemu-img", *command)
            assert refused.returncode == 1, command
            assert re.search('Failed to get (shared )?"write" lock', refused.stderr), refused
        assert run("qemu-io", "-c", "write 0 512", disk.path).returncode == 1
        assert disk.path.read_bytes() == before
        with image.edit() as edit:
            edit.add("weekly")
        assert run("qemu-img", "info", disk.path).returncode == 1, "still open, still locked"
    assert [bitmap["name"] for bitmap in disk.listed()] == ["daily", "weekly"]
    assert disk.check().returncode == 0


def test_qemu_can_look_without_a_lock_while_an_image_is_edited(disk: Disk) -> None:
    with qcow2bm.open(disk.path, "r+") as image:
        with image.edit() as edit:
            edit.rename("daily", "weekly")
            info = json.loads(run("qemu-img", "info", "-U", "--output", "json", disk.path).stdout)
            assert [b["name"] for b in info["format-specific"]["data"]["bitmaps"]] == ["daily"]
        info = json.loads(run("qemu-img", "info", "-U", "--output", "json", disk.path).stdout)
        (listed,) = info["format-specific"]["data"]["bitmaps"]
        assert listed == {"name": "weekly", "flags": ["auto"], "granularity": 512}
        with pytest.raises(qcow2bm.ImageLockedError):
            qcow2bm.open(disk.path)
        with qcow2bm.open(disk.path, force_share=True) as other:
            assert extents(other.bitmaps["weekly"]) == [(MiB, 512), (33 * MiB, 64 * KiB)]


@contextmanager
def written_in_storage_daemon(disk: Disk) -> Iterator[None]:
    with StorageDaemon() as daemon:
        daemon.open(disk, read_only=False)
        yield


@contextmanager
def read_in_storage_daemon(disk: Disk) -> Iterator[None]:
    with StorageDaemon() as daemon:
        daemon.open(disk)
        yield


@contextmanager
def read_in_qemu_io(disk: Disk) -> Iterator[None]:
    with disk.held_by_qemu_io(read_only=True):
        yield


@contextmanager
def edited_here(disk: Disk) -> Iterator[None]:
    with qcow2bm.open(disk.path, "r+"):
        yield


WRITES = r"is writing to it \(lock byte 101\)"
READS = r"reads it and does not let others write \(lock byte 201\)"


@pytest.mark.parametrize(
    ("holder", "held"),
    [
        (Disk.held_by_qemu_io, WRITES),
        (written_in_storage_daemon, WRITES),
        (edited_here, WRITES),
        (read_in_qemu_io, READS),
        (read_in_storage_daemon, READS),
    ],
)
@pytest.mark.parametrize("timeout", [0, 0.2])
def test_no_edit_while_somebody_uses_the_image(
    disk: Disk, holder: Holder, held: str, timeout: float
) -> None:
    with holder(disk):
        before, locks = disk.path.read_bytes(), held_lock_bytes(disk.path)
        with pytest.raises(qcow2bm.ImageLockedError, match=held):
            qcow2bm.open(disk.path, "r+", lock_timeout=timeout)
        assert disk.path.read_bytes() == before
        assert held_lock_bytes(disk.path) == locks, "nothing stays behind of the attempt"
    with qcow2bm.open(disk.path, "r+") as image, image.edit() as edit:
        edit.add("weekly")
    assert disk.check().returncode == 0


def test_the_locks_are_those_of_qemu(disk: Disk) -> None:
    assert held_lock_bytes(disk.path) == set()
    with disk.held_by_qemu_io():
        theirs = held_lock_bytes(disk.path)
    with qcow2bm.open(disk.path, "r+") as image:
        assert held_lock_bytes(disk.path) == theirs == {100, 101, 103, 201, 203}
        with image.edit() as edit:
            edit.add("weekly")
            assert held_lock_bytes(disk.path) == theirs
        assert held_lock_bytes(disk.path) == theirs
        image.bitmaps["weekly"].count()
        assert held_lock_bytes(disk.path) == theirs, "reading does not take the locks away"
    assert held_lock_bytes(disk.path) == set()


def python(script: str, *arguments: object) -> subprocess.Popen[str]:
    """Another process that runs a script with this library."""
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        text=True,
    )


PATIENT_EDITOR = """
import sys
import qcow2bm

print("begun", flush=True)
with qcow2bm.open(sys.argv[1], "r+", lock_timeout=60) as image, image.edit() as edit:
    edit.add("weekly")
"""


def test_an_edit_that_waits_begins_when_qemu_is_done(disk: Disk) -> None:
    with disk.held_by_qemu_io():
        editor = python(PATIENT_EDITOR, disk.path)
        assert editor.stdout
        assert editor.stdout.readline() == "begun\n"
        assert editor.poll() is None
    assert editor.communicate(timeout=60)[1] == ""
    assert editor.returncode == 0
    assert [bitmap["name"] for bitmap in disk.listed()] == ["daily", "weekly"]
    assert disk.check().returncode == 0


EDITOR = """
import json, sys
import qcow2bm

path, number, edits = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
done = []
for edit_number in range(edits):
    name = f"{number}.{edit_number}"
    try:
        with qcow2bm.open(path, "r+", lock_timeout=60) as image, image.edit() as edit:
            edit.add(name, 512 << edit_number % 8)
            edit.set(name, 4096 * number, 4096 * (edit_number + 1))
            if edit_number % 5 == 1:
                edit.add(name)
            if edit_number % 5 == 3:
                raise KeyboardInterrupt
            if edit_number % 5 == 4:
                edit.remove(f"{number}.{edit_number - 4}")
                done.remove(f"{number}.{edit_number - 4}")
    except (qcow2bm.BitmapExistsError, KeyboardInterrupt):
        assert edit_number % 5 in (1, 3)
        continue
    done.append(name)
print(json.dumps(done))
"""


def test_editors_in_many_processes(disk: Disk) -> None:
    """Every edit that succeeded is there, and nothing of one that failed."""
    processes, edits = 20, 20
    running = [python(EDITOR, disk.path, number, edits) for number in range(processes)]
    expected = {"daily"}
    for editor in running:
        out, errors = editor.communicate(timeout=300)
        assert editor.returncode == 0, errors
        expected |= set(json.loads(out))
    assert len(expected) == 1 + processes * edits * 2 // 5
    listed = [bitmap["name"] for bitmap in disk.listed()]
    assert len(listed) == len(set(listed))
    assert set(listed) == expected
    assert disk.check().returncode == 0
    with qcow2bm.open(disk.path, strict=True) as image:
        for name in expected - {"daily"}:
            number, edit_number = map(int, name.split("."))
            bitmap = image.bitmaps[name]
            start, stop = 4096 * number, 4096 * (number + edit_number + 1)
            granularity = bitmap.granularity
            first = start // granularity * granularity
            assert extents(bitmap) == [(first, -(-stop // granularity) * granularity - first)]
