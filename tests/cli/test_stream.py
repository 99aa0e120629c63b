"""The commands ``stream dump`` and ``stream write``."""

from __future__ import annotations

import json
import lzma
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from support.console import Result, environment, run, start
from support.golden_images import crashed, empty, names, sound
from support.images import Stored, build_image
from support.jsonspec import check_stream_dump, failure_in
from support.problem_images import broken

import qcow2bm
from qcow2bm.migration.stream_bitmaps import read_stream

DATA = Path(__file__).parents[1] / "data"
WRITE = ["stream", "write", "vm.qcow2", "--node-alias=disk"]
WHOLE = [*WRITE, "--machine=pc-q35-7.2"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "vm.qcow2").write_bytes(sound().data)
    (tmp_path / "stream").write_bytes(lzma.decompress((DATA / "stream.bin.xz").read_bytes()))
    return tmp_path


def dumped(folder: Path, name: str = "stream") -> tuple[int, Any]:
    """The status and the document of a dump."""
    done = run(["stream", "dump", "--output=json", name], folder)
    assert done.err == ""
    document = json.loads(done.out)
    check_stream_dump(document)
    return done.status, document


def failed(done: Result) -> bool:
    line, *more = done.err.splitlines()
    assert all(one.startswith("  ") for one in more)
    return (done.status, done.out) == (1, "") and line.startswith("qcow2bm: ")


# --- stream dump ------------------------------------------------------------------------------


def test_the_dump_of_a_sound_stream(folder: Path) -> None:
    status, document = dumped(folder)
    assert status == 0
    truth = json.loads((DATA / "stream.json").read_text("utf-8"))["bitmaps"]
    shown = document.pop("bitmaps")
    assert document == {"schema": 1, "complete": True, "problems": []}
    assert [bitmap.pop("dirty-bytes") for bitmap in shown] == [
        *(0, 4395008, 4587520, 4457472),
        *(2098688, 50688),  # of which the last granule is clipped
    ]
    assert shown == [
        {
            "node-alias": bitmap["node_alias"],
            "bitmap-alias": bitmap["bitmap_alias"],
            "granularity": bitmap["granularity"],
            "enabled": bitmap["recording"],
            "persistent": bitmap["persistent"],
            "complete": True,
            "sha256": bitmap["sha256"],
        }
        for bitmap in truth
    ]


TEXT = """\
stream:           out
bitmaps:          1
complete:         yes

bitmap 0: "größe"
  node:           "disk"
  status:         complete
  granularity:    64 KiB (65536 bytes)
  enabled:        yes
  persistent:     yes
  disk:           40 MiB (41943040 bytes)
  dirty:          40 MiB (41943040 bytes), 100.0 % of that
  sha256:         DIGEST

no problems found (memory and devices of the VM were not checked)
"""


def test_the_dump_for_people(folder: Path) -> None:
    assert run([*WHOLE, "größe", "-o", "out"], folder) == (0, "", "")
    with qcow2bm.open(folder / "vm.qcow2") as image:
        digest = image.bitmaps["größe"].sha256()
    shown = run(["stream", "dump", "out"], folder)
    assert shown == (0, TEXT.replace("DIGEST", digest), "")


@pytest.mark.spec("CLI-23")
def test_the_dump_of_a_stream_that_is_cut_off(folder: Path) -> None:
    content = (folder / "stream").read_bytes()
    (folder / "stream").write_bytes(content[: 0x1532EC + 17])  # behind one COMPLETE
    status, document = dumped(folder)
    assert (status, document["complete"]) == (2, False)
    complete = [bitmap["complete"] for bitmap in document["bitmaps"]]
    assert complete == [True, False, False, False, False, False]
    assert [bitmap["sha256"] is not None for bitmap in document["bitmaps"]] == complete
    (problem,) = document["problems"]
    assert problem == {
        "structure": "migration stream",
        "field": None,
        "offset": 0x1532EC + 17,
        "message": "migration stream at 0x1532fd is cut off",
    }
    text = run(["stream", "dump", "stream"], folder)
    assert (text.status, text.err) == (2, "")
    assert text.out.splitlines()[-3:] == [
        "1 problem:",
        "  migration stream at 0x1532fd is cut off",
        "complete: 1 of 6 bitmaps",
    ]


@pytest.mark.spec("CLI-23")
@pytest.mark.parametrize("content", [b"", b"QE", b"QFI\xfb\0\0\0\3" * 20])
def test_what_is_no_stream(folder: Path, content: bytes) -> None:
    (folder / "stream").write_bytes(content)
    done = run(["stream", "dump", "stream"], folder)
    assert failed(done)
    assert done.err.startswith("qcow2bm: stream: migration stream")
    in_json = run(["stream", "dump", "stream", "--output=json"], folder)
    assert (in_json.status, in_json.err) == (1, done.err)
    assert failure_in(in_json.out, in_json.err)["filename"] == "stream"
    assert failed(run(["stream", "dump", "missing"], folder))
    assert failed(run(["stream", "dump", "."], folder))


def test_names_from_a_stream_are_escaped(folder: Path) -> None:
    (folder / "vm.qcow2").write_bytes(names().data)
    alias = os.fsdecode(b"d\x1b\xff")
    command = ["stream", "write", "vm.qcow2", f"--node-alias={alias}", "--section-only"]
    assert run([*command, "-o", "out", "@01", "@2", "-q"], folder).status == 0
    text = run(["stream", "dump", "out"], folder).out
    for shown in (r'"a\x1b[31mred\nb"', r'"\xff\xfe"', r'"d\x1b\xff"'):
        assert shown in text
    _, document = dumped(folder, "out")
    assert [bitmap["bitmap-alias"] for bitmap in document["bitmaps"]] == [
        "a\x1b[31mred\nb",
        "\ufffd\ufffd",
    ]


def test_a_pipe_is_read_to_its_end(folder: Path) -> None:
    """The writer does not fail, although the bitmaps are complete before it has finished."""
    content = (folder / "stream").read_bytes() + bytes(1 << 20)
    done = subprocess.run(
        [sys.executable, "-m", "qcow2bm", "stream", "dump", "-", "--output=json"],
        cwd=folder,
        env=environment(),
        input=content,
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert json.loads(done.stdout) == dumped(folder)[1]


@pytest.mark.spec("CLI-23")
@pytest.mark.parametrize("content", [b"no stream", b"QEVM\0\0\0\3\2", b"QEVM\0\0\0\3\5\1x"])
def test_a_pipe_is_read_to_its_end_after_a_fault_too(folder: Path, content: bytes) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "qcow2bm", "stream", "dump", "-"],
        cwd=folder,
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        assert process.stdin
        for _ in range(8):
            process.stdin.write(content + bytes(1 << 20))
            process.stdin.flush()  # raises BrokenPipeError if the pipe is not read
        process.stdin.close()
        assert process.wait(60) in (1, 2)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_both_commands_over_a_named_pipe(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    with start([*WHOLE, "-o", "pipe"], folder) as writer:
        with start(["stream", "dump", "pipe", "--output=json"], folder) as reader:
            out, err = reader.communicate(timeout=60)
        assert (reader.returncode, err) == (0, b"")
        assert writer.communicate(timeout=60) == (b"", b"")
    assert writer.returncode == 0
    assert len(json.loads(out)["bitmaps"]) == 3


# --- stream write -----------------------------------------------------------------------------


@pytest.mark.spec("CLI-24")
def test_all_valid_bitmaps_are_written(folder: Path) -> None:
    with start(WHOLE, folder) as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, b"")
    assert out.startswith(b"QEVM\0\0\0\3\7\0\0\0\x0apc-q35-7.2\1")
    bitmaps = read_stream([out])
    assert bitmaps.is_complete
    with qcow2bm.open(folder / "vm.qcow2") as image:
        assert [
            (b.bitmap_alias, b.granularity, b.enabled, b.persistent, b.disk_size, b.sha256())
            for b in bitmaps.complete
        ] == [
            (b.name, b.granularity, b.auto, True, image.virtual_size, b.sha256())
            for b in image.bitmaps.values()
        ]


@pytest.mark.spec("CLI-24")
def test_bitmaps_that_are_not_valid_are_left_out_or_an_error(folder: Path) -> None:
    (folder / "vm.qcow2").write_bytes(crashed().data)
    done = run([*WHOLE, "-o", "out"], folder)
    assert (done.status, done.out) == (2, "")
    assert done.err == 'qcow2bm: warning: vm.qcow2: bitmap "daily" is inconsistent, and left out\n'
    assert [b["bitmap-alias"] for b in dumped(folder, "out")[1]["bitmaps"]] == ["base"]
    assert run([*WHOLE, "-o", "quiet", "-q"], folder) == (2, "", "")
    assert failed(run([*WHOLE, "-o", "other", "daily"], folder))
    assert failed(run([*WHOLE, "-o", "other", "base", "@7"], folder))
    assert failed(run([*WHOLE, "-o", "out"], folder))  # and no bitmap is said to be left out
    assert not (folder / "other").exists()
    (folder / "vm.qcow2").write_bytes(empty().data)
    assert failed(run([*WHOLE, "-o", "other"], folder))


@pytest.mark.spec("CLI-24")
def test_problems_of_the_image_are_told(folder: Path) -> None:
    (folder / "vm.qcow2").write_bytes(broken("bitmaps-extension.nb_bitmaps.less"))
    done = run([*WHOLE, "-o", "out", "daily"], folder)
    assert (done.status, done.out) == (2, "")
    assert "nb_bitmaps" in done.err
    assert dumped(folder, "out")[0] == 0


def test_names_a_stream_cannot_have(folder: Path) -> None:
    (folder / "vm.qcow2").write_bytes(build_image(Stored(b"n" * 256, [b"\x01"])).data)
    done = run([*WHOLE, "-o", "out"], folder)
    assert failed(done)
    assert "256 bytes" in done.err
    assert not (folder / "out").exists()
    twice = run([*WHOLE, "-o", "out", "@0", "@0"], folder)
    assert failed(twice)


def test_a_granularity_a_stream_cannot_have(folder: Path) -> None:
    (folder / "vm.qcow2").write_bytes(build_image(Stored(b"b", granularity_bits=8)).data)
    done = run([*WHOLE, "-o", "out"], folder)
    assert failed(done)
    assert 'bitmap "b" has a granularity of 256' in done.err


@pytest.mark.spec("CLI-25")
def test_nothing_is_overwritten(folder: Path) -> None:
    before = (folder / "vm.qcow2").read_bytes()
    (folder / "link").symlink_to("vm.qcow2")
    for name in ("vm.qcow2", "link", "stream", "."):
        done = run([*WHOLE, "-o", name], folder)
        assert failed(done)
        assert "exists already and is not overwritten" in done.err
    assert (folder / "vm.qcow2").read_bytes() == before
    assert failed(run([*WHOLE, "-o", "no/folder"], folder))


@pytest.mark.spec("CLI-25")
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_what_fails_leaves_no_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert failed(run([*WHOLE, "-o", "/dev/full"], folder))
    assert Path("/dev/full").exists()

    def fail(*_: object) -> Any:
        yield b"QEVM"
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qcow2bm.api.stream.write_stream", fail)
    done = run([*WHOLE, "-o", "new"], folder)
    assert failed(done)
    assert done.err == "qcow2bm: new: No space left on device\n"
    assert not (folder / "new").exists()


@pytest.mark.spec("CLI-25")
@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs terminals")
def test_never_to_a_terminal(folder: Path) -> None:
    terminal, other = os.openpty()
    shown = bytearray()
    reader = threading.Thread(target=lambda: shown.extend(_all_of(terminal)))
    reader.start()
    try:
        for options in ([], ["-o", os.ttyname(other)]):
            done = subprocess.run(
                [sys.executable, "-m", "qcow2bm", *WHOLE, *options],
                cwd=folder,
                env=environment(),
                stdout=other,
                stderr=subprocess.PIPE,
                check=False,
            )
            assert done.returncode == 1
            assert b"is a terminal" in done.stderr
    finally:
        os.close(other)
        reader.join()
        os.close(terminal)
    assert bytes(shown) == b""


def _all_of(descriptor: int) -> bytes:
    data = b""
    try:
        while piece := os.read(descriptor, 4096):
            data += piece
    except OSError:  # the last program on the other side is gone
        pass
    return data


@pytest.mark.parametrize(
    "arguments",
    [
        ["stream", "frobnicate"],
        ["stream", "dump"],
        ["stream", "dump", "stream", "--node-alias=x"],
        WRITE,
        [*WRITE, "--machine=pc", "--section-only"],
        ["stream", "write", "vm.qcow2", "--machine=pc"],
        ["stream", "write", "vm.qcow2", "--machine=pc", "--node-alias="],
        ["stream", "write", "vm.qcow2", "--machine=pc", f"--node-alias={'n' * 256}"],
        [*WRITE, "--machine="],
    ],
)
def test_wrong_usage(folder: Path, arguments: list[str]) -> None:
    done = run(arguments, folder)
    assert (done.status, done.out) == (64, "")
    assert len(done.err.splitlines()) == 1
    assert "; see qcow2bm stream" in done.err


def test_arguments_behind_dashes(folder: Path) -> None:
    (folder / "-x").write_bytes((folder / "stream").read_bytes())
    expected = run(["stream", "dump", "./-x"], folder).out.replace("./-x", "-x")
    assert run(["stream", "dump", "--", "-x"], folder) == (0, expected, "")
    assert run(["--", "stream", "dump", "-x"], folder) == (0, expected, "")
    command = ["stream", "write", "vm.qcow2", "--node-alias=--", "--machine=--", "-o", "out"]
    assert run([*command, "--", "daily"], folder).status == 0
    assert [b["node-alias"] for b in dumped(folder, "out")[1]["bitmaps"]] == ["--"]


def test_the_help_says_that_the_machine_boots_cold(folder: Path) -> None:
    done = run(["stream", "write", "--help"], folder)
    assert done.status == 0
    assert "boots cold" in done.out
