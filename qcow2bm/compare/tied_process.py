"""Programs that end when this process ends, however it ends."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence

_UNLESS_ORPHANED = '[ "$PPID" = "$0" ] && exec "$@"'


def tied(command: Sequence[str]) -> list[str]:
    """Returns a command that runs ``command``, and that the kernel kills if this process ends.

    The thread that starts the command must not end before it. Where setpriv of util-linux is
    missing, the program outlives a process that is killed.
    """
    if not shutil.which("setpriv"):
        return list(command)
    # This process may end before the kernel is told to kill; then nothing is to be run at all.
    guard = ["sh", "-c", _UNLESS_ORPHANED, str(os.getpid())]
    return ["setpriv", "--pdeathsig", "KILL", *guard, *command]
