"""Repairing the metadata of bitmaps, as a plan.

What can be proved is repaired. A bitmap that cannot be proved right is dropped.

*Spec*: spec/repair.md.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple

from qcow2bm.checking.directory_repair import DirectoryRepair, LostBitmap
from qcow2bm.checking.findings import Findings
from qcow2bm.checking.readings import believable_readings, length_repair
from qcow2bm.checking.refcount_repair import can_set_refcounts, refcount_writes, tail_writes
from qcow2bm.clusters.header_draft import HeaderDraft
from qcow2bm.clusters.plan import Barrier, Plan, Step, Write, coalesce
from qcow2bm.errors import UnsupportedError
from qcow2bm.log import logger
from qcow2bm.problem_errors import as_error
from qcow2bm.problem_kinds import EXTENSION_LENGTH, UNKNOWN_FEATURE
from qcow2bm.problems import REFUSED, Problem, RepairName
from qcow2bm.storage.dry_run import DryRunStorage
from qcow2bm.storage.interface import Storage

REPAIRS: dict[RepairName, str] = {
    "directory": "extension, directory, entries and tables of bitmaps",
    "tails": "bits behind the end of the disk",
    "refcounts": "leaked clusters, and refcounts that are too low",
    "stale": "a stale bitmaps extension, which is removed; not done unless it is asked for",
}
"""The faults that can be repaired, by the name of the repair."""


class Repair(NamedTuple):
    """The effects of a repair.

    Attributes:
        plan: all writes and barriers; empty if there is nothing to do.
        lost: the bitmaps that are dropped.
        renamed: (old, new) names of bitmaps.
        repaired: the problems of the severity refused or unusable that are gone afterwards, except
            those of bitmaps that are dropped.
        problems: all problems before the repair.
        left: the problems of the severity refused or unusable afterwards.
        leaked_clusters: how many clusters leak afterwards.
        freed_bytes: the size of the leaked clusters that are freed.
    """

    plan: Plan
    lost: tuple[LostBitmap, ...]
    renamed: tuple[tuple[str, str], ...]
    repaired: tuple[Problem, ...]
    problems: tuple[Problem, ...]
    left: tuple[Problem, ...]
    leaked_clusters: int
    freed_bytes: int


class _Trial:
    """The steps of a repair so far, tried out in memory.

    Attributes:
        storage: the image as it will be after the steps.
        steps: the steps.
        commit_point: the index of the step that makes the new state the valid one; None if there
            is no such step.
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = DryRunStorage(storage)
        self.steps: list[Step] = []
        self.commit_point: int | None = None

    def add(self, steps: Iterable[Step], commit_point: int | None = None) -> bool:
        """Adds steps; returns whether there were any.

        ``commit_point`` is the index among these steps.
        """
        begun = len(self.steps)
        for step in steps:
            if isinstance(step, Write):
                self.storage.write(step.offset, step.parts)
                logger.debug("repair plans a write at %#x: %s", step.offset, step.what)
            self.steps.append(step)
        if len(self.steps) == begun:
            return False
        if commit_point is not None:
            self.commit_point = begun + commit_point
        return True


def plan_repair(
    storage: Storage,
    *,
    lossless: bool = False,
    only: Collection[str] | None = None,
    capacity: int | None = None,
) -> Repair:
    """Returns how an image is repaired; nothing is written.

    Args:
        storage: the image; the caller holds its locks.
        lossless: do only what drops no bitmap.
        only: which of `REPAIRS` to do; by default all but "stale".
        capacity: the length in bytes that the storage cannot outgrow, if there is one.

    Raises:
        FormatError: it is no qcow2 image, or its refcounts are too damaged to allocate clusters.
        UnsupportedError: it has incompatible features that are unknown here.
        StorageError: reading failed, or there is no room.
    """
    trial = _Trial(storage)
    before = stored = Findings.load(trial.storage)
    for found in stored.metadata.header_problems:
        if found.kind == UNKNOWN_FEATURE:
            raise UnsupportedError(f"repairing an image that {found.reason}")
    chosen = [name for name in REPAIRS if name != "stale"] if only is None else only
    if "directory" in chosen and trial.add(length_repair(stored.metadata), 0):
        stored = Findings.load(trial.storage)
    readings = believable_readings(stored) if "directory" in chosen else [stored]
    if readings[0] is not stored:
        logger.info("repair reads the directory otherwise, in %d ways", len(readings))
    directory = DirectoryRepair(
        stored,
        readings,
        lossless=lossless or _is_header_refused(stored),
        capacity=capacity,
    )
    after = stored  # a reading that no step makes true is only a guess
    plan = directory.plan(chosen)
    if trial.add(plan.steps, plan.commit_point):
        after = Findings.load(trial.storage)
    if trial.add(_in_place((before, stored, *readings), after, chosen, is_first=not trial.steps)):
        after = Findings.load(trial.storage)
    _require_no_new_overlap((before, stored), after)
    for old, new in directory.renamed:
        logger.info("repair renames the bitmap %r to %r", old, new)
    for lost in directory.lost:
        logger.info("repair drops a bitmap: %r (%s)", lost.name, lost.reason)
    return Repair(
        Plan(tuple(trial.steps), trial.commit_point),
        tuple(directory.lost),
        tuple(directory.renamed),
        tuple(_repaired(before, after, directory.lost)),
        before.problems,
        after.faults,
        after.check.leaked_clusters,
        max(0, before.check.leaked_clusters - after.check.leaked_clusters)
        * before.metadata.file.cluster_size,
    )


def _is_header_refused(findings: Findings) -> bool:
    """Whether QEMU refuses the header for other reasons than the length of the extension.

    To drop bitmaps gains nothing then. The header may even be all that is wrong with them.
    """
    return any(
        found.severity == REFUSED and found.kind != EXTENSION_LENGTH
        for found in findings.metadata.header_problems
    )


def _in_place(
    earlier: tuple[Findings, ...], now: Findings, chosen: Collection[str], *, is_first: bool
) -> list[Step]:
    """Returns the steps that clear tails and set refcounts, in place.

    ``earlier`` are all ways in which the image was read before, ``now`` is its present state, and
    ``is_first`` says that no step comes before these.
    """
    writes: list[Write] = []
    if "tails" in chosen:
        writes += tail_writes(now)
    if "refcounts" in chosen and can_set_refcounts(earlier, now):
        writes += refcount_writes(now.metadata)
    if not writes:
        return []
    prepared: list[Step] = []
    if is_first and now.metadata.file.header.version > 2:
        prepared = HeaderDraft(now.metadata.file).clear_unknown_autoclear()
    return [*prepared, *coalesce(writes), Barrier("refcounts and tails")]


def _repaired(before: Findings, after: Findings, lost: Iterable[LostBitmap]) -> Iterator[Problem]:
    """Yields the problems that are gone, except those that went together with their bitmaps."""
    left = {(found.id, found.offset) for found in after.problems}
    names = {each.name for each in lost}
    for found in before.faults:
        index = found.bitmap_index
        is_lost = index is not None and not names.isdisjoint(
            (None, before.metadata.directory.entries[index].name)
        )
        if (found.id, found.offset) not in left and not is_lost:
            yield found


def _require_no_new_overlap(earlier: Iterable[Findings], after: Findings) -> None:
    """Raises FormatError if structures would share clusters that they did not share before."""
    known = {(found.id, found.offset) for before in earlier for found in before.problems}
    for found in after.problems:
        if found.kind.is_overlap and (found.id, found.offset) not in known:
            raise as_error(found, ": the outcome would not be sound, so nothing is written")
