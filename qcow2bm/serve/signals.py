"""Noticing that the process is asked to end, in a program with signal handlers of its own."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from threading import Thread

_SIGNALS = (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)


class EndSignals:
    """Calls a function once, in a thread of its own, when the process is asked to end.

    Python runs signal handlers in the main thread, and the program that embeds Python may keep
    the main thread waiting. So a thread waits for the byte that Python's C handler writes.
    """

    def __init__(self, call: Callable[[], None]) -> None:
        """Replaces the handlers of the signals; only the main thread may call this."""
        self._call = call
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._old_descriptor = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._old = {number: signal.signal(number, _nothing) for number in _SIGNALS}
        self._thread = Thread(target=self._wait, name="qcow2bm signals", daemon=True)
        self._thread.start()

    def _wait(self) -> None:
        while received := os.read(self._reader, 1):
            if received[0] in _SIGNALS:
                self._call()
                return

    def close(self) -> None:
        """Waits for a call in progress, and prevents further calls.

        Only the main thread may call this. Handlers that were not Python's cannot be restored;
        these signals then do nothing.
        """
        signal.set_wakeup_fd(self._old_descriptor)
        for number, handler in self._old.items():
            if handler is not None:
                signal.signal(number, handler)
        os.close(self._writer)
        self._thread.join()
        os.close(self._reader)


def _nothing(*_: object) -> None:
    """Does nothing: the thread does the work."""
