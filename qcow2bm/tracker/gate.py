"""Letting writes in while nothing else has to happen, and waiting for those that are under way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition, local

from qcow2bm.errors import StateError


class Gate:
    """Counts who is inside, and lets nobody in while somebody wants it empty."""

    def __init__(self) -> None:
        self._condition = Condition()
        self._inside = 0
        self._is_shut = False
        self._thread = local()

    @property
    def _depth(self) -> int:
        """How often the thread that asks is inside."""
        depth: int = getattr(self._thread, "depth", 0)
        return depth

    @contextmanager
    def passage(self) -> Iterator[None]:
        """Is inside; waits before that while the gate is shut, unless the thread is inside."""
        with self._condition:
            if not self._depth:
                self._condition.wait_for(lambda: not self._is_shut)
            self._inside += 1
            self._thread.depth = self._depth + 1
        try:
            yield
        finally:
            with self._condition:
                self._inside -= 1
                self._thread.depth = self._depth - 1
                self._condition.notify_all()

    @contextmanager
    def empty(self) -> Iterator[None]:
        """Lets nobody in, and begins once nobody is inside."""
        with self._condition:
            self._is_shut = True
        try:
            with self._condition:
                self._condition.wait_for(lambda: not self._inside)
            yield
        finally:
            with self._condition:
                self._is_shut = False
                self._condition.notify_all()

    def require_outside(self) -> None:
        """Raises `StateError` in a thread that is inside: others may wait for it already."""
        if self._depth:
            raise StateError("inside a write", "outside of it", "the thread")
