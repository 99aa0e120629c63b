"""The commands as programs: exit status, streams, the modules they load, the files they touch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support import golden_images as images
from support.console import environment, run, start
from support.faulty_storage import FailingRead
from support.images import Built, Stored, build_image
from support.jsonspec import check_dump, check_map, failure_in

import qcow2bm
from qcow2bm.errors import Qcow2BmError

IMAGES = [
    images.sound,
    images.empty,
    images.crashed,
    images.stale,
    images.broken,
    images.names,
    images.data_file,
    images.cut_off,
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "vm.qcow2").write_bytes(images.sound().data)
    return tmp_path


@pytest.mark.parametrize(
    "arguments",
    [
        ["dump"],
        ["frobnicate", "vm.qcow2"],
        ["dump", "vm.qcow2", "other"],
        ["dump", "--frobnicate", "vm.qcow2"],
        ["dump", "--output=xml", "vm.qcow2"],
        ["dump", "--ext", "vm.qcow2"],
        ["map", "vm.qcow2"],
        ["map", "vm.qcow2", "-rf"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_64_and_one_line(folder: Path, arguments: list[str]) -> None:
    result = run(arguments, folder)
    assert result.status == 64
    assert result.out == ""
    assert len(result.err.splitlines()) == 1
    assert "--help" in result.err or "did you mean" in result.err


def test_version_and_help(folder: Path) -> None:
    assert run(["--version"], folder).out == f"qcow2bm {qcow2bm.__version__}\n"
    for arguments in (["--help"], ["dump", "--help"], ["map", "--help"]):
        result = run(arguments, folder)
        assert result.status == 0
        assert "exit status" in result.out
        assert result.err == ""


@pytest.mark.parametrize("columns", ["60", "200", "none"])
def test_help_is_as_wide_as_the_terminal(
    folder: Path, monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    limit = int(columns) if columns.isdecimal() else 80
    usage = run(["dump", "--help"], folder).out.partition("\n\n")[0]
    assert max(map(len, usage.splitlines())) <= limit


@pytest.mark.parametrize("image", IMAGES, ids=lambda image: image.__name__)
@pytest.mark.parametrize("options", [[], ["--extents", "--stale"], ["--sha256", "--no-count"]])
def test_dump_is_one_document_as_specified(
    tmp_path: Path, image: Callable[[], Built], options: list[str]
) -> None:
    (tmp_path / "vm.qcow2").write_bytes(image().data)
    result = run(["dump", "--output=json", *options, "vm.qcow2"], tmp_path)
    document = json.loads(result.out)
    check_dump(document)
    assert result.err == ""
    assert result.status == (
        2
        if any(p["severity"] in ("refused", "unusable", "leak") for p in document["problems"])
        else 0
    )
    for bitmap in document["bitmaps"]:
        assert ("extents" in bitmap) == ("--extents" in options)
        if bitmap["status"] != "valid":
            assert not bitmap.get("extents")
            assert not bitmap.get("sha256")


def test_extents_and_map_and_library_agree(folder: Path) -> None:
    document = json.loads(run(["dump", "--output=json", "--extents", "vm.qcow2"], folder).out)
    with qcow2bm.open(folder / "vm.qcow2") as image:
        for shown in document["bitmaps"]:
            bitmap = image.bitmaps[shown["name"]]
            rows = [row for part in bitmap.extents() for row in part.tolist()]
            assert [[e["start"], e["length"]] for e in shown["extents"]] == rows
            assert shown["dirty-bytes"] == bitmap.count() == sum(length for _, length in rows)
            assert shown["sha256"] == bitmap.sha256()
            mapped = json.loads(run(["map", "--output=json", "vm.qcow2", bitmap.name], folder).out)
            check_map(mapped)
            assert [[m["offset"], m["length"]] for m in mapped if m["type"]] == rows
            position = 0
            for before, part in zip([None, *mapped], mapped, strict=False):
                assert part["offset"] == position
                assert not before or before["type"] != part["type"]
                position += part["length"]
            assert position == image.virtual_size


def test_many_rows(tmp_path: Path) -> None:
    """More rows than are printed at once, single odd bits, and the disk ends in mid-granule."""
    bits = bytes([0b01010101, 0b00000001, 0b10000000, 0b11111110]) * (1 << 14)
    size = (8 * len(bits) << 12) - 1024
    image = build_image(Stored(b"b", (bits,), granularity_bits=12), cluster_bits=16, size=size)
    (tmp_path / "vm.qcow2").write_bytes(image.data)
    expected, start = [], 0
    flat = [bits[i // 8] >> i % 8 & 1 for i in range(8 * len(bits))]
    for i in range(1, len(flat) + 1):
        if i == len(flat) or flat[i] != flat[start]:
            stop = min(i << 12, size)
            expected.append((start << 12, stop - (start << 12), flat[start]))
            start = i
    mapped = json.loads(run(["map", "--output=json", "vm.qcow2", "b"], tmp_path).out)
    assert [(m["offset"], m["length"], m["type"]) for m in mapped] == expected
    dirty = json.loads(run(["map", "--dirty", "--output=json", "vm.qcow2", "b"], tmp_path).out)
    assert dirty == [m for m in mapped if m["type"]]
    lines = run(["map", "vm.qcow2", "b"], tmp_path).out.splitlines()
    assert [tuple(map(int, line.split()[:3])) for line in lines] == expected


@pytest.mark.parametrize(
    "arguments",
    ["dump --no-count vm.qcow2", "dump vm.qcow2", "dump --output=json --sha256 vm.qcow2",
     "map --totals vm.qcow2 daily"],
)  # fmt: skip
def test_metadata_commands_load_no_numpy(folder: Path, arguments: str) -> None:
    code = (
        "import sys; from qcow2bm.cli import main; status = main(sys.argv[1:]); "
        "sys.exit(status or 10 * ('numpy' in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments.split()],
        cwd=folder,
        env=environment(),
        stdout=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode == 0


def test_a_closed_pipe_ends_quietly(tmp_path: Path) -> None:
    image = build_image(Stored(b"b", (b"\x55" * 65536,)), cluster_bits=16, size=1 << 35)
    (tmp_path / "vm.qcow2").write_bytes(image.data)
    for arguments in ("map vm.qcow2 b", "map --output=json vm.qcow2 b", "dump --extents vm.qcow2"):
        with start(arguments.split(), tmp_path) as process:
            assert process.stdout
            assert process.stderr
            process.stdout.read(1)
            process.stdout.close()
            assert process.wait() == -signal.SIGPIPE
            assert process.stderr.read() == b""


def test_interrupting_ends_quietly(folder: Path) -> None:
    code = (
        "import sys, qcow2bm.cli.dump as dump; from qcow2bm.cli import console\n"
        "def run(arguments): raise KeyboardInterrupt\n"
        "dump.run = run; sys.argv = ['qcow2bm', 'dump', 'vm.qcow2']; console.run()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=environment(),
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (-signal.SIGINT, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", ["dump vm.qcow2", "map --output=json vm.qcow2 daily"])
def test_full_output_is_a_failure(folder: Path, arguments: str) -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "qcow2bm", *arguments.split()],
            cwd=folder,
            env=environment(),
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr == b"qcow2bm: standard output: No space left on device\n"


@pytest.mark.parametrize("output", ["human", "json"])
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("missing", "No such file"),
        (".", "is a directory"),
        ("fifo", "is a FIFO"),
        ("text", "not a qcow2 image"),
        ("nothing", "the file is empty"),
        ("v4", "not supported: qcow2 version 4"),
    ],
)
def test_what_is_no_image(tmp_path: Path, name: str, said: str, output: str) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "text").write_text("hello")
    (tmp_path / "nothing").touch()
    future = images.sound()
    future.plant(4, "header", 0, "version")
    (tmp_path / "v4").write_bytes(future.data)
    result = run(["dump", f"--output={output}", name], tmp_path)
    assert result.status == 1
    assert len(result.err.splitlines()) == 1
    assert result.err.startswith(f"qcow2bm: {name}: ")
    assert said in result.err
    if output == "human":
        assert result.out == ""
    else:
        assert failure_in(result.out, result.err)["filename"] == name


def test_odd_file_names_are_escaped(tmp_path: Path) -> None:
    result = run(["dump", "a\x1b[2J\nb"], tmp_path)
    assert result.err == "qcow2bm: a\\x1b[2J\\nb: No such file or directory\n"


def test_any_failing_read_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If any read fails, a person gets one line, and a program gets that and no other document."""
    arguments = ["dump", "--output=json", "--sha256", "vm.qcow2"]
    sound = run(arguments, folder)
    failing = FailingRead(monkeypatch)
    for number in range(1, 1000):
        failing.left = number
        result = run(arguments, folder)
        if failing.left > 0:
            assert result == sound
            break
        assert result.status == 1
        assert failure_in(result.out, result.err)["filename"] == "vm.qcow2"
        assert "Input/output error" in result.err
    assert 10 < number < 999


def test_the_library_never_raises_what_the_command_line_does_not_catch() -> None:
    assert issubclass(qcow2bm.StorageError, Qcow2BmError)
    assert not issubclass(qcow2bm.StorageError, BrokenPipeError)
