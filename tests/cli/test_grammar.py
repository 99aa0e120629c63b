"""The meaning of arguments that look like something else."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.console import run
from support.images import Stored, build_image

NAMES = ("--", "-x", "--output=json", "-", "--help", "daily", "map", "\\0")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    stored = [Stored(name.encode(), (bytes([1 << n]),)) for n, name in enumerate(NAMES)]
    data = build_image(*stored, cluster_bits=12).data
    for name in ("vm.qcow2", "-vm.qcow2", "--", "b"):
        (tmp_path / name).write_bytes(data)
    return tmp_path


@pytest.mark.spec("CLI-13")
@pytest.mark.parametrize("name", NAMES)
def test_a_name_may_look_like_anything_behind_the_dashes(folder: Path, name: str) -> None:
    expected = run(["map", "vm.qcow2", f"@{NAMES.index(name)}"], folder)
    assert (expected.status, expected.err) == (0, "")
    for arguments in (
        ["map", "vm.qcow2", "--", name],
        ["map", "--", "vm.qcow2", name],
        ["map", "--", "--", name],
        ["map", "--", "-vm.qcow2", name],
        ["--", "map", "vm.qcow2", name],
    ):
        assert run(arguments, folder) == expected, arguments


@pytest.mark.spec("CLI-13")
@pytest.mark.parametrize("name", NAMES)
def test_an_option_takes_any_name_behind_its_equals_sign(folder: Path, name: str) -> None:
    by_name = run(["dump", "vm.qcow2", f"--bitmap={name}"], folder)
    assert by_name == run(["dump", "vm.qcow2", f"--bitmap=@{NAMES.index(name)}"], folder)
    assert by_name.status == 0


@pytest.mark.spec("CLI-13")
def test_options_behind_the_dashes_are_names(folder: Path) -> None:
    named = run(["map", "vm.qcow2", "--", "daily", "--totals"], folder)
    assert named.status == 1
    assert 'bitmap "--totals" not found' in named.err
    assert run(["verdict", "vm.qcow2", "--", "daily", "--json"], folder).status == 64
    assert run(["dump", "--", "vm.qcow2", "-q"], folder).status == 64


@pytest.mark.spec("CLI-2")
def test_options_may_stand_among_names(folder: Path) -> None:
    expected = run(["clear", "--dry-run", "vm.qcow2", "--", "daily", "map", "-x"], folder)
    assert expected.status == 0
    for arguments in (
        ["clear", "vm.qcow2", "--dry-run", "--", "daily", "map", "-x"],
        ["clear", "vm.qcow2", "daily", "--dry-run", "map", "--", "-x"],
    ):
        assert run(arguments, folder) == expected
    assert run(["clear", "vm.qcow2", "--dry-run", "daily", "-x"], folder).status == 64


@pytest.mark.parametrize(
    ("arguments", "prog"),
    [
        (["--frobnicate"], "qcow2bm"),
        (["frobnicate"], "qcow2bm"),
        (["dump", "--frobnicate", "vm.qcow2"], "qcow2bm dump"),
        (["dump", "vm.qcow2", "--totals"], "qcow2bm dump"),
        (["map", "vm.qcow2", "daily", "-rf"], "qcow2bm map"),
        (["map", "vm.qcow2", "daily", "--sha256"], "qcow2bm map"),
        (["verdict", "vm.qcow2", "--", "daily", "-x"], "qcow2bm verdict"),
    ],
)
def test_wrong_usage_names_the_help_that_helps(
    folder: Path, arguments: list[str], prog: str
) -> None:
    result = run(arguments, folder)
    assert (result.status, result.out) == (64, "")
    assert result.err.startswith("qcow2bm: ")
    assert result.err.endswith(f"; see {prog} --help\n")
    assert "\0" not in result.err
    assert len(result.err.splitlines()) == 1


@pytest.mark.parametrize("digits", ["8", "00000000", "9" * 19, "9" * 5000, "\u0661"])
def test_a_number_of_no_entry_is_an_error_however_long(folder: Path, digits: str) -> None:
    """Python refuses to make an int of more than 4300 digits."""
    result = run(["map", "vm.qcow2", "@" + digits], folder)
    assert (result.status, result.out) == (1, "")
    assert "not found; directory entries: @0 to @7" in result.err
    assert len(result.err.splitlines()) == 1


def test_an_error_names_the_file_once(folder: Path) -> None:
    (folder / "vm.qcow2: x").mkdir()
    (folder / "bad").write_bytes(b"bad")
    assert run(["dump", "missing"], folder).err == "qcow2bm: missing: No such file or directory\n"
    assert run(["dump", "vm.qcow2: x"], folder).err.startswith("qcow2bm: vm.qcow2: x: is a dir")
    assert run(["dump", "bad"], folder).err.startswith("qcow2bm: bad: header")
    # A message that begins with the same letter as the file name keeps its first letter.
    for command in (["map", "b", "nope"], ["dump", "b", "--bitmap=nope"]):
        assert run(command, folder).err.startswith('qcow2bm: b: bitmap "nope" not found; ')


@pytest.mark.spec("CLI-4")
@pytest.mark.parametrize("command", ["map", "remove", "verdict", "rename"])
def test_a_name_that_looks_like_the_number_of_another_entry_is_refused(
    tmp_path: Path, command: str
) -> None:
    names = (b"@1", b"b", b"c", b"@3", b"@02")
    data = build_image(*(Stored(name) for name in names), cluster_bits=12).data
    path = tmp_path / "vm.qcow2"
    path.write_bytes(data)
    more = ["new"] if command == "rename" else []
    for name, literal, number in (("@1", "@@1", "@01"), ("@02", "@@02", "@2")):
        refused = run([command, "vm.qcow2", name, *more], tmp_path)
        assert refused.status == 1
        assert f'write "{literal}" for the bitmap of that name, or "{number}" for' in refused.err
        assert path.read_bytes() == data
        for spelling in (literal, number):
            assert run([command, "vm.qcow2", spelling, *more], tmp_path).status == 0
            path.write_bytes(data)
    # The entry with number 3 has the name "@3": both readings mean the same.
    assert run([command, "vm.qcow2", "@3", *more], tmp_path).status == 0
