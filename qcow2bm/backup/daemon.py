"""A qemu-storage-daemon of our own, which copies what a backup needs.

*Spec*: spec/backup.md.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from typing import IO, Any

from qcow2bm.compare.content import Identity, identity
from qcow2bm.compare.tied_process import opened_files, tied
from qcow2bm.errors import QmpError, QmpRefusedError, StorageError, UnsupportedError
from qcow2bm.qmp.answers import Answer
from qcow2bm.qmp.client import Monitor
from qcow2bm.units import escape

_PROGRAM = "qemu-storage-daemon"
_JOB = "backup"
_ANSWER_SECONDS = 3600  # closing an image may write all that the cache of the system holds
_END_SECONDS = 10  # a program that has closed its socket ends within this time
_FIRST_PAUSE, _LONGEST_PAUSE = 0.005, 0.25

JobProgress = Callable[[int], None]
"""Is called with the number of bytes that a job has done so far."""


class StorageDaemon:
    """A running qemu-storage-daemon that only this process can speak to."""

    def __init__(self, monitor: Monitor, process: subprocess.Popen[bytes], said: IO[bytes]) -> None:
        """See `storage_daemon`."""
        self._monitor = monitor
        self._process = process
        self._said = said

    def execute(self, command: str, arguments: dict[str, Any] | None = None) -> Answer:
        """Sends a QMP command, and returns the answer.

        Raises:
            QmpRefusedError: QEMU refuses the command, or would since a name or path is not UTF-8.
            QmpError: the daemon has ended, or does not answer.
        """
        try:
            json.dumps(arguments, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise QmpRefusedError(command, "QEMU takes no name that is not UTF-8") from error
        try:
            return self._monitor.execute(command, arguments)
        except QmpRefusedError:
            raise
        except QmpError as error:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_END_SECONDS)
                raise QmpError(command, _how_it_ended(self._process, self._said)) from error
            raise

    def add_node(self, name: str, path: str, options: dict[str, Any]) -> None:
        """Opens a file as a node.

        Raises:
            StorageError: QEMU cannot open ``path``.
            QmpError: the daemon has ended, or does not answer.
        """
        try:
            self.execute("blockdev-add", {"node-name": name, **options})
        except QmpRefusedError as error:
            reason = error.reason
            if "encrypt." in reason:  # QEMU names the option by which it would get the secret
                reason = "it is encrypted, and no secret can be given here"
            raise StorageError(path, 0, 0, f"QEMU cannot open it: {reason}") from error

    def files(self) -> dict[int, Identity]:
        """Returns which files the daemon has open, by the numbers of their descriptors."""
        opened = opened_files(self._process.pid).items()
        return {number: identity(status) for number, (_, status) in opened}

    def run_job(
        self,
        command: str,
        arguments: dict[str, Any],
        path: str,
        progress: JobProgress = lambda done: None,
    ) -> int:
        """Runs a job to its end, and returns how many bytes it did.

        Args:
            command: starts the job, with these ``arguments``.
            arguments: without the id of the job.
            path: the file that the job writes.
            progress: is called now and then.

        Raises:
            StorageError: the job failed.
            QmpError: QEMU refuses the command, or the daemon has ended.
        """
        self.execute(command, {"job-id": _JOB, **arguments})
        pause = _FIRST_PAUSE
        while True:
            (job,) = self.execute("query-jobs").items()  # the one job there is
            done = job["current-progress"].number()
            progress(done)
            if job["status"].text() == "concluded":
                break
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        error = job.get("error")
        if error:
            raise StorageError(path, 0, 0, f"QEMU cannot fill it: {escape(error.text())}")
        self.execute("job-dismiss", {"id": _JOB})
        return done

    def quit(self) -> None:
        """Has the daemon close everything, and waits until it has ended.

        Raises:
            QmpError: the daemon failed.
        """
        self.execute("quit")
        self._process.wait()
        if self._process.returncode:
            raise QmpError("quit", _how_it_ended(self._process, self._said))


@contextmanager
def storage_daemon() -> Iterator[StorageDaemon]:
    """Runs a qemu-storage-daemon, which has opened nothing yet, for the duration of the block.

    Raises:
        UnsupportedError: the daemon, or the package qemu.qmp, is not installed.
        QmpError: the daemon does not start.
    """
    if not shutil.which(_PROGRAM):
        raise UnsupportedError(f"a backup without {_PROGRAM} (Debian: qemu-system-common)")
    ours, theirs = socket.socketpair()
    with closing(ours), tempfile.TemporaryFile() as said:
        with theirs:
            process = _start(theirs.fileno(), said)
        try:
            try:
                monitor = Monitor(ours, _ANSWER_SECONDS)
            except QmpError as error:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_END_SECONDS)
                    raise QmpError("", _how_it_ended(process, said)) from error
                raise
            with monitor:
                yield StorageDaemon(monitor, process, said)
        finally:
            process.kill()  # what it was writing is given up, unless it has ended already
            process.wait()


def _start(descriptor: int, said: IO[bytes]) -> subprocess.Popen[bytes]:
    qmp = ["--chardev", f"socket,id=qmp,fd={descriptor}", "--monitor", "qmp"]
    try:
        return subprocess.Popen(
            tied([_PROGRAM, *qmp]),
            pass_fds=[descriptor],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # the interrupt of a terminal is for this process alone
        )
    except OSError as error:
        raise StorageError.from_os(error, _PROGRAM, 0, 0) from error


def _how_it_ended(process: subprocess.Popen[bytes], said: IO[bytes]) -> str:
    said.seek(0)
    text = escape(" ".join(said.read().decode("utf-8", "replace").split()))
    status = process.returncode
    how = f"with status {status}" if status >= 0 else f"by {signal.Signals(-status).name}"
    return f"{_PROGRAM} ended {how}" + (f" ({text})" if text else "")


def file_node(path: str) -> dict[str, Any]:
    """Returns the options of a node for a regular file or a block device.

    Raises:
        StorageError: there is no such file.
    """
    try:
        is_device = stat.S_ISBLK(os.stat(path).st_mode)
    except OSError as error:
        raise StorageError.from_os(error, path, 0, 0) from error
    # In a relative path, QEMU would take a colon for the end of a protocol.
    driver = "host_device" if is_device else "file"
    return {"driver": driver, "filename": os.path.abspath(path)}
