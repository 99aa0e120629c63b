"""What stands for virsh: it hands commands on to the QMP socket that the environment names.

It does what virsh 9.0 does with `qemu-monitor-command [--pass-fds=N,...] -- DOMAIN COMMAND`.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import sys
from pathlib import Path
from typing import TextIO

SOCKET = "STAND_IN_FOR_LIBVIRT"
DOMAIN = "vm1"


def install(folder: Path, address: Path) -> dict[str, str]:
    """Makes the program in a folder; returns the environment in which it is found."""
    program = folder / "virsh"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {__file__} "$@"\n')
    program.chmod(0o755)
    return {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", SOCKET: str(address)}


def main() -> int:
    """Sends the command, and prints the answer as QEMU gives it."""
    action, *options, dashes, domain, command = sys.argv[1:]
    assert (action, dashes) == ("qemu-monitor-command", "--")
    if domain != DOMAIN:
        print(f"error: failed to get domain '{domain}'", file=sys.stderr)
        return 1
    descriptors = [
        int(number)
        for option in options
        for number in option.removeprefix("--pass-fds=").split(",")
    ]
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.environ[SOCKET])
        stream = connection.makefile("r", encoding="utf-8")
        stream.readline()  # the greeting
        connection.sendall(b'{"execute": "qmp_capabilities"}')
        answer(stream)
        socket.send_fds(connection, [command.encode()], descriptors)
        print(answer(stream))
    return 0


def answer(stream: TextIO) -> str:
    """The next line that is no event."""
    for line in stream:
        if "event" not in json.loads(line):
            return line.strip()
    raise EOFError


if __name__ == "__main__":
    sys.exit(main())
