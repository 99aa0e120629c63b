"""Running the command line as a program of its own, or inside the test."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

from qcow2bm.cli import main

ROOT = Path(__file__).parents[2]


class Result(NamedTuple):
    status: int
    out: str
    err: str


@contextmanager
def _working_in(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextmanager
def _standard_input(data: bytes) -> Iterator[None]:
    """Gives this process another standard input, with a file descriptor of its own."""
    before = sys.stdin
    with os.fdopen(os.memfd_create("standard input"), "w+") as file:
        file.buffer.write(data)
        file.seek(0)
        sys.stdin = file
        try:
            yield
        finally:
            sys.stdin = before


def run(arguments: Sequence[str], folder: Path, standard_input: bytes = b"") -> Result:
    """One command in this process, with ``folder`` as working directory."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    err = io.StringIO()
    with (
        _working_in(folder),
        _standard_input(standard_input),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            status = main(arguments)
        except SystemExit as end:
            status = int(end.code or 0)
    out.flush()
    written = out.buffer
    assert isinstance(written, io.BytesIO)
    return Result(status, written.getvalue().decode("utf-8"), err.getvalue())


def environment() -> dict[str, str]:
    """The environment for a process of its own that is to run this checkout."""
    return os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}


def start(arguments: Sequence[str], folder: Path) -> subprocess.Popen[bytes]:
    """One command as a process of its own, with pipes for its output."""
    return subprocess.Popen(
        [sys.executable, "-m", "qcow2bm", *arguments],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def run_on_terminal(
    arguments: Sequence[str],
    folder: Path,
    columns: int = 80,
    variables: Mapping[str, str] | None = None,
) -> str:
    """Runs a command on a terminal of so many columns, and returns the output.

    ``variables`` are those of its environment that are not as in this process.
    """
    ours, theirs = pty.openpty()
    try:
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        process = subprocess.Popen(
            [sys.executable, "-m", "qcow2bm", *arguments],
            cwd=folder,
            env=environment() | {"TERM": "xterm"} | dict(variables or {}),
            stdin=subprocess.DEVNULL,
            stdout=theirs,
            stderr=theirs,
        )
    finally:
        os.close(theirs)
    shown = b""
    with open(ours, "rb", buffering=0) as terminal:
        try:
            while piece := terminal.read(1 << 16):
                shown += piece
        except OSError:  # the program has ended, and with it the terminal
            pass
    process.wait()
    return shown.decode("utf-8").replace("\r\n", "\n")
