"""If output is incomplete, the exit status says so, whatever the streams are."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
from support import golden_images as images
from support.console import environment, run
from support.images import Built, Stored, build_image

needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")

COMMANDS = (
    "map vm.qcow2 b",
    "map --output=json vm.qcow2 b",
    "map --totals vm.qcow2 b",
    "dump vm.qcow2",
    "dump --extents vm.qcow2",
    "dump --output=json vm.qcow2",
    "dump --output=json --extents vm.qcow2",
    "",
    "--help",
    "--version",
)


def many_rows() -> Built:
    """An image whose map is longer than any buffer or pipe takes at once."""
    return build_image(Stored(b"b", (b"\x55" * 512,) * 12), size=12 * 8 * 512 << 16)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "vm.qcow2").write_bytes(many_rows().data)
    return tmp_path


def program(
    arguments: str | Sequence[str],
    folder: Path,
    *,
    redirect: str = "",
    stdout: int = subprocess.PIPE,
    limit: int | None = None,
    **variables: str,
) -> subprocess.CompletedProcess[bytes]:
    """Runs a command with streams redirected by a shell, and files limited to a length."""
    # If the limit cut off a .pyc file, later runs would read it.
    variables = {"PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1", **variables}
    arguments = arguments.split() if isinstance(arguments, str) else arguments
    restrict: Callable[[], None] | None = None
    if limit is not None:
        restrict = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit))
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {redirect}', "sh", sys.executable, "-m", "qcow2bm", *arguments],
        cwd=folder,
        env=environment() | variables,
        stdout=stdout,
        stderr=subprocess.PIPE,
        preexec_fn=restrict,
        timeout=60,
        check=False,
    )


def said(number: int) -> bytes:
    return f"qcow2bm: standard output: {os.strerror(number)}\n".encode()


@pytest.mark.spec("CLI-11")
@pytest.mark.parametrize("arguments", COMMANDS)
def test_a_file_that_cannot_grow_is_a_failure(folder: Path, arguments: str) -> None:
    """The system writes a part of the output, and only the next write fails."""
    whole = program(arguments, folder).stdout
    for limit, status, message in (
        (len(whole), 0, b""),
        (len(whole) - 1, 1, said(errno.EFBIG)),
        (len(whole) // 2, 1, said(errno.EFBIG)),
    ):
        done = program(arguments, folder, redirect=">out", limit=limit)
        assert (done.returncode, done.stderr) == (status, message), limit
        assert (folder / "out").read_bytes() == whole[:limit]


@pytest.mark.spec("CLI-11")
@pytest.mark.parametrize("arguments", ["map vm.qcow2 b", "map --output=json vm.qcow2 b"])
def test_a_pipe_that_does_not_wait_and_is_full_is_a_failure(folder: Path, arguments: str) -> None:
    reading, writing = os.pipe()
    try:
        os.set_blocking(writing, False)
        done = program(arguments, folder, stdout=writing)
    finally:
        os.close(writing)
        os.close(reading)
    assert done.returncode == 1
    assert done.stderr.startswith(b"qcow2bm: standard output: ")
    assert done.stderr.count(b"\n") == 1


@pytest.mark.spec("CLI-11")
def test_a_pipe_that_does_not_wait_takes_what_fits(folder: Path) -> None:
    reading, writing = os.pipe()
    with open(reading, "rb") as pipe:
        try:
            os.set_blocking(writing, False)
            done = program("dump --output=json vm.qcow2", folder, stdout=writing)
        finally:
            os.close(writing)
        assert (done.returncode, done.stderr) == (0, b"")
        assert json.loads(pipe.read())["schema"] == 1


@pytest.mark.spec("CLI-11")
@pytest.mark.parametrize("arguments", COMMANDS)
def test_no_output_at_all_is_a_failure(folder: Path, arguments: str) -> None:
    done = program(arguments, folder, redirect=">&-")
    assert (done.returncode, done.stderr) == (1, said(errno.EBADF))


@needs_full
@pytest.mark.spec("CLI-11")
@pytest.mark.parametrize("arguments", ["--help", "--version", "dump --help", "map --help"])
@pytest.mark.parametrize("buffered", ["", "1"])
def test_full_output_is_a_failure_of_help_too(folder: Path, arguments: str, buffered: str) -> None:
    done = program(arguments, folder, redirect=">/dev/full", PYTHONUNBUFFERED=buffered)
    assert (done.returncode, done.stderr) == (1, said(errno.ENOSPC))


LOUD: dict[str, tuple[str, int]] = {
    "warning": ("map vm.qcow2 sound", 2),
    "error": ("map vm.qcow2 nope", 1),
    "no file": ("dump missing", 1),
    "usage": ("dump --frobnicate vm.qcow2", 64),
    "silence": ("dump vm.qcow2", 2),
}


@pytest.mark.spec("CLI-12")
@pytest.mark.parametrize("case", LOUD)
@pytest.mark.parametrize("redirect", ["2>&-", pytest.param("2>/dev/full", marks=needs_full)])
@pytest.mark.parametrize("buffered", ["", "1"])
def test_where_nothing_can_be_said_the_rest_is_the_same(
    tmp_path: Path, case: str, redirect: str, buffered: str
) -> None:
    (tmp_path / "vm.qcow2").write_bytes(images.broken().data)
    arguments, status = LOUD[case]
    usual = run(arguments.split(), tmp_path)
    done = program(arguments, tmp_path, redirect=redirect, PYTHONUNBUFFERED=buffered)
    assert usual.status == status
    assert bool(usual.err) == (case != "silence")
    assert (done.returncode, done.stdout.decode()) == (status, usual.out)
    assert done.stderr == b""


@pytest.mark.spec("CLI-6")
def test_names_that_the_encoding_has_not_are_escaped(tmp_path: Path) -> None:
    (tmp_path / "vm.qcow2").write_bytes(images.sound().data)
    plain = program("dump vm.qcow2", tmp_path, PYTHONIOENCODING="utf-8").stdout.decode()
    assert '"größe"' in plain
    done = program("dump vm.qcow2", tmp_path, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == plain.encode("ascii", "backslashreplace")
    missing = program(["map", "vm.qcow2", "größer"], tmp_path, PYTHONIOENCODING="ascii")
    assert missing.returncode == 1
    assert missing.stderr.startswith(rb'qcow2bm: vm.qcow2: bitmap "gr\xf6\xdfer" not found')
