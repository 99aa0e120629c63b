"""Knowing which writes of the guest are in flight, and waiting until none is (QEMU: draining).

*Spec*: spec/tracking.md, "Marking" and "asyncio".
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from threading import get_ident

from qcow2bm.errors import StateError
from qcow2bm.tracker.block import AsyncBlock, Block
from qcow2bm.tracker.waiting import Changes

_STUCK_SECONDS = 60.0


class _Write:
    """A write of the guest."""

    __slots__ = ("is_over", "thread")

    def __init__(self) -> None:
        self.thread = get_ident()
        self.is_over = False


_WITHIN: ContextVar[tuple[_Write, ...]] = ContextVar("qcow2bm writes", default=())
"""The writes that a thread or task is inside of, and those of the task that began this one.

A task that was begun inside a write belongs to it: the write may wait for the task.
"""


class InFlightWrites:
    """The writes that have begun and have not ended; `drained` keeps new ones waiting."""

    def __init__(
        self,
        others_wait: Callable[[], bool] = lambda: False,
        stuck_seconds: float = _STUCK_SECONDS,
    ) -> None:
        """Begins without any write.

        Args:
            others_wait: whether anybody waits for what goes on while writes are drained.
            stuck_seconds: how long none of the writes may end while others wait.
        """
        self._writes: set[_Write] = set()
        self._drainers: set[object] = set()
        self._others_wait = others_wait
        self._stuck_seconds = stuck_seconds
        self.forget()

    def forget(self) -> None:
        """Forgets all writes: for a forked process, in which no other thread of its parent runs.

        Such a thread may hold the lock, so the lock is replaced.
        """
        self._changes = Changes()
        self._waiting = 0  # at the gate
        self._ended = 0
        self._writes.clear()
        self._drainers.clear()

    def write(self, mark: Callable[[], None]) -> Block:
        """Returns a context manager: a write is in flight while its block runs.

        Before that it waits while `drained` goes on, unless it is inside another write that is in
        flight; then it calls ``mark``. The block may end in another thread than it began in.

        Raises, on entering:
            StateError: it would wait for other writes of this thread, which would never end.
        """
        write = _Write()

        def begin() -> None:
            self._enter(write)
            with self._changes.lock:
                if not self._admit(write):
                    self._require_other_threads()
                    self._waiting += 1
                    try:
                        self._changes.wait_for(lambda: self._admit(write))
                    finally:
                        self._waiting -= 1
            mark()

        return Block(begin, lambda: self._end(write))

    def async_write(self, mark: Callable[[], Awaitable[None]]) -> AsyncBlock:
        """Returns `write` as an asynchronous context manager: no thread waits."""
        write = _Write()

        async def begin() -> None:
            self._enter(write)
            self._waiting += 1
            try:
                await self._changes.until(lambda: self._admit(write))
            finally:
                self._waiting -= 1
            await mark()

        return AsyncBlock(begin, lambda: self._end(write))

    def _enter(self, write: _Write) -> None:
        """What this thread or task does from now on is inside the write."""
        before = _WITHIN.get()
        _WITHIN.set((*(one for one in before if not one.is_over), write))

    def _admit(self, write: _Write) -> bool:
        """Lets a write begin, if it may; returns whether it began."""
        if self._drainers and not self._is_in_write():
            return False
        self._writes.add(write)
        return True

    def _end(self, write: _Write) -> None:
        write.is_over = True
        with self._changes.lock:
            self._writes.discard(write)
            self._ended += 1
            self._changes.announce()

    def end_mine(self) -> None:
        """Records that the writes have ended that the caller is inside of, and that began here.

        Those of other tasks in this thread go on.
        """
        for write in _WITHIN.get():
            if write.thread == get_ident() and write in self._writes:
                self._end(write)

    def _is_in_write(self) -> bool:
        """Whether the caller is inside a write that is in flight."""
        return any(write in self._writes for write in _WITHIN.get())

    def drained(self) -> Block:
        """Returns a context manager: no write begins in its block, which runs when none is left.

        Raises, on entering:
            StateError: it would wait for other writes of this thread, which would never end; or
                others wait, and no write has ended for a long time.
        """
        drainer = object()

        def begin() -> None:
            with self._changes.lock:
                self._drainers.add(drainer)
                while self._writes:
                    self._require_other_threads()
                    self._wait_for_an_end()

        def end() -> None:
            with self._changes.lock:
                self._drainers.discard(drainer)
                self._changes.announce()

        return Block(begin, end)

    def _wait_for_an_end(self) -> None:
        ended = self._ended
        if self._changes.wait_for(lambda: self._ended != ended, self._stuck_seconds):
            return
        if self._waiting or self._others_wait():
            state = f"behind {len(self._writes)} writes, none of which ended while others waited"
            raise StateError(state, "free of writes that wait for other writes", "the tracker")

    def end_draining(self) -> None:
        """Lets writes begin that wait: for the end of tracking, when no mark is taken any more."""
        with self._changes.lock:
            self._drainers.clear()
            self._changes.announce()

    def require_outside(self) -> None:
        """Raises `StateError` if the caller is inside a write that is in flight.

        Other threads may already wait for that write to end.
        """
        with self._changes.lock:
            if self._is_in_write():
                raise StateError("inside a write", "outside of it", "the thread")

    def require_undrained(self) -> None:
        """Raises `StateError` if this thread has writes in flight that are waited for."""
        with self._changes.lock:
            if self._drainers:
                self._require_other_threads()

    def _require_other_threads(self) -> None:
        """Raises if waiting for the writes in flight would keep some of them from ending."""
        if any(write.thread == get_ident() for write in self._writes):
            state = "the one in which writes began that have to end first"
            required = "another one: in an event loop use AsyncioTracker"
            raise StateError(state, required, "the thread")
