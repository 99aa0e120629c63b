"""Getting a stop short: rounds of flushing, a flusher in the background, several disks."""

from __future__ import annotations

import errno
import math
import threading
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pytest
from support.faulty_storage import Fault, FaultyStorage
from support.images import Stored, build_image

import qcow2bm
from qcow2bm.bitmaps.tracked_bitmap import PIECE_BYTES
from qcow2bm.bitmaps.tracked_store import TrackedStore
from qcow2bm.storage.write_guard import WriteGuard
from qcow2bm.tracker.group import TrackerGroup
from qcow2bm.tracker.reports import Pending
from qcow2bm.tracker.tracker import Tracker

if TYPE_CHECKING:
    from typing_extensions import Buffer

SIZE = 1 << 30  # 256 KiB of bits of 512 bytes each: 64 pieces


def image() -> bytearray:
    return build_image(Stored(b"a", granularity_bits=9), size=SIZE, cluster_bits=12).data


class Disk:
    """A storage that takes as long as a disk does, by a clock of its own that runs at once."""

    def __init__(self, data: bytearray, bytes_per_second: float, barrier: float) -> None:
        self.storage = FaultyStorage(data)
        self.now = 0.0
        self.during: Callable[[], None] = lambda: None
        write, wait = self.storage.write, self.storage.barrier

        def timed_write(offset: int, parts: Sequence[Buffer]) -> None:
            write(offset, parts)
            self.now += sum(memoryview(part).nbytes for part in parts) / bytes_per_second
            self.during()

        def timed_barrier() -> None:
            wait()
            self.now += barrier

        self.storage.write = timed_write  # type: ignore[method-assign]
        self.storage.barrier = timed_barrier  # type: ignore[method-assign]

    def tracker(self) -> Tracker:
        held = WriteGuard(self.storage)
        held.acquire(0)
        store = TrackedStore(held)
        store.begin(store.metadata.directory.entries, ())
        return Tracker(held, store, clock=lambda: self.now)


@pytest.mark.spec("TRACK-15")
def test_a_quiet_disk_converges_at_once() -> None:
    disk = Disk(image(), 1 << 20, 0.001)
    tracker = disk.tracker()
    tracker.mark(0, SIZE)
    seen: list[Pending] = []
    result = tracker.converge(0.01, progress=seen.append)
    assert result.is_reached
    assert result.rounds == 1
    assert [pending.pieces for pending in seen] == [64, 0]
    before = disk.now
    assert tracker.stop().bytes_written == 4
    assert disk.now - before <= 0.01


@pytest.mark.spec("TRACK-15")
def test_who_writes_faster_than_the_disk_is_told_so() -> None:
    """All pieces are touched anew while they are flushed."""
    disk = Disk(image(), 1 << 20, 0.001)
    tracker = disk.tracker()
    bits = iter(range(SIZE // 512))

    def mark_all_pieces() -> None:
        bit = next(bits)
        for piece in range(64):
            tracker.mark((piece * 8 * PIECE_BYTES + bit % (8 * PIECE_BYTES)) * 512, 1)

    tracker.mark(0, 1)
    disk.during = mark_all_pieces
    result = tracker.converge(0.01)
    assert not result.is_reached
    assert result.seconds >= 64 * PIECE_BYTES / (1 << 20)
    assert result.rounds < 20


@pytest.mark.spec("TRACK-15")
def test_barriers_that_take_too_long_are_no_secret() -> None:
    disk = Disk(image(), 1 << 30, 0.5)
    tracker = disk.tracker()
    tracker.mark(0, 1)
    tracker.flush()
    result = tracker.converge(0.5)
    assert not result.is_reached
    assert result.seconds >= 1


@pytest.mark.spec("TRACK-15")
def test_the_timeout() -> None:
    disk = Disk(image(), 1 << 20, 0.001)
    tracker = disk.tracker()
    tracker.mark(0, SIZE)
    result = tracker.converge(0.01, timeout=0)
    assert (result.is_reached, result.rounds) == (False, 0)


@pytest.mark.spec("TRACK-15")
@pytest.mark.parametrize("q", [0.1, 0.3, 0.6])
@pytest.mark.parametrize("seed", range(3))
def test_rounds_shrink_as_the_model_says(q: float, seed: int) -> None:
    """Every round leaves at most q times the pieces of the one before, but for chance."""
    disk, tracker, seen = written_at_random(q, seed)
    result = tracker.converge(0.02, progress=seen.append)
    assert result.is_reached
    counts = [pending.pieces for pending in seen]
    for before, after in pairwise(counts):
        expected = q * before
        assert after <= expected + 4 * math.sqrt(expected) + 2
    assert disk.now < 2 * 64 * PIECE_BYTES / _RATE / (1 - q)


@pytest.mark.spec("TRACK-15")
@pytest.mark.parametrize("seed", range(3))
def test_rounds_do_not_shrink_where_the_model_says_so(seed: int) -> None:
    _, tracker, seen = written_at_random(20, seed)
    result = tracker.converge(0.02, progress=seen.append)
    assert not result.is_reached
    assert min(pending.pieces for pending in seen[1:]) > 32  # of 64


_RATE = 1 << 20  # bytes per second that the storage takes


def written_at_random(q: float, seed: int) -> tuple[Disk, Tracker, list[Pending]]:
    """A disk whose storage is busy while m = q * F / 4096 random bits are marked per second."""
    random = np.random.default_rng(seed)
    disk = Disk(image(), _RATE, 0.0001)
    tracker = disk.tracker()
    done = [0.0]

    def mark() -> None:
        count = random.poisson(q * _RATE / PIECE_BYTES * (disk.now - done[0]))
        done[0] = disk.now
        starts = random.integers(0, SIZE // 512, count) * 512
        tracker.mark_many(np.stack((starts, np.ones(count, np.int64)), axis=1))

    for piece in range(64):  # all are touched, and hardly anything is set
        tracker.mark(piece * 8 * PIECE_BYTES * 512, 1)
    disk.during = mark
    return disk, tracker, []


@pytest.mark.parametrize("seed", range(3))
def test_bitmaps_fill_up_as_the_model_says(seed: int) -> None:
    """After m random marks on n bits, about n * exp(-m / n) bits must still be clear."""
    random = np.random.default_rng(seed)
    data = build_image(Stored(b"a", granularity_bits=16), size=SIZE, cluster_bits=12).data
    n = SIZE >> 16
    with qcow2bm.open(data, "r+") as opened, opened.track() as tracker:
        for m in (n // 2, n, 2 * n):
            starts = random.integers(0, n, m if m == n // 2 else m // 2) << 16
            tracker.mark_many(np.stack((starts, np.ones(len(starts), np.int64)), axis=1))
            clear = n - _count(tracker)
            assert abs(clear - n * math.exp(-m / n)) < 5 * math.sqrt(n)


def _count(tracker: Tracker) -> int:
    return int.from_bytes(tracker._session.recording.bits.octets, "little").bit_count()


@pytest.mark.spec("TRACK-16")
def test_the_background_flushes_and_ends() -> None:
    data = image()
    with qcow2bm.open(data, "r+") as opened, opened.track() as tracker:
        tracker.mark(0, SIZE)
        flushed = threading.Event()
        real = tracker.flush

        def flush(*arguments: int) -> object:
            report = real(*arguments)
            if not tracker.pending.pieces:
                flushed.set()
            return report

        tracker.flush = flush  # type: ignore[method-assign, assignment]
        with tracker.background(0.001, 16 << 20):
            assert flushed.wait(60)
        assert not [t for t in threading.enumerate() if t.name == "qcow2bm flush"]
        assert tracker.stop().pieces == 0


@pytest.mark.spec("TRACK-16")
@pytest.mark.spec("TRACK-12")
def test_what_fails_in_the_background_is_told_by_the_next_call() -> None:
    storage = FaultyStorage(image())
    with qcow2bm.open(storage, "r+") as opened:
        tracker = opened.track()
        tracker.mark(0, 1)
        storage.fault = Fault(len(storage.calls), errno.EIO, is_sticky=True)
        with tracker.background(0.001):
            deadline = threading.Event()
            while tracker.state == "tracking":
                deadline.wait(0.001)
        with pytest.raises(qcow2bm.StateError, match="failed") as raised:
            tracker.mark(0, 1)
        assert isinstance(raised.value.__cause__, qcow2bm.CommitError)


@pytest.mark.spec("TRACK-17")
def test_a_disk_that_fails_keeps_no_other_from_being_stored() -> None:
    storages = {name: FaultyStorage(image()) for name in ("first", "second", "third")}
    images = {name: qcow2bm.open(storage, "r+") for name, storage in storages.items()}
    trackers = {name: opened.track() for name, opened in images.items()}
    for tracker in trackers.values():
        tracker.mark(0, 1)
    group = TrackerGroup(trackers)
    assert all(not isinstance(c, Exception) and c.is_reached for c in group.converge(60).values())
    storages["second"].fault = Fault(len(storages["second"].calls), errno.EIO, is_sticky=True)
    results = group.stop()
    assert list(results) == list(storages)
    assert isinstance(results["second"], qcow2bm.CommitError)
    for name, storage in storages.items():
        storage.fault = None
        with qcow2bm.open(storage) as opened:
            status = opened.bitmaps["a"].status
            assert status == ("inconsistent" if name == "second" else "valid")
