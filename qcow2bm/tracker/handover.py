"""Giving the image to another host, and taking it back.

*Spec*: spec/lifecycle.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from qcow2bm.bitmaps.tracked_store import TrackedBitmap, load_live
from qcow2bm.clusters.file import ClusterFile
from qcow2bm.clusters.header_draft import fresh_token
from qcow2bm.errors import CommitError, StateError, StorageError
from qcow2bm.format.directory import FLAG_IN_USE, DirectoryEntry
from qcow2bm.migration.evidence import (
    Definition,
    Departure,
    DiskOutcome,
    Facts,
    Fate,
    Witness,
    decide,
    judge,
)
from qcow2bm.migration.sentinel import Sentinel, is_sentinel
from qcow2bm.storage.file_identity import FileIdentity, FilePath, identify
from qcow2bm.tracker.fanout import Recording, Tracked
from qcow2bm.units import decode_name

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from qcow2bm.migration.evidence import Policy
    from qcow2bm.tracker.reports import StopReport
    from qcow2bm.tracker.tracker import Tracker


class Activation(NamedTuple):
    """What was found when an image was taken back.

    Attributes:
        outcome: whether the disk is as it was given away. Unless it is "unchanged", a guest that
            was running before must not go on with it: it would not know what was written.
        reason: why that is the answer.
        bitmaps: what became of each bitmap.
        changed: what may have been written meanwhile, int64[n, 2] of (start, length) in guest
            bytes; None if that is not known.
    """

    outcome: DiskOutcome
    reason: str
    bitmaps: dict[str, Fate]
    changed: NDArray[np.int64] | None


class Migration(NamedTuple):
    """What holds for one migration alone, from its beginning until it is cancelled or taken back.

    Attributes:
        carried: the names of the bitmaps that it carries, which are not stored here.
        sentinel: what will tell of writes, and its bitmap, which is in_use by us so far.
        left: the image as it was given away; None before that.
        data_file: the path of the external data file, if the caller gave it.
        change_token: that of the storage then; None where it has none.
        next_token: what becomes of the generation, where it is recorded, when it is taken back:
            the same if that has to be tried again, so that we know it for our own.
    """

    carried: frozenset[str]
    sentinel: tuple[Sentinel, TrackedBitmap] | None
    left: Departure | None = None
    data_file: FilePath | None = None
    change_token: object = None
    next_token: bytes = b""

    @property
    def lives(self) -> list[TrackedBitmap]:
        """The bitmap of the sentinel, if there is one."""
        return [self.sentinel[1]] if self.sentinel else []


def begin(tracker: Tracker, carried: Iterable[str], *, with_sentinel: bool) -> Migration:
    """Makes the sentinel; see `Tracker.begin_migration`."""
    if isinstance(carried, str):
        raise TypeError("carried are names, not one name")
    names = frozenset(carried)
    for name in names:
        tracker._find(name)
    store = tracker._store
    is_stale = store.metadata.directory.extension and not store.metadata.directory.is_consistent
    if not with_sentinel or is_stale:
        return Migration(names, None)
    draft = store.draft()
    sentinel = Sentinel.fresh(tracker._virtual_size, store.cluster_size)
    draft.add(sentinel.canary_name, sentinel.granularity, enabled=False)
    draft.fill(sentinel.canary_name, sentinel.canary_ranges, is_set=True)
    draft.add(sentinel.name, sentinel.granularity, enabled=True)
    draft.find(sentinel.name).flags |= FLAG_IN_USE  # the guest goes on writing
    length = draft.bits(sentinel.name).clusters * store.cluster_size
    live = TrackedBitmap.unplaced(sentinel.name, sentinel.granularity, bytearray(length))
    store.plan(draft)  # raises what can be known before
    with tracker._fatal():
        tracker._recommit(draft, live)
    return Migration(names, (sentinel, live))


def cancel(tracker: Tracker, migration: Migration) -> None:
    """Removes the sentinel; see `Tracker.cancel_migration`."""
    if not migration.sentinel:
        return
    sentinel, _ = migration.sentinel
    draft = tracker._store.draft()
    draft.remove(sentinel.name)
    draft.remove(sentinel.canary_name)
    tracker._store.plan(draft)  # raises what can be known before
    with tracker._fatal():
        tracker._recommit(draft)


def inactivate(tracker: Tracker, migration: Migration, data_file: FilePath | None) -> StopReport:
    """Stores everything and lets the image go; see `Tracker.inactivate`."""
    report = tracker._store_all("inactive")
    file = tracker._store.file
    facts = Facts(
        Definition.of(file),
        tracker._store.token,
        _identity(data_file),
        tracker._store.metadata.directory.is_consistent,
        {b.live.name: b.live.entry for b in tracker._now.tracked},
    )
    sentinel = migration.sentinel[0] if migration.sentinel else None
    tracker._migration = migration._replace(
        left=Departure(facts, sentinel),
        data_file=data_file,
        change_token=tracker._storage.change_token(),
        next_token=fresh_token(),
    )
    tracker._activation = None
    tracker._storage.release()
    return report


def _identity(path: FilePath | None) -> FileIdentity | None:
    """Who the external data file is; None where that cannot be said."""
    with suppress(StorageError):
        return None if path is None else identify(path)
    return None


def activate(
    tracker: Tracker,
    migration: Migration,
    policy: Policy,
    *,
    other_side_has_stopped: bool,
    lock_timeout: float,
) -> Activation:
    """Takes the image back; see `Tracker.activate`."""
    storage = tracker._storage
    if not storage.excludes_other_hosts and not other_side_has_stopped:
        raise StateError(
            "on storage whose locks other hosts do not see",
            "activated with other_side_has_stopped=True, once that is so",
            "the image",
        )
    try:
        storage.acquire(lock_timeout)
        storage.refresh()
        store = tracker._store
        store.reload()
        comeback = _Comeback(tracker, migration, policy)
        store.plan(comeback.draft)  # raises what can be known before anything is written
        store.restore_generation()
        plan = store.plan(comeback.draft, migration.next_token)
    except BaseException:
        storage.release()
        raise
    try:
        store.commit(plan, [bitmap.live for bitmap in comeback.tracked])
        comeback.go_on()
    except BaseException as error:
        is_old = isinstance(error, CommitError) and error.outcome == "old"
        if is_old:
            storage.release()
        else:
            tracker._end("failed", error)
        if isinstance(error, CommitError):
            text = _STILL_AWAY if is_old else _LOST
            raise CommitError(error.path, error.step, error.outcome, error.reason, text) from error
        raise
    return comeback.activation


_STILL_AWAY = "nothing of it counts, and the image is inactive still: activate it again, or abandon"
_LOST = "tracking has ended, and the bitmaps stay in use: take full backups"


class _Comeback:
    """What becomes of the bitmaps, decided but not yet done.

    Attributes:
        draft: the bitmaps of the image as they are to be now.
        tracked: those that are tracked from now on.
        activation: what the caller is told.
    """

    def __init__(self, tracker: Tracker, migration: Migration, policy: Policy) -> None:
        assert migration.left
        self._tracker = tracker
        store = tracker._store
        entries = {e.name: e for e in store.metadata.directory.entries if e.name is not None}
        numbers = {p.bitmap_index for p in store.metadata.problems if p.breaks_bitmap}
        found = Facts(
            Definition.of(store.file),
            _token(store.file, migration),
            _identity(migration.data_file),
            store.metadata.directory.is_consistent,
            entries,
            {name for name, entry in entries.items() if entry.index in numbers},
        )
        sentinel = migration.left.sentinel
        witnesses = (sentinel.name, sentinel.canary_name) if sentinel else ()
        witness = Witness(*(self._octets(found, name) for name in witnesses))
        verdict = judge(migration.left, found, witness)
        fates = decide(migration.left, found, verdict, policy)
        self.activation = Activation(verdict.outcome, verdict.reason, fates, verdict.changed)
        ours = {bitmap.live.name: bitmap for bitmap in tracker._now.tracked}
        is_untouched = self._is_untouched(migration, found)
        self.tracked = []
        for name, fate in fates.items():
            if fate.kind == "kept":
                if not is_untouched:
                    self._unite(ours[name], entries[name])
                self.tracked.append(ours[name])
            elif fate.kind == "reloaded":
                self.tracked.append(Tracked.of(load_live(store.file, entries[name])))
        self._has_kept = any(fate.kind == "kept" for fate in fates.values())
        self.draft = store.draft()
        if found.is_consistent:
            for name in filter(is_sentinel, entries):
                self.draft.remove(name)
        # Those that do not fit the disk are not tracked, and miss what is written from now on.
        names = {bitmap.live.name for bitmap in self.tracked}
        names |= {name for name in found.broken if entries[name].auto}
        for bitmap in self.draft.bitmaps.values():
            if decode_name(bitmap.name_bytes) in names:
                bitmap.flags |= FLAG_IN_USE

    def _octets(self, found: Facts, name: str) -> NDArray[np.uint8] | None:
        entry = found.entries.get(name)
        if entry is None or name in found.broken:
            return None
        return np.frombuffer(load_live(self._tracker._store.file, entry).octets, np.uint8)

    def _is_untouched(self, migration: Migration, found: Facts) -> bool:
        """Whether nobody wrote to the image at all, so that ours are stored there as they were."""
        assert migration.left
        token = self._tracker._storage.change_token()
        ours = migration.left.facts.entries
        is_same = all(found.entries.get(name) == entry for name, entry in ours.items())
        return token is not None and token == migration.change_token and is_same

    def _unite(self, bitmap: Tracked, entry: DirectoryEntry) -> None:
        """Adds what the image has to what we have in memory; all of it has to be stored again.

        Somebody may have merged other bitmaps into it, or cleared it and stored it anew, even if
        it is in_use again where it was before. Whatever is stored there, more is never wrong.
        """
        octets, touched = (np.frombuffer(array, np.uint8) for array in bitmap.bits)
        touched[:] = 1
        octets |= np.frombuffer(load_live(self._tracker._store.file, entry).octets, np.uint8)

    def go_on(self) -> None:
        """Lets marks in again, all of it being committed."""
        tracker = self._tracker
        size = tracker._virtual_size = tracker._store.file.virtual_size
        tracker._now = Recording.of(self.tracked, size)
        tracker._recorder.reopen(size, tracker._now.granularity, tracker._now.bits)
        if self._has_kept and self.activation.changed is not None:
            tracker._recorder.mark_many(self.activation.changed)
        tracker._activation = self.activation
        tracker._migration = None


def _token(file: ClusterFile, migration: Migration) -> bytes | None:
    """That of the generation; what we ourselves made of it counts as what it was."""
    assert migration.left
    found = file.token
    return migration.left.facts.token if found == migration.next_token else found


def verdict(tracker: Tracker) -> Activation:
    """What was found when the disk was taken back last; `StateError` once tracking has ended.

    "unchanged" if it was not in other hands.
    """
    tracker._require("flush")
    if tracker._activation:
        return tracker._activation
    fates = dict.fromkeys(tracker.names, Fate("kept", "the disk was not given away"))
    return Activation("unchanged", "the disk was not given away", fates, np.zeros((0, 2), np.int64))
