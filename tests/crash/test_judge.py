"""The judge of crash states sees what is wrong: plans that are made unsafe do not pass."""

from __future__ import annotations

import struct
from random import Random

import pytest
from support.crash_judge import Judge, look, read, under_counted
from support.crash_states import BrokenStateError, ObservedImage, Views, intervals
from support.edit_operations import named, planned
from support.layouts import LAYOUTS, build, set_refcount

from qcow2bm.clusters.plan import Barrier, Plan, Step, Write
from qcow2bm.format.directory import FIELD_OFFSETS, FLAG_IN_USE

CASES = (
    ("garbage: garbage in free clusters of 4096", "several"),
    ("clusters of 512: 3 bitmaps, refcounts of 16 bits", "set"),
    ("clusters of 4096: 25 bitmaps, refcounts of 16 bits", "merge"),
    ("special: snapshots", "reset"),
    ("special: unknown autoclear bits", "set"),
    ("full refcounts: block, 64 bits", "set"),
    ("full refcounts: table, 64 bits", "set"),
    ("header with bitmaps: 3 bitmaps, 4096, head at 488, backing long", "set"),
    ("header with bitmaps: 1 bitmaps, 4096, head at 1008, backing none, more behind", "set"),
    ("header without bitmaps: 0 bitmaps, 4096, head at 504, backing long", "add two"),
    ("header without bitmaps: 0 bitmaps, 4096, head at 1008, backing long", "add two"),
)

ONLY_ORDER = {
    "use of the new refcount blocks",
    "use of the larger refcount table",
    "use of the rearranged header extensions",
}
"""Barriers between preparations and the rest. Nothing before the commit point builds on them, and
the barrier before that makes all of it durable."""

ONLY_TIDY = {"refcounts of freed clusters"}
"""Writes without which clusters leak, and nothing else is wrong."""


def case(layout: str, operation: str) -> tuple[Judge, Plan]:
    return planned(build(layout), named(operation))


def without(plan: Plan, number: int) -> Plan:
    point = plan.commit_point
    assert point is not None
    return Plan(plan.steps[:number] + plan.steps[number + 1 :], point - (number < point))


def assert_noticed(judge: Judge, plan: Plan, step: Step, most: int = 200) -> None:
    try:
        judge.judge_all(plan, Random(step.what), most)
    except BrokenStateError:
        return
    raise AssertionError(f"the judge does not miss {step}")


@pytest.mark.parametrize(("layout", "operation"), CASES)
def test_every_barrier_is_needed(layout: str, operation: str) -> None:
    judge, plan = case(layout, operation)
    for number, step in enumerate(plan.steps[:-1]):
        if isinstance(step, Barrier) and step.what not in ONLY_ORDER:
            assert_noticed(judge, without(plan, number), step)


@pytest.mark.parametrize(("layout", "operation"), CASES)
def test_every_write_is_needed(layout: str, operation: str) -> None:
    judge, plan = case(layout, operation)
    for number, step in enumerate(plan.steps):
        if isinstance(step, Write) and step.what not in ONLY_TIDY:
            assert_noticed(judge, without(plan, number), step, most=60)


@pytest.mark.parametrize(("layout", "operation"), CASES)
def test_the_commit_must_not_come_first(layout: str, operation: str) -> None:
    judge, plan = case(layout, operation)
    point = plan.commit_point
    assert point is not None
    commit, barrier = plan.steps[point : point + 2]
    rest = (*plan.steps[:point], *plan.steps[point + 2 :])
    assert_noticed(judge, Plan((commit, barrier, *rest), 0), commit)


@pytest.mark.spec("INV-REFCOUNT")
@pytest.mark.parametrize(("layout", "operation"), CASES[:4])
def test_nothing_must_be_freed_before_the_commit(layout: str, operation: str) -> None:
    judge, plan = case(layout, operation)
    point = plan.commit_point
    assert point is not None
    freeing = plan.steps[point + 2 :]
    assert freeing
    steps = (*plan.steps[:point], *freeing, *plan.steps[point : point + 2])
    assert_noticed(judge, Plan(steps, point + len(freeing)), freeing[0])


@pytest.mark.spec("INV-HEADER")
@pytest.mark.parametrize("layout", [layout for layout, _ in CASES])
def test_a_header_torn_in_two_is_noticed(layout: str) -> None:
    data, facts = bytearray(build(layout)), look(build(layout))
    judge = Judge(bytes(data), facts, facts.bitmaps)
    judge.judge(data, "either")
    (start,) = struct.unpack_from(">I", data, 100)
    data[start : start + 8] = bytes(8)
    data[8:16] = bytes(8)  # the place of the backing file name
    with pytest.raises(BrokenStateError):
        judge.judge(data, "either")


def test_a_bitmap_that_becomes_in_use_is_noticed() -> None:
    layout = "clusters of 4096: 3 bitmaps, refcounts of 16 bits"
    data, facts = bytearray(build(layout)), look(build(layout))
    judge = Judge(bytes(data), facts, facts.bitmaps)
    (directory,) = struct.unpack_from(">Q", data, 112 + 8 + 16)
    data[directory + FIELD_OFFSETS["flags"] + 3] |= FLAG_IN_USE
    with pytest.raises(BrokenStateError, match="neither"):
        judge.judge(data, "either")


COUNTED = [
    name
    for name in LAYOUTS
    if name.startswith(("special", "clusters of 512")) and "stale" not in name
]


@pytest.mark.parametrize("layout", COUNTED)
def test_every_reference_is_counted(layout: str) -> None:
    data = build(layout)
    assert under_counted(data) == []
    for cluster in range(len(data) // (1 << data[23])):
        changed = bytearray(data)
        set_refcount(changed, cluster, 0)
        assert under_counted(changed), cluster


def test_the_states_of_a_small_plan() -> None:
    before = b"a" * 512 + b"b" * 512
    plan = Plan(
        (
            Write(0, (b"c" * 512,), "first"),
            Write(256, (b"d" * 512,), "across a border"),
            Write(1024, (b"e" * 512,), "growth"),
            Barrier("one"),
            Write(0, (b"f",), "the last"),
        ),
        4,
    )
    first, second = intervals(before, plan)
    firsts = (b"a" * 512, b"c" * 512, b"c" * 256 + b"d" * 256)
    seconds = (b"b" * 512, b"d" * 256 + b"b" * 256)
    thirds = (bytes(512), b"e" * 512)
    states = {bytes(first.image(choice)) for choice in first.choices(Random(1))}
    assert {s for s in states if len(s) == 1536} == {
        a + b + c for a in firsts for b in seconds for c in thirds
    }
    shorter = {s for s in states if len(s) < 1536}
    assert shorter
    assert shorter <= {a + b for a in firsts for b in seconds}
    assert len(first.choices(Random(1))) == len(states)
    assert first.after == firsts[-1] + seconds[-1] + thirds[-1]
    assert {bytes(second.image(choice)) for choice in second.choices(Random(1))} == {
        first.after,
        b"f" + first.after[1:],
    }


def test_samples_have_the_states_of_interest() -> None:
    sectors = 40
    writes = tuple(Write(512 * n, (bytes([n + 1]) * 512,), "w") for n in reversed(range(sectors)))
    (interval,) = intervals(bytes(512 * sectors), Plan((*writes, Barrier("end"))))
    choices = interval.choices(Random(1))
    written = [
        frozenset(n for n, v in zip(interval.contents, c[0], strict=True) if v) for c in choices
    ]
    everything = frozenset(range(sectors))
    assert len(set(written)) == len(written) > 1000
    assert {frozenset[int](), everything} <= set(written)
    assert {frozenset({n}) for n in everything} <= set(written)
    assert {everything - {n} for n in everything} <= set(written)
    assert {frozenset(range(n, sectors)) for n in everything} <= set(written)


@pytest.mark.parametrize(("layout", "operation"), CASES)
def test_a_state_is_seen_as_if_it_were_read_alone(layout: str, operation: str) -> None:
    judge, plan = case(layout, operation)
    random = Random(layout)
    reads = 0

    def counted(image: ObservedImage) -> object:
        nonlocal reads
        reads += 1
        return read(image)

    states = 0
    for interval in intervals(judge.image, plan):
        views = Views(interval, counted)
        choices = interval.choices(random)
        for choice in [*random.sample(choices, min(len(choices), 30)), interval.last]:
            assert views[choice] == read(ObservedImage(interval.image(choice)))
            states += 1
        assert interval.image(interval.last) == interval.after
    assert reads < states, "or nothing is gained by it"
