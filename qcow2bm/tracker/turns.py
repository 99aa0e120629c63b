"""Letting one operation of a tracker run at a time.

A lock that is held while an operation runs could stay locked for ever: by an interrupt between
taking the lock and the block, or in a process that was forked meanwhile. Here a holder is recorded
instead, and the lock is held only while the record is read or changed.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import get_ident

from qcow2bm.tracker.block import Block
from qcow2bm.tracker.waiting import Changes


class Turns:
    """Lets one holder have its turn, and others wait."""

    def __init__(self) -> None:
        """Begins without a holder."""
        self.forget()

    def forget(self) -> None:
        """Forgets the holder: for a forked process, in which no other thread of its parent runs."""
        self._changes = Changes()
        self._waiting = 0
        self._holder: object = None
        self._thread: int | None = None

    @property
    def is_mine(self) -> bool:
        """Whether the calling thread has its turn, so that waiting for one would never end."""
        return self._thread == get_ident()

    @property
    def is_wanted(self) -> bool:
        """Whether others wait for their turn."""
        return self._waiting > 0

    def turn(
        self,
        begin: Callable[[], None] = lambda: None,
        end: Callable[[], None] = lambda: None,
        before_waiting: Callable[[], None] = lambda: None,
    ) -> Block:
        """Returns a context manager whose block runs in a turn.

        In the turn, ``begin`` is called before the block, and keeps the block from running if it
        raises. ``end`` is called when the turn ends. ``before_waiting`` is called if another has
        its turn, and keeps this from waiting if it raises.
        """
        holder = object()

        def take() -> None:
            with self._changes.lock:
                if self._holder is not None:
                    before_waiting()
                self._waiting += 1
                try:
                    self._changes.wait_for(lambda: self._holder is None)
                finally:
                    self._waiting -= 1
                self._holder, self._thread = holder, get_ident()
            begin()

        def give_back() -> None:
            if self._holder is holder:
                try:
                    end()
                finally:
                    self._free()

        return Block(take, give_back)

    def give_back_mine(self) -> None:
        """Ends the turn, if the calling thread has it."""
        if self.is_mine:
            self._free()

    def _free(self) -> None:
        with self._changes.lock:
            self._holder = self._thread = None
            self._changes.announce()
