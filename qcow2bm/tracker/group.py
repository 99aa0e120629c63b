"""The trackers of all disks of one machine, stopped or given away together.

*Spec*: spec/tracking.md, "Several disks".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from qcow2bm.errors import StateError
from qcow2bm.tracker.reports import Activation, Convergence, StopReport
from qcow2bm.tracker.tracker import Tracker

if TYPE_CHECKING:
    from qcow2bm.migration.evidence import Policy
    from qcow2bm.storage.file_identity import FilePath

_Result = TypeVar("_Result")


class TrackerGroup:
    """Trackers by the names of their disks.

    Every method works on all of them at once, each in a thread of its own. A failure of one disk
    is reported for that disk, and keeps no other disk from being stored.
    """

    def __init__(self, trackers: Mapping[str, Tracker]) -> None:
        self._trackers = dict(trackers)

    def converge(
        self, max_downtime: float, timeout: float | None = None
    ) -> dict[str, Convergence | Exception]:
        """`Tracker.converge` of every disk.

        The disks stop at the same time, so each of them may take all of ``max_downtime``.
        """
        return self._all(lambda _, tracker: tracker.converge(max_downtime, timeout))

    def stop(self) -> dict[str, StopReport | Exception]:
        """`Tracker.stop` of every disk: for each its report, or the error it failed with."""
        return self._all(lambda _, tracker: tracker.stop())

    def begin_migration(
        self, *, carried: Mapping[str, Iterable[str]] | None = None, sentinel: bool = True
    ) -> dict[str, Exception | None]:
        """`Tracker.begin_migration` of every disk; ``carried`` are names by disk.

        Raises:
            ValueError: there is no disk of such a name.
        """
        names = self._known(carried)
        return self._all(
            lambda disk, tracker: tracker.begin_migration(
                carried=names.get(disk, ()), sentinel=sentinel
            )
        )

    def cancel_migration(self) -> dict[str, Exception | None]:
        """`Tracker.cancel_migration` of every disk."""
        return self._all(lambda _, tracker: tracker.cancel_migration())

    def inactivate(
        self, *, data_files: Mapping[str, FilePath] | None = None
    ) -> dict[str, StopReport | Exception]:
        """`Tracker.inactivate` of every disk; if one fails, `activate` takes the others back.

        ``data_files`` are the paths of external data files by disk.

        Raises:
            ValueError: there is no disk of such a name.
        """
        paths = self._known(data_files)
        return self._all(lambda disk, tracker: tracker.inactivate(data_file=paths.get(disk)))

    def activate(
        self,
        policy: Policy = "drop",
        *,
        other_side_has_stopped: bool = False,
        lock_timeout: float = 0,
    ) -> dict[str, Activation | Exception]:
        """`Tracker.activate` of every disk that is inactive.

        The result has all disks. A disk that was taken back before has what was found then, until
        it is given away again; a disk that was never given away is "unchanged". The machine can go
        on only if all disks are "unchanged".
        """
        results = self._all(
            lambda _, tracker: tracker.activate(
                policy, other_side_has_stopped=other_side_has_stopped, lock_timeout=lock_timeout
            ),
            [disk for disk, tracker in self._trackers.items() if tracker.state == "inactive"],
        )
        return {
            disk: results[disk] if disk in results else _last_activation(tracker)
            for disk, tracker in self._trackers.items()
        }

    def _known(self, by_disk: Mapping[str, _Result] | None) -> Mapping[str, _Result]:
        unknown = set(by_disk or {}) - set(self._trackers)
        if unknown:
            raise ValueError(f"there is no disk {sorted(unknown)[0]!r}")
        return by_disk or {}

    def _all(
        self, work: Callable[[str, Tracker], _Result], disks: Iterable[str] | None = None
    ) -> dict[str, _Result | Exception]:
        chosen = list(self._trackers if disks is None else disks)
        for tracker in self._trackers.values():
            tracker.require_free()

        def attempt(disk: str) -> _Result | Exception:
            try:
                return work(disk, self._trackers[disk])
            except Exception as error:
                return error

        with ThreadPoolExecutor(max(1, len(chosen))) as pool:
            return dict(zip(chosen, pool.map(attempt, chosen), strict=True))


def _last_activation(tracker: Tracker) -> Activation | Exception:
    try:
        return tracker.activation
    except StateError as error:
        return error
