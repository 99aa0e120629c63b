"""Everything that can happen around a migration, in every order: no bitmap is ever silently wrong.

Breadth first through all states of the `World`, each only once, with the library's own code. After
each event, and after a loss of power at any point of it, the image is looked at as a reader does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import count
from random import Random
from typing import Any
from uuid import UUID

import pytest
from support.crash_states import intervals
from support.handover_world import (
    AUTOCLEAR,
    BY_B,
    BY_B_LATER,
    GRANULE,
    Dirty,
    Options,
    Seen,
    World,
    in_memory,
    intent_bits,
    look,
    look_recovered,
    plain_name,
    touched,
)

from qcow2bm.clusters.plan import Plan
from qcow2bm.migration import intent, sentinel
from qcow2bm.tracker.tracker import Tracker

ALL = [
    Options(generation, is_watched, carried, policy)
    for generation in (False, True)
    for is_watched in (False, True)
    for carried in ((), ("fine",), ("fine", "coarse"))
    for policy in ("drop", "merge")
    if carried or policy == "drop"
]
SOME = [
    (Options(False, False, ("fine",), "merge"), 2),
    (Options(False, True, ("fine", "coarse"), "merge"), 3),
    (Options(True, True, (), "drop"), 2),
]
"""Some options, each with the depth to which it is explored."""


def depth_of(options: Options) -> int:
    """How deep options are explored at length: each further event takes four times as long."""
    if options == Options(False, True, ("fine", "coarse"), "merge"):
        return 4
    return 4 if options == Options(False, True, ("fine",), "merge") else 3


DEEP = [(options, depth_of(options)) for options in ALL]

FIRST = ("A writes", "A inactivates")


@pytest.fixture(autouse=True)
def predictable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random names and tokens, other ones each time."""
    numbers = count(1)
    for module in (sentinel, intent):
        monkeypatch.setattr(module, "uuid4", lambda: UUID(int=next(numbers)))
    monkeypatch.setattr(intent, "_MIN_GRANULARITY", GRANULE)
    monkeypatch.setattr("secrets.token_bytes", lambda size: next(numbers).to_bytes(size, "big"))


class Explorer:
    """Goes through the states, and counts them.

    ``most`` are so many states after a loss of power within one event; None for all.
    """

    def __init__(self, options: Options, most: int | None) -> None:
        self.options = options
        self.most = most
        self.random = Random(str(options))
        self.seen: set[object] = set()
        self.crashes = 0
        self.recovered = 0  # how many of the states are recoverable
        self.events = Counter[str]()
        self.verdicts = Counter[str]()

    def run(self, first: Sequence[str], depth: int) -> None:
        """All states that so many events can lead to, after those that come first."""
        world = World(self.options)
        for name in first:
            dict(world.events())[name](world)
        level = [world]
        self.seen.add(key_of(world))
        for _ in range(depth):
            level = [new for world in level for new in self._step(world)]

    def _step(self, world: World) -> Iterator[World]:
        for name, happen in list(world.events()):
            new = world.copy()
            new.activation = None
            new.a_host.log, new.b_host.log = list(new.a_host.unsynced), list(new.b_host.unsynced)
            new.path += (name,)
            self.events[name] += 1
            try:
                happen(new)
                self._check(new, name)
                yield from self._new([new])
                yield from self._crashes(world, new, bytes(world.disk.data))
            except Exception as error:
                raise AssertionError(f"{self.options}: {', '.join(new.path)}: {error}") from error

    def _new(self, worlds: list[World]) -> Iterator[World]:
        for world in worlds:
            key = key_of(world)
            if key not in self.seen:
                self.seen.add(key)
                yield world

    def _crashes(self, world: World, new: World, before: bytes) -> Iterator[World]:
        """The worlds that a loss of power of a host leaves, within the event or after it."""
        # What a clearing takes away may be gone or not.
        written = {name: world.written[name] & new.written[name] for name in new.written}
        alike = set()
        for host, log in (("A", new.a_host.log), ("B", new.b_host.log)):
            for interval in intervals(before, Plan(tuple(log))):
                choices = interval.choices(self.random)
                if self.most is not None and len(choices) > self.most:
                    choices = self.random.sample(choices, self.most)
                for data in {bytes(interval.image(choice)): None for choice in choices}:
                    self.crashes += 1
                    bitmaps = look(data)
                    require_no_wrong(bitmaps, written)
                    self._check_recovered(new, data, written, host)
                    facts = host, frozenset(bitmaps.items()), data[AUTOCLEAR]
                    if facts not in alike:
                        alike.add(facts)
                        crashed = world.after_power_loss(host, data)
                        crashed.written = dict(written)
                        yield from self._new([crashed])

    def _check(self, world: World, name: str) -> None:
        data = bytes(world.disk.data)
        require_no_wrong(look(data), world.written)
        self._check_recovered(world, data, world.written)
        for tracker in (world.a, world.b):
            if isinstance(tracker, Tracker) and tracker.state in ("tracking", "migrating"):
                for bitmap, seen in in_memory(tracker).items():
                    if missing := seen.misses(world.written.get(bitmap, frozenset())):
                        raise AssertionError(f"{bitmap} in memory misses {set(missing)}")
        if name == "A activates" and world.activation:
            self.verdicts[world.activation.outcome] += 1
            require_right(world)
            world.since = frozenset()

    def _check_recovered(
        self, world: World, data: bytes, written: dict[str, Dirty], lost: str = ""
    ) -> None:
        """What can be recovered has all; and if only A has run and loses power, all can be."""
        recovered = look_recovered(data)
        require_no_wrong(recovered, written)
        self.recovered += bool(recovered)
        if self.options.intent and lost == "A" and all(e.startswith("A ") for e in world.path):
            bitmaps = recovered or look(data)
            kept = written.keys() - {*self.options.carried}
            assert {bitmaps[name].status for name in kept} == {"valid"}, f"lost: {bitmaps}"


def require_no_wrong(bitmaps: dict[str, Seen], written: dict[str, Dirty]) -> None:
    """No bitmap is valid although it misses something that was written."""
    for name, seen in bitmaps.items():
        missing = seen.misses(written.get(name, frozenset()))
        if seen.status == "valid" and missing:
            raise AssertionError(f"{name} is valid, but misses {set(missing)}")


def require_right(world: World) -> None:
    """What `activate` says is what happened, as far as it could be known."""
    since, found, options = world.since, world.activation, world.options
    assert found
    fates = {name: fate.kind for name, fate in found.bitmaps.items()}
    if not world.had_sentinel:
        assert found.outcome in ("unknown", "changed"), f"{found}"
        return
    undetectable = since <= {"raw", "restored", "rolled back"}
    if undetectable:
        assert found.outcome == "unchanged", f"undetectable, but {found}"
        assert set(fates.values()) <= {"kept"}, f"lost for nothing: {found}"
        return
    if since & {"rolled back", "rolled back to the start"}:
        return
    is_seen = since & {"wrote", "wrote elsewhere", "cleared", "unaware", "tracked"}
    if is_seen:
        assert found.outcome == "changed", f"{set(since)}, but {found}"
    opened = {"opened", "cleared one", "merged", "received"}
    by_qemu = since <= opened | {"reopened", "wrote", "wrote elsewhere"}
    if by_qemu and not is_seen:
        knows = options.generation and since & opened
        assert found.outcome == ("changed" if knows else "unchanged"), f"{set(since)}: {found}"
    if by_qemu and found.changed is not None:
        ranges = [range(start, start + length) for start, length in found.changed.tolist()]
        writes = {"wrote": BY_B, "wrote elsewhere": BY_B_LATER}
        wanted = [granule for what, granule in writes.items() if what in since]
        assert all(any(g * GRANULE in part for part in ranges) for g in wanted), f"{found}"
    if by_qemu:
        for name, kind in fates.items():
            is_carried = name in options.carried
            is_lost = is_carried and found.outcome == "changed" and "received" not in since
            if is_lost and options.policy == "merge":
                if set(options.carried) != set(fates):
                    continue  # it depends on whether the places of the others came back
                is_lost = False
            assert (kind == "dropped") == is_lost, f"{name} is {kind} after {set(since)}: {found}"


def key_of(world: World) -> object:
    """What tells states apart: everything but what is only different by name or place."""
    a, b = world.a, world.b
    migration = a._session.migration if a else None
    departure = migration.departure if migration else None
    own = departure.sentinel.name if departure and departure.sentinel else ""
    data = bytes(world.disk.data)
    bitmaps = look(data)
    facts: list[object] = [
        frozenset((plain_name(name, own), seen) for name, seen in bitmaps.items()),
        data[AUTOCLEAR],
        frozenset(world.written.items()),
        world.since,
        world.disk.user,
        _of_tracker(a),
        _of_tracker(b) if isinstance(b, Tracker) else _of_qemu(b, own),
        world.a_host.is_stale,
        world.b_host.is_stale,
        bool(world.a_host.unsynced),
        bool(world.b_host.unsynced),
    ]
    if departure and migration:
        facts.append(migration.change_token == world.a_host.change_token())
        then = look(world.hand_over[0])
        facts.append(frozenset((plain_name(name, own), seen) for name, seen in then.items()))
    return tuple(facts)


def _of_tracker(tracker: Tracker | None) -> object:
    if tracker is None:
        return None
    migration = tracker._session.migration
    return (
        tracker.state,
        frozenset(in_memory(tracker).items()),
        touched(tracker),
        migration.carried if migration else None,
        intent_bits(tracker),
    )


def _of_qemu(qemu: Any, own: str) -> object:
    if qemu is None:
        return None
    bits = frozenset((plain_name(name, own), value) for name, value in qemu.bits.items())
    return bits, qemu.reopens


def explore(options: Options, depth: int, most: int | None, first: Sequence[str] = FIRST) -> None:
    """Goes through all states up to a depth, and says how many those were."""
    explorer = Explorer(options, most)
    explorer.run(first, depth)
    if first == FIRST:
        assert explorer.verdicts["unchanged"], "the exploration saw too little"
        assert explorer.verdicts["changed"], "the exploration saw too little"
    assert bool(explorer.recovered) == options.intent
    print(
        f"{options}: {len(first)} + {depth} events deep: {len(explorer.seen)} states, "
        f"{sum(explorer.events.values())} events, {explorer.crashes} losses of power, "
        f"{explorer.recovered} recoverable, {dict(explorer.verdicts)}"
    )


INTENT = Options(False, True, (), "drop", intent=True)


@pytest.mark.spec("INTENT-5", "INTENT-6", "INTENT-7", "INTENT-9")
@pytest.mark.parametrize(
    ("options", "first", "depth"),
    [
        (INTENT, (), 2),
        pytest.param(INTENT, (), 4, marks=pytest.mark.deep),
        pytest.param(INTENT._replace(is_watched=False), FIRST, 3, marks=pytest.mark.deep),
        pytest.param(INTENT._replace(carried=("fine",)), FIRST, 2, marks=pytest.mark.deep),
    ],
    ids=str,
)
def test_no_order_of_events_recovers_a_bitmap_that_is_wrong(
    options: Options, first: tuple[str, ...], depth: int
) -> None:
    """And a bitmap is recovered whatever only one machine does."""
    explore(options, depth, most=4, first=first)


@pytest.mark.parametrize(("options", "depth"), SOME, ids=str)
def test_no_order_of_events_makes_a_bitmap_silently_wrong(options: Options, depth: int) -> None:
    explore(options, depth, most=3)


@pytest.mark.deep
@pytest.mark.parametrize(("options", "depth"), DEEP, ids=str)
def test_no_longer_order_of_events_does_either(options: Options, depth: int) -> None:
    explore(options, depth, most=4)
