"""QMP by way of libvirt, which has the QMP socket of its domains to itself.

The program virsh sends each command, and hands open files over. So the URI of the hypervisor can be
given as for virsh, in the environment variable LIBVIRT_DEFAULT_URI. libvirt marks the domain as
tainted, because commands reach QEMU that libvirt did not send.

*Spec*: spec/libvirt.md.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from typing import Any

from qcow2bm.errors import QmpError, QmpRefusedError, QmpTimeoutError, UnsupportedError
from qcow2bm.qmp.answers import Answer
from qcow2bm.qmp.commands import DEFAULT_TIMEOUT, LENT, QmpCommands, one_line

_VIRSH = "virsh"


class LibvirtMonitor(QmpCommands):
    """Sends QMP commands to the QEMU of a libvirt domain, each by a call of virsh."""

    def __init__(self, domain: str, timeout: float = DEFAULT_TIMEOUT) -> None:
        """Finds out whether there is such a domain.

        Args:
            domain: its name, id or UUID.
            timeout: how many seconds each command may take.

        Raises:
            ValueError: the timeout is not positive.
            UnsupportedError: virsh is not installed.
            QmpError: there is no such domain, or it does not run.
        """
        super().__init__(timeout)
        self._domain = domain
        self.execute("query-version")

    def execute(self, command: str, arguments: dict[str, Any] | None = None) -> Answer:
        """Sends a command, and returns what QEMU answers; raises as `QmpCommands.execute` does."""
        return self._send(command, arguments or {})

    def lend(self, descriptor: int) -> int:
        """Lends QEMU an open file, and returns the number of the fdset that has it.

        Raises:
            QmpError: QEMU or libvirt refuses the file; libvirt takes files from version 8.2 on.
        """
        lent = self._send("add-fd", {"opaque": LENT}, descriptors=[descriptor])
        return lent["fdset-id"].number()

    def _send(
        self, command: str, arguments: dict[str, Any], descriptors: Sequence[int] = ()
    ) -> Answer:
        message = {"execute": command, "arguments": arguments}
        options = [f"--pass-fds={descriptor}" for descriptor in descriptors]
        words = [_VIRSH, "qemu-monitor-command", *options, "--", self._domain, json.dumps(message)]
        try:
            done = subprocess.run(
                words,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=self.timeout,
                pass_fds=descriptors,
                env={**os.environ, "LC_ALL": "C"},
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise QmpTimeoutError(command, self.timeout) from error
        except FileNotFoundError as error:
            raise UnsupportedError("libvirt without the program virsh") from error
        except OSError as error:
            raise QmpError(command, f"{_VIRSH}: {error.strerror}") from error
        if done.returncode:
            said = one_line(done.stderr.decode(errors="replace")).removeprefix("error: ")
            raise QmpError(command, f"{_VIRSH}: {said or f'status {done.returncode}'}")
        return _answer(command, done.stdout)


def _answer(command: str, printed: bytes) -> Answer:
    try:
        message = json.loads(printed)
        if "error" in message:
            raise QmpRefusedError(command, one_line(str(message["error"]["desc"])))
        return Answer(command, message["return"])
    except (ValueError, LookupError, TypeError) as error:
        raise QmpError(command, f"{_VIRSH} printed no answer of QEMU") from error
