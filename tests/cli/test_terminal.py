"""On a terminal, lines are wrapped and some words have colors; elsewhere neither is so.

``pytest --golden-update`` writes tests/cli/golden_terminal anew; read the difference before you
keep it. There, an escape character is shown as "<ESC>".
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from support import golden_images as images
from support.console import ROOT, Result, run, run_on_terminal

from qcow2bm.cli.terminal import paint, wrap

GOLDEN = Path(__file__).parent / "golden_terminal"
COMMANDS = {
    "dump": "dump damaged.qcow2",
    "check": "check damaged.qcow2",
    "repair": "repair --dry-run damaged.qcow2",
}
WIDTHS = (60, 80, 140)
COLOR = re.compile(r"\x1b\[\d*m")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "damaged.qcow2").write_bytes(images.broken().data)
    (tmp_path / "sound.qcow2").write_bytes(images.sound().data)
    shutil.copyfile(ROOT / "tests/data/three.qcow2", tmp_path / "three.qcow2")
    return tmp_path


@pytest.mark.spec("CLI-35")
@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("command", COMMANDS)
def test_the_lines_fit_the_terminal_and_nothing_is_cut_or_added(
    command: str, columns: int, folder: Path, request: pytest.FixtureRequest
) -> None:
    shown = run_on_terminal(COMMANDS[command].split(), folder, columns)
    path = GOLDEN / f"{command}-{columns}.txt"
    if request.config.getoption("--golden-update"):
        path.write_text(shown.replace("\x1b", "<ESC>"), "utf-8")
    assert shown.replace("\x1b", "<ESC>") == path.read_text("utf-8")
    plain = COLOR.sub("", shown)
    # A command is never wrapped: the terminal would give it to a shell in pieces.
    lines = [line for line in plain.splitlines() if not line.startswith("  next: ")]
    assert all(len(line) <= columns for line in lines)
    assert plain.split() == run(COMMANDS[command].split(), folder).out.split()


def test_every_golden_file_has_its_case() -> None:
    names = {f"{command}-{columns}.txt" for command in COMMANDS for columns in WIDTHS}
    assert {path.name for path in GOLDEN.iterdir()} == names


@pytest.mark.spec("CLI-35")
def test_a_word_longer_than_a_line_stays_whole(folder: Path) -> None:
    shown = run_on_terminal(["dump", "--sha256", "sound.qcow2"], folder, 60)
    digests = re.findall(r"sha256: +([0-9a-f]+)$", shown, re.MULTILINE)
    assert [len(digest) for digest in digests] == [64, 64, 64]


def test_lines_are_wrapped_between_words_and_colors_take_no_room() -> None:
    assert list(wrap("one two  three", 8, 2)) == ["one two", "  three"]
    assert list(wrap("\x1b[31mone\x1b[0m two three", 8, 0)) == ["\x1b[31mone\x1b[0m two", "three"]
    assert list(wrap("    indented text", 10, 6)) == ["    indented", "      text"]
    assert list(wrap("", 10)) == [""]


@pytest.mark.spec("CLI-35")
def test_the_help_is_as_wide_as_the_terminal(folder: Path) -> None:
    for columns in WIDTHS:
        shown = run_on_terminal(["check", "--help"], folder, columns)
        longest = max(map(len, shown.splitlines()))
        assert columns - 22 < longest < columns


COLORED = ["dump", "damaged.qcow2"]


@pytest.mark.spec("CLI-34")
@pytest.mark.parametrize(
    ("option", "variables", "is_colored"),
    [
        ("", {}, True),
        ("--color=auto", {}, True),
        ("--color=never", {}, False),
        ("--color=never", {"FORCE_COLOR": "1"}, False),
        ("", {"NO_COLOR": "1"}, False),
        ("", {"NO_COLOR": ""}, True),
        ("", {"TERM": "dumb"}, False),
        ("--color=always", {"NO_COLOR": "1"}, True),
    ],
)
def test_colors_on_a_terminal(
    option: str, variables: dict[str, str], is_colored: bool, folder: Path
) -> None:
    shown = run_on_terminal([*COLORED, *filter(None, [option])], folder, 80, variables)
    assert bool(COLOR.search(shown)) == is_colored


@pytest.mark.spec("CLI-34")
@pytest.mark.parametrize(
    ("option", "variables", "is_colored"),
    [
        ("", {}, False),
        ("--color=auto", {}, False),
        ("--color=always", {}, True),
        ("", {"FORCE_COLOR": "1"}, True),
        ("", {"FORCE_COLOR": ""}, False),
        ("", {"FORCE_COLOR": "1", "NO_COLOR": "1"}, False),
        ("--color=always", {"NO_COLOR": "1"}, True),
        ("--color=never", {"FORCE_COLOR": "1"}, False),
    ],
)
def test_colors_in_a_pipe(
    option: str,
    variables: dict[str, str],
    is_colored: bool,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    done = run([*COLORED, *filter(None, [option])], folder)
    plain = run([*COLORED, "--color=never"], folder)
    assert bool(COLOR.search(done.out)) == is_colored
    assert COLOR.sub("", done.out) == plain.out


@pytest.mark.spec("CLI-34")
@pytest.mark.parametrize("command", [*COMMANDS.values(), "map sound.qcow2 daily"])
def test_json_has_no_colors_and_is_not_wrapped(command: str, folder: Path) -> None:
    arguments = [*command.split(), "--output=json"]
    plain = run(arguments, folder)
    assert run([*arguments, "--color=always"], folder) == plain
    shown = run_on_terminal([*arguments, "--color=always"], folder, 60)
    assert shown == plain.out
    json.loads(shown)


@pytest.mark.spec("CLI-34")
def test_each_status_and_severity_has_its_color(folder: Path) -> None:
    red, green, yellow, bold = "\x1b[31m", "\x1b[32m", "\x1b[33m", "\x1b[1m"
    shown = run(["dump", "--color=always", "three.qcow2"], folder).out
    assert f"{green}valid\x1b[0m" in shown
    assert f"{yellow}inconsistent\x1b[0m" in shown
    assert f"{bold}qcow2bm salvage three.qcow2 --all --all-dirty\x1b[0m" in shown
    shown = run(["dump", "--color=always", "damaged.qcow2"], folder).out
    assert f"{red}broken\x1b[0m" in shown
    assert f"{red}refused\x1b[0m:" in shown


def test_colors_end_with_the_command(folder: Path) -> None:
    assert COLOR.search(run([*COLORED, "--color=always"], folder).out)
    assert paint("valid", "valid") == "valid"


@pytest.mark.spec("CLI-1")
@pytest.mark.parametrize("command", [*COMMANDS.values(), "map sound.qcow2 daily"])
def test_json_is_short_for_output_json(command: str, folder: Path) -> None:
    done: Result = run([*command.split(), "--json"], folder)
    assert done == run([*command.split(), "--output=json"], folder)
    json.loads(done.out)
