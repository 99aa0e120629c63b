"""The state that all parts of a tracker share: the image, the recording, the phase, and the locks.

*Spec*: spec/tracking.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

from qcow2bm.bitmaps.draft import Draft
from qcow2bm.bitmaps.tracked_bitmap import TrackedBitmap
from qcow2bm.bitmaps.tracked_store import TrackedStore
from qcow2bm.clusters.plan import Barrier, Plan, Step
from qcow2bm.errors import BitmapNotFoundError, CommitError, Qcow2BmError, StateError
from qcow2bm.log import logger
from qcow2bm.migration.intent import Intent, is_intent
from qcow2bm.migration.lifecycle import Event, State, after, has_ended
from qcow2bm.storage.forks import disown_in_forks
from qcow2bm.storage.write_guard import WriteGuard
from qcow2bm.tracker.batches import Batch
from qcow2bm.tracker.fanout import Recording
from qcow2bm.tracker.inflight import InFlightWrites
from qcow2bm.tracker.intent import IntentLog
from qcow2bm.tracker.phase import Migration, Phase
from qcow2bm.tracker.rate import Rate
from qcow2bm.tracker.recorder import Recorder
from qcow2bm.tracker.reports import Activation, StopReport
from qcow2bm.tracker.turns import Turns
from qcow2bm.tracker.waiting import cancelled_by, require_wanted

_LOST = "tracking has ended, and the bitmaps stay in use: they miss writes; take full backups"
_TRUSTED_STILL = (
    "the intent bitmap could not be marked in_use: nothing may write to the disk before the next "
    "track or recover"
)
_UNKNOWN = "all is stored, but whether the bitmaps are valid now is unknown: look at the bitmaps"


class Session:
    """One image being tracked, from its beginning to its end.

    Operations run one at a time, inside `exclusive`. What changes the image runs inside `fatal`.
    The state is changed by `apply` alone, which asks the transition table.

    Attributes:
        storage: of the image; its lock is held unless the image is inactive.
        store: what is written to the image.
        recorder: where marks come in.
        in_flight: the writes of the guest that have begun and not ended.
        clock: the time in seconds.
        flushing: how many bytes per second the storage takes.
        barrier_seconds: how long a barrier takes, by recent measurements.
        intent: makes sure that a crash loses no mark; None without that.
    """

    def __init__(
        self,
        storage: WriteGuard,
        store: TrackedStore,
        *,
        on_end: Callable[[], None],
        clock: Callable[[], float],
    ) -> None:
        """Tracks the bitmaps of the ``store``; ``on_end`` is called once tracking has ended."""
        self.storage = storage
        self.store = store
        self.recorder = Recorder(Recording.of(store.bitmaps, store.file.virtual_size))
        self.in_flight = InFlightWrites(lambda: self._turns.is_wanted)
        self.clock = clock
        self.flushing = Rate()
        self.barrier_seconds = 0.0
        self.intent: IntentLog | None = None
        self._intent_bitmap: Intent | None = None
        self._is_distrusted = False
        self._is_critical = False
        self._on_end = on_end
        self._phase = Phase()
        self._turns = Turns()
        disown_in_forks(self)

    # --- the phase -----------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """Whether tracking goes on, or how it ended."""
        return self._phase.state

    @property
    def migration(self) -> Migration | None:
        """The facts of the present migration, if there is one."""
        return self._phase.migration

    @property
    def activation(self) -> Activation | None:
        """The result of taking the image back last, until the image is given away again."""
        return self._phase.activation

    def apply(
        self,
        event: Event,
        *,
        migration: Migration | None = None,
        activation: Activation | None = None,
        cause: BaseException | None = None,
    ) -> None:
        """Changes the state as the transition table says; the only place that does.

        Raises:
            StateError: the event is not allowed in this state.
        """
        self._phase = self._phase.after(
            event, migration=migration, activation=activation, cause=cause
        )

    def require(self, event: Event) -> None:
        """Raises `StateError`, with the failure as its cause, if the state forbids an event."""
        try:
            after(self.state, event)
        except StateError as error:
            raise error from self._phase.cause

    def end(
        self, event: Event, cause: BaseException | None = None, *, is_trusted: bool = True
    ) -> None:
        """Ends tracking by an event: marks raise from now on, and nothing more is written.

        Unless the end ``is_trusted``, the program may go on without tracking: then nothing is
        recovered later by the intent bitmap. Of an image that is given away nothing is left to be
        recovered: its bitmaps are stored, or carried by the migration.

        Raises:
            Qcow2BmError: the intent bitmap could not be marked in_use.
        """
        self.recorder.close(after(self.state, event), cause)
        self.apply(event, cause=cause)  # before anything that may take long, and be interrupted
        if event == "fail":
            logger.error("tracking has failed: %s", cause, exc_info=cause)
        try:
            self.in_flight.end_draining()
            if self.intent:
                self.intent.end(self.state)
                if not self.storage.is_held:  # the image is given away
                    self._is_distrusted = True
                elif not is_trusted:
                    self.store.distrust(is_intent)
                    self._complete_distrust()
        finally:
            self._on_end()

    def fail(self, cause: BaseException) -> None:
        """Ends tracking by a failure, unless it has ended before."""
        if has_ended(self.state):
            return
        try:
            self.end("fail", cause, is_trusted=not isinstance(cause, Exception))
        except Qcow2BmError as error:
            logger.error("%s: %s", _TRUSTED_STILL, error)

    def abandon(self, *, is_trusted: bool = False) -> None:
        """Ends tracking without storing anything, unless it has ended before; see `end`.

        If it has ended in another way, the intent bitmap is marked in_use now.
        """
        self.require_free()
        with cancelled_by(None), self._turns.turn():
            if not has_ended(self.state):
                self.end("abandon", is_trusted=is_trusted)
            elif not is_trusted and self.state in ("abandoned", "failed"):
                self._distrust_later()

    def _distrust_later(self) -> None:
        """Marks the intent bitmap in_use once tracking has ended, unless that is done.

        The image may have been edited since, and have another tracker.
        """
        intent = self._intent_bitmap
        if not intent or self._is_distrusted:
            return
        if not self.storage.is_held:
            raise StateError("closed", "open: open it, and invalidate the bitmaps", "the image")
        # The canary has the same name, and more behind it.
        self.store.distrust_anew(lambda name: name is not None and name.startswith(intent.name))
        self._complete_distrust()

    def _complete_distrust(self) -> None:
        self.storage.barrier_anew()
        self._is_distrusted = True

    def release_mine(self) -> None:
        """Ends the writes and the operation that this thread is inside of.

        The caller goes on with none of them. An interrupt at the end of a write or of an operation
        can leave its record behind, and must not keep the locks from being released.
        """
        self.in_flight.end_mine()
        self._turns.give_back_mine()

    def give_up(self) -> None:
        """`abandon`, also where this thread is inside a write or an operation.

        The program writes no more without another tracker, as after a `stop`.
        """
        self.release_mine()
        self.abandon(is_trusted=True)

    def disown(self) -> None:
        """Ends tracking in a forked process: its memory is a copy, which no flush will store.

        Of the locks that a thread of the parent may hold, none is waited for.
        """
        self._turns.forget()
        self.in_flight.forget()
        if not has_ended(self.state):
            self.recorder.disown(after(self.state, "fork"))
            if self.intent:
                self.intent.disown()
            self.apply("fork")

    # --- one operation at a time ---------------------------------------------------------------

    def exclusive(self, event: Event = "flush") -> AbstractContextManager[object]:
        """Returns a context manager that lets one operation run at a time, if the state allows it.

        Raises:
            StateError: this thread would wait for itself; on entering: the state does not allow it.
        """
        self.require_free()

        def begin() -> None:
            require_wanted()
            if self._is_critical:  # an interrupt came before `fatal` could end tracking
                self.fail(KeyboardInterrupt())
            self.require(event)

        return self._turns.turn(begin, self.store.forget, self.in_flight.require_undrained)

    def require_free(self) -> None:
        """Raises `StateError` in a thread that would wait for its own write or edit."""
        self.in_flight.require_outside()
        if self._turns.is_mine:
            raise StateError("being edited", "left alone until that is done", "the tracker")

    @contextmanager
    def fatal(self) -> Iterator[None]:
        """Ends tracking if the block raises."""
        is_inner, self._is_critical = self._is_critical, True
        try:
            yield
        except BaseException as error:
            self.fail(error)
            raise
        self._is_critical = is_inner

    def fail_in_background(self, cause: BaseException) -> None:
        """`fail`, from a thread that is in no operation."""
        with self._turns.turn():
            self.fail(cause)

    # --- what is recorded ----------------------------------------------------------------------

    @property
    def recording(self) -> Recording:
        """The recording that takes the marks now, with the bitmaps that are tracked."""
        return self.recorder.recording

    @property
    def stored_here(self) -> list[TrackedBitmap]:
        """The bitmaps that are tracked, without those that a migration carries."""
        carried = self.migration.carried if self.migration else ()
        return [bitmap for bitmap in self.recording.bitmaps if bitmap.name not in carried]

    @property
    def stores_all(self) -> bool:
        """Whether all bitmaps that are tracked are stored here."""
        return not self.migration or not self.migration.carried

    def find(self, name: str) -> TrackedBitmap:
        """The tracked bitmap of a name; raises `BitmapNotFoundError` if there is none."""
        for bitmap in self.recording.bitmaps:
            if bitmap.name == name:
                return bitmap
        raise BitmapNotFoundError(name, "is not tracked")

    def switch(self, ended: Iterable[TrackedBitmap], begun: Iterable[TrackedBitmap]) -> None:
        """Lets marks from now on go to other bitmaps; those ended have all marks before.

        No write is in flight: the caller has drained them.
        """
        gone = list(ended)
        before = self.recording
        kept = [bitmap for bitmap in before.bitmaps if bitmap not in gone]
        # What is beside the kept bitmap is brought to it below: until then no mark may go
        # into the bitmap itself.
        is_beside = before.is_beside and bool(kept)
        bitmaps = *kept, *begun
        if self.intent:
            self.intent.unfollow()
        self.recorder.replace(Recording.of(bitmaps, before.virtual_size, is_beside=is_beside))
        before.fan_out()
        if self.intent:
            self.intent.follow(self.recording)

    # --- intent --------------------------------------------------------------------------------

    def begin_intent(self, intent: Intent) -> None:
        """Lets writes wait from now on until a crash cannot lose their marks.

        Raises:
            StorageError: the intent bitmap could not be read.
        """
        self.intent = IntentLog(self.storage, self.fail_in_background)
        self.take_intent(intent, self.recording)

    def marker(self) -> Callable[[int, int], None]:
        """Returns the function that marks a range, and with intent waits: see `Tracker.mark`.

        A closure, because a program calls the function for every write of a guest.
        """
        if not self.intent:
            return self.recorder.mark
        mark, is_settled, wait = self.recorder.mark, self.intent.is_settled, self.intent.wait

        def mark_with_intent(start: int, length: int) -> None:
            if not is_settled(start, length):
                mark(start, length)
                wait(start, length)

        return mark_with_intent

    def take_intent(self, intent: Intent | None, recording: Recording) -> None:
        """Goes on with another intent bitmap, which is in the image by now; no write is in flight.

        Without one, writes go on without intent: no bitmap is tracked.

        Raises:
            StorageError: it could not be read.
        """
        assert self.intent
        self._intent_bitmap = intent
        if intent:
            self.intent.place(intent.granularity, *self.store.first_cluster(intent.name))
        else:
            self.intent.stand_aside()
        self.intent.follow(recording)

    def cover(self, draft: Draft, names: Iterable[str]) -> Intent | None:
        """Lets the intent bitmap stand for these bitmaps once the draft is committed.

        Returns what `commit` is to be told; None without intent.

        Raises:
            LimitError: there are too many of them.
        """
        if not self._intent_bitmap:
            return None
        intent = self._intent_bitmap.covering(names)
        draft.rename(self._intent_bitmap.canary_name, intent.canary_name)
        return intent

    # --- what is written -----------------------------------------------------------------------

    def store_pieces(self, batch: Batch, *, is_quiet: bool = False) -> Plan:
        """Stores pieces and returns how; if that fails, they count as not stored, and all ends."""
        with self.fatal():
            try:
                taken = [(bitmap, bitmap.take(n, is_quiet=is_quiet)) for bitmap, n in batch]
                plan = Plan(tuple(self.store.store(taken)))
                self._execute(plan)
            except BaseException:
                for bitmap, numbers in batch:
                    bitmap.give_back(numbers)
                raise
            return plan

    def store_all(self, event: Event) -> StopReport:
        """Closes the recorder, stores all bitmaps but those that are carried, and clears in_use.

        ``event`` is what the caller does afterwards: marks raise with the state it leads to. No
        write is in flight: the caller has drained them.
        """
        begun = self.clock()
        stored = self.stored_here
        self.recorder.close(after(self.state, event))
        self.recording.fan_out()
        due: Batch = [(bitmap, bitmap.due().tolist()) for bitmap in stored]
        data = self.store_pieces(due, is_quiet=True)
        sentinel = self.migration.sentinel_bitmap if self.migration else None
        end = self.store.end([*stored, sentinel] if sentinel else stored)
        self._execute(Plan(tuple(end), commit_point=0))
        plan = Plan((*data.steps, *end))
        pieces = sum(len(numbers) for _, numbers in due)
        return StopReport(plan.length, pieces, plan.barriers, self.clock() - begun)

    def _execute(self, plan: Plan) -> None:
        """Does what a plan says, and measures how fast that goes."""
        begun = before = self.clock()

        def watch(step: Step) -> None:
            nonlocal before
            now = self.clock()
            if isinstance(step, Barrier):
                self.barrier_seconds = max(self.barrier_seconds / 2, now - before)
            before = now

        try:
            self.store.execute(plan, watch)
        except CommitError as error:
            text = _UNKNOWN if error.outcome == "unknown" else _LOST
            raise CommitError(error.path, error.step, error.outcome, error.reason, text) from error
        self.flushing.add(plan.length, before - begun)

    def commit(self, plan: Plan, *others: TrackedBitmap, intent: Intent | None = None) -> None:
        """Does what a plan of the store says; in_use are then the tracked bitmaps and ``others``.

        ``intent`` is what `cover` has returned.

        Raises:
            CommitError: a write, a barrier or, afterwards, reading failed.
        """
        try:
            self.store.commit(plan, [*self.recording.bitmaps, *others])
        except CommitError as error:
            raise CommitError(error.path, error.step, error.outcome, error.reason, _LOST) from error
        self._intent_bitmap = intent or self._intent_bitmap
        if self.intent and self._intent_bitmap:
            self.intent.move(self.store.first_cluster(self._intent_bitmap.name)[0])
