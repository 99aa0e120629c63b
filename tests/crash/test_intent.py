"""Crashes while bitmaps are tracked with intent: each bitmap comes back, with every write.

A write of the guest may be on its disk from the moment when `writing` lets it begin. So after
recovery each bitmap must have all writes that began before the crash, since the bitmap began to
record.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from random import Random
from threading import get_ident
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest
from support.crash_states import BrokenStateError, ObservedImage, State, judge_states
from support.images import ZEROES, Stored, build_image
from support.recording import Octets, Place, RecordingStorage, cover, random_ranges, stored_bits

import qcow2bm
from qcow2bm.clusters.plan import Plan
from qcow2bm.migration.intent import is_intent
from qcow2bm.tracker.tracker import Tracker

if TYPE_CHECKING:
    from typing_extensions import Buffer

MIB = 1 << 20
LAYOUTS: dict[str, dict[str, Any]] = {
    "clusters of 512": {"cluster_bits": 9, "size": 5 * MIB},
    "clusters of 4096": {"cluster_bits": 12, "size": 40 * MIB},
    "clusters of 65536": {"cluster_bits": 16, "size": 1 << 30},
}
GRANULARITY = {"a": 512, "z": 2048, "b": 512, "n": 4096}


class Event(NamedTuple):
    """What happened when the storage had seen so many steps.

    ``kind`` is "write", with the range; or "begin", "end" or "gone" with the name of a bitmap that
    from now on has to have every write, that has all it ever gets, or that need not be there.
    """

    step: int
    kind: str
    what: Any


class Run(NamedTuple):
    """The writes that a storage saw, and what the guest did meanwhile."""

    image: bytes
    plan: Plan
    events: list[Event]
    ended: int | None


class Interleaved(RecordingStorage):
    """A storage during one of whose writes something else happens, in the same thread."""

    def __init__(self, data: bytearray) -> None:
        super().__init__(data)
        self.thread = get_ident()
        self.meanwhile: Callable[[], None] | None = None

    def write(self, offset: int, parts: Sequence[Buffer]) -> None:
        super().write(offset, parts)
        meanwhile = self.meanwhile
        if meanwhile and get_ident() == self.thread:
            self.meanwhile = None
            meanwhile()


class Guest:
    """Tracks an image with intent, and records when its writes may begin."""

    def __init__(self, storage: Interleaved, tracker: Tracker, random: Random) -> None:
        self.tracker, self.random = tracker, random
        self.events: list[Event] = []
        self._storage = storage

    def note(self, kind: str, what: Any) -> None:
        self.events.append(Event(len(self._storage.steps), kind, what))

    def write(self, size: int) -> None:
        """Writes at random, in one of the ways there are, and flushes now and then."""
        random = self.random
        for _ in range(random.randrange(1, 4)):
            ranges = random_ranges(random, size, 3, size // random.choice((3, 100, 1000)))
            if random.random() < 0.3:
                self.tracker.mark_many(np.array(ranges))
                for place in ranges:
                    self.note("write", place)
            for place in ranges:
                self._write(place)
            for _ in range(random.randrange(4)):
                if random.random() < 0.5:
                    place = random.choice(ranges)[0], 1
                    self._storage.meanwhile = partial(self._write_meanwhile, place)
                self.tracker.flush(random.choice((None, None, 4096)))
                self._storage.meanwhile = None

    def _write_meanwhile(self, place: Place) -> None:
        log = self.tracker._session.intent
        if log and not log._storing.locked():  # or the write would wait for the flush
            self._write(place)

    def _write(self, place: Place) -> None:
        with self.tracker.writing(*place):
            self.note("write", place)


def image(layout: str) -> bytes:
    options = LAYOUTS[layout]
    clusters = -(-options["size"] // (8 << options["cluster_bits"] << 9))
    data = build_image(
        Stored(b"a", ((b"\x01\x80", ZEROES) * clusters)[:clusters], 9),
        Stored(b"off", flags=0, granularity_bits=16),
        Stored(b"z", granularity_bits=11),
        **options,
    ).data
    return bytes(data + b"\xaa" * (2 << options["cluster_bits"]))


def play(layout: str, seed: int) -> Run:
    """Tracks, rotates, edits, perhaps migrates and comes back, and stops or dies."""
    random = Random(f"{layout} {seed}")
    data = image(layout)
    storage = Interleaved(bytearray(data))
    ended = None
    with qcow2bm.open(storage, "r+") as opened:
        size = opened.virtual_size
        tracker = opened.track(intent=True)
        guest = Guest(storage, tracker, random)
        guest.events = [Event(0, "begin", "a"), Event(0, "begin", "z")]
        guest.write(size)
        if random.random() < 0.6:
            tracker.rotate("a", "b")
            guest.note("rotated", ("a", "b"))
            guest.write(size)
        if random.random() < 0.6:
            with tracker.edit() as edit:
                edit.disable("z")
                edit.add("n", GRANULARITY["n"])
            guest.note("rotated", ("z", "n"))
            guest.write(size)
        if random.random() < 0.4:
            tracker.begin_migration()
            guest.write(size)
            tracker.cancel_migration()
            guest.write(size)
        if random.random() < 0.5:
            tracker.inactivate()
            tracker.activate()
            guest.write(size)
        if random.random() < 0.5:
            tracker.stop()
            ended = len(storage.steps)
        else:
            tracker.give_up()
    return Run(data, storage.since(0), guest.events, ended)


def wanted_at(run: Run, old: dict[str, Octets], step: int) -> dict[str, Octets]:
    """The bits that each bitmap has to have if the crash comes after so many steps.

    A bitmap that is rotated away, or in, has to have the writes of its time; whether it is there
    depends on whether the rotation was done.
    """
    bits: dict[str, Octets] = {}
    recording: list[str] = []
    for event in run.events:
        if event.step > step:
            break
        if event.kind == "begin":
            bits[event.what] = old[event.what].copy()
            recording.append(event.what)
        elif event.kind == "rotated":
            gone, come = event.what
            recording = [come if name == gone else name for name in recording]
            length = -(-len(old["a"]) * GRANULARITY["a"] // GRANULARITY[come])
            bits[come] = np.zeros(length, np.uint8)
        else:
            for name in recording:
                cover(bits[name], GRANULARITY[name], [event.what])
    return bits


class Found(NamedTuple):
    """The bitmaps after the recovery of a state, by name: their bits, whether they are enabled."""

    bitmaps: dict[str, tuple[str, bytes]]
    faults: frozenset[str]


def recover(state: ObservedImage) -> Found:
    """Recovers a state in a copy, as the next user of the image does."""
    size = state.size()
    data = bytearray(size)
    state.read_into(0, memoryview(data))
    with qcow2bm.open(data, "r+") as opened:
        if opened.recoverable:
            opened.recover()
    with qcow2bm.open(data) as opened:
        faults = {
            str(problem.id)
            for problem in qcow2bm.check(data).problems
            if problem.severity in ("refused", "unusable")
        }
        return Found(
            {
                name: (
                    bitmap.status,
                    bitmap.packed().tobytes() if bitmap.status == "valid" else b"",
                )
                for name, bitmap in opened.bitmaps.items()
                if not is_intent(name)
            },
            frozenset(faults),
        )


def judge_all(run: Run, random: Random, most: int) -> int:
    old = stored_bits(run.image)

    def judge(found: Found, state: State) -> None:
        interval = state.interval
        # The crash may come late: whatever was written, all of it may be missing still.
        step = interval.stop_step + state.is_after
        wanted = wanted_at(run, old, step)
        for name, (status, packed) in found.bitmaps.items():
            if name.startswith("qcow2bm-"):
                continue  # a sentinel
            if status != "valid":
                raise BrokenStateError(f"{name} is lost: {status}")
            bits = np.unpackbits(np.frombuffer(packed, np.uint8), bitorder="little")
            if name in wanted:
                lost = np.flatnonzero(wanted[name] & ~bits[: len(wanted[name])])
                if len(lost):
                    raise BrokenStateError(f"{name} misses {lost[:5]}, {len(lost)} in all")
        if not {"off"} < found.bitmaps.keys():
            raise BrokenStateError(f"only {found.bitmaps.keys()} are left")
        if found.faults:
            raise BrokenStateError(f"the image has {found.faults}")

    return judge_states(run.image, run.plan, random, recover, judge, most)


@pytest.mark.spec("INV-INTENT", "INTENT-5")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_some_states(layout: str) -> None:
    for seed in range(2):
        assert judge_all(play(layout, seed), Random(seed), 3)


@pytest.mark.deep
@pytest.mark.spec("INV-INTENT", "INTENT-5")
@pytest.mark.parametrize(("layout", "seeds"), [*zip(LAYOUTS, (30, 30, 3), strict=True)])
def test_many_states(layout: str, seeds: int) -> None:
    count = sum(judge_all(play(layout, seed), Random(seed), 60) for seed in range(seeds))
    print(f"crash states recovered: {count} ({layout}), no write missing, no bitmap lost")
    assert count > 250 * seeds
