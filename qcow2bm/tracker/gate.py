"""Letting writes in while nothing else has to happen, and waiting for those that are under way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition


class Gate:
    """Counts who is inside, and lets nobody in while somebody wants it empty."""

    def __init__(self) -> None:
        self._condition = Condition()
        self._inside = 0
        self._is_shut = False

    @contextmanager
    def passage(self) -> Iterator[None]:
        """Is inside; waits before that while the gate is shut."""
        with self._condition:
            self._condition.wait_for(lambda: not self._is_shut)
            self._inside += 1
        try:
            yield
        finally:
            with self._condition:
                self._inside -= 1
                self._condition.notify_all()

    @contextmanager
    def empty(self) -> Iterator[None]:
        """Lets nobody in, and begins once nobody is inside."""
        with self._condition:
            self._is_shut = True
            self._condition.wait_for(lambda: not self._inside)
        try:
            yield
        finally:
            with self._condition:
                self._is_shut = False
                self._condition.notify_all()
