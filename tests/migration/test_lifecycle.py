"""Every event in every state, really tried: allowed ones lead where the table says.

What is not allowed raises `StateError`, and changes neither the state nor a byte of the image.
"""

from __future__ import annotations

import errno
import gc
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import product
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NamedTuple, get_args

import numpy as np
import pytest
from support.crash_judge import under_counted
from support.faulty_storage import Fault, FaultyStorage
from support.images import Stored, build_image
from support.interrupts import can_be_interrupted
from support.layouts import append, set_refcount

import qcow2bm
from qcow2bm.errors import CommitError, StateError
from qcow2bm.migration.lifecycle import TRANSITIONS, Event, State, after
from qcow2bm.migration.sentinel import is_sentinel
from qcow2bm.storage.memory import MemoryStorage
from qcow2bm.tracker.tracker import Tracker

if TYPE_CHECKING:
    from _typeshed import TraceFunction
    from numpy.typing import NDArray
    from typing_extensions import Buffer

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
    "fork": {"fork": lambda on: on.tracker._session.disown()},
}

WAYS: dict[State, Callable[[Tracking], object]] = {
    "tracking": lambda on: None,
    "migrating": lambda on: on.tracker.begin_migration(),
    "inactive": lambda on: on.tracker.inactivate(),
    "stopped": lambda on: on.tracker.stop(),
    "abandoned": lambda on: on.tracker.abandon(),
    "failed": fail,
    "forked": lambda on: on.tracker._session.disown(),
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
        session = on.tracker._session
        names, migration = on.tracker.names, session.migration
        bits = [bytes(bitmap.bits.octets) for bitmap in session.recording.bitmaps]
        with pytest.raises(StateError, match=f"tracker is {state}"):
            TRIED[event][way](on)
        assert on.tracker.state == state
        assert on.storage.data == before
        assert on.storage.effects == effects
        assert (on.tracker.names, session.migration) == (names, migration)
        assert [bytes(bitmap.bits.octets) for bitmap in session.recording.bitmaps] == bits


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
    """Nothing is left behind: neither sentinels nor leaked clusters."""
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


# --- interrupts ---------------------------------------------------------------------------------

PACKAGE = str(Path(qcow2bm.__file__).parent)
MODULES = tuple(
    f"{PACKAGE}/{name}"
    for name in (
        "tracker/",
        "bitmaps/tracked_bitmap.py",
        "bitmaps/tracked_store.py",
        "storage/read_once.py",
        "storage/write_guard.py",
        "api/",
        "clusters/plan.py",
    )
)
"""Where it matters most at which line it happens; elsewhere are calculations."""

GUEST = bytes(range(1, 256)) * 16


class Locking(FaultyStorage):
    """Knows whether its lock is held, and that flags are written in the directory only.

    What is wrong it lists: whatever it raised would be taken for a write that failed.
    """

    is_locked = False
    is_strict = False

    def __init__(self, data: bytearray) -> None:
        super().__init__(data)
        self.wrong: list[str] = []

    @contextmanager
    def write_lock(self, timeout: float) -> Iterator[None]:
        with super().write_lock(timeout):
            self.is_locked = True
            try:
                yield
            finally:
                self.is_locked = False

    def write(self, offset: int, parts: Sequence[Buffer]) -> None:
        if not self.is_locked:
            self.wrong.append("written without the lock")
        if self.is_strict and len(b"".join(parts)) == 4:
            with qcow2bm.open(bytes(self.data)) as opened:
                places = [entry.offset + 12 for entry in opened.directory]
            if offset not in places:
                self.wrong.append(f"flags were written outside of the directory, at {offset}")
        super().write(offset, parts)


@cache
def with_guest() -> tuple[bytes, range]:
    """An image, and where the guest has its tables and data in it."""
    bitmaps = Stored(b"a", granularity_bits=12), Stored(b"b", granularity_bits=16)
    off = Stored(b"off", [b"\x05"], granularity_bits=16, flags=0)
    built = build_image(*bitmaps, off, size=SIZE, cluster_bits=12)
    begin = append(built.data, GUEST)
    l2_table = append(built.data, struct.pack(">Q", begin | 1 << 63))
    struct.pack_into(">Q", built.data, built.offset("l1-table"), l2_table | 1 << 63)
    return bytes(built.data), range(begin, len(built.data))


def ones(packed: NDArray[np.uint8]) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(packed, bitorder="little")).tolist())


class Interrupted:
    """An image that is tracked, and a call that is interrupted at one of its lines.

    Attributes:
        lines: how many lines there were until then.
        was_hit: whether there were so many.
        state: that of the tracker after the interrupt.
    """

    def __init__(self, at: int, modules: tuple[str, ...]) -> None:
        data, self.guest = with_guest()
        self.original = data
        self.storage = Locking(bytearray(data))
        self.image = qcow2bm.open(self.storage, "r+")
        self.tracker = self.image.track()
        self.marks: set[int] = set()
        self.frozen: set[int] | None = None  # what "a" has, if "c" was begun in its place
        self.lines, self.was_hit = 0, False
        self.state: State = "tracking"
        self._at, self._modules = at, modules

    def mark(self) -> None:
        start = (len(self.marks) * 37 + 5) * 4096 % SIZE
        self.tracker.mark(start, 1)
        self.marks.add(start)

    def interrupt(self, work: Callable[[], object]) -> None:
        """Does it with an interrupt at that line."""
        before = sys.gettrace()
        sys.settrace(self._enter)
        try:
            work()
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
        self.storage.is_strict = True

    def _enter(self, frame: FrameType, event: str, argument: object) -> TraceFunction | None:
        return self._step if frame.f_code.co_filename.startswith(self._modules) else None

    def _step(self, frame: FrameType, event: str, argument: object) -> TraceFunction | None:
        if event == "line" and not self.was_hit and can_be_interrupted(frame):
            self.lines += 1
            if self.lines > self._at:
                self.was_hit = True
                raise KeyboardInterrupt
        return self._step

    def require_sound(self) -> None:
        """What is valid has exactly what was marked; the guest's clusters are as they were."""
        data = self.storage.data
        assert self.storage.wrong == []
        assert under_counted(data) == []
        guest = slice(self.guest.start, self.guest.stop)
        assert data[guest] == self.original[guest]
        with qcow2bm.open(bytes(data)) as opened:
            assert [found for found in opened.problems if found.breaks_bitmap] == []
            assert opened.bitmaps.keys() >= {"a", "b", "off"}
            for name, bitmap in opened.bitmaps.items():
                bits = ones(bitmap.stale_bits())
                marks = self.marks
                if self.frozen is not None and name in ("a", "c"):
                    marks = self.frozen if name == "a" else marks - self.frozen
                wanted = {start // bitmap.granularity for start in marks}
                if name == "off":
                    assert bitmap.status == "valid"
                    assert bits == {0, 2}
                elif name.endswith("-canary"):
                    assert bitmap.status == "valid"
                    assert bits == {0, (opened.virtual_size - 1) // bitmap.granularity}
                elif is_sentinel(name):
                    assert bits == set()
                elif bitmap.status == "valid":
                    assert bits == wanted, name
        if self.tracker.state == "inactive":
            assert not self.storage.is_locked, "the lock is held while it is inactive"

    def rotate(self) -> None:
        self.tracker.rotate("a", "c")
        self.frozen = set(self.marks)

    def call(self, name: str) -> None:
        """What it says of the tracker, or of this."""
        calls: dict[str, Callable[[], object]] = {
            "mark": self.mark,
            "begin": lambda: self.tracker.begin_migration(carried=["b"]),
            "rotate": self.rotate,
        }
        call = calls.get(name) or getattr(self.tracker, name)
        call()

    def attempt(self, name: str) -> bool:
        """Does what may not be allowed any more; returns whether it was."""
        try:
            self.call(name)
        except qcow2bm.Qcow2BmError:
            return False
        finally:
            self.require_sound()
        return True


BEFORE: dict[str, tuple[str, ...]] = {
    "begin": (),
    "cancel_migration": ("begin",),
    "inactivate": ("begin",),
    "inactivate without begin": (),
    "activate": ("begin", "mark", "inactivate"),
    "activate without carried": ("inactivate",),
    "stop": ("begin",),
}
"""What is interrupted, and what comes before it."""

AFTERWARDS: dict[str, tuple[str, ...]] = {
    "again": ("mark", "flush", "cancel_migration", "mark", "begin", "mark", "stop"),
    "away": ("inactivate", "mark", "activate", "mark", "flush", "inactivate", "activate", "stop"),
    "back": ("activate", "mark", "rotate", "stop"),
    "end": ("stop",),
    "no more": ("mark", "abandon"),
}


def interrupt(name: str, afterwards: str, at: int, modules: tuple[str, ...]) -> Interrupted | None:
    """Interrupts at that line, and goes on with what can be done; None if there is no such line."""
    on = Interrupted(at, modules)
    on.mark()
    for step in BEFORE[name]:
        assert on.attempt(step)
        if step != "inactivate":
            on.mark()
    on.interrupt(lambda: on.call(name.partition(" ")[0]))
    if not on.was_hit:
        on.image.close()
        return None
    on.state = on.tracker.state
    on.require_sound()
    for step in AFTERWARDS[afterwards]:
        on.attempt(step)
    on.image.close()
    on.require_sound()
    if on.storage.is_locked:  # an interrupt while it was let go left the storage held
        assert on.state == "failed"
        del on.tracker, on.image
        gc.collect()
    assert not on.storage.is_locked
    return on


def interrupts(name: str, *, is_all: bool) -> Iterator[Interrupted]:
    """Each of its lines, or some, with one in turn of what can come afterwards."""
    every = list(AFTERWARDS)
    for at in range(0, 100000, 1 if is_all else 17):
        found = interrupt(name, every[at % len(every)], at, MODULES)
        if not found:
            return
        yield found


def require_interrupts(name: str, *, is_all: bool) -> None:
    states: set[State] = set()
    statuses_of_a: set[str] = set()
    lines: set[int] = set()
    for found in interrupts(name, is_all=is_all):
        lines.add(found.lines)
        states.add(found.state)
        statuses_of_a.add(statuses(found.storage.data)["a"])
    assert sorted(lines) == list(range(1, max(lines) + 1, 1 if is_all else 17))
    assert max(lines) > 200
    # Not every interrupt is the end, and not every one comes before it.
    assert len(states) > 1
    assert statuses_of_a == {"valid", "inconsistent"}


@pytest.mark.spec("LIFE-2")
@pytest.mark.parametrize("name", BEFORE)
def test_some_interrupts(name: str) -> None:
    """No bitmap is valid that misses a mark, and no byte of anything else is written."""
    require_interrupts(name, is_all=False)


@pytest.mark.deep
@pytest.mark.parametrize("name", BEFORE)
def test_all_interrupts(name: str) -> None:
    require_interrupts(name, is_all=True)


# --- storages that cannot grow ------------------------------------------------------------------


class Full(MemoryStorage):
    """As long as it is, and no longer; free clusters in it can be taken by others."""

    def __init__(self, free: int, *bitmaps: Stored) -> None:
        data = build_image(*bitmaps, cluster_bits=9, size=SIZE).data
        data.extend(bytes(free << 9))
        super().__init__(data, "<full>")
        self.data = data

    def capacity(self) -> int:
        return len(self.data)

    def write(self, offset: int, parts: Sequence[Buffer]) -> None:
        if offset + len(b"".join(parts)) > len(self.data):
            raise qcow2bm.StorageError(self.name, offset, 0, "behind the end", errno.EFBIG)
        super().write(offset, parts)

    def take(self, keep: int = 0) -> None:
        """Another writer takes all free clusters but so many."""
        for cluster in self.free_clusters()[keep:]:
            set_refcount(self.data, cluster, 1)

    def free_clusters(self) -> list[int]:
        (table,) = struct.unpack_from(">Q", self.data, 48)
        (block,) = struct.unpack_from(">Q", self.data, table)
        count = len(self.data) >> 9
        refcounts = struct.unpack_from(f">{count}H", self.data, block)
        return [number for number in range(count) if not refcounts[number]]


def clusters_for(work: Callable[[Tracker], object], *, most: int = 64) -> int:
    """With how many free clusters it can be done."""
    for free in range(most):
        storage = Full(free, A)
        try:
            with qcow2bm.open(storage, "r+") as image:
                work(image.track())
        except qcow2bm.StorageError:
            continue
        return free
    raise AssertionError("it never can")


A = Stored(b"a", granularity_bits=12)
NO_ROOM = "No space left"


@pytest.mark.parametrize("way", ["begin_migration", "inactivate"])
def test_without_room_for_the_sentinel_nothing_changes_and_tracking_goes_on(way: str) -> None:
    least = clusters_for(lambda tracker: tracker.mark(0, 1))
    needed = clusters_for(lambda tracker: getattr(tracker, way)())
    assert needed > least
    for free in range(least, needed):
        storage = Full(free, A)
        with qcow2bm.open(storage, "r+") as image:
            tracker = image.track()
            tracker.mark(1 << 20, 1)
            before = bytes(storage.data)
            for _ in range(2):
                with pytest.raises(qcow2bm.StorageError, match=NO_ROOM) as raised:
                    getattr(tracker, way)()
                assert raised.value.errno == errno.ENOSPC
                assert not isinstance(raised.value, CommitError)
                assert storage.data == before
                assert tracker.state == "tracking"
            tracker.mark(2 << 20, 1)
            tracker.flush()
            tracker.begin_migration(sentinel=False)
            tracker.cancel_migration()
            tracker.mark(3 << 20, 1)
            tracker.stop()
            assert bits_of(storage.data, "a") == {256, 512, 768}
            assert under_counted(storage.data) == []


def test_without_room_to_take_the_sentinel_out_the_migration_goes_on() -> None:
    storage = Full(20, A)
    with qcow2bm.open(storage, "r+") as image:
        tracker = image.track()
        tracker.mark(1 << 20, 1)
        tracker.flush()
        tracker.begin_migration()
        free = storage.free_clusters()
        storage.take()
        before = bytes(storage.data)
        for _ in range(2):
            with pytest.raises(qcow2bm.StorageError, match=NO_ROOM):
                tracker.cancel_migration()
            assert tracker.state == "migrating"
            assert storage.data == before
        for cluster in free:
            set_refcount(storage.data, cluster, 0)
        tracker.cancel_migration()
        assert tracker.state == "tracking"
        tracker.stop()
    assert list(statuses(storage.data)) == ["a"]
    assert bits_of(storage.data, "a") == {256}


def given_away(storage: Full, image: qcow2bm.Image) -> Tracker:
    tracker = image.track()
    tracker.mark(1 << 20, 1)
    tracker.inactivate()
    return tracker


WIDE = [Stored(b"wide%d" % number, granularity_bits=9) for number in range(6)]
"""Of four clusters each, of which none is stored so far."""


@pytest.mark.parametrize("is_room_left", [False, True])
def test_an_image_whose_free_clusters_were_taken_comes_back(is_room_left: bool) -> None:
    """And goes on as long as there is room; then tracking ends, and nothing is believed."""
    storage = Full(120, A, *WIDE)
    with qcow2bm.open(storage, "r+") as image:
        tracker = given_away(storage, image)
        needed = 0
        while True:  # as few as let the commit itself be done
            trial = Full(120, A, *WIDE)
            with qcow2bm.open(trial, "r+") as other:
                tried = given_away(trial, other)
                trial.take(needed)
                try:
                    tried.activate()
                except qcow2bm.StorageError:
                    assert tried.state == "inactive"
                    needed += 1
                    continue
            break
        storage.take(needed + 30 * is_room_left)
        assert tracker.activate().outcome == "unchanged"
        states = [tracker.state]
        tracker.mark(1 << 20, 4096)  # where there is a cluster already
        tracker.flush()
        states.append(tracker.state)
        tracker.mark_many(np.array([[n, 1] for n in range(0, SIZE, 1 << 20)]))
        if is_room_left:
            tracker.flush()
            tracker.stop()
        else:
            with pytest.raises(qcow2bm.StorageError, match="no room") as raised:
                tracker.flush()
            assert raised.value.errno == errno.ENOSPC
            with pytest.raises(StateError) as refused:
                tracker.mark(0, 1)
            assert refused.value.__cause__ is raised.value
        states.append(tracker.state)
    assert states == ["tracking", "tracking", "stopped" if is_room_left else "failed"]
    found = statuses(storage.data)
    assert len(found) == 7
    assert set(found.values()) == {"valid" if is_room_left else "inconsistent"}
    assert under_counted(storage.data) == []
    if is_room_left:
        for name in found:
            bits = 12 if name == "a" else 9
            wanted = {start >> bits for start in range(0, SIZE, 1 << 20)}
            assert bits_of(storage.data, name) >= wanted


def bits_of(data: bytes | bytearray, name: str) -> set[int]:
    with qcow2bm.open(bytes(data)) as image:
        return ones(image.bitmaps[name].packed())
