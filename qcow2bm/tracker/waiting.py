"""Waiting until something has changed, in threads and in tasks of asyncio.

*Spec*: spec/tracking.md, "asyncio".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from threading import Condition, Lock
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from asyncio import Future


class GivenUpError(Exception):
    """An operation was given up before it did anything."""


class Cancellation:
    """Lets an operation that runs in another thread be given up while it waits."""

    def __init__(self) -> None:
        """The operation is wanted."""
        self.is_set = False
        self._changes: Changes | None = None

    def set(self) -> None:
        """Lets the operation raise `GivenUpError` if it waits, or when it would begin to wait."""
        self.is_set = True
        changes = self._changes
        if changes:
            with changes.lock:
                changes.announce()

    def concerns(self, changes: Changes) -> None:
        """Records what the operation waits for now."""
        self._changes = changes


_CANCELLATION: ContextVar[Cancellation | None] = ContextVar("qcow2bm cancellation", default=None)


@contextmanager
def cancelled_by(cancellation: Cancellation | None) -> Iterator[None]:
    """Lets operations in the block be given up by a cancellation, or by none."""
    token = _CANCELLATION.set(cancellation)
    try:
        yield
    finally:
        _CANCELLATION.reset(token)


def require_wanted() -> None:
    """Raises `GivenUpError` if the operation that runs here was given up."""
    cancellation = _CANCELLATION.get()
    if cancellation and cancellation.is_set:
        raise GivenUpError


class Changes:
    """A state that several threads and tasks change, and wait for.

    Attributes:
        lock: is held while the state is looked at or changed.
    """

    def __init__(self) -> None:
        """Nobody waits."""
        self.lock = Lock()
        self._threads = Condition(self.lock)
        self._tasks: list[Future[None]] = []

    def announce(self) -> None:
        """Lets all who wait look at the state again; the lock is held."""
        self._threads.notify_all()
        for future in self._tasks:
            with suppress(RuntimeError):  # the event loop is closed
                future.get_loop().call_soon_threadsafe(_wake, future)

    def wait_for(self, is_reached: Callable[[], bool], timeout: float | None = None) -> bool:
        """Waits in a thread; the lock is held, but not meanwhile.

        Returns whether the state was reached within ``timeout`` seconds.

        Raises:
            GivenUpError: the operation is not wanted any more.
        """
        cancellation = _CANCELLATION.get()
        if cancellation is None:
            return self._threads.wait_for(is_reached, timeout)
        cancellation.concerns(self)
        self._threads.wait_for(lambda: cancellation.is_set or is_reached(), timeout)
        require_wanted()
        return is_reached()

    async def until(self, attempt: Callable[[], bool]) -> None:
        """Waits in a task until ``attempt``, which is called with the lock held, succeeds.

        If the task is cancelled, no attempt has succeeded.
        """
        from asyncio import get_running_loop  # asyncio takes long to load

        loop = get_running_loop()
        while True:
            with self.lock:
                if attempt():
                    return
                future = loop.create_future()
                self._tasks.append(future)
            try:
                await future
            finally:
                with self.lock:
                    self._tasks.remove(future)


def _wake(future: Future[None]) -> None:
    if not future.done():
        future.set_result(None)
