"""Knowing which writes of the guest are in flight, and waiting until none is (QEMU: draining).

*Spec*: spec/tracking.md, "Marking".
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Condition, Lock, get_ident

from qcow2bm.errors import StateError
from qcow2bm.tracker.block import Block


class InFlightWrites:
    """The writes that have begun and have not ended; `drained` keeps new ones waiting."""

    def __init__(self) -> None:
        """Begins without any write."""
        self._threads: dict[object, int] = {}  # by write, the thread in which the write began
        self._drainers: set[object] = set()
        self.forget()

    def forget(self) -> None:
        """Forgets all writes: for a forked process, in which no other thread of its parent runs.

        Such a thread may hold the lock, so the lock is replaced.
        """
        self._lock = Lock()
        self._changed = Condition(self._lock)
        self._threads.clear()
        self._drainers.clear()

    def write(self, mark: Callable[[], None]) -> Block:
        """Returns a context manager: a write is in flight while its block runs.

        Before that it waits while `drained` goes on, unless its thread has a write in flight
        already; then it calls ``mark``. The block may end in another thread than it began in.
        """
        write = object()

        def begin() -> None:
            with self._lock:
                self._changed.wait_for(lambda: not self._drainers or self._is_in_write())
                self._threads[write] = get_ident()
            mark()

        return Block(begin, lambda: self._end(write))

    def _end(self, write: object) -> None:
        with self._lock:
            self._threads.pop(write, None)
            self._changed.notify_all()

    def end_mine(self) -> None:
        """Records that all writes of the calling thread have ended."""
        mine = [write for write, thread in list(self._threads.items()) if thread == get_ident()]
        for write in mine:
            self._end(write)

    def _is_in_write(self) -> bool:
        """Whether the calling thread has a write in flight."""
        return get_ident() in self._threads.values()

    def drained(self) -> Block:
        """Returns a context manager: no write begins in its block, which runs when none is left."""
        drainer = object()

        def begin() -> None:
            with self._lock:
                self._drainers.add(drainer)
                self._changed.wait_for(lambda: not self._threads)

        def end() -> None:
            with self._lock:
                self._drainers.discard(drainer)
                self._changed.notify_all()

        return Block(begin, end)

    def end_draining(self) -> None:
        """Lets writes begin that wait: for the end of tracking, when no mark is taken any more."""
        with self._lock:
            self._drainers.clear()
            self._changed.notify_all()

    def require_outside(self) -> None:
        """Raises `StateError` if the calling thread has a write in flight.

        Other threads may already wait for that write to end.
        """
        with self._lock:
            if self._is_in_write():
                raise StateError("inside a write", "outside of it", "the thread")
