"""The trackers of all disks of one machine, stopped together.

*Spec*: spec/tracking.md, "Several disks".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from qcow2bm.tracker.tracker import Convergence, StopReport, Tracker

_Result = TypeVar("_Result")


class TrackerGroup:
    """Trackers by the names of their disks.

    Everything is done to all of them at once, each in a thread of its own; what goes wrong with
    one disk is reported for it and keeps no other from being stored.
    """

    def __init__(self, trackers: Mapping[str, Tracker]) -> None:
        self._trackers = dict(trackers)

    def converge(
        self, max_downtime: float, timeout: float | None = None
    ) -> dict[str, Convergence | Exception]:
        """`Tracker.converge` of every disk: they stop at once, so each may take all the time."""
        return self._all(lambda tracker: tracker.converge(max_downtime, timeout))

    def stop(self) -> dict[str, StopReport | Exception]:
        """`Tracker.stop` of every disk: for each its report, or the error it failed with."""
        return self._all(lambda tracker: tracker.stop())

    def _all(self, work: Callable[[Tracker], _Result]) -> dict[str, _Result | Exception]:
        for tracker in self._trackers.values():
            tracker._require_free()

        def attempt(tracker: Tracker) -> _Result | Exception:
            try:
                return work(tracker)
            except Exception as error:
                return error

        with ThreadPoolExecutor(max(1, len(self._trackers))) as pool:
            results = pool.map(attempt, self._trackers.values())
            return dict(zip(self._trackers, results, strict=True))
