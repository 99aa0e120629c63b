"""The command ``demo --qemu`` shows what it says, with the QEMU that is installed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.console import run

from qcow2bm.cli import demo_qemu


@pytest.mark.spec("CLI-51")
@pytest.mark.usefixtures("system_emulator")
def test_the_demo_with_qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_qemu, "_BITMAPS", 1)
    monkeypatch.setattr(demo_qemu, "_WRITES", 20)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    done = run(["demo", "--qemu"], tmp_path)
    assert (done.status, done.err) == (0, "")
    stops = re.findall(r"the machine stops for +([\d.]+) ms", done.out)
    assert len(stops) == 2
    assert "live offload: 1 bitmap in a file" in done.out
    assert "live restore: 1 bitmap back in the machine" in done.out
    assert done.out.endswith("\n40 writes, all of them in each bitmap\n")
    assert [*tmp_path.iterdir()] == []


@pytest.mark.spec("CLI-51")
def test_without_qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(demo_qemu, "_PROGRAMS", ("qemu-none",))
    done = run(["demo", "--qemu"], tmp_path)
    assert (done.status, done.out) == (1, "")
    assert done.err == "qcow2bm: demo: there is no QEMU: qemu-none is not installed\n"


@pytest.mark.spec("CLI-51")
def test_a_qemu_that_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "qemu-broken"
    program.write_text("#!/bin/sh\necho broken: no such option >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(demo_qemu, "_PROGRAMS", (str(program),))
    monkeypatch.setattr(demo_qemu, "_BITMAPS", 1)
    done = run(["demo", "--qemu"], tmp_path)
    assert done.status == 1
    assert done.err == "qcow2bm: demo: QEMU does not start: broken: no such option\n"
