"""A QMP connection without async: sends commands, returns answers, raises errors of this library.

The package qemu.qmp does the work. It is loaded with the first connection, and not before.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import socket
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from qcow2bm.errors import QmpError, QmpRefusedError, QmpTimeoutError, UnsupportedError
from qcow2bm.qmp.answers import Answer
from qcow2bm.qmp.commands import DEFAULT_TIMEOUT, LENT, QmpCommands, one_line

if TYPE_CHECKING:
    from qemu.qmp import QMPClient

_GREETING_SECONDS = 10  # QEMU greets at once, unless it serves another client
_GOODBYE_SECONDS = 5
_HOST_AND_PORT = re.compile(r"\[?([^/\[\]]+)\]?:(\d{1,5})")


class Monitor(QmpCommands):
    """A connection to the QMP server of a running QEMU; a context manager for one thread.

    *Guarantees*: no command waits for longer than the timeout, whatever the server sends or leaves
    out. Events that QEMU sends are dropped.
    """

    def __init__(self, address: str | socket.socket, timeout: float = DEFAULT_TIMEOUT) -> None:
        """Connects to a QMP server.

        Args:
            address: the path of a unix socket, or HOST:PORT; or a socket that is connected, which
                the monitor closes.
            timeout: how many seconds QEMU may take to answer each command.

        Raises:
            ValueError: the timeout is not positive.
            UnsupportedError: the package qemu.qmp is not installed.
            QmpError: there is no such server, or it does not answer.
        """
        super().__init__(timeout)
        self._client = _new_client()
        self._socket: socket.socket | None = None
        self._runner = asyncio.Runner()
        self._is_closed = False
        try:
            self._connect(address)
        except BaseException:
            self._end()
            raise

    def _connect(self, address: str | socket.socket) -> None:
        from qemu.qmp import ConnectError

        seconds = min(_GREETING_SECONDS, self.timeout)
        try:
            if isinstance(address, str):
                self._socket = _connected(_parse(address), seconds)
            else:
                self._socket = address
                self._socket.setblocking(False)
            self._run(self._client.connect(self._socket), seconds)
        except TimeoutError as error:
            reason = (
                "no greeting: another client is connected, QEMU hangs, or this is no QMP server"
            )
            raise QmpError("", reason) from error
        except (ConnectError, OSError) as error:
            cause = error.exc if isinstance(error, ConnectError) else error
            raise QmpError("", _why(cause)) from error

    def close(self) -> None:
        """Ends the connection; QEMU runs on. A second call does nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        try:
            with suppress(Exception):  # if it is lost, the command under way has raised that
                self._run(self._client.disconnect(), _GOODBYE_SECONDS)
        finally:
            self._end()

    def _end(self) -> None:
        self._hang_up()
        self._runner.close()
        if self._socket:
            self._socket.close()

    def _hang_up(self) -> None:
        """Ends the connection at once; or what is not sent yet would be waited for."""
        if self._socket:
            with suppress(OSError):  # the server has done so
                self._socket.shutdown(socket.SHUT_RDWR)

    def _run(self, step: Coroutine[Any, Any, object], seconds: float) -> object:
        """Runs a coroutine to its end; raises `TimeoutError` if that takes longer."""
        return self._runner.run(asyncio.wait_for(step, seconds))

    def execute(self, command: str, arguments: dict[str, Any] | None = None) -> Answer:
        """Sends a command, and returns what QEMU answers.

        Raises:
            QmpRefusedError: QEMU refuses the command.
            QmpTimeoutError: QEMU does not answer in time. The connection is closed then, because
                QEMU would answer no later command before this one.
            QmpError: the connection is lost.
        """
        if self._is_closed:
            raise QmpError(command, "the connection is closed")
        with translated(command):
            try:
                value = self._run(self._client.execute(command, arguments), self.timeout)
            except TimeoutError as error:
                self._hang_up()
                self.close()
                raise QmpTimeoutError(command, self.timeout) from error
        return Answer(command, value)

    def lend(self, descriptor: int) -> int:
        """Lends QEMU an open file, and returns the number of the fdset that has it.

        Raises:
            QmpError: QEMU refuses the file, or the connection is no unix socket.
        """
        from qemu.qmp import QMPError

        try:
            self._client.send_fd_scm(descriptor)
        except (QMPError, OSError) as error:
            raise QmpError("add-fd", one_line(str(error))) from error
        return self.execute("add-fd", {"opaque": LENT})["fdset-id"].number()


@contextmanager
def translated(command: str) -> Iterator[None]:
    """Raises errors of this library instead of those of qemu.qmp.

    Raises:
        QmpRefusedError: QEMU refuses the command.
        QmpError: the connection is lost.
    """
    from qemu.qmp import ExecuteError, QMPError

    try:
        yield
    except ExecuteError as error:
        raise QmpRefusedError(command, one_line(str(error))) from error
    except (QMPError, OSError, EOFError) as error:
        raise QmpError(command, f"the connection is lost ({one_line(str(error))})") from error


def _connected(where: str | tuple[str, int], seconds: float) -> socket.socket:
    """Returns a socket that is connected to a path, or to a host and a port; raises `OSError`."""
    if isinstance(where, str):
        connected = socket.socket(socket.AF_UNIX)
        try:
            connected.settimeout(seconds)
            connected.connect(where)
        except BaseException:
            connected.close()
            raise
    else:
        connected = socket.create_connection(where, seconds)
    connected.setblocking(False)
    return connected


def _new_client() -> QMPClient:
    try:
        from qemu.qmp import QMPClient
    except ImportError as error:
        feature = 'QMP without the package qemu.qmp; install it: pip install "qcow2bm[qmp]"'
        raise UnsupportedError(feature) from error
    # qemu.qmp logs what it raises, and without a handler Python would print that.
    logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())
    client = QMPClient("qcow2bm")
    # This listener would keep all events until they are asked for, which is never.
    client.events.event_filter = lambda event: False
    return client


def _why(error: BaseException) -> str:
    """Returns why no connection could be made, in words for the operator."""
    if isinstance(error, EOFError):
        return "the server closed the connection at once"
    if isinstance(error, OSError) and error.errno:  # a name that is not found has a negative one
        return os.strerror(error.errno) if error.errno > 0 else one_line(str(error.strerror))
    said = one_line(str(error)) or type(error).__name__
    if "Greeting" in said:
        return f"this is no QMP server: QEMU opens one with -qmp, not with -monitor ({said})"
    return said


def _parse(address: str) -> str | tuple[str, int]:
    """Returns the address as qemu.qmp takes it: a path, or a host and a port.

    A path that exists is taken as a path, even if it looks like HOST:PORT. Any other address may
    also be written as for QEMU: ``unix:PATH,server=on`` or ``tcp:HOST:PORT``.
    """
    if os.path.exists(address):
        return address
    kind, colon, rest = address.partition(":")
    if colon and kind in ("unix", "tcp"):
        address = rest.partition(",")[0]
    found = None if kind == "unix" else _HOST_AND_PORT.fullmatch(address)
    return (found[1], int(found[2])) if found else address
