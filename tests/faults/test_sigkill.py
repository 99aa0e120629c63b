"""A real process, killed at every write and every barrier: old or new, and never locked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.interrupted_edits import EDITS, plan, state_of, states

import qcow2bm

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="writing is for Linux")


SAMPLE = ("set", "overlay")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in SAMPLE else pytest.mark.deep) for n in EDITS]
)
def test_killed_at_every_call(name: str, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "support.killed_edits", name, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")

    old, new = states(name)
    steps, commit = plan(name).steps, plan(name).commit_point
    assert commit is not None
    expected = {"done": new}
    for number, _ in enumerate(steps):
        for moment in ("before", "half", "after"):
            is_new = number > commit or (number == commit and moment == "after")
            expected[f"{number}-{moment}"] = new if is_new else old
    assert {path.name for path in tmp_path.iterdir()} == set(expected)
    for left, state in expected.items():
        path = tmp_path / left
        assert state_of(path.read_bytes()) == state, left
        with qcow2bm.open(path, "r+") as image:  # no process holds a lock any more
            if state == old:
                with image.edit() as edit:
                    if not image.is_consistent and not name.startswith("salvage"):
                        edit.remove_all()  # what is left of the extension
                    EDITS[name].change(edit)
        assert state_of(path.read_bytes()) == new, left
    print(f"{name}: killed {len(expected) - 1} times")
