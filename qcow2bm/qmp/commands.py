"""What can send QMP commands to a running QEMU, whatever the way.

A `Monitor` has a socket of its own. Where another program has it, the commands go through that
program: through libvirt (`LibvirtMonitor`), or through a client of asyncio (`AsyncioMonitor`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from qcow2bm.qmp.actions import Action
from qcow2bm.qmp.answers import Answer
from qcow2bm.units import escape

LENT = "qcow2bm-scratch"
"""The label of the open files that are lent to QEMU."""

DEFAULT_TIMEOUT: float = 120
"""How many seconds each command may take, unless the caller says otherwise.

QEMU answers no command while it stores a bitmap, which may take seconds on a slow disk.
"""


class QmpCommands(ABC):
    """Sends commands to one QEMU; a context manager.

    *Guarantees*: every command is sent once. If its answer does not come, `QmpError` is raised, and
    only a new connection can tell whether QEMU did the command.

    Attributes:
        timeout: how many seconds QEMU may take to answer each command.
    """

    def __init__(self, timeout: float) -> None:
        """Raises `ValueError` unless the timeout is positive."""
        if not timeout > 0:
            raise ValueError(f"the timeout is {timeout}, must be more than 0 seconds")
        self.timeout = timeout

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:  # noqa: B027 - not every way has something to end
        """Ends the connection; QEMU runs on. A second call does nothing."""

    @abstractmethod
    def execute(self, command: str, arguments: dict[str, Any] | None = None) -> Answer:
        """Sends a command, and returns what QEMU answers.

        Raises:
            QmpRefusedError: QEMU refuses the command.
            QmpTimeoutError: QEMU does not answer in time.
            QmpError: the connection is lost.
        """

    @abstractmethod
    def lend(self, descriptor: int) -> int:
        """Lends QEMU an open file, and returns the number of the fdset that has it.

        The file has the label `LENT`.

        Raises:
            QmpError: QEMU refuses the file, or the connection takes no open file.
        """

    def take_back(self, fdset: int) -> None:
        """Has QEMU close a file that was lent, once no node uses it; raises as `execute` does."""
        self.execute("remove-fd", {"fdset-id": fdset})

    def transaction(self, actions: Sequence[Action]) -> None:
        """Has QEMU do all the actions, or none of them; raises as `execute` does."""
        self.execute("transaction", {"actions": list(actions)})


def one_line(text: str) -> str:
    """Returns a message of another program in one line that can be printed."""
    return escape(" ".join(text.split()))
