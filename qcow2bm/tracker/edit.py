"""Changing the bitmaps of an image while it is tracked.

*Spec*: spec/tracking.md, "Rotation and edits".
"""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from qcow2bm.bitmaps.draft_bits import MAX_FACTOR, DraftBits, PackedSource, Source
from qcow2bm.bitmaps.tracked_store import TrackedBitmap
from qcow2bm.errors import BitmapError, LimitError, StateError
from qcow2bm.format.directory import FLAG_AUTO, FLAG_IN_USE
from qcow2bm.tracker.fanout import Tracked, merge

if TYPE_CHECKING:
    from qcow2bm.bitmaps.draft import Draft
    from qcow2bm.bits.operations import Op
    from qcow2bm.tracker.tracker import Tracker


class _Merge(NamedTuple):
    """What is merged, and into what: in memory, or on disk by the commit."""

    target: Tracked | DraftBits
    source: Tracked | DraftBits
    op: Op


class TrackerEdit:
    """What can be done with the bitmaps of a disk that is being written to.

    Made by `Tracker.edit`. The names mean the same as in `qcow2bm.Edit`, which says what they
    raise. Bitmaps that record writes are tracked from the end of the block on, from the moment in
    which those that are removed or disabled end. Merging is done then, too, in the order in
    which it was asked for. Once a bitmap is removed or disabled, nothing more can be done with it
    in this edit.
    """

    def __init__(self, tracker: Tracker) -> None:
        """See `Tracker.edit`."""
        self._tracker = tracker
        self._is_used = False
        self._open_draft: Draft | None = None
        self._stored: list[Tracked] = []  # which are ended, and stored
        self._dropped: list[Tracked] = []  # which are ended, and gone
        self._begun: dict[str, Tracked] = {}
        self._merges: list[_Merge] = []

    def __enter__(self) -> TrackerEdit:
        if self._is_used:
            raise StateError("finished", "begun anew with Tracker.edit", "the edit")
        with ExitStack() as held:
            held.enter_context(self._tracker._exclusive("edit"))
            self._is_used = True
            self._open_draft = self._tracker._store.draft()
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
                    self._tracker._require("edit")
                    self._tracker._store.plan(self._draft)  # raises what can be known before
                    with self._tracker._fatal():
                        self._commit()
        finally:
            self._open_draft = None

    @property
    def _draft(self) -> Draft:
        if self._open_draft is None:
            raise StateError("not going on", "inside its with block", "the edit")
        return self._open_draft

    def _commit(self) -> None:
        tracker = self._tracker
        tracker._switch([*self._stored, *self._dropped], list(self._begun.values()))
        for step in self._merges:
            self._merge(step)
        for name, bitmap in self._begun.items():  # in memory is all that will be on disk
            with tracker._recorder.locked():
                merge(bitmap, self._draft.bits(name), tracker._virtual_size)
        tracker._store_pieces([(bitmap, bitmap.due().tolist()) for bitmap in self._stored])
        tracker._recommit(self._draft)

    def _merge(self, step: _Merge) -> None:
        """One of the merges: everything marked before the commit is in memory by now."""
        tracker = self._tracker
        bits: Source
        if isinstance(step.source, Tracked):
            octets = np.frombuffer(bytes(step.source.bits.octets), np.uint8)
            granularity = step.source.live.entry.granularity
            bits = PackedSource(octets, granularity, tracker._virtual_size)
        else:
            bits = step.source
        if isinstance(step.target, DraftBits):
            step.target.combine(step.op, bits)
        else:
            with tracker._recorder.locked():
                merge(step.target, bits, tracker._virtual_size)

    def _known(self, name: str) -> Tracked | None:
        """The bitmap if it is tracked or will be; raises for one that this edit has ended."""
        if name in self._begun:
            return self._begun[name]
        for bitmap in self._tracker._now.tracked:
            if bitmap.live.name == name:
                if bitmap in self._stored or bitmap in self._dropped:
                    raise BitmapError(name, "was ended by this edit: go on in another one")
                return bitmap
        return None

    def _begin(self, name: str) -> None:
        bits = self._draft.bits(name)
        length = bits.clusters * self._tracker._store.cluster_size
        live = TrackedBitmap.unplaced(name, bits.granularity, bytearray(length))
        self._draft.find(name).flags |= FLAG_AUTO | FLAG_IN_USE
        self._begun[name] = Tracked.of(live)

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
        tracked = self._known(name)
        self._draft.remove(name)
        if not self._begun.pop(name, None) and tracked:
            self._dropped.append(tracked)

    def enable(self, name: str) -> None:
        """Tracks a bitmap that was disabled."""
        if not self._known(name):
            self._begin(name)

    def disable(self, name: str) -> None:
        """Tracks a bitmap no more; it is stored, and valid."""
        tracked = self._known(name)
        self._draft.find(name).flags &= ~(FLAG_AUTO | FLAG_IN_USE)
        if not self._begun.pop(name, None) and tracked:
            self._stored.append(tracked)

    def merge(self, target: str, source: str, op: Op = "or") -> None:
        """Combines what ``target`` records with what ``source`` does.

        What is tracked only ever gets more, so such a target takes "or" only.
        """
        into, origin = self._known(target), self._known(source)
        if into and op != "or":
            raise BitmapError(target, f'is tracked, so that nothing can be taken from it by "{op}"')
        step = _Merge(self._bits(target, into), self._bits(source, origin), op)
        sizes = [_granularity(step.target), _granularity(step.source)]
        if max(sizes) // min(sizes) > MAX_FACTOR:
            ratio = max(sizes) // min(sizes)
            raise LimitError("the ratio of the granularities", ratio, MAX_FACTOR)
        self._merges.append(step)

    def _bits(self, name: str, tracked: Tracked | None) -> Tracked | DraftBits:
        """Where its bits are: what begins in this edit is in the draft until the end."""
        return self._draft.bits(name) if not tracked or name in self._begun else tracked


def _granularity(bits: Tracked | DraftBits) -> int:
    return bits.live.entry.granularity if isinstance(bits, Tracked) else bits.granularity
