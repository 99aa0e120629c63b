"""in_use or complete after any crash: what tracking leaves behind when the power fails.

The steps are those that a storage saw, of a session from beginning to track to having stopped.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import NamedTuple

import numpy as np
import pytest
from support.crash_judge import Facts, Findings, look, names, read
from support.crash_states import BrokenStateError, Interval, State, intervals, judge_states
from support.images import build_image
from support.layouts import FAMILIES, LAYOUTS, build, trackable
from support.recording import (
    RecordingStorage,
    cover,
    number_of,
    random_bitmap,
    random_ranges,
    stored_bits,
)

import qcow2bm
from qcow2bm.clusters.plan import Plan, Write
from qcow2bm.format.directory import FLAG_AUTO, FLAG_IN_USE

MIXED = [
    f"clusters of {1 << cluster_bits}, {kind}"
    for cluster_bits in (9, 12, 16)
    for kind in ("two", "one left out")
]
"""Bitmaps of two granularities with clusters of all kinds, free clusters that are not empty."""


def mixed(name: str, random: Random) -> bytes:
    """An image of that name."""
    cluster_bits = int(name.split()[2].strip(",")).bit_length() - 1
    size = (20 << cluster_bits << 9) + 512  # two and a half clusters of the finer bitmap
    bitmaps = [
        random_bitmap(random, name, size, granularity_bits, cluster_bits, flags)
        for name, granularity_bits, flags in (
            ("fine", 9, FLAG_AUTO),
            ("disabled", 9, 0),
            ("coarse", 11, FLAG_AUTO),
            ("crashed", 10, FLAG_AUTO | FLAG_IN_USE),
        )
    ]
    built = build_image(*bitmaps, cluster_bits=cluster_bits, size=size)
    return bytes(built.data + b"\xaa" * (4 << cluster_bits))


class Session(NamedTuple):
    """The writes while an image was tracked, and what its bitmaps must be.

    ``begun`` is how many steps were done when marking began, and ``last`` how many before the
    bitmaps became valid; ``lost`` are the bitmaps that were left out.
    """

    image: bytes
    old: Facts
    plan: Plan
    begun: int
    last: int
    marked: dict[str, int]
    lost: frozenset[str]

    def judge(self, found: Findings[Facts], state: State) -> None:
        """Raises unless this is a state that a crash in the interval, or after it, may leave."""
        facts = found.facts
        self._judge_bitmaps(facts, state.interval, is_after=state.is_after)
        if facts.fixed != self.old.fixed:
            raise BrokenStateError(f"the header has {facts.fixed}, not {self.old.fixed}")
        if facts.faults - self.old.faults:
            raise BrokenStateError(f"there are new faults: {set(facts.faults)}")
        if facts.has_unknown_autoclear and state.data != self.image:
            raise BrokenStateError("an unknown autoclear bit is still set after a change")
        found.require_counted(self.image)

    def _judge_bitmaps(self, facts: Facts, interval: Interval, *, is_after: bool) -> None:
        if len(facts.bitmaps) != len(self.old.bitmaps):
            raise BrokenStateError(f"bitmaps are gone: {names(facts.bitmaps)}")
        is_begun = interval.first_step >= self.begun or (
            is_after and interval.stop_step + 1 >= self.begun
        )
        is_over = is_after and interval.first_step >= self.last
        for old, found in zip(self.old.bitmaps, facts.bitmaps, strict=True):
            in_use = found._replace(flags=found.flags & ~FLAG_IN_USE, dirty=old.dirty)
            is_in_use = found.status == "inconsistent" and in_use._replace(status=old.status) == old
            if old.name in self.lost:
                allowed = is_in_use or (not is_begun and found == old)
            elif old.name not in self.marked:
                allowed = found == old
            elif interval.first_step >= self.last:
                is_complete = found == old._replace(dirty=self.marked[old.name])
                allowed = is_complete or (is_in_use and not is_over)
            else:
                allowed = is_in_use or (not is_begun and found == old)
            if not allowed:
                raise BrokenStateError(f"{old.name} may not be {names((found,))} {found.status}")

    def judge_all(self, random: Random, most: int | None = None) -> int:
        """Judges the states that the session can leave; returns how many.

        At most ``most`` states of an interval are judged.
        """
        return judge_states(self.image, self.plan, random, read, self.judge, most)


def track(image: bytes, random: Random, rounds: int, *, leaves_out: bool = False) -> Session:
    """Marks and flushes at random, and stops."""
    storage = RecordingStorage(bytearray(image))
    expected = stored_bits(image)
    with qcow2bm.open(storage, "r+") as opened:
        recording = [b.name for b in opened.bitmaps.values() if b.auto and b.status == "valid"]
        tracked = recording[leaves_out:]
        granularity = {name: opened.bitmaps[name].granularity for name in tracked}
        size = opened.virtual_size
        tracker = opened.track(tracked, others="mark-in-use" if leaves_out else "refuse")
        begun = len(storage.steps)
        for number in range(rounds + 1):
            if number:
                tracker.flush(random.choice((None, 4096, 3 * 4096)))
            ranges = random_ranges(random, size, 5, size // random.choice((3, 100)))
            tracker.mark_many(np.array(ranges))
            for name in tracked:
                cover(expected[name], granularity[name], ranges)
        tracker.stop()
    plan = Plan(tuple(storage.steps))
    last = max(n for n in range(len(plan.steps) - 1) if plan.is_barrier(n)) + 1
    flags = [step for step in plan.steps[last:] if isinstance(step, Write)]
    assert [write.length for write in flags] == [4] * len(tracked)
    marked = {name: number_of(expected[name]) for name in tracked}
    return Session(image, look(image), plan, begun, last, marked, frozenset(recording[:leaves_out]))


def sessions(name: str, count: int) -> Iterator[Session]:
    """Some of different lengths, of an image of that name."""
    for seed in range(count):
        random = Random(f"{name} {seed}")
        image = build(name) if name in LAYOUTS else mixed(name, random)
        leaves_out = name.endswith("one left out")
        yield track(image, random, rounds=random.randrange(4), leaves_out=leaves_out)


@pytest.mark.spec("INV-SUPERSET", "INV-INUSE", "INV-REFCOUNT")
@pytest.mark.parametrize("name", MIXED)
def test_some_states(name: str) -> None:
    for session in sessions(name, 4):
        session.judge_all(Random(name), most=12)


def test_some_layouts() -> None:
    random = Random("layouts")
    listed = trackable()
    for name in random.sample(listed, 20) + [n for n in listed if "full" in n or "autoclear" in n]:
        for session in sessions(name, 1):
            session.judge_all(random, most=4)


@pytest.mark.spec("INV-SUPERSET", "INV-INUSE", "INV-REFCOUNT")
@pytest.mark.deep
@pytest.mark.parametrize("name", MIXED)
def test_many_states(name: str) -> None:
    count = sum(session.judge_all(Random(name), most=200) for session in sessions(name, 40))
    print(f"crash states checked: {count} ({name})")
    assert count >= 500


@pytest.mark.deep
@pytest.mark.parametrize("family", FAMILIES)
def test_many_states_of_all_layouts(family: str) -> None:
    count = 0
    for name in trackable(family):
        for session in sessions(name, 2):
            count += session.judge_all(Random(name), most=40)
    print(f"crash states checked: {count} ({family})")


@pytest.mark.spec("INV-INUSE")
@pytest.mark.parametrize(
    "which", ["after in_use", "before bitmaps are valid", "before table entries"]
)
def test_no_barrier_is_for_nothing(which: str) -> None:
    """Without it there are states that must not be, and the judge notices."""
    noticed = 0
    for session in sessions("clusters of 512, two", 6):
        barriers = [n for n in range(session.begun, session.last - 1) if session.plan.is_barrier(n)]
        numbers = {
            "after in_use": [session.begun - 1],
            "before bitmaps are valid": [session.last - 1],
            "before table entries": barriers,
        }
        for number in numbers[which]:
            steps = session.plan.steps
            plan = Plan((*steps[:number], *steps[number + 1 :]))
            begun = session.begun - (number < session.begun)
            without = session._replace(plan=plan, begun=begun, last=session.last - 1)
            try:
                without.judge_all(Random(number))
            except BrokenStateError:
                noticed += 1
    assert noticed


def test_the_bits_after_a_stop_are_those_that_were_marked() -> None:
    session = next(sessions("clusters of 4096, two", 1))
    *_, interval = intervals(session.image, session.plan)
    found = {bitmap.name: bitmap for bitmap in look(interval.after).bitmaps}
    assert {name: found[name].dirty for name in session.marked} == session.marked
