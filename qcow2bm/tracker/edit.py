"""Changing the bitmaps of an image while it is tracked.

*Spec*: spec/tracking.md, "Rotation and edits".
"""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from qcow2bm.errors import BitmapError
from qcow2bm.format.directory import FLAG_AUTO, FLAG_IN_USE
from qcow2bm.store.draft import PackedSource, Source
from qcow2bm.tracker.spread import Tracked, merge

if TYPE_CHECKING:
    from qcow2bm.bits.algebra import Op
    from qcow2bm.tracker.tracker import Tracker


class TrackerEdit:
    """What can be done with the bitmaps of a disk that is being written to.

    Made by `Tracker.edit`. The names mean the same as in `qcow2bm.Edit`, which says what they
    raise. Bitmaps that record writes are tracked from the end of the block on.
    """

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker
        self._left: list[Tracked] = []  # which are stored and then left alone
        self._dropped: list[Tracked] = []  # which are not even stored
        self._started: list[str] = []
        self._merged: list[tuple[Tracked, Tracked]] = []  # each with a copy that has more

    def __enter__(self) -> TrackerEdit:
        self._tracker._io.acquire()
        try:
            self._tracker._require_tracking()
            self._draft = self._tracker._store.draft()
        except BaseException:
            self._tracker._io.release()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._commit()
        finally:
            self._tracker._io.release()

    def _commit(self) -> None:
        tracker = self._tracker
        with tracker._recorder.locked():
            for bitmap, copy in self._merged:
                bitmap.add(copy.bits.octets)
        if self._left or self._dropped:
            tracker._drop(self._left, self._dropped)
        tracker._recommit(self._draft, self._started)

    def _tracked(self, name: str) -> Tracked | None:
        """The bitmap if it is tracked, and goes on being so."""
        ending = [*self._left, *self._dropped]
        for bitmap in self._tracker._now.tracked:
            if bitmap.live.name == name and bitmap not in ending:
                return bitmap
        return None

    def add(self, name: str, granularity: int | None = None, enabled: bool = True) -> None:
        """Adds a clean bitmap; it is tracked if it is ``enabled``."""
        self._draft.add(name, granularity, enabled=enabled)
        if enabled:
            self._start(name)

    def _start(self, name: str) -> None:
        self._draft.find(name).flags |= FLAG_AUTO | FLAG_IN_USE
        self._started.append(name)

    def remove(self, name: str) -> None:
        """Removes a bitmap, tracked or not."""
        tracked = self._tracked(name)
        self._draft.remove(name)
        if tracked:
            self._dropped.append(tracked)
        if name in self._started:
            self._started.remove(name)

    def enable(self, name: str) -> None:
        """Tracks a bitmap that was disabled."""
        if not self._tracked(name) and name not in self._started:
            self._draft.bits(name)  # raises unless it can be loaded
            self._start(name)

    def disable(self, name: str) -> None:
        """Tracks a bitmap no more; it is stored, and valid."""
        tracked = self._tracked(name)
        self._draft.find(name).flags &= ~(FLAG_AUTO | FLAG_IN_USE)
        if tracked:
            self._left.append(tracked)
        if name in self._started:
            self._started.remove(name)

    def merge(self, target: str, source: str, op: Op = "or") -> None:
        """Combines what ``target`` records with what ``source`` does.

        What is tracked only ever gets more, so such a target takes "or" only.
        """
        bits = self._source(source)
        tracked = self._tracked(target)
        if not tracked:
            self._draft.merge(target, bits, op)
            return
        if op != "or":
            raise BitmapError(target, f'is tracked, so that nothing can be taken from it by "{op}"')
        copy = self._copy(tracked)
        merge(copy, bits, self._tracker._virtual_size)
        self._merged.append((tracked, copy))

    def _source(self, name: str) -> Source:
        tracked = self._tracked(name)
        if not tracked:
            return self._draft.bits(name)
        octets = np.frombuffer(self._copy(tracked).bits.octets, np.uint8)
        return PackedSource(octets, tracked.live.entry.granularity, self._tracker._virtual_size)

    def _copy(self, tracked: Tracked) -> Tracked:
        """What a tracked bitmap has now, with what was merged into it in this edit."""
        for bitmap, copy in reversed(self._merged):
            if bitmap is tracked:
                return copy.copy()
        return tracked.copy()
