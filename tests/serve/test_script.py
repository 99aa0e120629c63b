"""The script that nbdkit runs, as far as any Python can run it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.console import run

from qcow2bm import serve

SCRIPT = Path(serve.__file__).with_name("nbdkit_plugin.py")
OURS = ".".join(map(str, sys.version_info[:2]))


def refusal(script: Path) -> str:
    """Returns the one line that the script prints when the plugin cannot be loaded."""
    done = subprocess.run(
        [sys.executable, "-S", "-E", script],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done
    return done.stderr


def installed(folder: Path) -> Path:
    """The script, and nothing else, of a package in ``folder``."""
    place = folder / "qcow2bm" / "serve"
    place.mkdir(parents=True)
    return Path(shutil.copy(SCRIPT, place))


def test_the_command_prints_where_it_is(tmp_path: Path) -> None:
    assert run(["nbdkit-plugin"], tmp_path) == (0, f"{SCRIPT}\n", "")


@pytest.mark.parametrize("version", ["3.9", "3.99", "4.0"])
@pytest.mark.parametrize("packages", ["site-packages", "dist-packages"])
def test_another_python_is_refused(tmp_path: Path, version: str, packages: str) -> None:
    script = installed(tmp_path / "lib" / f"python{version}" / packages)
    expected = f"is installed for Python {version}, but nbdkit runs Python {OURS}"
    assert refusal(script) == f"nbdkit: error: qcow2bm: {expected}\n"


@pytest.mark.parametrize("folder", [f"python{OURS}/site-packages", "python3/dist-packages", "src"])
def test_what_cannot_be_loaded_is_said_in_one_line(tmp_path: Path, folder: str) -> None:
    line = refusal(installed(tmp_path / folder))
    assert f"cannot be loaded from {tmp_path / folder} by Python {OURS}: No module named" in line


def test_a_link_leads_to_where_it_was_installed(tmp_path: Path) -> None:
    script = installed(tmp_path / "lib" / "python3.99" / "site-packages")
    link = tmp_path / "plugin.py"
    link.symlink_to(script)
    assert "is installed for Python 3.99" in refusal(link)
