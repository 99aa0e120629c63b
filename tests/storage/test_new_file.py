"""Files that are appended to, and held by one process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.console import environment

import qcow2bm
from qcow2bm import new_file


def test_appending_overwrites_what_an_earlier_call_left(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"whole")
    new_file.append(str(path), b" and more")
    assert path.read_bytes() == b"whole and more"
    new_file.append(str(path), b"!", end=5)
    assert path.read_bytes() == b"whole!"


def test_appending_needs_a_file(tmp_path: Path) -> None:
    with pytest.raises(qcow2bm.StorageError, match="No such file"):
        new_file.append(str(tmp_path / "missing"), b"data")
    assert not (tmp_path / "missing").exists()


def test_one_process_holds_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    program = f"from qcow2bm import new_file\nwith new_file.held({str(path)!r}): print('held')"

    def by_another_process() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", program]
        return subprocess.run(
            command, capture_output=True, text=True, env=environment(), check=False
        )

    with new_file.held(str(path)):
        refused = by_another_process()
        assert refused.returncode
        assert "is in use by another process" in refused.stderr
    assert by_another_process().stdout == "held\n"
    with pytest.raises(qcow2bm.StorageError, match="No such file"), new_file.held("missing"):
        raise AssertionError("this must not be reached")


def test_an_error_of_the_block_is_not_one_of_the_file_that_is_held(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    with pytest.raises(BrokenPipeError), new_file.held(str(path)):
        raise BrokenPipeError


def test_an_incomplete_file_says_so_and_gets_its_name_at_the_end(tmp_path: Path) -> None:
    path, part = tmp_path / "file", tmp_path / "file.incomplete"
    with new_file.incomplete_file(str(path)) as name:
        assert (name, part.exists(), path.exists()) == (str(part), True, False)
        part.write_bytes(b"whole")
    assert (list(tmp_path.iterdir()), path.read_bytes()) == ([path], b"whole")
    for taken in (path, part):
        with (
            pytest.raises(qcow2bm.StorageError, match=f"{taken}: "),
            new_file.incomplete_file(str(path)),
        ):
            raise AssertionError("this must not be reached")
        path.unlink(missing_ok=True)
        part.touch()
    assert list(tmp_path.iterdir()) == [part]


def test_a_file_that_is_not_completed_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(KeyboardInterrupt), new_file.incomplete_file(str(path)):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with (
        pytest.raises(qcow2bm.StorageError, match="file: exists already"),
        new_file.incomplete_file(str(path)),
    ):
        path.write_bytes(b"another")
    assert (list(tmp_path.iterdir()), path.read_bytes()) == ([path], b"another")
