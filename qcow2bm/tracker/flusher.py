"""Storing what has changed while marking goes on: once, until a stop is short, or every so often.

*Spec*: spec/tracking.md, "Flushing" and "Convergence".
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread

from qcow2bm.bitmaps.tracked_bitmap import PIECE_BYTES
from qcow2bm.errors import StateError
from qcow2bm.migration.lifecycle import has_ended
from qcow2bm.tracker.batches import Batches
from qcow2bm.tracker.reports import Convergence, FlushReport, Pending
from qcow2bm.tracker.session import Session
from qcow2bm.tracker.waiting import require_wanted

_GUESS_BYTES_PER_SECOND = 50 << 20  # as long as nothing was measured
_PROGRESS = 0.95  # a round is of use if it leaves no more than this part of what was left
_IDLE_ROUNDS = 4


class Flusher:
    """Flushes the bitmaps of a session."""

    def __init__(self, session: Session) -> None:
        """Nothing is flushed yet."""
        self._session = session
        self._batches = Batches()

    def pending(self) -> Pending:
        """See `Tracker.pending`."""
        session = self._session
        with session.exclusive("flush"):
            session.recording.fan_out()
            pieces = sum(bitmap.bits.touched.count(1) for bitmap in session.stored_here)
            size = pieces * PIECE_BYTES
            seconds = size / (session.flushing.per_second or _GUESS_BYTES_PER_SECOND)
            return Pending(size, pieces, seconds + 2 * session.barrier_seconds)

    def flush(self, max_bytes: int | None = None, deadline: float | None = None) -> FlushReport:
        """See `Tracker.flush`."""
        session = self._session
        with session.exclusive("flush"):
            begun = session.clock()
            before = session.intent.snapshot(session.recorder.paused()) if session.intent else None
            session.recording.fan_out()
            left = 1 << 62 if max_bytes is None else max(1, max_bytes // PIECE_BYTES)
            size = pieces = barriers = 0
            for batch in self._batches.due(session.stored_here, left):
                plan = session.store_pieces(batch)
                size, barriers = size + plan.length, barriers + plan.barriers
                pieces += sum(len(numbers) for _, numbers in batch)
                if deadline is not None and session.clock() - begun >= deadline:
                    break
                require_wanted()
            else:
                is_all = pieces < left and session.stores_all
                if before and session.intent and is_all:
                    with session.fatal():
                        session.intent.settle(before)
            return FlushReport(size, pieces, barriers, session.clock() - begun)

    def converge(
        self, max_downtime: float, timeout: float | None, progress: Callable[[Pending], None]
    ) -> Convergence:
        """See `Tracker.converge`."""
        session = self._session
        begun = session.clock()
        least, rounds, idle = float("inf"), 0, 0
        while True:
            pending = self.pending()
            progress(pending)
            # A rate that was not measured yet is a guess, too weak a reason to stop a machine.
            is_known = session.flushing.per_second is not None or not pending.pieces
            is_reached = is_known and pending.seconds <= max_downtime
            if is_known:
                idle = 0 if pending.seconds < least * _PROGRESS else idle + 1
                least = min(least, pending.seconds)
            is_late = timeout is not None and session.clock() - begun >= timeout
            if is_reached or is_late or idle >= _IDLE_ROUNDS:
                return Convergence(is_reached, pending.seconds, rounds, session.clock() - begun)
            self.flush()
            rounds += 1

    @contextmanager
    def background(
        self, flush: Callable[[int | None], object], interval: float, max_bytes: int | None
    ) -> Iterator[None]:
        """Calls ``flush(max_bytes)`` every ``interval`` seconds; see `Tracker.background`."""
        session = self._session
        session.require_free()
        is_over = threading.Event()

        def work() -> None:
            while not is_over.wait(interval):
                try:
                    flush(max_bytes)
                except StateError:
                    if has_ended(session.state):
                        return
                except BaseException as error:
                    session.fail_in_background(error)
                    return

        thread = Thread(target=work, name="qcow2bm flush", daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()
