"""Edits copies of an image in processes that die at each write and barrier; for test_sigkill.

The arguments are the name of an edit and a folder. There it leaves the image as each kill left
it, called NUMBER-WHEN after the call, and as "done" what became of the one it could finish.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from support.faulty_storage import sectors_of
from support.interrupted_edits import EDITS, states

import qcow2bm

MOMENTS = ("before", "half", "after")


def arm(number: int, moment: str) -> None:
    """Makes this process die at call ``number`` of those that write or wait for the disk."""
    numbers = count()

    def armed(real: Callable[..., Any], half: Callable[..., object]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if next(numbers) != number:
                return real(*arguments)
            if moment != "before":
                (real if moment == "after" else half)(*arguments)
            os.kill(os.getpid(), signal.SIGKILL)

        return call

    def write_half(descriptor: int, parts: Sequence[bytes], offset: int) -> None:
        data = b"".join(parts)
        write(descriptor, [data[: sectors_of(offset, len(data), 0.5)]], offset)

    write, sync = os.pwritev, os.fdatasync
    os.pwritev = armed(write, write_half)
    os.fdatasync = armed(sync, lambda descriptor: None)


def edit_in_child(name: str, path: Path, number: int, moment: str) -> int:
    """The status with which a process ended that was to die while it edited."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        arm(number, moment)
        with qcow2bm.open(path, "r+") as image:
            EDITS[name].run(image)
        os._exit(0)
    finally:
        os._exit(1)


def main(name: str, folder: Path) -> int:
    """Goes through all calls until there is none of that number."""
    states(name)  # imports whatever is imported only when used, once for all children
    content = EDITS[name].image()
    for number in count():
        for moment in MOMENTS:
            path = folder / f"{number}-{moment}"
            path.write_bytes(content)
            code = edit_in_child(name, path, number, moment)
            if code == 0:
                path.rename(folder / "done")
                return 0
            if code != -signal.SIGKILL:
                return 1
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
