"""Knowing which writes of the guest are in flight, and waiting until none is (QEMU: draining).

*Spec*: spec/tracking.md, "Marking".
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition, get_ident

from qcow2bm.errors import StateError


class InFlightWrites:
    """The writes that have begun and have not ended; `drained` keeps new ones waiting."""

    def __init__(self) -> None:
        self._condition = Condition()
        self._threads: dict[object, int] = {}  # by a token of each write, the thread it began in
        self._is_draining = False

    @contextmanager
    def write(self) -> Iterator[None]:
        """A write is in flight while the block runs.

        Before that it waits while `drained` goes on, unless its thread has a write in flight
        already. The block may end in another thread than it began in.
        """
        token = object()
        try:
            with self._condition:
                self._condition.wait_for(lambda: not self._is_draining or self._is_in_write())
                self._threads[token] = get_ident()
            yield
        finally:  # wherever an interrupt comes, the token does not stay behind
            with self._condition:
                self._threads.pop(token, None)
                self._condition.notify_all()

    def _is_in_write(self) -> bool:
        """Whether the calling thread has a write in flight."""
        return get_ident() in self._threads.values()

    @contextmanager
    def drained(self) -> Iterator[None]:
        """Lets no write begin, and runs the block once none is in flight."""
        try:
            with self._condition:
                self._is_draining = True
                self._condition.wait_for(lambda: not self._threads)
            yield
        finally:
            with self._condition:
                self._is_draining = False
                self._condition.notify_all()

    def require_outside(self) -> None:
        """Raises `StateError` if the calling thread has a write in flight.

        Other threads may already wait for that write to end.
        """
        with self._condition:
            if self._is_in_write():
                raise StateError("inside a write", "outside of it", "the thread")
