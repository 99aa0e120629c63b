"""The README shows what the program prints and runs what it tells people to run.

``pytest --golden-update`` writes the output of its commands anew.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.console import ROOT, run

import qcow2bm

README = ROOT / "README.md"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that looks like a clone of the repository to the README's commands."""
    shutil.copytree(ROOT / "tests" / "data", tmp_path / "tests" / "data")
    return tmp_path


def _with_output_in(folder: Path) -> Callable[[re.Match[str]], str]:
    def with_output(match: re.Match[str]) -> str:
        """A console block with the output its commands have now."""
        shown = []
        for line in match[1].splitlines():
            if line.startswith("$ cp "):
                _, source, target = shlex.split(line[2:])
                shutil.copyfile(folder / source, folder / target)
                shown.append(f"{line}\n")
            elif line.startswith("$ "):
                arguments = shlex.split(line[2:])
                assert arguments[:3] == ["python", "-m", "qcow2bm"]
                result = run(arguments[3:], folder)
                assert result.err == ""
                shown.append(f"{line}\n{result.out}")
        return f"```console\n{''.join(shown)}```"

    return with_output


def test_output_is_what_the_commands_print(request: pytest.FixtureRequest, folder: Path) -> None:
    text = README.read_text(encoding="utf-8")
    now = re.sub(r"```console\n(.*?)```", _with_output_in(folder), text, flags=re.DOTALL)
    if request.config.getoption("--golden-update"):
        README.write_text(now, encoding="utf-8")
    assert README.read_text(encoding="utf-8") == now


def blocks(kind: str, heading: str) -> list[str]:
    """The fenced blocks of a kind in a section of the README."""
    section = README.read_text("utf-8").partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return re.findall(rf"```{kind}\n(.*?)```", section, re.DOTALL)


def test_the_migration_example_runs_on_both_sides(folder: Path) -> None:
    (example,), (output,) = blocks("python", "Migration"), blocks("text", "Migration")
    (folder / "migrate.py").write_text(example, "utf-8")
    shutil.copyfile(folder / "tests/data/three.qcow2", folder / "vm.qcow2")
    done = subprocess.run(
        [sys.executable, "migrate.py", "vm.qcow2"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.stderr) == (output, "")


def test_the_python_example_runs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    (example,) = blocks("python", "Python in a few lines")
    assert len(example.splitlines()) <= 24
    shutil.copyfile(folder / "tests/data/three.qcow2", folder / "vm.qcow2")
    monkeypatch.chdir(folder)
    exec(compile(example, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "1173504 bytes are dirty" in printed
    assert "inconsistent" in printed


def test_the_image_that_does_not_boot(folder: Path) -> None:
    (shown,) = blocks("text", "My VM does not boot")
    data = bytearray((folder / "tests/data/three.qcow2").read_bytes())
    with qcow2bm.open(bytes(data)) as image:
        data[image.bitmaps["daily"].entry.offset_of("flags") + 2] |= 1
    (folder / "vm.qcow2").write_bytes(data)
    commands = re.split(r"^\$ ", shown, flags=re.MULTILINE)[1:]
    printed = 0
    for command, output in (text.split("\n", 1) for text in commands):
        program, *arguments = command.split()
        if program == "qcow2bm":
            assert run(arguments, folder).out == output
            printed += 1
    assert printed == 2


def test_messages_of_qemu_are_those_of_the_problems() -> None:
    from support.kinds import READ_KINDS

    text = README.read_text(encoding="utf-8")
    known = {kind.qemu_message for kind in READ_KINDS.values() if kind.qemu_message}
    section = text.partition("## My VM does not boot")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    quoted = [message for cell in cells for message in cell.split("`")[1::2]]
    assert len(quoted) >= 8
    for message in quoted:
        words = message.replace("'...'", "").replace("...", "").strip(" :")
        assert any(words.startswith(m) or m in words or words in m for m in known), message
