"""With JSON, a command that fails prints one document, which says what standard error says."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import golden_images as images
from support.console import Result, environment, run
from support.faulty_storage import FailingRead
from support.images import Stored, build_image
from support.jsonspec import check_failure, failure_in

import qcow2bm
from qcow2bm import Qcow2BmError
from qcow2bm.cli.commands import parsers
from qcow2bm.cli.failure import ERRORS, Failure, document
from qcow2bm.storage.file import FileStorage
from qcow2bm.storage.locks import WRITER, held_locks


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "vm.qcow2").write_bytes(images.sound().data)
    (tmp_path / "crashed.qcow2").write_bytes(images.crashed().data)
    (tmp_path / "stale.qcow2").write_bytes(images.stale().data)
    (tmp_path / "text").write_text("hello" * 200)
    return tmp_path


def failed(result: Result) -> dict[str, Any]:
    """The error of a document that must be the only one, and the file that it is about."""
    assert result.status == 1
    found = failure_in(result.out, result.err)
    return {"filename": found["filename"], **found["error"]}


# --- every command ------------------------------------------------------------------------------

FAILURES = {
    "dump missing": ("storage", "missing"),
    "dump vm.qcow2 --bitmap nope": ("bitmap-not-found", "vm.qcow2"),
    "map crashed.qcow2 daily": ("bitmap-inconsistent", "crashed.qcow2"),
    "check text": ("format", "text"),
    "verdict missing daily": ("storage", "missing"),
    "verify vm.qcow2 daily missing": ("storage", "missing"),
    "verify vm.qcow2 nope missing": ("bitmap-not-found", "vm.qcow2"),
    "add vm.qcow2 daily": ("bitmap-exists", "vm.qcow2"),
    "add vm.qcow2 new -g 1000": ("wrong-value", "vm.qcow2"),
    "add stale.qcow2 new": ("bitmap-stale", "stale.qcow2"),
    "remove vm.qcow2 nope": ("bitmap-not-found", "vm.qcow2"),
    "clear crashed.qcow2 daily": ("bitmap-inconsistent", "crashed.qcow2"),
    "enable missing daily": ("storage", "missing"),
    "disable vm.qcow2 nope": ("bitmap-not-found", "vm.qcow2"),
    "invalidate vm.qcow2 nope": ("bitmap-not-found", "vm.qcow2"),
    "rename vm.qcow2 daily weekly": ("bitmap-exists", "vm.qcow2"),
    "rename vm.qcow2 daily @1": ("wrong-value", "vm.qcow2"),
    "copy vm.qcow2 daily weekly": ("bitmap-exists", "vm.qcow2"),
    "set vm.qcow2 daily 1E:1": ("wrong-value", "vm.qcow2"),
    "reset vm.qcow2 daily 1E:1 --dry-run": ("wrong-value", "vm.qcow2"),
    "invert vm.qcow2 nope": ("bitmap-not-found", "vm.qcow2"),
    "fit vm.qcow2 nope": ("bitmap-not-found", "vm.qcow2"),
    "merge vm.qcow2 daily base --from missing": ("storage", "missing"),
    "merge vm.qcow2 daily nope --from crashed.qcow2": ("bitmap-not-found", "crashed.qcow2"),
    "backup vm.qcow2 nope new --base vm.qcow2": ("storage", "vm.qcow2"),
    "backup crashed.qcow2 daily new --base vm.qcow2": ("bitmap-inconsistent", "crashed.qcow2"),
    "backup vm.qcow2 daily new --base text": ("format", "text"),
    "backup vm.qcow2 daily text --full": ("storage", "text"),
    "repair text --no-undo": ("format", "text"),
    "undo vm.qcow2 missing": ("storage", "missing"),
    "undo vm.qcow2 text": ("format", "text"),
    "measure vm.qcow2 nope": ("bitmap-not-found", "vm.qcow2"),
    "prune vm.qcow2 --keep nope": ("bitmap-not-found", "vm.qcow2"),
    "recover crashed.qcow2": ("intent", "crashed.qcow2"),
    "salvage vm.qcow2 daily --all-dirty": ("bitmap", "vm.qcow2"),
    "stream dump text": ("format", "text"),
    "stream restore missing vm.qcow2": ("storage", "missing"),
    "sidecar dump text": ("format", "text"),
    "sidecar load text vm.qcow2": ("format", "text"),
    "live offload --qmp missing.sock new": ("qmp", "missing.sock"),
    "live restore missing vm.qcow2": ("storage", "missing"),
    "live restore text vm.qcow2": ("format", "vm.qcow2"),
    "live restore --qmp missing.sock text": ("qmp", "missing.sock"),
    "live record --qmp x --source missing.sock text": ("qmp", "missing.sock"),
    "live collect --qmp missing.sock text": ("qmp", "missing.sock"),
    "live status --qmp missing.sock": ("qmp", "missing.sock"),
    "live remove --qmp missing.sock daily": ("qmp", "missing.sock"),
    "rescue finish missing": ("storage", "missing"),
    "rescue start --qmp missing.sock": ("qmp", "missing.sock"),
    "rescue arm --qmp missing.sock": ("qmp", "missing.sock"),
    "rescue verdict --qmp missing.sock": ("qmp", "missing.sock"),
}


@pytest.mark.spec("JSON-5")
@pytest.mark.parametrize("command", FAILURES)
def test_a_failure_is_a_document_with_an_id(folder: Path, command: str) -> None:
    plain = run(command.split(), folder)
    result = run([*command.split(), "--json"], folder)
    error = failed(result)
    assert (error["id"], error["filename"]) == FAILURES[command]
    assert (plain.status, plain.out, plain.err) == (1, "", result.err)


@pytest.mark.spec("CLI-47")
@pytest.mark.parametrize(
    ("command", "following"),
    [
        ("map crashed.qcow2 daily", "salvage crashed.qcow2 daily --all-dirty"),
        ("clear crashed.qcow2 daily", "salvage crashed.qcow2 daily --all-dirty"),
        ("add stale.qcow2 new", "salvage stale.qcow2 --all --all-dirty"),
        ("remove vm.qcow2 nope", ""),
        ("map vm.qcow2 nope", ""),
    ],
)
def test_the_command_that_helps_follows_and_works(
    command: str, following: str, tmp_path: Path, folder: Path
) -> None:
    name = command.split()[1]
    (tmp_path / name).write_bytes((folder / name).read_bytes())
    done = run(command.split(), tmp_path)
    _, *more = done.err.splitlines()
    assert done.status == 1
    assert [line for line in more if "next:" in line] == (
        [f"  next: qcow2bm {following}"] if following else []
    )
    if following:
        assert run(following.split(), tmp_path).status == 0
        assert run(command.split(), tmp_path).status == 0


def test_every_command_that_has_json_is_tried() -> None:
    have = {parser.path for parser in parsers() if parser.has_option("--output")}
    tried = {tuple(command.split()) for command in FAILURES}
    assert [path for path in have if not any(t[: len(path)] == path for t in tried)] == []


@pytest.mark.spec("JSON-5")
@pytest.mark.parametrize("command", ["dump --json", "map --json vm.qcow2", "salvage --json a b",
                                     "remove vm.qcow2 --json", "nonsense --json"])  # fmt: skip
def test_wrong_usage_prints_no_document(folder: Path, command: str) -> None:
    result = run(command.split(), folder)
    assert (result.status, result.out) == (64, "")
    assert len(result.err.splitlines()) == 1


# --- facts ----------------------------------------------------------------------------------------


def test_facts_of_what_is_wrong_in_a_file(folder: Path) -> None:
    image = images.sound()
    (folder / "vm.qcow2").write_bytes(image.data[:4])
    assert failed(run(["dump", "--json", "vm.qcow2"], folder)) == {
        "filename": "vm.qcow2",
        "id": "format",
        "message": "vm.qcow2: header: version at 0x4 is cut off",
        "hint": None,
        "structure": "header",
        "field": "version",
        "offset": 4,
    }


def test_facts_of_a_lock(folder: Path) -> None:
    with (
        (folder / "vm.qcow2").open("rb", buffering=0) as file,
        held_locks(file, "vm.qcow2", WRITER),
    ):
        error = failed(run(["dump", "--json", "vm.qcow2"], folder))
    del error["message"]
    assert error == {
        "filename": "vm.qcow2",
        "id": "image-locked",
        "hint": "force-share",
        "action": "reading",
        "held": "is writing to it (lock byte 101)",
        "lock-byte": 101,
    }


def test_facts_of_an_error_of_the_system(folder: Path) -> None:
    error = failed(run(["dump", "--json", "missing"], folder))
    assert error["errno"] == "ENOENT"
    assert (error["action"], error["offset"], error["length"]) == ("reading", 0, 0)


def test_facts_of_a_disk_that_is_not_the_one_to_be_compared(folder: Path) -> None:
    arguments = "salvage crashed.qcow2 daily --compare text text --json"
    result = run(arguments.split(), folder)
    note, line = result.err.splitlines(keepends=True)
    assert note.startswith("qcow2bm: note: ")
    error = failed(result._replace(err=line))
    assert (error["id"], error["filename"]) == ("comparison", "text")
    assert (error["fault"], error["container"]) == ("not-current", None)


def test_a_name_that_is_no_text_is_shown_all_the_same(folder: Path) -> None:
    error = failed(run(["map", "--json", "vm.qcow2", "d\udcff\n"], folder))
    assert error["name"] == "d\ufffd\n"
    assert r'bitmap "d\xff\n" not found' in error["message"]


@pytest.mark.spec("EDIT-22")
def test_facts_of_an_edit_without_room(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "vm.qcow2"
    with path.open("ab") as file:
        file.write(bytes(512))
    monkeypatch.setattr(FileStorage, "capacity", lambda self: path.stat().st_size)
    result = run(["add", "--json", "vm.qcow2", "new"], folder)
    error = failed(result)
    assert (error["id"], error["hint"]) == ("no-room", "remove-bitmap")
    assert (error["needed"], error["missing"], error["limit"]) == (1024, 512, path.stat().st_size)
    assert error["bitmaps"] == [
        {"name": "daily", "bytes": 1024},
        {"name": "größe", "bytes": 1024},
        {"name": "weekly", "bytes": 512},
    ]
    assert result.err.endswith(
        "; what removing a bitmap would free: "
        '"daily" 1 KiB, "größe" 1 KiB, "weekly" 512 bytes; make room: qcow2bm remove IMAGE NAME\n'
    )
    assert run(["remove", "vm.qcow2", "daily"], folder).status == 0
    assert run(["add", "vm.qcow2", "new"], folder).status == 0


@pytest.mark.spec("EDIT-23")
def test_facts_of_an_edit_on_a_full_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwritev", fail)
    error = failed(run(["add", "--json", "vm.qcow2", "new"], folder))
    assert (error["id"], error["outcome"], error["growth"]) == ("commit", "old", 1024)
    assert (error["hint"], error["bitmaps"]) == ("remove-all", [])


def test_an_error_without_memory_has_an_id(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise MemoryError

    monkeypatch.setattr("qcow2bm.cli.dump.open", fail)
    assert failed(run(["dump", "--json", "vm.qcow2"], folder))["id"] == "no-memory"


# --- the table ------------------------------------------------------------------------------------


def public_errors() -> list[type[Qcow2BmError]]:
    values = (getattr(qcow2bm, name) for name in qcow2bm.__all__)
    return [v for v in values if isinstance(v, type) and issubclass(v, Qcow2BmError)]


def test_every_public_error_has_an_id_of_its_own() -> None:
    assert set(public_errors()) <= set(ERRORS)
    ids = [row.id for row in ERRORS.values()]
    assert len(set(ids)) == len(ids)


def test_an_error_without_a_row_has_that_of_its_base() -> None:
    class Special(qcow2bm.BitmapStaleError, LookupError):
        pass

    found = document(Failure(None, "it failed", Special("daily")))
    check_failure(found)
    assert found["filename"] is None
    assert (found["error"]["id"], found["error"]["name"]) == ("bitmap-stale", "daily")
    assert document(Failure("a", "it failed", OSError()))["error"]["id"] == "failed"


# --- output that has begun, or is not taken -------------------------------------------------------


@pytest.mark.spec("JSON-5")
@pytest.mark.parametrize(
    "arguments",
    ["dump --json --extents vm.qcow2", "dump --json --entries vm.qcow2", "map --json vm.qcow2 b"],
)
def test_no_document_follows_a_part_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str
) -> None:
    """If any read fails, there is the failure, or the beginning of the document, and never both."""
    bits = [b"\x55" * 4096, *[b"\x01"] * 299]  # more than is read at once
    image = build_image(Stored(b"b", bits), Stored(b"c", bits), cluster_bits=12,
                        size=300 * 8 * 4096 << 16)  # fmt: skip
    (tmp_path / "vm.qcow2").write_bytes(image.data)
    whole = run(arguments.split(), tmp_path)
    failing = FailingRead(monkeypatch)
    parts = 0
    for number in range(1, 1000):
        failing.left = number
        result = run(arguments.split(), tmp_path)
        if failing.left > 0:
            assert result == whole
            break
        assert result.status == 1
        assert len(result.err.splitlines()) == 1
        if whole.out.startswith(result.out):
            parts += 1
            assert result.out
            assert len(result.out) < len(whole.out)
        else:
            failed(result)
    assert 0 < parts < number - 1


def started(
    arguments: list[str], folder: Path, stdout: int
) -> tuple[int, bytes]:  # status and standard error
    done = subprocess.run(
        [sys.executable, "-m", "qcow2bm", *arguments],
        cwd=folder,
        env=environment(),
        stdout=stdout,
        stderr=subprocess.PIPE,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stderr


@pytest.mark.spec("CLI-9")
def test_if_the_reader_of_a_failure_has_gone_away_the_program_ends_by_sigpipe(folder: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        assert started(["dump", "--json", "missing"], folder, writing) == (
            -signal.SIGPIPE,
            b"qcow2bm: missing: No such file or directory\n",
        )
    finally:
        os.close(writing)


@pytest.mark.spec("CLI-7")
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_failure_that_standard_output_does_not_take_is_one_line_all_the_same(
    folder: Path,
) -> None:
    with open("/dev/full", "wb") as full:
        status, said = started(["dump", "--json", "missing"], folder, full.fileno())
    assert (status, said) == (1, b"qcow2bm: missing: No such file or directory\n")


@pytest.mark.spec("CLI-11")
def test_if_standard_output_is_closed_the_line_says_so(folder: Path) -> None:
    done = subprocess.run(
        ["sh", "-c", '"$0" -m qcow2bm dump --json missing >&-', sys.executable],
        cwd=folder,
        env=environment(),
        stderr=subprocess.PIPE,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == b"qcow2bm: standard output: Bad file descriptor\n"
