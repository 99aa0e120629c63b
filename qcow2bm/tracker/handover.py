"""Giving the image to another host, and taking it back.

*Spec*: spec/lifecycle.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np

from qcow2bm.bitmaps.tracked_bitmap import TrackedBitmap
from qcow2bm.clusters.header_draft import fresh_token
from qcow2bm.errors import CommitError, LimitError, StateError, StorageError
from qcow2bm.format.directory import FLAG_IN_USE, DirectoryEntry
from qcow2bm.log import logger
from qcow2bm.migration.evidence import Definition, Departure, Facts, Fate, Witness, decide, judge
from qcow2bm.migration.intent import Intent, is_intent
from qcow2bm.migration.lifecycle import has_ended
from qcow2bm.migration.sentinel import Sentinel, is_sentinel
from qcow2bm.storage.file_identity import FileIdentity, FilePath, identify
from qcow2bm.tracker.fanout import Recording
from qcow2bm.tracker.phase import Migration
from qcow2bm.tracker.reports import Activation
from qcow2bm.tracker.session import Session
from qcow2bm.units import decode_name

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from qcow2bm.migration.evidence import Policy
    from qcow2bm.tracker.reports import StopReport

_STILL_AWAY = "nothing of it counts, and the image is inactive still: activate it again, or abandon"
_LOST = "tracking has ended, and the bitmaps stay in use: take full backups"


def begin(session: Session, carried: Iterable[str], *, with_sentinel: bool) -> None:
    """Adds the sentinel and enters "migrating"; see `Tracker.begin_migration`."""
    if isinstance(carried, str):
        raise TypeError("carried are names, not one name")
    names = frozenset(carried)
    for name in names:
        session.find(name)
    migration = Migration(names)
    store = session.store
    is_stale = store.metadata.directory.extension and not store.metadata.directory.is_consistent
    if with_sentinel and not is_stale:
        migration = _with_sentinel(session, migration)
    session.apply("begin_migration", migration=migration)


def _with_sentinel(session: Session, migration: Migration) -> Migration:
    """Adds a sentinel and its canary to the image."""
    store = session.store
    draft = store.load_draft()
    sentinel = Sentinel.fresh(session.recording.virtual_size, store.cluster_size)
    draft.add(sentinel.canary_name, sentinel.granularity, enabled=False)
    draft.fill(sentinel.canary_name, sentinel.canary_ranges, is_set=True)
    draft.add(sentinel.name, sentinel.granularity, enabled=True)
    draft.find(sentinel.name).flags |= FLAG_IN_USE  # the guest goes on writing
    length = draft.bits(sentinel.name).clusters * store.cluster_size
    bitmap = TrackedBitmap.unplaced(sentinel.name, sentinel.granularity, length)
    plan = store.plan(draft)  # raises what can be known before anything is written
    with session.fatal():
        session.commit(plan, bitmap)
    return migration._replace(sentinel=sentinel, sentinel_bitmap=bitmap)


def cancel(session: Session) -> None:
    """Leaves "migrating" and removes the sentinel; see `Tracker.cancel_migration`."""
    migration, store = session.migration, session.store
    assert migration
    plan = None
    if migration.sentinel:
        draft = store.load_draft()
        draft.remove(migration.sentinel.name)
        draft.remove(migration.sentinel.canary_name)
        plan = store.plan(draft)  # raises what can be known before anything is written
    session.apply("cancel_migration")  # first: an interrupt cancels the migration, too
    if plan:
        with session.fatal():
            session.commit(plan)


def cancel_before_stop(session: Session) -> None:
    """Leaves "migrating" if that is the state; without room the sentinel stays, in_use."""
    if not session.migration:
        return
    try:
        cancel(session)
    except (LimitError, StorageError):
        if has_ended(session.state):
            raise
        session.apply("cancel_migration")


def inactivate(session: Session, data_file: FilePath | None) -> StopReport:
    """Stores everything, enters "inactive" and lets the image go; see `Tracker.inactivate`."""
    if data_file is not None:
        identify(data_file)  # raises for a wrong path before anything is done
    if session.migration is None:
        begin(session, (), with_sentinel=True)
    migration, store = session.migration, session.store
    assert migration
    if session.intent and migration.carried:
        _leave_out_carried(session, migration)
    with session.in_flight.drained(), session.fatal():
        if session.intent:
            session.intent.pause()
        report = session.store_all("inactivate")
        facts = Facts(
            Definition.of(store.file),
            store.token,
            _identity(data_file),
            store.metadata.directory.is_consistent,
            {bitmap.name: bitmap.entry for bitmap in session.recording.bitmaps},
        )
        migration = migration._replace(
            departure=Departure(facts, migration.sentinel),
            data_file=data_file,
            change_token=session.storage.change_token(),
            next_token=fresh_token(),
        )
        session.apply("inactivate", migration=migration)
        session.storage.release()
        return report


def _leave_out_carried(session: Session, migration: Migration) -> None:
    """Lets the intent bitmap not stand any more for the bitmaps that the migration carries.

    They are in_use in the image, and the program may go on without tracking.
    """
    store = session.store
    draft = store.load_draft()
    intent = session.cover(draft, [bitmap.name for bitmap in session.stored_here])
    plan = store.plan(draft)  # raises what can be known before anything is written
    others = [migration.sentinel_bitmap] if migration.sentinel_bitmap else []
    with session.fatal():
        session.commit(plan, *others, intent=intent)


def _identity(path: FilePath | None) -> FileIdentity | None:
    """The identity of the external data file; None where it cannot be found out."""
    with suppress(StorageError):
        return None if path is None else identify(path)
    return None


def activate(
    session: Session, policy: Policy, *, other_side_has_stopped: bool, lock_timeout: float
) -> Activation:
    """Takes the image back and enters "tracking"; see `Tracker.activate`."""
    storage, store, migration = session.storage, session.store, session.migration
    assert migration
    if not storage.excludes_other_hosts and not other_side_has_stopped:
        raise StateError(
            "on storage whose locks other hosts do not see",
            "activated with other_side_has_stopped=True, once that is so",
            "the image",
        )
    try:
        storage.acquire(lock_timeout)
        storage.refresh()
        store.reload()
        comeback = _Comeback(session, migration, policy)
        # Raises what can be known before anything is written.
        plan = store.plan(comeback.draft, migration.next_token)
        if store.restore_generation():
            plan = store.plan(comeback.draft, migration.next_token)
    except BaseException:
        storage.release()
        raise
    try:
        store.commit(plan, comeback.bitmaps)
        comeback.go_on()
    except BaseException as error:
        is_old = isinstance(error, CommitError) and error.outcome == "old"
        if is_old:
            storage.release()
        else:
            session.fail(error)
        if isinstance(error, CommitError):
            text = _STILL_AWAY if is_old else _LOST
            raise CommitError(error.path, error.step, error.outcome, error.reason, text) from error
        raise
    return comeback.activation


class _Comeback:
    """The fate of the bitmaps at an activation, decided but not yet carried out.

    Attributes:
        draft: the bitmaps of the image as they are to be now.
        bitmaps: those that are tracked from now on.
        activation: what the caller is told.
    """

    def __init__(self, session: Session, migration: Migration, policy: Policy) -> None:
        assert migration.departure
        self._session = session
        self._migration = migration
        self._departure = departure = migration.departure
        self._found = found = self._facts()
        judgement = judge(departure, found, self._witness())
        logger.info("an image was taken back: %s: %s", judgement.outcome, judgement.reason)
        fates = decide(departure, found, judgement, policy)
        self.activation = Activation(judgement.outcome, judgement.reason, fates, judgement.changed)
        self.bitmaps = list(self._tracked(fates))
        self._has_kept = any(fate.kind == "kept" for fate in fates.values())
        self.draft = session.store.draft()
        if found.is_consistent:
            for name in found.entries:
                if is_sentinel(name) or is_intent(name):
                    self.draft.remove(name)
        self._intent = self._with_intent() if session.intent and found.is_consistent else None
        # Enabled bitmaps that do not fit the disk are not tracked, and miss writes from now on.
        names = {bitmap.name for bitmap in self.bitmaps}
        names |= {name for name in found.broken if found.entries[name].auto}
        for bitmap in self.draft.bitmaps.values():
            if decode_name(bitmap.name_bytes) in names:
                bitmap.flags |= FLAG_IN_USE

    def _with_intent(self) -> Intent:
        """Adds a new intent bitmap for the bitmaps that are tracked from now on."""
        store = self._session.store
        names = [bitmap.name for bitmap in self.bitmaps]
        intent = Intent.fresh(store.file.virtual_size, store.cluster_size, names)
        self.draft.add(intent.canary_name, intent.granularity, enabled=False)
        self.draft.fill(intent.canary_name, intent.canary_ranges, is_set=True)
        # Nothing says which bits of the bitmaps are stored: until the next flushes, none counts.
        self.draft.add(intent.name, intent.granularity, enabled=True)
        self.draft.fill(intent.name, [(0, intent.virtual_size)], is_set=True)
        return intent

    def _facts(self) -> Facts:
        """The image as it is now."""
        metadata = self._session.store.metadata
        entries = {e.name: e for e in metadata.directory.entries if e.name is not None}
        numbers = {found.bitmap_index for found in metadata.problems if found.breaks_bitmap}
        token = metadata.file.token
        if token == self._migration.next_token:  # written by an attempt of ours that failed
            token = self._departure.facts.token
        return Facts(
            Definition.of(metadata.file),
            token,
            _identity(self._migration.data_file),
            metadata.directory.is_consistent,
            entries,
            {name for name, entry in entries.items() if entry.index in numbers},
        )

    def _witness(self) -> Witness:
        """The bits of sentinel and canary."""
        sentinel = self._departure.sentinel
        if not sentinel:
            return Witness()
        return Witness(self._octets(sentinel.name), self._octets(sentinel.canary_name))

    def _octets(self, name: str) -> NDArray[np.uint8] | None:
        entry = self._found.entries.get(name)
        if entry is None or name in self._found.broken:
            return None
        return np.frombuffer(self._load(entry).bits.octets, np.uint8)

    def _load(self, entry: DirectoryEntry) -> TrackedBitmap:
        return TrackedBitmap.load(self._session.store.file, entry)

    def _tracked(self, fates: dict[str, Fate]) -> Iterable[TrackedBitmap]:
        """The bitmaps that go on being tracked, with the bits that they go on with."""
        ours = {bitmap.name: bitmap for bitmap in self._session.recording.bitmaps}
        is_untouched = self._is_untouched()
        for name, fate in fates.items():
            if fate.kind == "kept":
                if not is_untouched:
                    self._unite(ours[name], self._found.entries[name])
                yield ours[name]
            elif fate.kind == "reloaded":
                yield self._load(self._found.entries[name])

    def _is_untouched(self) -> bool:
        """Whether no writer wrote to the image at all, so that our bitmaps are stored there."""
        token = self._session.storage.change_token()
        ours = self._departure.facts.entries
        is_same = all(self._found.entries.get(name) == entry for name, entry in ours.items())
        return token is not None and token == self._migration.change_token and is_same

    def _unite(self, bitmap: TrackedBitmap, entry: DirectoryEntry) -> None:
        """Adds what the image has to what is in memory; all of it has to be stored again.

        Another writer may have merged other bitmaps into it, or cleared it and stored it anew,
        even if it is in_use again where it was before. More bits than necessary are never wrong.
        """
        octets, touched = (np.frombuffer(array, np.uint8) for array in bitmap.bits)
        touched[:] = 1
        octets |= np.frombuffer(self._load(entry).bits.octets, np.uint8)

    def go_on(self) -> None:
        """Lets marks in again, once all of it is committed."""
        session = self._session
        recording = Recording.of(self.bitmaps, session.store.file.virtual_size)
        if session.intent:  # before any mark is let in
            session.take_intent(self._intent, recording)
        session.recorder.reopen(recording)
        if self._has_kept and self.activation.changed is not None:
            session.recorder.mark_many(self.activation.changed)
        session.apply("activate", activation=self.activation)


def last_activation(session: Session) -> Activation:
    """Returns the result of taking the disk back last.

    "unchanged" if it was not given away since tracking began.

    Raises:
        StateError: the image is in other hands, or tracking has ended.
    """
    session.require("flush")
    if session.activation:
        return session.activation
    reason = "the disk was not given away"
    fates = {bitmap.name: Fate("kept", reason) for bitmap in session.recording.bitmaps}
    return Activation("unchanged", reason, fates, np.zeros((0, 2), np.int64))
