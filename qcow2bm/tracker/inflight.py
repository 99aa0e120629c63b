"""Letting writes in while nothing else has to happen, and waiting for those that are under way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition, get_ident

from qcow2bm.errors import StateError


class InFlightWrites:
    """Knows who is inside, and lets nobody in while somebody wants it empty."""

    def __init__(self) -> None:
        self._condition = Condition()
        self._inside: dict[object, int] = {}  # a token of each passage, and the thread it began in
        self._is_shut = False

    @contextmanager
    def passage(self) -> Iterator[None]:
        """Is inside; waits before that while the gate is shut, unless its thread is inside.

        The block may end in another thread than it began in.
        """
        token = object()
        try:
            with self._condition:
                self._condition.wait_for(lambda: not self._is_shut or self._is_inside())
                self._inside[token] = get_ident()
            yield
        finally:  # from wherever an interrupt comes, the token does not stay behind
            with self._condition:
                self._inside.pop(token, None)
                self._condition.notify_all()

    def _is_inside(self) -> bool:
        """Whether the thread that asks is."""
        return get_ident() in self._inside.values()

    @contextmanager
    def drained(self) -> Iterator[None]:
        """Lets nobody in, and begins once nobody is inside."""
        try:
            with self._condition:
                self._is_shut = True
                self._condition.wait_for(lambda: not self._inside)
            yield
        finally:
            with self._condition:
                self._is_shut = False
                self._condition.notify_all()

    def require_outside(self) -> None:
        """Raises `StateError` in a thread that is inside: others may wait for it already."""
        with self._condition:
            if self._is_inside():
                raise StateError("inside a write", "outside of it", "the thread")
