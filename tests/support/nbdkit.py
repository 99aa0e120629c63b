"""nbdkit with this library's plugin, as a process, and disks for it to serve."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from support.qemu import Disk, run, run_ok

from qcow2bm import serve

SCRIPT = Path(serve.__file__).with_name("nbdkit_plugin.py")
_TIMEOUT = 60  # seconds: so that a hanging tool fails a test and not the whole run


def missing() -> str | None:
    """Returns the reason why the plugin cannot be tested here; None if it can."""
    tools = [tool for tool in ("nbdkit", "nbdcopy") if not shutil.which(tool)]
    if tools:
        return f"not installed: {', '.join(tools)}"
    done = run("nbdkit", "python", "--dump-plugin")
    lines = dict(line.partition("=")[::2] for line in done.stdout.splitlines())
    theirs = ".".join(lines.get("python_version", "").split(".")[:2])
    ours = ".".join(map(str, sys.version_info[:2]))
    if done.returncode or theirs != ours:
        return f"nbdkit runs Python {theirs or 'not at all'}, and the tests run {ours}"
    return None


def environment() -> dict[str, str]:
    """Returns an environment in which the plugin finds its packages, also in a checkout."""
    return {**os.environ, "PYTHONPATH": sysconfig.get_path("purelib")}


@dataclass(frozen=True)
class RawDisk:
    """A qcow2 image and its raw data file."""

    image: Disk
    data: Path

    @classmethod
    def create(cls, folder: Path, size: int, **options: object) -> RawDisk:
        """A new one; every cluster is allocated unless ``options`` say otherwise."""
        data = folder / "vm.raw"
        raw = {"data_file": data, "data_file_raw": "on", "preallocation": "metadata"}
        return cls(Disk.create(folder / "vm.qcow2", size, **(raw | options)), data)

    @property
    def parameters(self) -> tuple[str, ...]:
        """The arguments of the plugin."""
        return f"image={self.image.path}", f"data={self.data}"


@dataclass(frozen=True)
class Server:
    """A server that runs, in the foreground or not."""

    uri: str
    pid: int
    _descriptor: int

    def io(self, *commands: str) -> str:
        """Runs qemu-io commands over one connection."""
        switches = [switch for command in commands for switch in ("-c", command)]
        return run_ok("qemu-io", "-f", "raw", *switches, self.uri)

    def send(self, number: signal.Signals) -> None:
        """Sends a signal."""
        signal.pidfd_send_signal(self._descriptor, number)

    @property
    def is_running(self) -> bool:
        """Whether the process is not gone yet."""
        return not self._has_ended(0)

    def wait(self) -> None:
        """Returns once the process is gone."""
        assert self._has_ended(1000 * _TIMEOUT), "nbdkit does not end"

    def end(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Sends a signal and returns once the process is gone."""
        self.send(number)
        self.wait()

    def _has_ended(self, milliseconds: int) -> bool:
        poll = select.poll()
        poll.register(self._descriptor, select.POLLIN)
        return bool(poll.poll(milliseconds))


def command(*arguments: str | Path, script: Path = SCRIPT) -> list[str | Path]:
    """nbdkit with options and the plugin; ``arguments`` go to the plugin."""
    options = [a for a in arguments if str(a).startswith("-")]
    return ["nbdkit", *options, "python", script, *(a for a in arguments if a not in options)]


def refusal(*arguments: str | Path, script: Path = SCRIPT) -> str:
    """The one line that nbdkit prints on standard error when it must not start."""
    done = subprocess.run(
        [*command("-f", "-U-", *arguments, script=script), "--run", "true"],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=_TIMEOUT,
        check=False,
    )
    assert done.returncode == 1, done
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


@contextmanager
def serving(disk: RawDisk, *parameters: str, background: bool = False) -> Iterator[Server]:
    """Serves a disk; at the end kills the process if it still runs."""
    folder = disk.image.path.parent
    pidfile, socket = folder / "pid", folder / "socket"
    pidfile.unlink(missing_ok=True)
    options: list[str | Path] = ["-P", pidfile, "-U", socket, *([] if background else ["-f"])]
    process = subprocess.Popen(
        ["nbdkit", *options, "python", SCRIPT, *disk.parameters, *parameters],
        env=environment(),
        stdin=subprocess.DEVNULL,
        cwd=folder,
    )
    try:
        if background:
            assert process.wait(_TIMEOUT) == 0
        while not pidfile.exists() or not pidfile.read_text().endswith("\n"):
            assert process.poll() in (None, 0), "nbdkit ends at once"
            time.sleep(0.01)
        descriptor = os.pidfd_open(int(pidfile.read_text()))
        try:
            server = Server(f"nbd+unix:///?socket={socket}", int(pidfile.read_text()), descriptor)
            run_ok("nbdinfo", "--size", server.uri)  # answered once the disk is open
            yield server
        finally:
            try:
                server.end(signal.SIGKILL)
            except ProcessLookupError:
                pass
            finally:
                os.close(descriptor)
    finally:
        process.kill()
        process.wait(_TIMEOUT)
        socket.unlink(missing_ok=True)
