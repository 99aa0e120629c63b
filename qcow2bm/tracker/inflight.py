"""Knowing which writes of the guest are in flight, and waiting until none is (QEMU: draining).

An interrupt (Ctrl-C) can come at any line. Therefore the context managers here are classes, which
record themselves and take the record back if entering does not succeed: a generator would leave its
record behind as long as the traceback of the interrupt lives.

*Spec*: spec/tracking.md, "Marking".
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from threading import Condition, Lock, get_ident
from types import TracebackType

from qcow2bm.errors import StateError


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

    def begin(self, write: object) -> None:
        """Records a write, which need not be in flight yet if an interrupt comes.

        Before that the method waits while `drained` goes on, unless the calling thread has a write
        in flight already.
        """
        with self._lock:
            self._changed.wait_for(lambda: not self._drainers or self._is_in_write())
            self._threads[write] = get_ident()

    def end(self, write: object) -> None:
        """Records that a write has ended, in whichever thread; it may not have begun."""
        try:
            self._end(write)
        except BaseException:  # an interrupt
            self._end(write)
            raise

    def _end(self, write: object) -> None:
        with self._lock:
            self._threads.pop(write, None)
            self._changed.notify_all()

    def end_mine(self) -> None:
        """Records that all writes of the calling thread have ended."""
        mine = [write for write, thread in list(self._threads.items()) if thread == get_ident()]
        for write in mine:
            self.end(write)

    def _is_in_write(self) -> bool:
        """Whether the calling thread has a write in flight."""
        return get_ident() in self._threads.values()

    def drained(self) -> AbstractContextManager[None]:
        """Returns a context manager: no write begins in its block, which runs when none is left."""
        return _Drained(self)

    def drain(self, drainer: object) -> None:
        """Lets no write begin until `resume`, and waits until none is in flight."""
        with self._lock:
            self._drainers.add(drainer)
            self._changed.wait_for(lambda: not self._threads)

    def resume(self, drainer: object) -> None:
        """Lets writes begin again, as far as ``drainer`` kept them waiting."""
        try:
            self._resume(drainer)
        except BaseException:  # an interrupt
            self._resume(drainer)
            raise

    def _resume(self, drainer: object) -> None:
        with self._lock:
            self._drainers.discard(drainer)
            self._changed.notify_all()

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


class Write:
    """A context manager for a write of the guest, which is marked and in flight in the block."""

    def __init__(
        self, writes: InFlightWrites, mark: Callable[[int, int], None], start: int, length: int
    ) -> None:
        """``start`` and ``length`` are guest bytes, and are given to ``mark``."""
        self._writes, self._mark, self._range = writes, mark, (start, length)
        self._is_used = False

    def __enter__(self) -> None:
        """Waits until writes may begin, and marks.

        Raises:
            StateError: this object was entered before.
            ValueError, StateError: as ``mark`` does.
        """
        if self._is_used:
            raise StateError("used", "a new one for each write", "the context manager")
        self._is_used = True
        try:
            self._writes.begin(self)
            self._mark(*self._range)
        except BaseException:
            self._writes.end(self)
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Ends the write; the block may end in another thread than it began in."""
        self._writes.end(self)


class _Drained:
    """The context manager of `InFlightWrites.drained`."""

    def __init__(self, writes: InFlightWrites) -> None:
        self._writes = writes

    def __enter__(self) -> None:
        try:
            self._writes.drain(self)
        except BaseException:
            self._writes.resume(self)
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._writes.resume(self)
