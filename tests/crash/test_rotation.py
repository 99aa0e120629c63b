"""Crashes while bitmaps are rotated and edited under a tracker: none is valid and misses a mark."""

from __future__ import annotations

from random import Random
from typing import Any, NamedTuple

import numpy as np
import pytest
from support.crash_judge import Facts, Findings, look, read
from support.crash_states import BrokenStateError, State, judge_states
from support.images import ONES, ZEROES, Stored, build_image, extension
from support.recording import RecordingStorage, cover, number_of, random_ranges, stored_bits

import qcow2bm
from qcow2bm.clusters.plan import Plan
from qcow2bm.format.extensions import BACKING_FORMAT, FEATURE_NAMES

LAYOUTS: dict[str, dict[str, Any]] = {
    "clusters of 512": {"cluster_bits": 9, "size": 5 << 20},
    "clusters of 4096": {"cluster_bits": 12, "size": 40 << 20},
    "refcounts of 64 bits": {"cluster_bits": 9, "size": 5 << 20, "refcount_order": 6},
    "an overlay": {
        "cluster_bits": 16,
        "size": 1 << 30,
        "backing_name": b"base.qcow2",
        "extensions": [extension(BACKING_FORMAT, b"qcow2"), extension(FEATURE_NAMES, bytes(384))],
    },
}


class Session(NamedTuple):
    """The writes that a storage saw, and the facts that must hold for them.

    ``bits`` are those of a bitmap whenever it is valid, from step ``begun`` on; ``valid_from`` is
    the step from which on it has to be.
    """

    image: bytes
    plan: Plan
    begun: int
    bits: dict[str, int]
    valid_from: dict[str, int]


def session(layout: str, seed: int) -> Session:
    """Marks, rotates "a", marks, disables "z" and adds "n", marks, stops."""
    random = Random(f"{layout} {seed}")
    options = LAYOUTS[layout]
    table = (b"\x01\x80", ZEROES, ONES, b"\x10")
    clusters = -(-options["size"] // (8 << options["cluster_bits"] << 9))
    image = build_image(
        Stored(b"a", (table * clusters)[:clusters], 9),
        Stored(b"off", flags=0, granularity_bits=16),
        Stored(b"z", granularity_bits=11),
        **options,
    ).data + b"\xaa" * (2 << options["cluster_bits"])
    image = bytes(image)
    storage = RecordingStorage(bytearray(image))
    old = stored_bits(image)
    expected = {"a": old["a"], "z": old["z"], "off": old["off"]}
    granularity = {"a": 512, "b": 512, "z": 2048, "n": 4096}
    with qcow2bm.open(storage, "r+") as opened:
        size = opened.virtual_size
        tracker = opened.track()
        begun = len(storage.steps)

        def mark() -> None:
            for _ in range(2):
                ranges = random_ranges(random, size, 4, size // random.choice((3, 100)))
                tracker.mark_many(np.array(ranges))
                for name in tracker.names:
                    cover(expected[name], granularity[name], ranges)
                if random.random() < 0.5:
                    tracker.flush(random.choice((None, 4096)))

        mark()
        tracker.rotate("a", "b")
        rotated = len(storage.steps)
        expected["b"] = np.zeros_like(old["a"])
        mark()
        with tracker.edit() as edit:
            edit.disable("z")
            edit.add("n", 4096)
        edited = len(storage.steps)
        expected["n"] = np.zeros(-(-size // 4096), np.uint8)
        mark()
        tracker.stop()
    done = len(storage.steps)
    valid_from = {"a": rotated, "z": edited, "b": done, "n": done}
    bits = {name: number_of(found) for name, found in expected.items()}
    return Session(image, storage.since(0), begun, bits, valid_from)


def judge(run: Session, before: Facts, found: Findings[Facts], first_step: int) -> None:
    """Raises unless a crash from that step on, and before the next barrier, may leave this."""
    facts = found.facts
    if facts.fixed != before.fixed or facts.faults - before.faults:
        raise BrokenStateError(f"the image has {facts.fixed} and {facts.faults}")
    found.require_counted(run.image)
    old = {bitmap.name: bitmap for bitmap in before.bitmaps}
    names = {bitmap.name for bitmap in facts.bitmaps}
    if not old.keys() <= names:
        raise BrokenStateError(f"only {names} are left")
    for bitmap in facts.bitmaps:
        name = bitmap.name
        if bitmap.status == "inconsistent":
            is_right = name != "off" and first_step < run.valid_from[name]
        elif first_step < run.begun and bitmap == old.get(name):
            is_right = True  # in_use was not durable yet, and nothing marked
        else:
            is_right = bitmap.status == "valid" and bitmap.dirty == run.bits[name]
        if not is_right:
            raise BrokenStateError(f"{name} may not be {bitmap.status} like this")


def judge_all(run: Session, random: Random, most: int) -> int:
    before = look(run.image)

    def judge_state(found: Findings[Facts], state: State) -> None:
        interval = state.interval
        step = interval.stop_step + 1 if state.is_after else interval.first_step
        judge(run, before, found, step)

    return judge_states(run.image, run.plan, random, read, judge_state, most)


@pytest.mark.spec("INV-SUPERSET")
@pytest.mark.spec("TRACK-13")
@pytest.mark.spec("TRACK-14")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_some_states(layout: str) -> None:
    for seed in range(2):
        assert judge_all(session(layout, seed), Random(seed), 6)


@pytest.mark.deep
@pytest.mark.parametrize("layout", LAYOUTS)
def test_many_states(layout: str) -> None:
    count = sum(judge_all(session(layout, seed), Random(seed), 150) for seed in range(20))
    print(f"crash states checked: {count} ({layout})")
    assert count > 1000


def test_the_judge_notices_what_is_done_too_early() -> None:
    """Without the barriers some state has a valid bitmap that misses marks, or worse."""
    run = session("clusters of 512", 1)
    noticed = 0
    for step in range(len(run.plan.steps) - 1):
        if run.plan.is_barrier(step):
            plan = Plan((*run.plan.steps[:step], *run.plan.steps[step + 1 :]))
            shifted = {n: s - (step < s) for n, s in run.valid_from.items()}
            begun = run.begun - (step < run.begun)
            try:
                judge_all(run._replace(plan=plan, valid_from=shifted, begun=begun), Random(1), 20)
            except BrokenStateError:
                noticed += 1
    assert noticed
