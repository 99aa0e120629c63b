"""Letting one operation of a tracker run at a time.

A lock that is held while an operation runs could stay locked for ever: by an interrupt between
taking the lock and the block, or in a process that was forked meanwhile. Here a holder is recorded
instead, and the lock is held only while the record is read or changed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from threading import Condition, Lock, get_ident
from types import TracebackType


class Turns:
    """Lets one holder have its turn, and others wait."""

    def __init__(self) -> None:
        """Begins without a holder."""
        self.forget()

    def forget(self) -> None:
        """Forgets the holder: for a forked process, in which no other thread of its parent runs."""
        self._lock = Lock()
        self._changed = Condition(self._lock)
        self._holder: object = None
        self._thread: int | None = None

    @property
    def is_mine(self) -> bool:
        """Whether the calling thread has its turn, so that waiting for one would never end."""
        return self._thread == get_ident()

    def take(self, holder: object) -> None:
        """Waits for the turn."""
        with self._lock:
            self._changed.wait_for(lambda: self._holder is None)
            self._holder, self._thread = holder, get_ident()

    def give_back(self, holder: object) -> None:
        """Ends the turn, if ``holder`` has it."""
        try:
            self._give_back(holder)
        except BaseException:  # an interrupt
            self._give_back(holder)
            raise

    def give_back_mine(self) -> None:
        """Ends the turn, if the calling thread has it."""
        if self.is_mine:
            self.give_back(self._holder)

    def _give_back(self, holder: object) -> None:
        with self._lock:
            if self._holder is holder:
                self._holder = self._thread = None
                self._changed.notify_all()

    def turn(
        self,
        begin: Callable[[], None] = lambda: None,
        end: Callable[[], None] = lambda: None,
    ) -> AbstractContextManager[None]:
        """Returns a context manager whose block runs in a turn.

        ``begin`` is called before the block, and keeps the block from running if it raises. ``end``
        is called after the block.
        """
        return _Turn(self, begin, end)


class _Turn:
    """The context manager of `Turns.turn`."""

    def __init__(self, turns: Turns, begin: Callable[[], None], end: Callable[[], None]) -> None:
        self._turns, self._begin, self._end = turns, begin, end

    def __enter__(self) -> None:
        try:
            self._turns.take(self)
            self._begin()
        except BaseException:
            self._turns.give_back(self)
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._end()
        finally:
            self._turns.give_back(self)
