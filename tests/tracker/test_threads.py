"""Marks from many threads, flushes meanwhile, and a stop at any time: no mark is lost."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import chain
from random import Random
from threading import Barrier, Event, Thread
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
import pytest
from support.images import Stored, build_image
from support.recording import Octets, Place, RecordingStorage, cover, stored_bits

import qcow2bm
from qcow2bm.bitmaps.tracked_store import TrackedStore
from qcow2bm.errors import StateError
from qcow2bm.storage.write_guard import WriteGuard
from qcow2bm.tracker.tracker import Tracker

if TYPE_CHECKING:
    from typing_extensions import Buffer

WRITERS = 4
CLUSTER_BITS = 12
SIZE = 5 * (8 << CLUSTER_BITS << 9) + 512
PIECE_COVERS = 8 * 4096 << 9
"""At the finest granularity, in guest bytes."""
ANYWHERE = (SIZE // 2, 1)

GRANULARITY_BITS = {"one": (9,), "alike": (9, 9, 13), "coarse": (16, 12)}

every_mix = pytest.mark.parametrize("mix", GRANULARITY_BITS)


@pytest.fixture(autouse=True)
def races() -> Iterator[None]:
    """Threads take turns as often as the interpreter lets them."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def image(mix: str) -> bytearray:
    """Clean bitmaps: every bit that is stored later was marked."""
    bitmaps = [
        Stored(f"b{number}".encode(), granularity_bits=bits)
        for number, bits in enumerate(GRANULARITY_BITS[mix])
    ]
    return build_image(*bitmaps, cluster_bits=CLUSTER_BITS, size=SIZE).data


def bits_of(mix: str, ranges: list[Place]) -> dict[str, Octets]:
    """The bits of each bitmap that the ranges touch."""
    expected = {}
    for number, granularity_bits in enumerate(GRANULARITY_BITS[mix]):
        bits = expected[f"b{number}"] = np.zeros(-(-SIZE >> granularity_bits), np.uint8)
        cover(bits, 1 << granularity_bits, ranges)
    return expected


def assert_has(data: bytes | bytearray, required: dict[str, Octets]) -> None:
    """Every bit that is required is stored."""
    for name, bits in stored_bits(data).items():
        lost = np.flatnonzero(required[name] & ~bits)
        assert not len(lost), f"{name} lacks {lost[:5]} and more, {len(lost)} in all"


class Writer:
    """A guest that marks and writes until tracking has ended.

    ``begun`` are all ranges it ever wanted to write, ``done`` is how many of them were marked.
    """

    def __init__(self, tracker: Tracker, random: Random) -> None:
        self.begun: list[Place] = []
        self.done = 0
        self.error: BaseException | None = None
        self._tracker = tracker
        self._random = random

    def work(self, start: Barrier) -> None:
        start.wait()
        try:
            while True:
                self._write()
                self.done = len(self.begun)
        except BaseException as error:
            self.error = error

    def _range(self) -> Place:
        random = self._random
        start = random.randrange(SIZE)
        most = random.choice((1, 1, 512, 70_000, SIZE // 4 if random.random() < 0.01 else 1))
        return start, min(random.randrange(1, most + 1), SIZE - start)

    def _write(self) -> None:
        kind = self._random.randrange(10)
        if kind < 5:
            self.begun.append(self._range())
            self._tracker.mark(*self.begun[-1])
        elif kind < 9:
            self.begun.append(self._range())
            with self._tracker.writing(*self.begun[-1]):
                pass
        else:
            ranges = [self._range() for _ in range(50)]
            self.begun += ranges
            self._tracker.mark_many(np.array(ranges))


class Load:
    """Writers at work, and a thread that flushes; a context manager that waits for their end."""

    def __init__(self, tracker: Tracker, storage: RecordingStorage, mix: str, seed: str) -> None:
        self._tracker, self._storage, self._mix = tracker, storage, mix
        self._random = Random(seed)
        self.writers = [Writer(tracker, Random(f"{seed} {n}")) for n in range(WRITERS)]
        self.flushes = 0
        self.error: BaseException | None = None

    def __enter__(self) -> Load:
        start = Barrier(WRITERS + 2)
        works = [writer.work for writer in self.writers]
        self._threads = [Thread(target=work, args=(start,)) for work in (*works, self._flush)]
        for thread in self._threads:
            thread.start()
        start.wait()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._tracker.abandon()  # for it may be that the test has failed before it stopped
        for thread in self._threads:
            thread.join()
        if error:
            return
        assert [type(writer.error) for writer in self.writers] == [StateError] * WRITERS
        assert isinstance(self.error, StateError), self.error

    @property
    def marked(self) -> list[Place]:
        """The places that were marked by now."""
        return [*chain.from_iterable(writer.begun[: writer.done] for writer in self.writers)]

    @property
    def begun(self) -> list[Place]:
        """The places that were marked, or were about to be marked."""
        return [ANYWHERE, *chain.from_iterable(writer.begun for writer in self.writers)]

    def _flush(self, start: Barrier) -> None:
        """A flush of all has stored whatever was marked before it began."""
        start.wait()
        try:
            while True:
                marked = self.marked
                # A mark of what another thread is just marking returns at once. This one waits.
                self._tracker.mark_many(np.array([ANYWHERE]))
                limit = self._random.choice((None, None, 4096, 20_000))
                self._tracker.flush(limit)
                self.flushes += 1
                if limit is None and self.flushes % 3 == 0:
                    assert_has(bytes(self._storage.data), bits_of(self._mix, marked))
        except BaseException as error:
            self.error = error


def stop_at_any_time(mix: str, seed: int) -> int:
    """Stops while everybody works; returns how many marks there were."""
    random = Random(f"{mix} {seed}")
    storage = RecordingStorage(image(mix))
    with qcow2bm.open(storage, "r+") as opened:
        tracker = opened.track()
        with Load(tracker, storage, mix, f"{mix} {seed}") as load:
            enough = random.choice((0, 10, 300, 3000))
            while sum(writer.done for writer in load.writers) < enough:
                assert not load.error, load.error
            marked = load.marked
            tracker.stop()
            stopped = bytes(storage.data)
        assert storage.data == stopped, "something was written after the stop"
        assert tracker.state == "stopped"
    with qcow2bm.open(stopped) as opened:
        assert {bitmap.status for bitmap in opened.bitmaps.values()} == {"valid"}
    assert_has(stopped, bits_of(mix, marked))
    assert_has(stopped, bits_of(mix, load.marked))  # a mark that returned while stop() waited
    begun = bits_of(mix, load.begun)
    for name, bits in stored_bits(stopped).items():
        assert not (bits & ~begun[name]).any(), "a bit that no mark covered"
    return len(load.marked)


@pytest.mark.spec("TRACK-1")
@pytest.mark.spec("TRACK-7")
@every_mix
@pytest.mark.parametrize("seed", range(5))
def test_a_stop_at_any_time(mix: str, seed: int) -> None:
    stop_at_any_time(mix, seed)


@pytest.mark.deep
@every_mix
def test_many_stops(mix: str) -> None:
    marks = sum(stop_at_any_time(mix, seed) for seed in range(5, 120))
    print(f"{mix}: {marks} marks, none lost")


@pytest.mark.spec("TRACK-6")
def test_a_stop_waits_for_writes_under_way() -> None:
    storage = RecordingStorage(image("one"))
    inside, stopped = Event(), Event()
    log = []
    with qcow2bm.open(storage, "r+") as opened:
        tracker = opened.track()

        def write() -> None:
            with tracker.writing(512, 512):
                inside.set()
                stopped.wait(0.05)  # which it must not be, however long this took
                log.append("written")

        def stop() -> None:
            inside.wait()
            tracker.stop()
            log.append("stopped")
            stopped.set()

        threads = [Thread(target=work) for work in (write, stop)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert log == ["written", "stopped"]
        assert opened.bitmaps["b0"].count() == 512


def test_who_begins_to_write_while_it_stops_is_turned_away() -> None:
    """A write that begins during a stop must wait for the stop, and then be refused."""
    outcomes: list[str] = []

    def write() -> None:
        try:
            with tracker.writing(1024, 512):
                outcomes.append("marked")
        except StateError:
            outcomes.append("turned away")

    thread = Thread(target=write)

    class Stopping(RecordingStorage):
        def write(self, offset: int, parts: Sequence[Buffer]) -> None:
            if is_stopping.is_set() and not thread.ident:
                thread.start()
            super().write(offset, parts)

    is_stopping = Event()
    with qcow2bm.open(Stopping(image("one")), "r+") as opened:
        tracker = opened.track()
        tracker.mark(512, 512)
        is_stopping.set()
        tracker.stop()
        thread.join()
        assert outcomes == ["turned away"]
        assert opened.bitmaps["b0"].count() == 512


def test_an_exception_inside_a_write_lets_others_go_on() -> None:
    storage = RecordingStorage(image("one"))
    with qcow2bm.open(storage, "r+") as opened:
        tracker = opened.track()
        with pytest.raises(ZeroDivisionError), tracker.writing(512, 512):
            raise ZeroDivisionError
        with pytest.raises(ValueError, match="does not lie on the disk"), tracker.writing(SIZE, 1):
            raise AssertionError("this must not be reached")
        tracker.stop()  # no write is in flight that it would wait for
        assert opened.bitmaps["b0"].count() == 512


@every_mix
def test_many_threads_stop_and_one_does(mix: str) -> None:
    with qcow2bm.open(image(mix), "r+") as opened:
        tracker = opened.track()
        tracker.mark(0, SIZE)
        outcomes = []
        start = Barrier(WRITERS)

        def stop() -> None:
            start.wait()
            try:
                outcomes.append(tracker.stop().barriers)
            except StateError:
                outcomes.append(0)

        threads = [Thread(target=stop) for _ in range(WRITERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(outcomes) == [0] * (WRITERS - 1) + [3]
        assert {bitmap.status for bitmap in opened.bitmaps.values()} == {"valid"}


def test_a_flush_stores_what_was_marked_before_it_whatever_is_marked_meanwhile() -> None:
    """A flush must store everything that was marked before it, whatever is marked meanwhile.

    Otherwise pieces that change all the time would keep other pieces from being stored.
    """
    storage = RecordingStorage(image("alike"))
    held = WriteGuard(storage)
    held.acquire(0)
    store = TrackedStore(held)
    with qcow2bm.open(bytes(storage.data)) as opened:
        store.begin(opened.directory, [])
    pieces = iter(range(PIECE_COVERS, SIZE, PIECE_COVERS))

    def clock() -> float:
        if is_flushing:
            tracker.mark(next(pieces, 0), 1)
        return 0.0

    is_flushing = False
    tracker = Tracker(held, store, clock=clock)
    tracker.mark(0, 1)
    is_flushing = True
    tracker.flush()
    assert_has(bytes(storage.data), bits_of("alike", [(0, 1)]))
