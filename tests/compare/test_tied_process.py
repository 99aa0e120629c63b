"""A tied program ends with the process that started it, and does not start after that."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.console import environment

from qcow2bm.compare.tied_process import tied

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="setpriv is for Linux")

_PARENT = """
import subprocess, sys
from qcow2bm.compare.tied_process import tied
child = subprocess.Popen(tied(["cat"]), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
child.stdin.write(b"x")
child.stdin.flush()
child.stdout.read(1)
print(child.pid, flush=True)
sys.stdin.read()
"""


def test_a_tied_program_is_killed_with_its_parent() -> None:
    command = [sys.executable, "-c", _PARENT]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment()
    ) as parent:
        assert parent.stdout
        child = int(parent.stdout.readline())
        watch = os.pidfd_open(child)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        with os.fdopen(watch) as file:
            poll = select.poll()
            poll.register(file, select.POLLIN)
            assert poll.poll(10_000)


def test_an_orphan_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["touch", str(tmp_path / "made")]
    monkeypatch.setattr(os, "getpid", lambda: 0)  # as if this process were not the parent any more
    orphaned = tied(command)
    monkeypatch.undo()
    assert subprocess.run(orphaned, check=False).returncode == 1
    assert list(tmp_path.iterdir()) == []
    assert subprocess.run(tied(command), check=False).returncode == 0
    assert (tmp_path / "made").exists()


def test_without_setpriv_the_program_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert tied(["touch"]) == ["touch"]
