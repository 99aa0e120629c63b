"""The command ``verdict``: each exit status, its JSON, and that each command it names helps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support import golden_images
from support.console import Result, environment, run
from support.faulty_storage import FailingRead
from support.images import Built, Stored, build_image
from support.jsonspec import check_verdict, failure_in
from support.kinds import READ_KINDS
from support.problem_images import IDS, broken
from support.verdict_images import BITS, CRASHED, DISABLED, ENABLED, SIZE, image_of

import qcow2bm
from qcow2bm.cli.verdict import STATUSES
from qcow2bm.format.directory import FLAG_IN_USE

CRASHED_DISABLED = Stored(b"off", [BITS], flags=FLAG_IN_USE)


def of_unknown_type() -> Built:
    image = image_of(ENABLED)
    image.plant(9, "directory-entry", 0, "type")
    return image


def too_long() -> Built:
    """The table has an entry more than the disk needs."""
    image = image_of(ENABLED)
    image.plant(2, "directory-entry", 0, "bitmap_table_size")
    return image


def without_bitmaps_of_an_old_version() -> Built:
    return build_image(size=SIZE, version=2)


CASES: list[tuple[str, Callable[[], Built], str, list[str]]] = [
    ("usable", lambda: image_of(ENABLED), "enabled", []),
    ("disabled", lambda: image_of(ENABLED, DISABLED), "disabled", ["set", "enable"]),
    ("inconsistent", lambda: image_of(ENABLED, CRASHED), "crashed", ["salvage"]),
    ("inconsistent", lambda: image_of(CRASHED_DISABLED), "off", ["salvage"]),
    ("stale", lambda: image_of(ENABLED, autoclear=False), "enabled", ["salvage"]),
    ("stale", lambda: image_of(DISABLED, ENABLED, autoclear=False), "disabled", ["salvage"]),
    ("broken", of_unknown_type, "enabled", ["check", "repair"]),
    ("broken", too_long, "enabled", ["check", "fit"]),
    ("broken", lambda: image_of(ENABLED, ENABLED), "enabled", ["check", "repair"]),
    ("missing", lambda: image_of(), "enabled", ["add", "set"]),
    ("missing", lambda: image_of(ENABLED), "never there", ["add", "set"]),
    ("missing", lambda: image_of(DISABLED, CRASHED), "@@2", ["add", "set"]),
    ("missing", lambda: image_of(ENABLED), "@1", []),
    ("missing", without_bitmaps_of_an_old_version, "enabled", []),
    ("missing", lambda: image_of(ENABLED, autoclear=False), "never there", []),
]
each_case = pytest.mark.parametrize(
    ("reason", "make", "name", "commands"), CASES, ids=[f"{c[0]} {c[2]} {len(c[3])}" for c in CASES]
)


def ask(folder: Path, name: str, image: str = "vm.qcow2") -> tuple[Result, dict[str, object]]:
    done = run(["verdict", "--output=json", "--", image, name], folder)
    document = json.loads(done.out)
    check_verdict(document)
    assert done.err == ""
    assert (document["filename"], document["bitmap"]) == (image, name)
    assert done.status == STATUSES[document["reason"]]
    assert document["usable"] == (done.status == 0)
    return done, document


def run_next(folder: Path, document: dict[str, object]) -> list[int]:
    """Runs the commands of a verdict up to one of QEMU's; returns their exit statuses."""
    commands = document["next"]
    assert isinstance(commands, list)
    statuses: list[int] = []
    for argv in commands:
        if argv[0] == "qemu-img":
            return statuses
        assert argv[0] == "qcow2bm"
        done = run(argv[1:], folder)
        assert done.status == 0 or (argv[1] == "check" and done.status in (2, 3)), (argv, done)
        statuses.append(done.status)
    return statuses


def ask_until_yes(folder: Path, name: str) -> int:
    """Asks, and runs the commands of the answer, until the answer is yes; returns how often."""
    for number in range(5):
        _, document = ask(folder, name)
        if document["usable"]:
            return number
        assert run_next(folder, document), document
    raise AssertionError("the answer is never yes")


@pytest.mark.spec("CLI-39", "JSON-2")
@each_case
def test_each_answer(
    tmp_path: Path, reason: str, make: Callable[[], Built], name: str, commands: list[str]
) -> None:
    (tmp_path / "vm.qcow2").write_bytes(make().data)
    before = (tmp_path / "vm.qcow2").read_bytes()
    _, document = ask(tmp_path, name)
    assert document["reason"] == reason
    assert (document["dirty-bytes"] is None) == (reason not in ("usable", "disabled"))
    assert [argv[1] for argv in document["next"]] == commands  # type: ignore[attr-defined]
    text = run(["verdict", "vm.qcow2", name], tmp_path)
    assert (text.status, text.err) == (STATUSES[reason], "")  # type: ignore[index]
    (line,) = text.out.splitlines()
    assert line.startswith(f"vm.qcow2: {'yes' if reason == 'usable' else 'no'}: bitmap ")
    assert str(document["message"]) in line
    assert ("; next: qcow2bm " in line) == bool(commands)
    assert (tmp_path / "vm.qcow2").read_bytes() == before


@pytest.mark.spec("CLI-39")
@each_case
def test_the_commands_of_an_answer_lead_to_yes(
    tmp_path: Path, reason: str, make: Callable[[], Built], name: str, commands: list[str]
) -> None:
    """The new bits have everything that was written: only what is known to be clean is clean."""
    (tmp_path / "vm.qcow2").write_bytes(make().data)
    if not commands and reason != "usable":
        return
    if "repair" in commands:  # which drops the bitmap, or renames it
        _, document = ask(tmp_path, name)
        assert run_next(tmp_path, document) == [2, 0]
        _, document = ask(tmp_path, name)
        assert document["reason"] == "missing"
    ask_until_yes(tmp_path, name)
    with qcow2bm.open(tmp_path / "vm.qcow2") as image:
        (bitmap,) = (b for b in image.bitmaps.values() if b.name == name.removeprefix("@"))
        is_kept = reason == "usable" or "fit" in commands
        assert bitmap.count() == (2 << 16 if is_kept else image.virtual_size)


@pytest.mark.spec("CLI-39")
@pytest.mark.parametrize("id", IDS)
def test_the_commands_for_a_broken_image_succeed(id: str, tmp_path: Path) -> None:
    """Every command that a verdict names must succeed, whatever problem the image has."""
    for name in ("daily", "weekly", "crashed", "never there"):
        (tmp_path / "vm.qcow2").write_bytes(broken(id))
        (tmp_path / "vm.qcow2.undo").unlink(missing_ok=True)
        done = run(["verdict", "--output=json", "vm.qcow2", name], tmp_path)
        assert done.status in STATUSES.values(), done
        document = json.loads(done.out)
        check_verdict(document)
        run_next(tmp_path, document)
    assert id in READ_KINDS


@pytest.mark.spec("CLI-39")
def test_a_fault_that_forbids_the_salvage_is_repaired_first(tmp_path: Path) -> None:
    """A refcount is wrong, which only an edit notices: its dry run fails."""
    image = image_of(CRASHED, ENABLED)
    place = image.offset("bitmap-table", 0) // 512
    image.data[image.offset("refcount-block") + 2 * place + 1] = 0
    (tmp_path / "vm.qcow2").write_bytes(image.data)
    assert run(["salvage", "vm.qcow2", "crashed", "--all-dirty"], tmp_path).status == 1
    done, document = ask(tmp_path, "crashed")
    assert done.status == 4
    assert document["next"] == [["qcow2bm", "repair", "vm.qcow2", "--undo", "vm.qcow2.undo"]]
    assert ask_until_yes(tmp_path, "crashed") == 2


@pytest.mark.spec("CLI-39")
def test_an_undo_file_that_exists_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "vm.qcow2").write_bytes(of_unknown_type().data)
    (tmp_path / "vm.qcow2.undo").symlink_to("nowhere")
    _, document = ask(tmp_path, "enabled")
    assert document["next"] == [
        ["qcow2bm", "check", "vm.qcow2"],
        ["qcow2bm", "repair", "vm.qcow2", "--undo", "vm.qcow2.undo2"],
    ]
    run_next(tmp_path, document)
    assert not os.path.exists(tmp_path / "nowhere")


@pytest.mark.spec("CLI-38")
def test_problems_of_other_bitmaps_do_not_count(tmp_path: Path) -> None:
    (tmp_path / "vm.qcow2").write_bytes(golden_images.broken().data)
    assert run(["dump", "vm.qcow2"], tmp_path).status == 2
    done = run(["verdict", "vm.qcow2", "sound"], tmp_path)
    assert (done.status, done.err) == (0, "")


@pytest.mark.spec("CLI-38")
@pytest.mark.parametrize("options", [[], ["--output=json"]])
@pytest.mark.parametrize("name", ["missing", ".", "text", "nothing"])
def test_what_cannot_be_found_out_is_1(tmp_path: Path, name: str, options: list[str]) -> None:
    (tmp_path / "text").write_text("hello")
    (tmp_path / "nothing").touch()
    done = run(["verdict", name, "daily", *options], tmp_path)
    assert done.status == 1
    if options:
        assert failure_in(done.out, done.err)["filename"] == name
    else:
        assert done.out == ""
    (line,) = done.err.splitlines()
    assert line.startswith(f"qcow2bm: {name}: ")


@pytest.mark.spec("CLI-38")
def test_a_read_that_fails_is_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If any read fails, the answer must be neither yes nor one of the answers no."""
    (tmp_path / "vm.qcow2").write_bytes(image_of(ENABLED).data)
    failing = FailingRead(monkeypatch)
    for number in range(1, 1000):
        failing.left = number
        done = run(["verdict", "vm.qcow2", "enabled"], tmp_path)
        if failing.left > 0:
            break
        assert (done.status, done.out) == (1, "")
        assert "Input/output error" in done.err
    assert done.status == 0
    assert 5 < number < 999


@pytest.mark.parametrize("arguments", [[], ["vm.qcow2"], ["vm.qcow2", "a", "b"], ["-U", "a", "b"]])
def test_wrong_usage(tmp_path: Path, arguments: list[str]) -> None:
    done = run(["verdict", *arguments], tmp_path)
    assert (done.status, done.out) == (64, "")


def test_another_process_that_writes_is_8(tmp_path: Path) -> None:
    """A writer of this library holds QEMU's locks; tests/oracle does the same with QEMU."""
    (tmp_path / "vm.qcow2").write_bytes(image_of(ENABLED).data)
    with qcow2bm.open(tmp_path / "vm.qcow2", "r+"):
        done, document = ask(tmp_path, "enabled")
        assert (done.status, document["reason"], document["next"]) == (8, "running", [])
        assert document["dirty-bytes"] is None
        text = run(["verdict", "vm.qcow2", "enabled"], tmp_path)
        assert (text.status, text.err) == (8, "")
        assert "lock byte 10" in text.out
        assert '"enabled"' in text.out
        assert "query-block" in text.out
    assert ask(tmp_path, "enabled")[0].status == 0


@pytest.mark.parametrize(
    "name", [b"-rf", b"@1", b"@@", b"a b'c\"$(d)", "größe".encode(), b"\xff\xfe", b"a\x1b\nb", b""]
)
def test_commands_with_odd_names_can_be_run(tmp_path: Path, name: bytes) -> None:
    """A name that JSON or a terminal cannot have is given by its number."""
    stored = [DISABLED, CRASHED._replace(name=name), ENABLED]
    (tmp_path / "-x.qcow2").write_bytes(image_of(*stored).data)
    argument = os.fsdecode(name)
    done = run(["verdict", "--output=json", "--", "-x.qcow2", "@1"], tmp_path)
    assert done.status == 4
    run_next(tmp_path, json.loads(done.out))
    assert run(["verdict", "--", "-x.qcow2", "@1"], tmp_path).status == 0

    (tmp_path / "-x.qcow2").write_bytes(image_of(*stored).data)
    word = f"@{argument}" if argument.startswith("@") else argument
    done = run(["verdict", "--output=json", "--", "-x.qcow2", word], tmp_path)
    assert done.status == 4
    (argv,) = json.loads(done.out)["next"]
    assert all(text.isprintable() for text in argv)
    assert run(argv[1:], tmp_path).status == 0
    assert run(["verdict", "--", "-x.qcow2", word], tmp_path).status == 0


def test_the_line_can_be_given_to_a_shell(tmp_path: Path) -> None:
    odd = "a b'c$(touch made)"
    (tmp_path / "vm.qcow2").write_bytes(image_of(DISABLED._replace(name=odd.encode())).data)
    line = run(["verdict", "vm.qcow2", odd], tmp_path).out
    script = f'qcow2bm() {{ {sys.executable} -m qcow2bm "$@"; }}\n{line.partition("next: ")[2]}'
    subprocess.run(["sh", "-ec", script], cwd=tmp_path, env=environment(), check=True)
    assert not (tmp_path / "made").exists()
    assert run(["verdict", "vm.qcow2", odd], tmp_path).status == 0


def test_a_path_that_json_cannot_have_gets_no_commands(tmp_path: Path) -> None:
    (tmp_path / "vm\n.qcow2").write_bytes(image_of(CRASHED).data)
    done = run(["verdict", "vm\n.qcow2", "crashed"], tmp_path)
    assert done.status == 4
    assert len(done.out.splitlines()) == 1
    assert "next:" not in done.out
