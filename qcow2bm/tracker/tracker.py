"""Tracking the writes to a disk in its persistent bitmaps, and storing them as they change.

*Spec*: spec/tracking.md and spec/lifecycle.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn

from qcow2bm.bitmaps.tracked_store import TrackedStore
from qcow2bm.log import logger
from qcow2bm.migration.lifecycle import State
from qcow2bm.storage.file_identity import FilePath
from qcow2bm.storage.write_guard import WriteGuard
from qcow2bm.tracker import handover
from qcow2bm.tracker.edit import TrackerEdit, rotate
from qcow2bm.tracker.flusher import Flusher
from qcow2bm.tracker.reports import (
    Activation,
    Convergence,
    FlushReport,
    IntentReport,
    Pending,
    StopReport,
)
from qcow2bm.tracker.session import Session

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from qcow2bm.migration.evidence import Policy
    from qcow2bm.migration.intent import Intent


class Tracker:
    """Records writes to a disk in bitmaps of its image, which are in_use meanwhile.

    Made by `qcow2bm.Image.track`. Thread-safe; for tasks there is `AsyncioTracker`. As a context
    manager it stops when the block ends, also where KeyboardInterrupt, SystemExit or a cancellation
    ends the block. If any other exception does, it abandons.

    *Guarantees*: a bitmap on disk without in_use has every bit marked since tracking began
    (INV-SUPERSET). If the process dies, the bitmaps are in_use, so no reader believes them.

    Attributes:
        mark: ``mark(start, length)`` records that guest bytes are written. Call it before the
            write is acknowledged, and wait until it returns. With an intent bitmap call it before
            the write begins: it returns once a crash cannot lose the mark any more. Raises
            ValueError for a range that is not on the disk, and marks nothing of it; StateError once
            tracking has ended.
    """

    def __init__(
        self,
        storage: WriteGuard,
        store: TrackedStore,
        *,
        on_end: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        intent: Intent | None = None,
    ) -> None:
        """Tracks the bitmaps of the ``store``.

        Args:
            storage: of the image.
            store: the image, in which these bitmaps are in_use.
            on_end: called once tracking has ended.
            clock: the time in seconds.
            intent: the intent bitmap of the image, if writes are to wait for it.

        Raises:
            StorageError: the intent bitmap could not be read.
        """
        self._session = Session(storage, store, on_end=on_end, clock=clock)
        self._flusher = Flusher(self._session)
        if intent:
            self._session.begin_intent(intent)
        self.mark = self._session.marker()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.state in ("stopped", "abandoned"):
            return
        if self.state == "inactive" or (kind and issubclass(kind, Exception)):
            self.give_up()
            return
        if kind:  # the program is told to end: nothing is wrong with what was recorded
            self._session.release_mine()
        try:
            self.stop()  # raises if tracking has failed
        except BaseException as failure:
            self.give_up()
            if not kind or not isinstance(failure, Exception):
                raise
            logger.error("the bitmaps stay in use: %s", failure)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Tracker cannot be pickled")

    @property
    def state(self) -> State:
        """Whether tracking goes on, or how it ended: "failed" if a write or a barrier failed.

        While it is "inactive", the image is given away, and nothing is written to it. All states
        are in spec/lifecycle.md.
        """
        return self._session.state

    @property
    def names(self) -> list[str]:
        """The names of the bitmaps that are tracked."""
        return [bitmap.name for bitmap in self._session.recording.bitmaps]

    @property
    def activation(self) -> Activation:
        """The result of the last `activate`; "unchanged" before the disk is given away.

        Raises:
            StateError: the image is given away, or tracking has ended.
        """
        return handover.last_activation(self._session)

    def require_free(self) -> None:
        """Returns if this thread may call what waits for writes and edits to end.

        Raises:
            StateError: this thread is inside `writing` or `edit`.
        """
        self._session.require_free()

    @property
    def intent(self) -> IntentReport | None:
        """What waiting for the intent bitmap has cost so far; None without one."""
        log = self._session.intent
        return IntentReport(log.waits, log.barriers) if log else None

    def mark_many(self, ranges: NDArray[np.int64]) -> None:
        """`mark` for many ranges at once: (start, length) in guest bytes, int64[n, 2].

        Raises:
            ValueError: one of them is not on the disk; then nothing is marked.
            StateError: tracking has ended.
        """
        self._session.recorder.mark_many(ranges)
        if self._session.intent:
            self._session.intent.wait_many(ranges)

    def writing(self, start: int, length: int) -> AbstractContextManager[object]:
        """Marks a write of the guest, which is in flight while the block runs: `stop` waits for it.

        Inside the block, every method that may have to wait for writes raises `StateError`:
        `pending`, `flush`, `stop`, `abandon`, `rotate`, `edit`.

        Raises:
            ValueError, StateError: as `mark` does, before the block begins.
            StateError: it would wait for other writes of this thread, which would never end.
        """
        return self._session.in_flight.write(lambda: self.mark(start, length))

    def async_writing(self, start: int, length: int) -> AbstractAsyncContextManager[None]:
        """`writing` in a task of asyncio, which keeps no thread waiting.

        Raises ValueError and StateError as `mark` does, before the block begins.
        """
        intent = self._session.intent

        async def mark() -> None:
            if intent and intent.is_settled(start, length):
                return
            self._session.recorder.mark(start, length)
            if intent:
                await intent.until_written(start, length)

        return self._session.in_flight.async_write(mark)

    @property
    def pending(self) -> Pending:
        """The amount that is not stored yet. Raises `StateError` once tracking has ended."""
        return self._flusher.pending()

    def flush(self, max_bytes: int | None = None, deadline: float | None = None) -> FlushReport:
        """Stores what has changed, while marking goes on; the bitmaps stay in_use.

        Args:
            max_bytes: how much bitmap data to write, about; at least a piece is written.
            deadline: how many seconds to go on, about.

        Raises:
            CommitError: a write or barrier failed. Tracking has ended, and the bitmaps stay in_use.
            StateError: tracking has ended before.
        """
        return self._flusher.flush(max_bytes, deadline)

    def stop(self) -> StopReport:
        """Stores what is left and makes the bitmaps valid: the short pause of a migration.

        Waits for writes that are inside `writing`. Every mark that returned before is stored.

        Raises:
            CommitError: a write or barrier failed. Tracking has ended all the same. Unless the
                outcome is "unknown", the bitmaps stay in_use.
            StateError: tracking has ended before.
        """
        session = self._session
        with session.exclusive("stop"), session.in_flight.drained():
            handover.cancel_before_stop(session)
            with session.fatal():
                report = session.store_all("stop")
                session.end("stop")
                return report

    def converge(
        self,
        max_downtime: float,
        timeout: float | None = None,
        progress: Callable[[Pending], None] = lambda pending: None,
    ) -> Convergence:
        """Flushes again and again until a stop would take at most so many seconds.

        It gives up when several rounds in a row leave no less to be written: bits are then set as
        fast as they are stored, and a stop would take about `Convergence.seconds`.

        Args:
            max_downtime: how long a stop may take, in seconds.
            timeout: after how many seconds to give up.
            progress: called before every round with what is pending.

        Raises:
            As `flush` does.
        """
        return self._flusher.converge(max_downtime, timeout, progress)

    def background(
        self, interval: float, max_bytes_per_second: float | None = None
    ) -> AbstractContextManager[None]:
        """Flushes every ``interval`` seconds, in a thread of its own, while the block runs.

        With ``max_bytes_per_second`` at most about so much bitmap data is written. If a flush
        fails, tracking has ended, and every later call raises `StateError` with the failure as its
        cause. The failure is logged, too.
        """
        limit = None if max_bytes_per_second is None else int(max_bytes_per_second * interval)
        return self._flusher.background(self.flush, interval, limit)

    def rotate(self, name: str, new_name: str) -> None:
        """Freezes a bitmap for a backup, and goes on in a fresh one: no write falls between.

        ``name`` is then disabled and valid on disk, so that others can read it, and ``new_name``,
        of the same granularity, is tracked in its place. Waits for writes that are inside
        `writing`; a program that only calls `mark` must not write meanwhile. If the process dies,
        either both are in_use, or the frozen bitmap is valid and the fresh one in_use.

        Raises:
            BitmapNotFoundError: no bitmap of that name is tracked.
            BitmapExistsError, LimitError, ValueError: there cannot be one of the new name. Tracking
                goes on.
            CommitError: a write or barrier failed. Tracking has ended, and the bitmaps stay in_use,
                but for the frozen one if the commit was done.
            StorageError: there is no room, or reading failed.
            StateError: tracking has ended before.
        """
        rotate(self._session, name, new_name)

    def edit(self) -> TrackerEdit:
        """Changes to the bitmaps of the image while they are tracked: ``with tracker.edit() as``.

        All of them are committed together when the block ends. If it ends by an exception, nothing
        is changed. Nothing is flushed inside the block, but marking goes on.

        Raises:
            StateError: tracking has ended.
        """
        return TrackerEdit(self._session)

    def begin_migration(self, *, carried: Iterable[str] = (), sentinel: bool = True) -> None:
        """Prepares for `inactivate` while the guest runs, so that the stop is short.

        Marking and flushing go on, but the set of bitmaps does not change. The arguments hold until
        `cancel_migration`, until `activate` has taken the image back, or until tracking has ended.

        Args:
            carried: the names of the bitmaps that the migration itself carries to the other side:
                they are not stored here, and stay in_use on disk.
            sentinel: whether to add a bitmap that tells afterwards whether the disk was written
                to. Without it `activate` can never know. No sentinel is added to an image whose
                bitmaps are stale.

        Raises:
            BitmapNotFoundError: one of the names is not tracked.
            LimitError, StorageError: there is no room for the sentinel; nothing is changed.
            CommitError: a write or barrier failed. Tracking has ended, and the bitmaps stay in_use.
            StateError: a migration was begun before, or tracking has ended.
        """
        with self._session.exclusive("begin_migration"):
            handover.begin(self._session, carried, with_sentinel=sentinel)

    def cancel_migration(self) -> None:
        """Makes it as if no migration had begun: it was cancelled, or failed, before `inactivate`.

        Raises:
            LimitError, StorageError: there is no room to take the sentinel out; nothing is changed.
            CommitError: a write or barrier failed. Tracking has ended, and the bitmaps stay in_use.
            StateError: no migration was begun.
        """
        with self._session.exclusive("cancel_migration"):
            handover.cancel(self._session)

    def inactivate(self, *, data_file: FilePath | None = None) -> StopReport:
        """Stores what is left, makes the bitmaps valid, and lets the image go.

        Waits for writes that are inside `writing`. When it returns, others can open the image;
        until `activate`, nothing is written to the image any more, and marks raise. The bitmaps
        stay in memory. If `begin_migration` was not called, its work is done first.

        Args:
            data_file: the path of the external data file, if the image has one. Without it
                `activate` cannot know whether that file was written to.

        Raises:
            As `stop` and `begin_migration` do. Where there is no room for a sentinel, call
                `begin_migration` with ``sentinel=False`` first.
            StorageError: the data file cannot be looked at; nothing is changed.
        """
        with self._session.exclusive("inactivate"):
            return handover.inactivate(self._session, data_file)

    def activate(
        self,
        policy: Policy = "drop",
        *,
        other_side_has_stopped: bool = False,
        lock_timeout: float = 0,
    ) -> Activation:
        """Takes the image back after `inactivate`, and finds out what became of it.

        If the disk is unchanged, the bitmaps go on with what they have in memory. If it changed, or
        if that is not known, bitmaps that are sound in the image are loaded from there. All others
        are dropped: they stay in_use on disk. Tracking goes on with the bitmaps that are left.

        Args:
            policy: "drop", or "merge" to keep `carried` bitmaps of a changed disk, with what the
                sentinel says was written. "merge" is sound if every writer keeps bitmaps.
            other_side_has_stopped: the caller's word that no other host uses the image. Needed
                where locks do not tell: on block devices, and without locking.
            lock_timeout: how many seconds to wait while another process uses the image.

        Raises:
            ImageLockedError: another process uses the image.
            FormatError, UnsupportedError: the image cannot be edited as it is now.
            StorageError: reading failed, there is no room, or another file is in its place.
            LimitError: with intent, the image has too many bitmaps now, or too large a disk.
            CommitError: a write or barrier failed.
            StateError: the image was not given away, or ``other_side_has_stopped`` is needed.

            After an error the image is still given away, and this can be tried again, except after
            a `CommitError` whose outcome is not "old": then tracking has ended.
        """
        if policy not in ("drop", "merge"):
            raise ValueError(f'policy is {policy!r}, must be "drop" or "merge"')
        with self._session.exclusive("activate"):
            return handover.activate(
                self._session,
                policy,
                other_side_has_stopped=other_side_has_stopped,
                lock_timeout=lock_timeout,
            )

    def abandon(self) -> None:
        """Ends tracking: nothing more is written, and the bitmaps stay in_use.

        The program may go on without tracking: an intent bitmap is marked in_use, too, so that
        nothing is recovered by it; also if tracking has ended already, other than by `stop`. Waits
        for a flush or an edit that another thread is at.

        Raises:
            StateError: inside `writing` or `edit`; or the image is closed already, and an intent
                bitmap could not be marked.
            Qcow2BmError: an intent bitmap could not be marked: the disk must not be written to.
        """
        self._session.abandon()

    def give_up(self) -> None:
        """Abandons also where this thread is inside `writing` or `edit`: for closing the image.

        As after `stop`, nothing may write to the disk any more without another tracker: with an
        intent bitmap the bitmaps can be recovered.
        """
        self._session.give_up()
