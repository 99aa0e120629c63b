"""Changing the bitmaps of an image while it is tracked.

*Spec*: spec/tracking.md, "Rotation and edits".
"""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from qcow2bm.bitmaps.draft_bits import MAX_FACTOR, DraftBits, PackedSource, Source
from qcow2bm.bitmaps.tracked_bitmap import TrackedBitmap
from qcow2bm.errors import BitmapError, LimitError, StateError
from qcow2bm.format.directory import FLAG_AUTO, FLAG_IN_USE
from qcow2bm.migration.intent import Intent, is_intent
from qcow2bm.tracker.block import Block
from qcow2bm.tracker.fanout import merge
from qcow2bm.tracker.session import Session

if TYPE_CHECKING:
    from qcow2bm.bitmaps.draft import Draft
    from qcow2bm.bits.operations import Op


class Merge(NamedTuple):
    """A merge of an edit: of tracked bitmaps in memory, of others in the draft."""

    target: TrackedBitmap | DraftBits
    source: TrackedBitmap | DraftBits
    op: Op


class TrackerEdit:
    """Changes to the bitmaps of a disk that is being written to.

    Made by `Tracker.edit`. The methods mean the same as those of `qcow2bm.Edit`, which says what
    they raise. A bitmap that is enabled, or added and enabled, is tracked from the end of the
    block on; a bitmap that is removed or disabled records writes until the same moment. Merges
    are done at the end of the block, too, in the order in which they were asked for. In the same
    edit nothing more can be done with a bitmap that was removed or disabled.
    """

    def __init__(self, session: Session) -> None:
        """See `Tracker.edit`."""
        self._session = session
        self._is_used = False
        self._open_draft: Draft | None = None
        self._disabled: list[TrackedBitmap] = []  # no longer tracked, and stored
        self._removed: list[TrackedBitmap] = []  # no longer tracked, and gone
        self._begun: dict[str, TrackedBitmap] = {}
        self._merges: list[Merge] = []

    def __enter__(self) -> TrackerEdit:
        if self._is_used:
            raise StateError("finished", "begun anew with Tracker.edit", "the edit")
        with ExitStack() as held:
            held.enter_context(self._session.exclusive("edit"))
            self._is_used = True
            self._open_draft = self._session.store.load_draft()
            self._held = held.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            with self._held:
                if kind is None:
                    self._session.require("edit")
                    intent = self._session.cover(self._draft, self._names())
                    self._session.store.plan(self._draft)  # raises what can be known before
                    with self._session.in_flight.drained() as drained, self._session.fatal():
                        self._commit(drained, intent)
        finally:
            self._open_draft = None

    @property
    def _draft(self) -> Draft:
        if self._open_draft is None:
            raise StateError("not going on", "inside its with block", "the edit")
        return self._open_draft

    def _names(self) -> list[str]:
        """The names of the bitmaps that are tracked after this edit."""
        gone = [*self._disabled, *self._removed]
        before = [bitmap for bitmap in self._session.recording.bitmaps if bitmap not in gone]
        return [*(bitmap.name for bitmap in before), *self._begun]

    def _commit(self, drained: Block, intent: Intent | None) -> None:
        session, draft = self._session, self._draft
        session.switch([*self._disabled, *self._removed], self._begun.values())
        drained.leave()  # writes go on
        for step in self._merges:
            self._merge(step)
        for name, bitmap in self._begun.items():  # all that will be on disk has to be in memory
            self._add(bitmap, draft.bits(name))
        due = [*self._disabled]
        if intent:  # what was merged is in no write of the guest: a crash must not lose it
            due += [b for b in session.recording.bitmaps if b.name not in self._begun]
        session.store_pieces([(bitmap, bitmap.due().tolist()) for bitmap in due])
        session.commit(session.store.plan(draft), intent=intent)

    def _merge(self, step: Merge) -> None:
        """Does one of the merges; everything marked before the end of the block is in memory."""
        source: Source
        if isinstance(step.source, TrackedBitmap):
            octets = np.frombuffer(bytes(step.source.bits.octets), np.uint8)
            size = self._session.recording.virtual_size
            source = PackedSource(octets, step.source.granularity, size)
        else:
            source = step.source
        if isinstance(step.target, DraftBits):
            step.target.combine(step.op, source)
        else:
            self._add(step.target, source)

    def _add(self, bitmap: TrackedBitmap, source: Source) -> None:
        """Sets all that is set in ``source`` in a tracked bitmap."""
        with self._session.recorder.paused():
            merge(bitmap, source, self._session.recording.virtual_size)

    def _tracked(self, name: str) -> TrackedBitmap | None:
        """The bitmap if it is tracked or will be; raises for one that this edit has ended."""
        if is_intent(name):
            raise BitmapError(name, "is an intent bitmap, or its canary, and cannot be edited")
        if name in self._begun:
            return self._begun[name]
        for bitmap in self._session.recording.bitmaps:
            if bitmap.name == name:
                if bitmap in self._disabled or bitmap in self._removed:
                    raise BitmapError(name, "was ended by this edit: go on in another one")
                return bitmap
        return None

    def _begin(self, name: str) -> None:
        bits = self._draft.bits(name)
        length = bits.clusters * self._session.store.cluster_size
        bitmap = TrackedBitmap.unplaced(name, bits.granularity, length)
        self._draft.find(name).flags |= FLAG_AUTO | FLAG_IN_USE
        self._begun[name] = bitmap

    def add(self, name: str, granularity: int | None = None, enabled: bool = True) -> None:
        """Adds a clean bitmap; it is tracked if it is ``enabled``."""
        self._draft.add(name, granularity, enabled=False)
        if enabled:
            try:
                self._begin(name)
            except BaseException:
                self._draft.remove(name)
                raise

    def remove(self, name: str) -> None:
        """Removes a bitmap, tracked or not."""
        tracked = self._tracked(name)
        self._draft.remove(name)
        if not self._begun.pop(name, None) and tracked:
            self._removed.append(tracked)

    def enable(self, name: str) -> None:
        """Tracks a bitmap that was disabled."""
        if not self._tracked(name):
            self._begin(name)

    def disable(self, name: str) -> None:
        """Ends tracking a bitmap; it is stored, and valid."""
        tracked = self._tracked(name)
        self._draft.find(name).flags &= ~(FLAG_AUTO | FLAG_IN_USE)
        if not self._begun.pop(name, None) and tracked:
            self._disabled.append(tracked)

    def merge(self, target: str, source: str, op: Op = "or") -> None:
        """Combines what ``target`` records with what ``source`` records.

        Bits of a tracked bitmap are only ever set, so a tracked target takes "or" only.
        """
        into, origin = self._tracked(target), self._tracked(source)
        if into and op != "or":
            raise BitmapError(target, f'is tracked, so that nothing can be taken from it by "{op}"')
        step = Merge(self._bits(target, into), self._bits(source, origin), op)
        sizes = step.target.granularity, step.source.granularity
        if max(sizes) // min(sizes) > MAX_FACTOR:
            ratio = max(sizes) // min(sizes)
            raise LimitError("the ratio of the granularities", ratio, MAX_FACTOR)
        self._merges.append(step)

    def _bits(self, name: str, tracked: TrackedBitmap | None) -> TrackedBitmap | DraftBits:
        """Returns the holder of the bits: the draft, if the bitmap begins in this edit."""
        return self._draft.bits(name) if not tracked or name in self._begun else tracked


def rotate(session: Session, name: str, new_name: str) -> None:
    """Freezes a bitmap and goes on in a fresh one; see `Tracker.rotate`."""
    with session.exclusive("edit"):
        frozen, store = session.find(name), session.store
        draft = store.load_draft()
        draft.add(new_name, frozen.granularity, enabled=True)
        draft.find(new_name).flags |= FLAG_IN_USE
        draft.find(name).flags &= ~(FLAG_AUTO | FLAG_IN_USE)
        length = len(frozen.bits.octets)
        fresh = TrackedBitmap.unplaced(new_name, frozen.granularity, length)
        kept = (bitmap.name for bitmap in session.recording.bitmaps if bitmap is not frozen)
        intent = session.cover(draft, [*kept, new_name])
        store.plan(draft)  # raises what can be known before
        with session.in_flight.drained() as drained, session.fatal():
            session.switch([frozen], [fresh])
            drained.leave()  # writes go on
            session.store_pieces([(frozen, frozen.due().tolist())])
            session.commit(store.plan(draft), intent=intent)
