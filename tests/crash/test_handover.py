"""Crashes while an image is given away and taken back: no bitmap is valid that misses a mark.

Each step of a hand-over is looked at alone, on top of what was durable before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from random import Random
from typing import Any, NamedTuple

import numpy as np
import pytest
from support.crash_judge import Findings, Recorded, facts_of, names, reader
from support.crash_states import (
    BrokenStateError,
    ObservedImage,
    State,
    judge_states,
)
from support.images import extension
from support.layouts import FAMILIES, UNKNOWN, build, trackable
from support.layouts import image as layout_image
from support.plans import after
from support.recording import RecordingStorage, cover, number_of, random_ranges, stored_bits

import qcow2bm
from qcow2bm.clusters.plan import Barrier, Plan
from qcow2bm.errors import LimitError, UnsupportedError
from qcow2bm.format.extensions import BACKING_FORMAT, FEATURE_NAMES, GENERATION
from qcow2bm.format.features import AUTOCLEAR_GENERATION, GENERATION_NAME, KNOWN_AUTOCLEAR
from qcow2bm.migration.evidence import Policy
from qcow2bm.migration.sentinel import CANARY_SUFFIX, is_sentinel
from qcow2bm.tracker.reports import Activation
from qcow2bm.tracker.tracker import Tracker

ODD_NAMES = b"\2\x3fsomebody else's".ljust(48, b"\0") + b"\1\0lazy".ljust(48, b"\0") + b"odd rest"
OWN_NAME = b"\2\x3f" + GENERATION_NAME.encode().ljust(46, b"\0")
SOME_NAMES = b"\0\0dirty bit".ljust(48, b"\0") * 8
LONG = b"./" * 200 + b"base.img"


def extensions(*parts: tuple[int, bytes]) -> list[Any]:
    return [extension(kind, data) for kind, data in parts]


HEADERS: dict[str, dict[str, Any]] = {
    "small": {"cluster_bits": 9},
    "small overlay": {"cluster_bits": 9, "backing_name": b"base.img"},
    "small overlay, full": {"cluster_bits": 9, "backing_name": b"./" * 60 + b"base.img"},
    "overlay": {
        "backing_name": b"base.img",
        "extensions": extensions((BACKING_FORMAT, b"qcow2"), (FEATURE_NAMES, SOME_NAMES)),
    },
    "overlay with a long name": {
        "backing_name": LONG,
        "extensions": extensions((BACKING_FORMAT, b"raw")),
    },
    "long name, names of features, unknown ones": {
        "backing_name": LONG,
        "extensions": extensions((FEATURE_NAMES, SOME_NAMES), (UNKNOWN, b"odd")),
        "extensions_behind": extensions((UNKNOWN + 1, b"more " * 33)),
    },
    "odd names of features": {"extensions": extensions((FEATURE_NAMES, ODD_NAMES))},
    "empty names of features": {"extensions": extensions((FEATURE_NAMES, b""))},
    "own name already": {"extensions_behind": extensions((FEATURE_NAMES, OWN_NAME))},
    "unknown ones only": {
        "extensions": extensions((UNKNOWN, b"x" * 3)),
        "extensions_behind": extensions((UNKNOWN + 1, b"y" * 300), (UNKNOWN + 2, b"")),
    },
    "a token without its bit": {"extensions": extensions((GENERATION, b"t" * 24))},
    "a token of another length": {
        "extensions": extensions((GENERATION, b"t" * 16)),
        "header": {"autoclear_features": 1 | 1 << 63},
    },
    "a generation": {
        "extensions": extensions((GENERATION, b"t" * 24), (FEATURE_NAMES, OWN_NAME)),
        "header": {"autoclear_features": 1 | 1 << 63},
    },
    "a generation in two sectors": {
        "extensions": extensions((UNKNOWN, b"z" * 372), (GENERATION, b"t" * 24)),
        "header": {"autoclear_features": 1 | 1 << 63},
    },
    "somebody else's bit": {"header": {"autoclear_features": 1 | 1 << 63 | 1 << 7}},
    "additional fields": {
        "additional_fields": b"additional fields of 32 bytes...",
        "extensions_behind": extensions((UNKNOWN, b"q" * 301)),
        "backing_name": b"base.img",
    },
}


@cache
def header_image(name: str) -> bytes:
    options = {"cluster_bits": 12, **HEADERS[name]}
    return bytes(layout_image(options.pop("cluster_bits"), 3, **options))


class Look(NamedTuple):
    """The facts that must stay, those that may change, and the generation that is recorded."""

    fixed: tuple[object, ...]
    feature_names: tuple[bytes, ...]
    bitmaps: dict[str, Recorded]
    faults: frozenset[str]
    token: bytes | None
    unknown_autoclear: int


def look_at(data: bytes | bytearray | ObservedImage) -> Look:
    with qcow2bm.open(data) as image:
        facts = facts_of(image)
        bits = image.header.autoclear_features
        generation = image._opened.file.generation
        known = KNOWN_AUTOCLEAR | (AUTOCLEAR_GENERATION if generation else 0)
    header, backing_file, kept = facts.fixed
    others = tuple(e for e in kept if e.type not in (GENERATION, FEATURE_NAMES))
    names = b"".join(e.data for e in kept if e.type == FEATURE_NAMES)
    entries = [names[at : at + 48] for at in range(0, len(names), 48)]
    return Look(
        (header, backing_file, others),
        # Whichever program had the bit, it is named after this library once it is used for this.
        tuple(entry for entry in entries if entry[:2] != b"\2\x3f"),
        {bitmap.name: bitmap for bitmap in facts.bitmaps},
        facts.faults,
        generation.token if generation else None,
        bits & ~known,
    )


class Step(NamedTuple):
    """The writes of one call, and the facts that hold for each state it can leave.

    ``bits`` are those of each bitmap that was or is tracked, whenever it is valid; ``commits``
    says whether all bitmaps change at once, by a commit.
    """

    name: str
    image: bytes
    plan: Plan
    bits: dict[str, int]
    commits: bool

    def judge(self, findings: Findings[Look], state: State, old: Look, new: Look) -> None:
        """Raises unless a crash may leave this."""
        found = findings.facts
        if found.fixed != old.fixed:
            raise BrokenStateError(f"the header has {found.fixed}, not {old.fixed}")
        if found.feature_names != old.feature_names:
            raise BrokenStateError(f"names of features: {found.feature_names}")
        if found.faults - old.faults:
            raise BrokenStateError(f"there are new faults: {set(found.faults)}")
        if found.unknown_autoclear and state.data != self.image:
            raise BrokenStateError("an unknown autoclear bit is still set after a change")
        findings.require_counted(self.image)
        self._judge_bitmaps(found, old, new)
        self._judge_token(found, old, new)

    def _judge_bitmaps(self, found: Look, old: Look, new: Look) -> None:
        if not old.bitmaps.keys() & new.bitmaps.keys() <= found.bitmaps.keys():
            raise BrokenStateError(f"bitmaps are gone: {list(found.bitmaps)}")
        if found.bitmaps.keys() - old.bitmaps.keys() - new.bitmaps.keys():
            raise BrokenStateError(f"bitmaps came from nowhere: {list(found.bitmaps)}")
        for name, bitmap in found.bitmaps.items():
            before, after = old.bitmaps.get(name), new.bitmaps.get(name)
            if bitmap.status not in {b.status for b in (before, after) if b}:
                raise BrokenStateError(f"{name} may not be {bitmap.status}")
            kind = bitmap._replace(dirty=0)
            if kind not in [b._replace(dirty=0) for b in (before, after) if b]:
                raise BrokenStateError(f"{name} may not be {names((bitmap,))}")
            allowed = [b.dirty for b in (before, after) if b and b.status == "valid"]
            if name in self.bits:
                allowed = [self.bits[name]]
            if bitmap.status == "valid" and bitmap.dirty not in allowed:
                raise BrokenStateError(f"{name} is valid and has other bits")
        for name, bitmap in found.bitmaps.items():
            canary = found.bitmaps.get(name + CANARY_SUFFIX)
            if is_sentinel(name) and not name.endswith(CANARY_SUFFIX):
                if self.name.startswith("begin") and (bitmap.dirty or bitmap.status == "valid"):
                    raise BrokenStateError(f"{name} is not clean, or valid too early")
                if canary is None or canary.status != "valid" or canary.dirty != self._ends(canary):
                    raise BrokenStateError(f"{name} stands without its canary")
        if self.commits and self._kinds(found) not in (self._kinds(old), self._kinds(new)):
            raise BrokenStateError("some bitmaps are as before, others as after")

    def _ends(self, canary: Recorded) -> int:
        """The first and the last bit of a canary, as one number."""
        size = int.from_bytes(self.image[24:32], "big") & ~511
        return 1 | 1 << (size - 1) // canary.granularity

    @staticmethod
    def _kinds(found: Look) -> dict[str, Recorded]:
        return {name: bitmap._replace(dirty=0) for name, bitmap in found.bitmaps.items()}

    def _judge_token(self, found: Look, old: Look, new: Look) -> None:
        if old.token is None or new.token is None or not self.commits:
            return
        if found.token is None:
            raise BrokenStateError("the generation is not recorded any more")
        if self._kinds(found) != self._kinds(old) and found.token == old.token:
            raise BrokenStateError("bitmaps have changed, and the token has not")

    def judge_all(self, random: Random, most: int | None = None) -> int:
        """Judges the states that the call can leave; returns how many.

        At most ``most`` states of an interval are judged.
        """
        old, new = look_at(self.image), look_at(after(self.image, self.plan.steps))

        def judge(findings: Findings[Look], state: State) -> None:
            self.judge(findings, state, old, new)

        try:
            return judge_states(self.image, self.plan, random, reader(look_at), judge, most)
        except BrokenStateError as error:
            raise BrokenStateError(f"{self.name}: {error}") from None


class Recorder:
    """Does one call after the other to an image, and keeps what each of them wrote."""

    def __init__(self, image: bytes, random: Random) -> None:
        self.random = random
        self.storage = RecordingStorage(bytearray(image))
        self.steps: list[Step] = []
        self.bits = stored_bits(image)
        self.granularity: dict[str, int] = {}
        self.tracked: list[str] = []
        self.unsure: set[str] = set()

    def do(self, name: str, work: Callable[[], object], *, commits: bool = False) -> None:
        before, first = bytes(self.storage.data), len(self.storage.steps)
        bits = {n: number_of(b) for n, b in self.bits.items() if n in self.tracked}
        work()
        plan = self.storage.since(first)
        assert not plan.steps or isinstance(plan.steps[-1], Barrier)
        self.steps.append(Step(name, before, plan, bits, commits))

    def learn(self, tracker: Tracker) -> None:
        for bitmap in tracker._session.recording.bitmaps:
            self.granularity[bitmap.name] = bitmap.granularity
        self.tracked = tracker.names

    def mark(self, tracker: Tracker) -> None:
        size = tracker._session.recording.virtual_size
        ranges = random_ranges(self.random, size, 4, size // self.random.choice((3, 100)))
        tracker.mark_many(np.array(ranges))
        for name in tracker.names:
            cover(self.bits[name], self.granularity[name], ranges)

    def cover(self, tracker: Tracker, ranges: list[list[int]]) -> None:
        for name in tracker.names:
            cover(self.bits[name], self.granularity[name], [(s, n) for s, n in ranges])


def rewrite(data: bytearray, random: Random) -> None:
    """Another program that keeps bitmaps: everything stands elsewhere afterwards."""
    for number in range(random.randrange(1, 3)):
        with qcow2bm.open(data, "r+") as image, image.edit() as edit:
            edit.add(f"theirs{number}", 1 << 16, enabled=False)
            for name, bitmap in image.bitmaps.items():
                if bitmap.auto and bitmap.status == "valid":
                    edit.set(name, random.randrange(image.virtual_size), 1)


MEANWHILE = ("nothing", "rewritten", "merge", "killed", "unaware of the generation")


def hand_over(
    image: bytes, random: Random, meanwhile: str, *, generation: bool | None, carries: bool
) -> list[Step]:
    """From beginning to track to having stopped, with a migration that came to nothing."""
    run = Recorder(image, random)
    with qcow2bm.open(run.storage, "r+") as opened:
        recording = [b.name for b in opened.bitmaps.values() if b.auto and b.status == "valid"]
        run.tracked = recording
        begun: list[Tracker] = []
        run.do("track", lambda: begun.append(opened.track(recording, generation=generation)))
        (tracker,) = begun
        run.learn(tracker)
        carried = tracker.names if meanwhile == "merge" else tracker.names[: int(carries)]
        run.mark(tracker)
        run.do("begin, to be cancelled", tracker.begin_migration, commits=True)
        run.mark(tracker)
        run.do("cancel", tracker.cancel_migration, commits=True)
        run.mark(tracker)
        if random.random() < 0.5:
            run.do("flush", tracker.flush)
        run.do("begin", lambda: tracker.begin_migration(carried=carried), commits=True)
        run.mark(tracker)
        run.do("inactivate", tracker.inactivate)
        data = run.storage.data
        if meanwhile in ("rewritten", "merge"):
            rewrite(data, random)
        if meanwhile == "killed":
            with qcow2bm.open(bytes(data)) as found:
                places = [found.bitmaps[name].entry.offset for name in tracker.names]
            for place in places:
                data[place + 15] |= 1
        if meanwhile == "unaware of the generation" and look_at(data).token is not None:
            data[88] &= 0x7F
        stored = stored_bits(data)
        before = look_at(data)
        # What is reloaded is valid with what the image has; it never gets less.
        if meanwhile != "nothing":
            for name in tracker.names:
                if before.bitmaps[name].status == "valid":
                    run.bits[name] = stored[name]
        policy: Policy = "merge" if meanwhile == "merge" else "drop"
        came: list[Activation] = []
        run.do("activate", lambda: came.append(tracker.activate(policy)), commits=True)
        after = look_at(data)
        assert not any(map(is_sentinel, after.bitmaps))
        marked = {name: bits.copy() for name, bits in run.bits.items()}
        for name in tracker.names:
            assert after.bitmaps[name].status == "inconsistent"
            bitmap = tracker._session.find(name)
            marks = tracker._session.recording
            count = -(-marks.virtual_size // bitmap.granularity)
            marks.fan_out()
            octets = np.frombuffer(bytes(bitmap.bits.octets), np.uint8)
            run.bits[name] = np.unpackbits(octets, bitorder="little")[:count]
            # Nothing is dirty that was not marked, or stored by others.
            if name in marked and name not in carried:
                assert np.array_equal(run.bits[name], marked[name])
        dropped = {n for n in run.tracked if n not in tracker.names}
        is_carried_lost = carries and came[0].outcome != "unchanged"
        assert (meanwhile == "killed" or is_carried_lost) == bool(dropped)
        run.learn(tracker)
        run.mark(tracker)
        if tracker.names:
            run.do("rotate", lambda: tracker.rotate(tracker.names[0], "next"), commits=True)
            run.learn(tracker)
            size = tracker._session.recording.virtual_size
            run.bits["next"] = np.zeros(-(-size // run.granularity["next"]), np.uint8)
            run.mark(tracker)
        run.do("stop", tracker.stop)
    with qcow2bm.open(run.storage, "r+") as opened:
        run.tracked = []

        def edit() -> None:
            with opened.edit() as edit:
                edit.add("by an edit", 1 << 16)

        run.do("edit", edit, commits=True)
    if generation is not None:
        assert (look_at(run.storage.data).token is not None) == generation
    return run.steps


OPTIONS = [
    (meanwhile, generation, carries)
    for meanwhile in MEANWHILE
    for generation in (None, True, False)
    for carries in ((False, True) if meanwhile in ("nothing", "rewritten") else (False,))
]


def runs(image: bytes, random: Random, count: int | None = None) -> Iterator[list[Step]]:
    """Hand-overs of an image in all ways, or some of them."""
    for meanwhile, generation, carries in random.sample(OPTIONS, count or len(OPTIONS)):
        try:
            yield hand_over(image, random, meanwhile, generation=generation, carries=carries)
        except (LimitError, UnsupportedError):
            with qcow2bm.open(image) as opened:
                # The header of a small cluster, or one as full, has no room for what is added.
                assert opened.cluster_size <= 4096
                assert generation is not None


@pytest.mark.parametrize("name", HEADERS)
def test_some_states_of_headers(name: str) -> None:
    random = Random(name)
    count = 0
    for steps in runs(header_image(name), random, 2):
        count += sum(step.judge_all(random, 4) for step in steps)
    assert count or "small" in name


def test_some_states_of_layouts() -> None:
    random = Random("hand-over")
    count = 0
    for name in random.sample(trackable(), 6):
        for steps in runs(build(name), random, 1):
            count += sum(step.judge_all(random, 3) for step in steps)
    assert count > 100


@pytest.mark.parametrize("name", HEADERS)
@pytest.mark.parametrize("generation", [False, True])
def test_beginning_and_ending_the_generation(name: str, generation: bool) -> None:
    """More of the states of what rewrites the header, on every kind of it."""
    random = Random(name)
    image = header_image(name)
    for wanted in (generation, not generation):
        had_token = wanted and look_at(image).token is not None
        run = Recorder(image, random)
        with qcow2bm.open(run.storage, "r+") as opened:
            run.tracked = ["b00", "b02"]
            before = bytes(run.storage.data)
            begun: list[Tracker] = []
            track = partial(opened.track, generation=wanted)
            try:
                run.do("track", lambda begun=begun, track=track: begun.append(track()))  # type: ignore[misc]
            except (LimitError, UnsupportedError):
                assert run.storage.data == before  # nothing was begun
                assert "small" in name
                continue
            (tracker,) = begun
            run.learn(tracker)
            run.do("stop", tracker.stop)
        assert sum(step.judge_all(random, 10) for step in run.steps)
        found = look_at(run.storage.data)
        assert (found.token is not None) == wanted
        with qcow2bm.open(run.storage) as opened:
            named = {f.bit: f.name for f in opened.features("autoclear")}
        if not had_token:  # the writer that begins a generation gives it a name
            assert named.get(63) == (GENERATION_NAME if wanted else None)
        image = bytes(run.storage.data)


def test_most_headers_have_room() -> None:
    """Otherwise the tests above would look at nothing."""
    have_room = set()
    for name in HEADERS:
        with qcow2bm.open(bytearray(header_image(name)), "r+") as opened:
            try:
                opened.track(generation=True)
            except LimitError:
                continue
        have_room.add(name)
    assert HEADERS.keys() - have_room == {"small overlay, full"}


@pytest.mark.deep
@pytest.mark.parametrize("name", HEADERS)
def test_many_states_of_headers(name: str) -> None:
    count = 0
    random = Random(name)
    for steps in runs(header_image(name), random):
        count += sum(step.judge_all(random, 150) for step in steps)
    print(f"crash states checked: {count} ({name})")
    assert count > 1000


@pytest.mark.deep
@pytest.mark.parametrize("family", FAMILIES)
def test_many_states_of_all_layouts(family: str) -> None:
    count = 0
    for name in trackable(family):
        random = Random(name)
        for steps in runs(build(name), random, 3):
            count += sum(step.judge_all(random, 10) for step in steps)
    print(f"crash states checked: {count} ({family})")
    assert count or not trackable(family)


def test_the_judge_notices_what_is_done_too_early() -> None:
    """Without its barriers a step leaves states that must not be."""
    random = Random(1)
    noticed: set[str] = set()
    image = header_image("overlay with a long name")
    for steps in (
        hand_over(image, random, "nothing", generation=True, carries=False),
        hand_over(image, random, "rewritten", generation=None, carries=False),
        hand_over(
            build(trackable("clusters of 512")[0]),
            random,
            "nothing",
            generation=None,
            carries=False,
        ),
    ):
        for step in steps:
            for place in range(len(step.plan.steps) - 1):
                if not step.plan.is_barrier(place) or step.name in noticed:
                    continue
                kept = step.plan.steps
                without = step._replace(plan=Plan((*kept[:place], *kept[place + 1 :])))
                try:
                    without.judge_all(random, 60)
                except BrokenStateError:
                    noticed.add(step.name)
    assert noticed >= {"track", "begin", "cancel", "inactivate", "activate", "edit"}
