"""Programs that end when this process ends, however it ends; and what they have open."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Sequence
from contextlib import suppress

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


def opened_files(process_id: int) -> dict[int, tuple[str, os.stat_result]]:
    """Returns the regular files and block devices that a process has open: paths and status.

    The keys are the numbers of the descriptors. A file without a name is left out.
    """
    folder = f"/proc/{process_id}/fd"
    found = {}
    for number in os.listdir(folder):
        with suppress(FileNotFoundError):  # closed since the folder was listed
            place = os.path.join(folder, number)
            status = os.stat(place)
            is_file = stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode)
            if is_file and status.st_nlink:
                found[int(number)] = os.readlink(place), status
    return found
