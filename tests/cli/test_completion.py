"""The scripts of ``completion``, run by the shells that are there."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from support.console import run

from qcow2bm.cli.commands import COMMANDS, all_parsers

SHELLS = ("bash", "zsh", "fish")

# The variables that bash sets before it calls the function, and what it does with the answer.
COMPLETE = """\
source ./script
COMP_WORDS=("$@")
COMP_CWORD=$(($# - 1))
_qcow2bm
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("completion")
    (folder / "script").write_text(run(["completion", "bash"], folder).out)
    return folder


@pytest.mark.spec("CLI-37")
@pytest.mark.parametrize("shell", SHELLS)
def test_the_shell_accepts_the_script(shell: str, tmp_path: Path) -> None:
    program = shutil.which(shell)
    if not program:
        pytest.skip(f"needs {shell}")
    done = run(["completion", shell], tmp_path)
    assert (done.status, done.err) == (0, "")
    (tmp_path / "script").write_text(done.out)
    checked = subprocess.run(
        [program, "-n", "script"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


@pytest.mark.spec("CLI-37")
@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_has_every_command_and_option(shell: str, tmp_path: Path) -> None:
    script = run(["completion", shell], tmp_path).out
    for parser in all_parsers():
        assert all(word in script for word in parser.commands)
        for option in parser.options:
            for name in option.option_strings:
                dashes = {"--": " -l ", "-": " -s "}["--" if name.startswith("--") else "-"]
                shown = f"{dashes}{name.lstrip('-')} " if shell == "fish" else name
                assert shown in script, (parser.path, name)
            assert all(str(choice) in script for choice in option.choices or ())


def completed(folder: Path, *words: str) -> list[str]:
    """Returns what bash offers for the last word; an empty list means names of files."""
    done = subprocess.run(
        ["bash", "--norc", "-c", COMPLETE, "bash", "qcow2bm", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.spec("CLI-37")
@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("du",), ["dump"]),
        (("stream", ""), ["dump", "write", "restore"]),
        (("stream", "w"), ["write"]),
        (("dump", "--ex"), ["--extents"]),
        (("dump", "vm.qcow2", "--st"), ["--stale"]),
        (("stream", "dump", "--ex"), []),
        (("dump", "--output", "=", "j"), ["json"]),
        (("dump", "--output", "="), ["human", "json"]),
        (("dump", "--output", "j"), ["json"]),
        (("merge", "vm.qcow2", "--op", "x"), ["xor"]),
        (("dump", "--bitmap", "map", "--ex"), ["--extents"]),
        (("dump", ""), []),
        (("dump", "--bitmap", ""), []),
        (("clear", "vm.qcow2", "--", "-"), []),
        (("nbd",), ["nbdkit-plugin"]),
        (("--ver",), ["--version"]),
    ],
)
def test_bash_completes(words: tuple[str, ...], offered: list[str], folder: Path) -> None:
    assert completed(folder, *words) == offered


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_bash_offers_every_command(folder: Path) -> None:
    assert completed(folder, "") == list(COMMANDS)


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_bash_takes_the_function_for_the_program_and_files_for_the_rest(folder: Path) -> None:
    done = subprocess.run(
        ["bash", "--norc", "-c", "source ./script; complete -p qcow2bm"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "complete -o default -F _qcow2bm qcow2bm\n"
