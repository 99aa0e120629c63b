"""Tracking the writes to a disk in its persistent bitmaps, and storing them as they change.

*Spec*: spec/tracking.md.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from threading import Lock, Thread, get_ident
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn

from qcow2bm.bitmaps.draft import Draft
from qcow2bm.bitmaps.tracked_store import PIECE_BYTES, TrackedBitmap, TrackedStore
from qcow2bm.clusters.plan import Barrier, Plan, Step, execute
from qcow2bm.errors import (
    BitmapNotFoundError,
    CommitError,
    LimitError,
    StateError,
    StorageError,
)
from qcow2bm.format.directory import FLAG_AUTO, FLAG_IN_USE
from qcow2bm.migration.lifecycle import TRANSITIONS, Event, State, after
from qcow2bm.storage.file_identity import FilePath, identify
from qcow2bm.storage.write_guard import WriteGuard
from qcow2bm.tracker.batches import Batch, Batches
from qcow2bm.tracker.fanout import Recording, Tracked
from qcow2bm.tracker.inflight import InFlightWrites
from qcow2bm.tracker.rate import Rate
from qcow2bm.tracker.recorder import Recorder
from qcow2bm.tracker.reports import Convergence, FlushReport, Pending, StopReport

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from qcow2bm.migration.evidence import Policy
    from qcow2bm.tracker.edit import TrackerEdit
    from qcow2bm.tracker.handover import Activation, Migration

_LOST = "tracking has ended, and the bitmaps stay in use: they miss writes; take full backups"
_UNKNOWN = "all is stored, but whether the bitmaps are valid now is unknown: look at the bitmaps"
_GUESS_BYTES_PER_SECOND = 50 << 20  # as long as nothing was measured
_PROGRESS = 0.95  # a round is of use if it leaves no more than this part of what was left
_IDLE_ROUNDS = 4


class Tracker:
    """Records writes to a disk in bitmaps of its image, which are in_use meanwhile.

    Made by `qcow2bm.Image.track`. Thread-safe. As a context manager it stops when the block ends,
    and abandons if that is by an exception.

    *Guarantees*: a bitmap on disk without in_use has every bit marked since tracking began
    (INV-SUPERSET). If the process dies, the bitmaps are in_use, so nobody goes by them.

    Attributes:
        mark: ``mark(start, length)`` records that guest bytes are written. It must return before
            the write is acknowledged. Raises ValueError for a range not on the disk, of which
            nothing is marked, and StateError once tracking has ended.
    """

    def __init__(
        self,
        storage: WriteGuard,
        store: TrackedStore,
        virtual_size: int,
        *,
        on_end: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Tracks the bitmaps of the ``store``; ``on_end`` is called once tracking has ended."""
        self._storage = storage
        self._store = store
        self._clock = clock
        self._virtual_size = virtual_size
        self._now = Recording.of(map(Tracked.of, store.bitmaps), virtual_size)
        self._recorder = Recorder(virtual_size, self._now.granularity, self._now.bits)
        self._in_flight = InFlightWrites()
        self._io = Lock()  # one flush, stop or rotation at a time
        self._busy_thread: int | None = None
        self._ended: State | None = None  # how, once it has
        self._cause: BaseException | None = None  # of its failure
        self._flushing = Rate()
        self._barrier_seconds = 0.0
        self._batches = Batches()
        self._on_end = on_end
        self._migration: Migration | None = None  # from its beginning until it is over
        self._activation: Activation | None = None  # the last, until it is given away again
        self.mark = self._recorder.mark

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None or self.state == "inactive":
            self.abandon()
        elif self.state not in ("stopped", "abandoned"):
            self.stop()  # which says so if tracking has failed

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Tracker cannot be pickled")

    @property
    def state(self) -> State:
        """Whether it goes on, or how it ended: "failed" if a write or a barrier did.

        While it is "inactive", the image is in other hands: nothing is written to it.
        """
        if self._ended:
            return self._ended
        if not self._migration:
            return "tracking"
        return "inactive" if self._migration.left else "migrating"

    @property
    def names(self) -> list[str]:
        """The names of the bitmaps that are tracked."""
        return [bitmap.live.name for bitmap in self._now.tracked]

    def mark_many(self, ranges: NDArray[np.int64]) -> None:
        """`mark` for many ranges at once: (start, length) in guest bytes, int64[n, 2].

        Raises:
            ValueError: one of them is not on the disk; then nothing is marked.
            StateError: tracking has ended.
        """
        self._recorder.mark_many(ranges)

    @contextmanager
    def writing(self, start: int, length: int) -> Iterator[None]:
        """Around a write of the guest: marks it first, and lets `stop` wait until it is done.

        Raises as `mark` does, before the block begins. Inside it, whatever may have to wait for
        writes raises `StateError`: `pending`, `flush`, `stop`, `abandon`, `rotate`, `edit`.
        """
        with self._in_flight.passage():
            self.mark(start, length)
            yield

    @property
    def pending(self) -> Pending:
        """What is not stored yet. Raises `StateError` once tracking has ended."""
        with self._exclusive():
            self._now.spread()
            pieces = sum(bitmap.bits.touched.count(1) for bitmap in self._stored_here())
            size = pieces * PIECE_BYTES
            seconds = size / (self._flushing.per_second or _GUESS_BYTES_PER_SECOND)
            return Pending(size, pieces, seconds + 2 * self._barrier_seconds)

    def flush(self, max_bytes: int | None = None, deadline: float | None = None) -> FlushReport:
        """Stores what has changed, while marking goes on; the bitmaps stay in_use.

        Args:
            max_bytes: write about so much bitmap data, at least a piece.
            deadline: write for about so many seconds.

        Raises:
            CommitError: a write or barrier failed. Tracking has ended, and the bitmaps stay in_use.
            StateError: tracking has ended before.
        """
        with self._exclusive():
            begun = self._clock()
            self._now.spread()
            left = 1 << 62 if max_bytes is None else max(1, max_bytes // PIECE_BYTES)
            size = pieces = barriers = 0
            for batch in self._batches.due(self._stored_here(), left):
                plan = self._store_pieces(batch)
                size, barriers = size + plan.length, barriers + plan.barriers
                pieces += sum(len(numbers) for _, numbers in batch)
                if deadline is not None and self._clock() - begun >= deadline:
                    break
            return FlushReport(size, pieces, barriers, self._clock() - begun)

    def _store_pieces(self, batch: Batch, *, is_quiet: bool = False) -> Plan:
        """Stores pieces and returns how; if that fails, they are not stored, and all is over."""
        with self._fatal():
            try:
                taken = [(b.live, b.take(numbers, is_quiet=is_quiet)) for b, numbers in batch]
                plan = Plan(tuple(self._store.store(taken)))
                self._execute(plan)
            except BaseException:
                for bitmap, numbers in batch:
                    for piece in numbers:
                        bitmap.bits.touched[piece] = 1  # INV-META
                raise
            return plan

    @contextmanager
    def _fatal(self) -> Iterator[None]:
        """Ends tracking if what is done inside does not come to its end."""
        try:
            yield
        except BaseException as error:
            if "fail" in TRANSITIONS[self.state]:
                self._end("failed", error)
            raise

    @contextmanager
    def _exclusive(self, event: Event = "flush") -> Iterator[None]:
        """One thing at a time, if the state allows it."""
        self._require_free()
        with self._io:
            self._require(event)
            try:
                self._busy_thread = get_ident()
                yield
            finally:
                self._busy_thread = None

    def _require_free(self) -> None:
        """Raises `StateError` in a thread that would wait for itself."""
        self._in_flight.require_outside()
        if self._busy_thread == get_ident():
            raise StateError("being edited", "left alone until that is done", "the tracker")

    def _execute(self, plan: Plan) -> None:
        """Does what the plan says, and measures how fast that goes."""
        begun = before = self._clock()

        def watch(step: Step) -> None:
            nonlocal before
            now = self._clock()
            if isinstance(step, Barrier):
                self._barrier_seconds = max(self._barrier_seconds / 2, now - before)
            before = now

        try:
            execute(plan, self._storage, None, watch)
        except CommitError as error:
            text = _UNKNOWN if error.outcome == "unknown" else _LOST
            raise CommitError(error.path, error.step, error.outcome, error.reason, text) from error
        self._flushing.add(plan.length, before - begun)

    def stop(self) -> StopReport:
        """Stores what is left and makes the bitmaps valid: the short pause of a migration.

        Waits for writes that are inside `writing`. Every mark that returned before is stored.

        Raises:
            CommitError: a write or barrier failed. Tracking has ended all the same. Unless the
                outcome is "unknown", the bitmaps stay in_use.
            StateError: tracking has ended before.
        """
        with self._exclusive("stop"):
            with suppress(LimitError, StorageError):  # then the sentinel stays behind, in_use
                self._cancel()
            self._migration = None
            with self._fatal():
                report = self._store_all("stopped")
                self._end("stopped")
                return report

    def _stored_here(self) -> list[Tracked]:
        """The bitmaps that are tracked, but for those which a migration carries."""
        carried = self._migration.carried if self._migration else ()
        return [bitmap for bitmap in self._now.tracked if bitmap.live.name not in carried]

    def _store_all(self, state: State) -> StopReport:
        """Lets nothing be marked any more, and stores all bitmaps but those that are carried."""
        begun = self._clock()
        others = self._migration.lives if self._migration else []
        stored = self._stored_here()
        with self._in_flight.drained():
            self._recorder.close(state)
            self._now.spread()
            due = [(bitmap, bitmap.due().tolist()) for bitmap in stored]
            data = self._store_pieces(due, is_quiet=True)
        end = self._store.end([*(bitmap.live for bitmap in stored), *others])
        self._execute(Plan(tuple(end), commit_point=0))
        plan = Plan((*data.steps, *end))
        pieces = sum(len(numbers) for _, numbers in due)
        return StopReport(plan.length, pieces, plan.barriers, self._clock() - begun)

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
            timeout: give up after so many seconds.
            progress: called with what is pending before every round.

        Raises:
            As `flush` does.
        """
        begun = self._clock()
        least, rounds, idle = float("inf"), 0, 0
        while True:
            pending = self.pending
            progress(pending)
            # What nobody measured yet is a guess, on which nobody should stop a machine.
            is_known = self._flushing.per_second is not None or not pending.pieces
            is_reached = is_known and pending.seconds <= max_downtime
            if is_known:
                idle = 0 if pending.seconds < least * _PROGRESS else idle + 1
                least = min(least, pending.seconds)
            is_late = timeout is not None and self._clock() - begun >= timeout
            if is_reached or is_late or idle >= _IDLE_ROUNDS:
                return Convergence(is_reached, pending.seconds, rounds, self._clock() - begun)
            self.flush()
            rounds += 1

    @contextmanager
    def background(
        self, interval: float, max_bytes_per_second: float | None = None
    ) -> Iterator[None]:
        """Flushes every ``interval`` seconds, in a thread of its own, while the block runs.

        With ``max_bytes_per_second`` at most about so much bitmap data. If a flush fails,
        tracking has ended, and the next call of anything says so with the error as its cause.
        """
        self._require_free()
        limit = None if max_bytes_per_second is None else int(max_bytes_per_second * interval)
        is_over = threading.Event()

        def work() -> None:
            while not is_over.wait(interval):
                try:
                    self.flush(limit)
                except StateError:
                    if "activate" not in TRANSITIONS[self.state]:  # tracking has ended
                        return
                except BaseException as error:
                    with self._io:
                        if "fail" in TRANSITIONS[self.state]:
                            self._end("failed", error)
                    return

        thread = Thread(target=work, name="qcow2bm flush", daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()

    def rotate(self, name: str, new_name: str) -> None:
        """Freezes a bitmap for a backup, and goes on in a fresh one: no write falls between.

        ``name`` is then disabled and valid on disk, so that others can read it, and ``new_name``,
        of the same granularity, is tracked in its place. Waits for writes that are inside
        `writing`; who marks otherwise must not write meanwhile. If the process dies, both may be
        in_use, or the frozen one is valid and the fresh one in_use.

        Raises:
            BitmapNotFoundError: no bitmap of that name is tracked.
            BitmapExistsError, LimitError, ValueError: there cannot be one of the new name. Tracking
                goes on.
            CommitError: a write or barrier failed. Tracking has ended, and the bitmaps stay in_use,
                but for the frozen one if the commit was done.
            StorageError: there is no room, or reading failed.
            StateError: tracking has ended before.
        """
        with self._exclusive("edit"):
            frozen = self._find(name)
            granularity = frozen.live.entry.granularity
            draft = self._store.draft()
            draft.add(new_name, granularity, enabled=True)
            draft.find(new_name).flags |= FLAG_IN_USE
            draft.find(name).flags &= ~(FLAG_AUTO | FLAG_IN_USE)
            octets = bytearray(len(frozen.live.octets))
            fresh = Tracked.of(TrackedBitmap.unplaced(new_name, granularity, octets))
            self._store.plan(draft)  # raises what can be known before
            with self._fatal():
                self._switch([frozen], [fresh])
                self._store_pieces([(frozen, frozen.due().tolist())])
                self._recommit(draft)

    def edit(self) -> TrackerEdit:
        """Changes to the bitmaps of the image while they are tracked: ``with tracker.edit() as``.

        They are committed together when the block ends; if it ends by an exception, nothing is
        changed. Nothing is flushed meanwhile, but marking goes on.

        Raises:
            StateError: tracking has ended.
        """
        from qcow2bm.tracker.edit import TrackerEdit

        return TrackerEdit(self)

    def begin_migration(self, *, carried: Iterable[str] = (), sentinel: bool = True) -> None:
        """Prepares for `inactivate` while the guest runs, so that the stop is short.

        Marking and flushing go on, but the bitmaps are not changed otherwise. What is said here
        holds until `cancel_migration`, or until the image was taken back or tracking has ended.

        Args:
            carried: the names of the bitmaps that the migration itself carries to the other side:
                they are not stored here, and stay in_use on disk.
            sentinel: whether to add a bitmap that tells afterwards whether the disk was written
                to. Without it an `activate` can never know. Beside stale bitmaps there is none.

        Raises:
            BitmapNotFoundError: one of the names is not tracked.
            LimitError, StorageError: there is no room for the sentinel; nothing is changed.
            CommitError: a write or barrier failed. Tracking has ended, and the bitmaps stay in_use.
            StateError: a migration was begun before, or tracking has ended.
        """
        from qcow2bm.tracker import handover

        with self._exclusive("begin_migration"):
            self._migration = handover.begin(self, carried, with_sentinel=sentinel)

    def cancel_migration(self) -> None:
        """After a migration was cancelled, or failed, before `inactivate`: as if it never began.

        Raises:
            LimitError, StorageError: there is no room to take the sentinel out; nothing is changed.
            CommitError: a write or barrier failed. Tracking has ended, and the bitmaps stay in_use.
            StateError: no migration was begun.
        """
        with self._exclusive("cancel_migration"):
            self._cancel()

    def _cancel(self) -> None:
        from qcow2bm.tracker import handover

        if not self._migration:
            return
        migration, self._migration = self._migration, None  # first: an interrupt ends it, too
        try:
            handover.cancel(self, migration)
        except (LimitError, StorageError):
            self._migration = migration
            raise

    def inactivate(self, *, data_file: FilePath | None = None) -> StopReport:
        """Stores what is left, makes the bitmaps valid, and lets the image go.

        Waits for writes that are inside `writing`. When it returns, others can open the image;
        nothing is written to it any more, and marks raise, until `activate`. The bitmaps stay in
        memory. What `begin_migration` does is done first where that was not called.

        Args:
            data_file: the path of the external data file, if the image has one. Without it an
                `activate` cannot know whether that was written to.

        Raises:
            As `stop` and `begin_migration` do: where there is no room for a sentinel, call that
                with ``sentinel=False`` before.
            StorageError: the data file cannot be looked at; nothing is changed.
        """
        from qcow2bm.tracker import handover

        with self._exclusive("inactivate"):
            if data_file is not None:
                identify(data_file)  # a wrong path is found out before anything is done
            if self._migration is None:
                self._migration = handover.begin(self, (), with_sentinel=True)
            with self._fatal():
                return handover.inactivate(self, self._migration, data_file)

    def activate(
        self,
        policy: Policy = "drop",
        *,
        other_side_has_stopped: bool = False,
        lock_timeout: float = 0,
    ) -> Activation:
        """Takes the image back after `inactivate`, and finds out what became of it.

        If the disk is unchanged, the bitmaps go on with what they have in memory. If not, or if
        that is not known, what the image has is loaded where it is sound; the rest is dropped,
        and stays in_use on disk. Tracking goes on with what there is then.

        Args:
            policy: "drop", or "merge" to keep `carried` bitmaps of a changed disk, with what the
                sentinel says was written. That is sound if all who wrote keep bitmaps.
            other_side_has_stopped: the caller's word that no other host uses the image. Needed
                where locks do not tell: on block devices, and without locking.
            lock_timeout: how many seconds to wait while somebody else uses the image.

        Raises:
            ImageLockedError: somebody uses the image.
            FormatError, UnsupportedError: the image cannot be edited as it is now.
            StorageError: reading failed, there is no room, or another file is in its place.
            CommitError: a write or barrier failed.
            StateError: the image was not given away, or ``other_side_has_stopped`` is needed.

            The image stays in other hands then, and this can be tried again, unless the outcome
            of a `CommitError` is not "old": then tracking has ended.
        """
        from qcow2bm.tracker import handover

        if policy not in ("drop", "merge"):
            raise ValueError(f'policy is {policy!r}, must be "drop" or "merge"')
        with self._exclusive("activate"):
            assert self._migration
            return handover.activate(
                self,
                self._migration,
                policy,
                other_side_has_stopped=other_side_has_stopped,
                lock_timeout=lock_timeout,
            )

    def _switch(self, ended: list[Tracked], begun: list[Tracked]) -> None:
        """Lets marks from now on go to other bitmaps; the old ones have all of those before."""
        with self._in_flight.drained():
            before = self._now
            kept = [bitmap for bitmap in before.tracked if bitmap not in ended]
            # What is beside them is spread afterwards, so no mark may go into them by then.
            is_beside = before.is_beside and bool(kept)
            now = Recording.of((*kept, *begun), self._virtual_size, is_beside=is_beside)
            self._now = now
            self._recorder.replace(now.granularity, now.bits)
        before.spread()

    def _recommit(self, draft: Draft, *others: TrackedBitmap) -> None:
        lives = [*(bitmap.live for bitmap in self._now.tracked), *others]
        try:
            self._store.recommit(draft, lives)
        except CommitError as error:
            raise CommitError(error.path, error.step, error.outcome, error.reason, _LOST) from error

    def _find(self, name: str) -> Tracked:
        for bitmap in self._now.tracked:
            if bitmap.live.name == name:
                return bitmap
        raise BitmapNotFoundError(name, "is not tracked")

    def abandon(self) -> None:
        """Ends tracking: nothing more is written, and the bitmaps stay in_use.

        Waits for a flush or an edit that another thread is at.

        Raises:
            StateError: inside `writing` or `edit`.
        """
        self._require_free()
        with self._io:
            if not self._ended:
                self._end(after(self.state, "abandon"))

    def _end(self, state: State, cause: BaseException | None = None) -> None:
        self._recorder.close(state, cause)
        self._ended, self._cause, self._migration = state, cause, None
        self._on_end()

    def _require(self, event: Event) -> None:
        """Raises `StateError`, from what ended tracking, if the state does not allow it."""
        try:
            after(self.state, event)
        except StateError as error:
            raise error from self._cause
