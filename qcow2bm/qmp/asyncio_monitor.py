"""QMP by way of a client of asyncio that the caller has connected.

The functions of this library wait for QEMU's answers. So they run in a thread of their own, and
each command goes to the client in its event loop, which goes on meanwhile.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from qcow2bm.errors import QmpError, QmpTimeoutError
from qcow2bm.qmp.answers import Answer
from qcow2bm.qmp.client import translated
from qcow2bm.qmp.commands import DEFAULT_TIMEOUT, LENT, QmpCommands

if TYPE_CHECKING:
    from qemu.qmp import QMPClient

P = ParamSpec("P")
T = TypeVar("T")


class AsyncioMonitor(QmpCommands):
    """Sends QMP commands through a client of qemu.qmp, from another thread than the client's loop.

    `run` begins that thread. The client stays connected, and its owner may send commands meanwhile.
    """

    def __init__(self, client: QMPClient, timeout: float = DEFAULT_TIMEOUT) -> None:
        """Is called in the event loop of a client that is connected.

        Args:
            client: the client.
            timeout: how many seconds QEMU may take to answer each command.

        Raises:
            ValueError: the timeout is not positive.
            RuntimeError: no event loop runs here.
        """
        super().__init__(timeout)
        self._client = client
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._has_timed_out = False

    async def run(
        self, work: Callable[Concatenate[QmpCommands, P], T], *arguments: P.args, **named: P.kwargs
    ) -> T:
        """Runs a function of this library in a thread, with this monitor as its first argument.

        >>> report = await AsyncioMonitor(client).run(live.offload, "vm.bitmaps")  # doctest: +SKIP

        If the task is cancelled, the function still ends, and only then is the cancellation raised:
        what the function was doing is done as a whole.

        Raises what the function raises.
        """
        thread = asyncio.ensure_future(asyncio.to_thread(work, self, *arguments, **named))
        try:
            return await asyncio.shield(thread)
        except asyncio.CancelledError:
            while not thread.done():  # however often it is cancelled
                with suppress(asyncio.CancelledError):
                    await asyncio.wait([thread])
            raise

    def execute(self, command: str, arguments: dict[str, Any] | None = None) -> Answer:
        """Sends a command, and returns what QEMU answers; raises as `QmpCommands.execute` does."""
        return self._send(command, arguments, None)

    def lend(self, descriptor: int) -> int:
        """Lends QEMU an open file, and returns the number of the fdset that has it.

        Raises:
            QmpError: QEMU refuses the file, or the connection is no unix socket.
        """
        return self._send("add-fd", {"opaque": LENT}, descriptor)["fdset-id"].number()

    def _send(
        self, command: str, arguments: dict[str, Any] | None, descriptor: int | None
    ) -> Answer:
        async def send() -> object:
            if descriptor is not None:
                self._client.send_fd_scm(descriptor)
            return await self._client.execute(command, arguments)

        if self._has_timed_out:
            raise QmpError(command, "an earlier command was not answered in time")
        if threading.get_ident() == self._thread:
            raise RuntimeError("in its own event loop a command would never end: use run")
        sent = asyncio.run_coroutine_threadsafe(send(), self._loop)
        with translated(command):
            try:
                return Answer(command, sent.result(self.timeout))
            except TimeoutError as error:
                self._has_timed_out = True  # QEMU would answer no later command before this one
                sent.cancel()
                raise QmpTimeoutError(command, self.timeout) from error
