"""Every call of the storage fails in turn: tracking ends for good, and no bitmap is believed.

A bitmap that is valid afterwards has every bit; else it is in_use. After a failed barrier nothing
more is written, since no later barrier would prove anything.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from random import Random
from typing import NamedTuple

import numpy as np
import pytest
from support.audit import Audit
from support.faulty_storage import Fault, FaultyStorage
from support.images import ZEROES, Stored, Word, build_image
from support.interrupted_edits import EDITS
from support.recording import Place, cover, stored_bits

import qcow2bm
from qcow2bm.errors import CommitError, Qcow2BmError, StateError
from qcow2bm.format.directory import FLAG_AUTO, FLAG_IN_USE
from qcow2bm.tracker.tracker import Tracker

COVERED = 8 * 512 * 512
"""The guest bytes that a cluster of a bitmap of granularity 512 covers."""
SIZE = 12 * COVERED

ROUNDS: Sequence[list[Place]] = (
    [(512, 512), (5 * COVERED, COVERED)],  # in a cluster that is there, and a new one
    [(0, 5000), (8 * COVERED + 512, 1)],
    [(11 * COVERED - 512, 1024)],
)


def image() -> bytearray:
    """Three bitmaps, of which the middle one is disabled."""
    some: list[Word] = [b"\x01", ZEROES, b"\x80"]
    bitmaps = (
        Stored(b"fine", some * 4, 9),
        Stored(b"disabled", some * 4, 9, 0),
        Stored(b"coarse", [ZEROES, b"\x01"], 12),
    )
    return build_image(*bitmaps, size=SIZE).data


IMAGES: dict[str, Callable[[], bytearray]] = {
    "plain": image,
    "refcount block": EDITS["refcount block"].image,
    "unknown autoclear": EDITS["unknown autoclear"].image,
}


class Ended(NamedTuple):
    """The end of a session: the error, the call that raised it, and the tracker if there is one."""

    error: BaseException | None
    step: str
    tracker: Tracker | None
    marked: tuple[Place, ...]


def session(storage: FaultyStorage) -> Ended:
    """Tracks an image until something fails, or to the end."""
    tracker: Tracker | None = None
    marked: list[Place] = []
    step = "open"
    try:
        with qcow2bm.open(storage, "r+") as opened:
            step = "track"
            tracker = opened.track()
            for ranges in ROUNDS:
                step = "flush"
                fitting = [(s, n) for s, n in ranges if s + n <= opened.virtual_size]
                tracker.mark_many(np.array(fitting, np.int64).reshape(-1, 2))
                marked += fitting
                tracker.flush()
            tracker.mark(opened.virtual_size - 1, 1)
            marked.append((opened.virtual_size - 1, 1))
            step = "stop"
            tracker.stop()
            step = "end"
    except Qcow2BmError as error:
        return Ended(error, step, tracker, tuple(marked))
    return Ended(None, step, tracker, tuple(marked))


@cache
def calls(name: str) -> tuple[str, ...]:
    """The calls of a session in which nothing fails."""
    storage = FaultyStorage(IMAGES[name]())
    assert session(storage).step == "end"
    return tuple(storage.calls)


@cache
def recording(name: str) -> frozenset[str]:
    """The bitmaps of an image that are tracked."""
    with qcow2bm.open(IMAGES[name]()) as opened:
        return frozenset(bitmap.name for bitmap in opened.bitmaps.values() if bitmap.auto)


def numbers(name: str, *wanted: str) -> list[int]:
    """The numbers of the calls of these kinds."""
    return [number for number, call in enumerate(calls(name)) if call in wanted]


def assert_sound(name: str, data: bytearray, ended: Ended) -> set[str]:
    """No bitmap lacks a bit unless it is in_use; the names of those that are not."""
    before = IMAGES[name]()
    old, found = Audit(before), Audit(data)
    expected, stored = stored_bits(before), stored_bits(data)
    valid = set()
    for was, now in zip(old.bitmaps, found.bitmaps, strict=True):
        bitmap = now.name.decode()
        assert now._replace(flags=was.flags, words=was.words) == was
        if now.flags & FLAG_IN_USE:
            assert was.flags & FLAG_AUTO, "this one was not tracked"
            continue
        valid.add(bitmap)
        if now.flags & FLAG_AUTO:
            cover(expected[bitmap], 1 << now.granularity_bits, ended.marked)
        assert np.array_equal(stored[bitmap], expected[bitmap]), bitmap
    assert found.references - found.refcounts == Counter()  # INV-REFCOUNT
    assert found.payload is not None
    return valid


def assert_over(tracker: Tracker, state: str) -> None:
    """Asserts that a tracker refuses every use, and is in the given state."""
    assert tracker.state == state
    works: list[Callable[[], object]] = [
        lambda: tracker.mark(0, 1),
        lambda: tracker.mark(0, 0),
        lambda: tracker.mark_many(np.array([[0, 1]])),
        lambda: tracker.writing(0, 1).__enter__(),
        lambda: tracker.pending,
        tracker.flush,
        tracker.stop,
    ]
    for work in works:
        with pytest.raises(StateError):
            work()
    tracker.abandon()
    assert tracker.state == state


def fail(name: str, storage: FaultyStorage) -> Ended:
    """A session of which a write or barrier fails."""
    ended = session(storage)
    assert isinstance(ended.error, CommitError)
    if ended.tracker:
        effects = list(storage.effects)
        assert_over(ended.tracker, "failed")
        assert storage.effects == effects
    valid = assert_sound(name, storage.data, ended)
    if ended.tracker and ended.error.outcome != "unknown":
        assert not valid & recording(name)
    return ended


@pytest.mark.parametrize("share", [0, 0.5, 1])
@pytest.mark.parametrize("name", IMAGES)
def test_a_write_fails(name: str, share: float) -> None:
    for number in numbers(name, "write"):
        for is_sticky in (False, True):
            storage = FaultyStorage(IMAGES[name](), Fault(number, 5, is_sticky, share))
            fail(name, storage)
            assert storage.effects[-1] in ("write", "truncate")


@pytest.mark.spec("TRACK-12")
@pytest.mark.parametrize("name", IMAGES)
def test_a_barrier_fails_and_nothing_is_written_afterwards(name: str) -> None:
    """After a failed barrier nothing may be written, whatever the barrier has lost."""
    random = Random(name)
    outcomes = []
    for number in numbers(name, "barrier"):
        salts = [random.randrange(1 << 30) for _ in range(4)]
        for keeps in (
            lambda sector: False,
            lambda sector: True,
            *(lambda sector, s=salt: bool(Random(s + sector).randrange(2)) for salt in salts),
        ):
            storage = FaultyStorage(IMAGES[name](), Fault(number), keeps=keeps)
            ended = fail(name, storage)
            assert storage.effects[-1] in ("barrier", "truncate")
            assert isinstance(ended.error, CommitError)
            outcomes.append((ended.step, ended.error.outcome))
    # Only what makes the bitmaps valid can have worked although it failed.
    # And in_use may be on disk although tracking did not begin.
    assert [outcome for _, outcome in outcomes].count("unknown") == 12
    assert {step for step, outcome in outcomes if outcome == "unknown"} == {"track", "stop"}
    assert outcomes[-1] == ("stop", "unknown")


@pytest.mark.parametrize("is_kept", [False, True])
def test_the_last_barrier_can_have_worked_although_it_failed(is_kept: bool) -> None:
    """If the last barrier fails, the bitmaps may be valid or not: "unknown" must be needed."""
    number = numbers("plain", "barrier")[-1]
    storage = FaultyStorage(image(), Fault(number), keeps=lambda sector: is_kept)
    ended = fail("plain", storage)
    valid = assert_sound("plain", storage.data, ended)
    assert valid == ({"fine", "coarse", "disabled"} if is_kept else {"disabled"})


@pytest.mark.parametrize("name", IMAGES)
def test_a_read_fails(name: str) -> None:
    """If any read fails, the image must stay sound, also after the bitmaps were stored."""
    for number in numbers(name, "read_into", "size", "read_lock", "change_token"):
        for is_sticky in (False, True):
            storage = FaultyStorage(IMAGES[name](), Fault(number, 5, is_sticky))
            ended = session(storage)
            assert_sound(name, storage.data, ended)
            if ended.tracker and ended.error:
                assert_over(ended.tracker, "failed")
            if not ended.error:
                assert not is_in_use(storage.data)


def is_in_use(data: bytearray) -> bool:
    """Whether any bitmap is."""
    return any(bitmap.flags & FLAG_IN_USE for bitmap in Audit(data).bitmaps)


@pytest.mark.spec("INV-META")
@pytest.mark.spec("TRACK-7")
@pytest.mark.spec("TRACK-12")
def test_pieces_of_a_flush_that_failed_count_as_changed_again() -> None:
    """INV-META: what is not known to be durable is not stored."""
    failures = Counter[str]()
    for number in range(100):
        storage = FaultyStorage(image())
        with qcow2bm.open(storage, "r+") as opened:
            tracker = opened.track()
            tracker.mark(0, COVERED)
            tracker.mark(5 * COVERED, 1)
            assert tracker.pending.pieces == 2  # one of each bitmap, of several clusters
            before = [bytes(b.bits.touched) for b in tracker._session.recording.bitmaps]
            first = len(storage.calls)
            storage.fault = Fault(first + number)
            try:
                tracker.flush()
            except Qcow2BmError:
                failures[storage.calls[first + number]] += 1
            else:
                break
            assert tracker.state == "failed"
            assert [bytes(b.bits.touched) for b in tracker._session.recording.bitmaps] == before
            assert is_in_use(storage.data)
    assert tracker.state == "abandoned"  # because the image was closed
    assert failures["write"] >= 3
    assert failures["barrier"] == 2


def test_a_write_in_flight_when_tracking_fails_is_not_hindered() -> None:
    """The write goes on, but the bitmap stays in_use."""
    storage = FaultyStorage(image())
    with qcow2bm.open(storage, "r+") as opened:
        tracker = opened.track()
        with tracker.writing(512, 512):
            storage.fault = Fault(len(storage.calls), is_sticky=True)
            with pytest.raises(StateError, match="inside a write"):
                tracker.flush()
            with ThreadPoolExecutor(1) as pool, pytest.raises(CommitError):
                pool.submit(tracker.flush).result()
        with pytest.raises(StateError, match="failed"):
            tracker.flush()
        with pytest.raises(StateError):
            tracker.mark(512, 512)
    assert is_in_use(storage.data)


def test_a_failed_image_can_be_opened_and_its_bitmaps_made_anew() -> None:
    storage = FaultyStorage(image())
    with qcow2bm.open(storage, "r+") as opened:
        tracker = opened.track()
        tracker.mark(512, 512)
        storage.fault = Fault(len(storage.calls))
        with pytest.raises(CommitError):
            tracker.stop()
        assert opened.bitmaps["fine"].status == "inconsistent"
        with opened.edit() as edit:
            for name in ("fine", "coarse"):
                edit.remove(name)
                edit.add(name, 512)
        with opened.track() as tracker:
            tracker.mark(512, 1)
        assert [opened.bitmaps[name].count() for name in ("fine", "coarse")] == [512, 512]
    assert not is_in_use(storage.data)
