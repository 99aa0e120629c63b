"""Every event in every state, really tried: allowed ones lead where the table says.

What is not allowed raises `StateError`, and changes neither the state nor a byte of the image.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import NamedTuple, get_args

import numpy as np
import pytest
from support.faulty import Fault, FaultyStorage
from support.images import Stored, build_image

import qcow2bm
from qcow2bm.errors import CommitError, StateError
from qcow2bm.migration.lifecycle import TRANSITIONS, Event, State, after
from qcow2bm.tracker.tracker import Tracker

STATES: tuple[State, ...] = get_args(State)
EVENTS: tuple[Event, ...] = get_args(Event)
SIZE = 8 << 20


class Tracking(NamedTuple):
    """A tracker, and the storage that its image is in."""

    storage: FaultyStorage
    image: qcow2bm.Image
    tracker: Tracker


Work = Callable[[Tracking], object]


def data() -> bytearray:
    bitmaps = Stored(b"a", granularity_bits=12), Stored(b"b", granularity_bits=16)
    return build_image(*bitmaps, Stored(b"off", flags=0), size=SIZE).data


def fail(on: Tracking) -> None:
    """A write that fails; of an activation only what counts ends tracking."""
    if on.tracker.state == "inactive":
        barriers = iter((on.storage.barrier,))

        def second_fails() -> None:
            next(barriers, broken)()

        strike_with(on, on.tracker.activate, second_fails)
    elif "fail" in TRANSITIONS[on.tracker.state]:
        on.tracker.mark(0, 1)
        strike_with(on, on.tracker.flush, broken)
    else:
        on.tracker.flush()


def broken() -> None:
    raise qcow2bm.StorageError("<faulty>", 0, 0, "broken", errno.EIO)


def strike_with(on: Tracking, work: Callable[[], object], barrier: Callable[[], None]) -> None:
    on.storage.barrier = barrier  # type: ignore[method-assign]
    try:
        with pytest.raises(CommitError):
            work()
    finally:
        del on.storage.barrier


@contextmanager
def written(tracker: Tracker) -> Iterator[None]:
    with tracker.writing(0, 1):
        yield


def write(on: Tracking) -> None:
    with written(on.tracker):
        pass


def edit(on: Tracking) -> None:
    with on.tracker.edit() as edit:
        edit.add("new")


TRIED: dict[Event, dict[str, Work]] = {
    "mark": {
        "mark": lambda on: on.tracker.mark(0, 1),
        "nothing": lambda on: on.tracker.mark(0, 0),
        "mark_many": lambda on: on.tracker.mark_many(np.array([[0, 1], [4096, 8192]])),
        "writing": write,
    },
    "flush": {
        "flush": lambda on: on.tracker.flush(),
        "converge": lambda on: on.tracker.converge(10),
        "pending": lambda on: on.tracker.pending,
    },
    "edit": {"edit": edit, "rotate": lambda on: on.tracker.rotate("a", "c")},
    "begin_migration": {
        "begin": lambda on: on.tracker.begin_migration(),
        "carried": lambda on: on.tracker.begin_migration(carried=["a"]),
        "without sentinel": lambda on: on.tracker.begin_migration(sentinel=False),
    },
    "cancel_migration": {"cancel": lambda on: on.tracker.cancel_migration()},
    "inactivate": {"inactivate": lambda on: on.tracker.inactivate()},
    "activate": {
        "activate": lambda on: on.tracker.activate(),
        "merge": lambda on: on.tracker.activate("merge", other_side_has_stopped=True),
    },
    "stop": {"stop": lambda on: on.tracker.stop()},
    "abandon": {"abandon": lambda on: on.tracker.abandon()},
    "fail": {"fail": fail},
}

WAYS: dict[State, Callable[[Tracking], object]] = {
    "tracking": lambda on: None,
    "migrating": lambda on: on.tracker.begin_migration(),
    "inactive": lambda on: on.tracker.inactivate(),
    "stopped": lambda on: on.tracker.stop(),
    "abandoned": lambda on: on.tracker.abandon(),
    "failed": fail,
}


@contextmanager
def in_state(state: State) -> Iterator[Tracking]:
    storage = FaultyStorage(data())
    with qcow2bm.open(storage, "r+") as image:
        on = Tracking(storage, image, image.track())
        on.tracker.mark(1 << 20, 1)
        WAYS[state](on)
        assert on.tracker.state == state
        yield on


def pairs(*, are_allowed: bool) -> list[tuple[State, Event, str]]:
    return [
        (state, event, way)
        for state, event in product(STATES, EVENTS)
        for way in TRIED[event]
        if (event in TRANSITIONS[state]) is are_allowed
    ]


def test_every_state_and_event_is_tried() -> None:
    assert set(WAYS) == set(STATES) == set(TRANSITIONS)
    assert set(TRIED) == set(EVENTS)
    assert len(pairs(are_allowed=True)) + len(pairs(are_allowed=False)) == len(STATES) * sum(
        map(len, TRIED.values())
    )


@pytest.mark.parametrize(("state", "event", "way"), pairs(are_allowed=True), ids="-".join)
def test_an_allowed_event_leads_where_it_is_to(state: State, event: Event, way: str) -> None:
    with in_state(state) as on:
        TRIED[event][way](on)
        assert on.tracker.state == TRANSITIONS[state][event] == after(state, event)


@pytest.mark.spec("LIFE-2")
@pytest.mark.parametrize(("state", "event", "way"), pairs(are_allowed=False), ids="-".join)
def test_a_refused_event_changes_nothing(state: State, event: Event, way: str) -> None:
    with in_state(state) as on:
        before, effects = bytes(on.storage.data), on.storage.effects
        names, migration = on.tracker.names, on.tracker._migration
        bits = [bytes(bitmap.bits.octets) for bitmap in on.tracker._now.tracked]
        with pytest.raises(StateError, match=f"tracker is {state}"):
            TRIED[event][way](on)
        assert on.tracker.state == state
        assert on.storage.data == before
        assert on.storage.effects == effects
        assert (on.tracker.names, on.tracker._migration) == (names, migration)
        assert [bytes(bitmap.bits.octets) for bitmap in on.tracker._now.tracked] == bits


@pytest.mark.parametrize(("state", "event", "way"), pairs(are_allowed=False), ids="-".join)
def test_after_a_refused_event_all_goes_on(state: State, event: Event, way: str) -> None:
    """What is allowed still is, and leads where it would have led."""
    wanted: tuple[Event, ...] = "mark", "flush", "activate", "abandon"
    allowed = [other for other in wanted if other in TRANSITIONS[state]]
    with in_state(state) as on:
        with pytest.raises(StateError):
            TRIED[event][way](on)
        for other in allowed:
            first = next(iter(TRIED[other]))
            TRIED[other][first](on)
            assert on.tracker.state == TRANSITIONS[state][other]
            if TRANSITIONS[state][other] != state:
                break


@pytest.mark.parametrize(("state", "event"), [*product(STATES, EVENTS)], ids="-".join)
def test_what_is_needed_is_said(state: State, event: Event) -> None:
    if event in TRANSITIONS[state]:
        assert after(state, event) in STATES
        return
    with pytest.raises(StateError) as raised:
        after(state, event)
    assert raised.value.state == state
    needed = set(raised.value.required.split(" or "))
    assert needed == {other for other in STATES if event in TRANSITIONS[other]}


@pytest.mark.parametrize("state", ["failed"])
def test_who_failed_says_why(state: State) -> None:
    with in_state(state) as on:
        events: tuple[Event, ...] = "flush", "begin_migration", "inactivate", "activate", "stop"
        for event in events:
            with pytest.raises(StateError) as raised:
                next(iter(TRIED[event].values()))(on)
            assert isinstance(raised.value.__cause__, CommitError)


def test_a_policy_that_is_none() -> None:
    with in_state("inactive") as on:
        with pytest.raises(ValueError, match='"drop" or "merge"'):
            on.tracker.activate("keep")  # type: ignore[arg-type]
        assert on.tracker.state == "inactive"
        assert on.tracker.activate().outcome == "unchanged"


def test_there_and_back_many_times() -> None:
    """Nothing is left behind by it: neither sentinels nor clusters that nobody uses."""
    storage = FaultyStorage(data())
    with qcow2bm.open(storage, "r+") as image:
        tracker = image.track()
        lengths = []
        for number in range(8):
            tracker.mark(number << 16, 1)
            if number % 2:
                tracker.begin_migration(carried=["a"] if number % 4 == 1 else ())
                tracker.cancel_migration()
            tracker.inactivate()
            activation = tracker.activate()
            assert (activation.outcome, tracker.state) == ("unchanged", "tracking")
            assert {fate.kind for fate in activation.bitmaps.values()} == {"kept"}
            lengths.append(len(storage.data))
        tracker.stop()
        assert len(set(lengths[2:])) == 1
        assert list(image.bitmaps) == ["a", "b", "off"]
        assert all(image.bitmaps["a"].packed()[2 * n] & 1 for n in range(8))


CALLS: dict[str, Callable[[Tracker], object]] = {
    "begin": lambda tracker: tracker.begin_migration(carried=["b"]),
    "cancel": lambda tracker: tracker.cancel_migration(),
    "inactivate": lambda tracker: tracker.inactivate(),
    "stop": lambda tracker: tracker.stop(),
}


@pytest.mark.parametrize("is_sticky", [False, pytest.param(True, marks=pytest.mark.deep)])
@pytest.mark.parametrize("name", CALLS)
def test_every_failing_call(name: str, is_sticky: bool) -> None:
    """Whatever fails: what is valid has all bits, and who can go on has lost nothing."""
    states = set()
    for number in range(1000):
        storage = FaultyStorage(data())
        with qcow2bm.open(storage, "r+") as image:
            tracker = image.track()
            tracker.mark(1 << 20, 1)
            if name == "cancel":
                tracker.begin_migration(carried=["b"])
            if name == "inactivate":
                tracker.begin_migration()
            tracker.mark(2 << 20, 1)
            before = tracker.state
            storage.fault = Fault(len(storage.calls) + number, is_sticky=is_sticky)
            try:
                CALLS[name](tracker)
            except qcow2bm.Qcow2BmError:
                assert tracker.state in (before, "failed")
            states.add(tracker.state)
            require_complete(storage.data)
            if not storage.was_hit:
                break
            storage.fault = None
            if tracker.state in ("tracking", "migrating"):
                tracker.mark(3 << 20, 1)
                tracker.stop()
                require_complete(storage.data, 3 << 20)
                assert statuses(storage.data)["a"] == "valid"
    assert number > 5
    assert "failed" in states


def statuses(data: bytes | bytearray) -> dict[str, str]:
    with qcow2bm.open(bytes(data)) as image:
        return {name: bitmap.status for name, bitmap in image.bitmaps.items()}


def require_complete(data: bytes | bytearray, *more: int) -> None:
    with qcow2bm.open(bytes(data)) as image:
        for name in ("a", "b"):
            bitmap = image.bitmaps[name]
            if bitmap.status == "valid":
                bits = np.unpackbits(bitmap.packed(), bitorder="little")
                for start in (1 << 20, 2 << 20, *more):
                    assert bits[start // bitmap.granularity], (name, start)
