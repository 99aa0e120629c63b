"""The demo: what it shows is true, and it leaves nothing behind."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import namedtuple
from pathlib import Path
from types import ModuleType

import pytest
from support.console import environment, run
from support.qemu import Disk

import qcow2bm
from qcow2bm.cli import demo

MIB = 1 << 20


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files of this process and of the processes it starts."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def _without_tqdm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)


def start(limit: int = resource.RLIM_INFINITY) -> subprocess.Popen[bytes]:
    """Starts the demo as a process whose files can have at most ``limit`` bytes."""

    def prepare() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell lets its background jobs ignore it

    return subprocess.Popen(
        [sys.executable, "-m", "qcow2bm", "demo"],
        env=environment() | {"PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=prepare,
    )


@pytest.mark.spec("CLI-21", "CLI-22")
@pytest.mark.usefixtures("_without_tqdm")
def test_the_demo_shows_how_it_goes_and_compares_the_stops(folder: Path) -> None:
    result = run(["demo", "--seconds", "1.5"], folder)
    assert (result.status, result.err) == (0, "")
    assert len(re.findall(r"^ +[12] s  [\d,]+ writes, ", result.out, re.MULTILINE)) == 2
    rows = re.findall(r"^(\w[\w ]*?) +([\d,]+) +(\d+) +[\d.]+$", result.out, re.MULTILINE)
    (everything, whole, barriers), (tracked, rest, barriers_tracked) = rows
    assert (everything, tracked) == ("store everything", "tracked")
    assert whole == f"{32 * MIB + 4:,}"
    # In place, as no cluster is missing: whole pieces and the flags.
    assert int(rest.replace(",", "")) % 4096 == 4
    assert (barriers, barriers_tracked) == ("2", "2")
    assert list(folder.iterdir()) == []


@pytest.mark.spec("CLI-22")
def test_where_there_is_tqdm_it_shows_how_it_goes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []

    class Bar:
        def __init__(self, total: int, unit: str) -> None:
            shown.append(f"{total} {unit}")

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None:
            shown.append("closed")

        def set_postfix_str(self, text: str, refresh: bool) -> None:
            shown.append(text)

        def update(self) -> None:
            shown.append("+1")

    module = ModuleType("tqdm")
    module.__dict__["tqdm"] = Bar
    monkeypatch.setitem(sys.modules, "tqdm", module)
    result = run(["demo", "--seconds", "0.2"], folder)
    assert (result.status, result.err) == (0, "")
    assert [shown[0], *shown[2:]] == ["1 s", "+1", "closed"]
    assert "writes" in shown[1]
    assert "writes, " not in result.out


@pytest.mark.usefixtures("_without_tqdm")
def test_it_may_take_no_time_at_all(folder: Path) -> None:
    result = run(["demo", "--seconds", "0"], folder)
    assert (result.status, result.err) == (0, "")


def test_the_image_is_sound_and_both_stops_leave_it_so(folder: Path) -> None:
    path = folder / "demo.qcow2"
    demo._make_image(path)
    with qcow2bm.open(path) as image:
        before = image.bitmaps["daily"].count()
        assert image.problems == ()
        assert image.virtual_size == 16 << 40
        assert before == image.virtual_size // 2
    demo._tracked_stop(path, 0.2, is_shown=False)
    with qcow2bm.open(path) as image:
        assert image.problems == ()
        assert image.bitmaps["daily"].status == "valid"
        bits = image.bitmaps["daily"].packed()
        assert image.bitmaps["daily"].count() > before
    length = path.stat().st_size
    for number in range(2):
        stop = demo._stop_that_stores_everything(path, number)
        assert (stop.bytes_written, stop.barriers) == (32 * MIB + 4, 2)
    assert path.stat().st_size == length
    marked = range(256 * MIB, 16 << 40, 512 * MIB)
    for start in marked:
        for bit in (start >> 16, (start >> 16) + 1):
            bits[bit >> 3] |= 1 << (bit & 7)
    with qcow2bm.open(path) as image:
        assert image.problems == ()
        assert image.bitmaps["daily"].status == "valid"
        assert image.bitmaps["daily"].packed().tobytes() == bits.tobytes()


@pytest.mark.qemu
def test_qemu_finds_nothing_wrong_with_the_image(folder: Path) -> None:
    disk = Disk(folder / "demo.qcow2")
    demo._make_image(disk.path)
    demo._tracked_stop(disk.path, 0.2, is_shown=False)
    demo._stop_that_stores_everything(disk.path, 0)
    assert disk.check().returncode == 0, disk.check()
    assert disk.listed() == [{"flags": ["auto"], "name": "daily", "granularity": 65536}]


@pytest.mark.spec("CLI-21")
def test_without_room_nothing_is_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(MIB, 0, MIB))
    result = run(["demo"], folder)
    assert (result.status, result.out) == (1, "")
    reason = "the demo needs 36 MiB of room, and there are 1 MiB; set TMPDIR"
    assert result.err == f"qcow2bm: {folder}: {reason}\n"
    assert list(folder.iterdir()) == []


@pytest.mark.spec("CLI-21")
@pytest.mark.parametrize("limit", [4096, 256 << 10, 16 * MIB])
def test_a_file_that_cannot_grow_is_one_line_and_leaves_nothing(folder: Path, limit: int) -> None:
    """A quota works like this limit: the free room does not show it."""
    process = start(limit)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.startswith(f"qcow2bm: {folder}".encode())
    assert b"File too large" in err
    assert err.count(b"\n") == 1
    assert list(folder.iterdir()) == []


@pytest.mark.usefixtures("folder")
def test_no_folder_for_temporary_files_is_one_line() -> None:
    process = start(limit=0)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, b"")
    assert err.startswith(b"qcow2bm: demo: no temporary folder: ")
    assert err.count(b"\n") == 1


@pytest.mark.spec("CLI-21")
@pytest.mark.parametrize("lines", [1, 2])
def test_an_interrupt_ends_it_at_once_and_leaves_nothing(folder: Path, lines: int) -> None:
    """An interrupt must end the demo, both while it makes the image and while it tracks writes."""
    with start() as process:
        assert process.stdout
        assert process.stderr
        for _ in range(lines):
            assert process.stdout.readline()
        assert [path.name[:12] for path in folder.iterdir()] == ["qcow2bm-demo"]
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(60) == -signal.SIGINT
        assert b"Traceback" not in process.stderr.read()
    assert list(folder.iterdir()) == []
