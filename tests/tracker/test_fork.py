"""A forked process has a copy of the tracker, and the copy refuses marks.

A mark in the child would return as if the bitmap had it, and the parent would store a bitmap that
misses a write.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from support.images import Stored, build_image

import qcow2bm

SIZE = 8 << 20
GRANULARITY = 65536


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(build_image(Stored(b"b", granularity_bits=16), size=SIZE).data)
    return path


def in_child(work: Callable[[], object]) -> str:
    """Calls ``work`` in a forked process; returns its result, or the error it raises, as text."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            text = str(work())
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(writer, text.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        text = answer.read()
    os.waitpid(child, 0)
    return text


def dirty(path: Path) -> list[int]:
    with qcow2bm.open(path) as image:
        bitmap = image.bitmaps["b"]
        assert bitmap.status == "valid"
        number = int.from_bytes(bitmap.packed().tobytes(), "little")
    return [bit for bit in range(SIZE // GRANULARITY) if number >> bit & 1]


def write_in(tracker: qcow2bm.Tracker) -> str:
    with tracker.writing(1 << 20, 65536):
        return "written"


WORK: dict[str, Callable[[qcow2bm.Tracker], object]] = {
    "mark": lambda tracker: tracker.mark(1 << 20, 1),
    "mark of a long range": lambda tracker: tracker.mark(0, SIZE),
    "mark of nothing": lambda tracker: tracker.mark(0, 0),
    "mark_many": lambda tracker: tracker.mark_many([(1 << 20, 1)]),  # type: ignore[arg-type]
    "writing": write_in,
    "flush": lambda tracker: tracker.flush(),
    "pending": lambda tracker: tracker.pending,
    "stop": lambda tracker: tracker.stop(),
    "rotate": lambda tracker: tracker.rotate("b", "c"),
    "begin_migration": lambda tracker: tracker.begin_migration(),
    "inactivate": lambda tracker: tracker.inactivate(),
}


@pytest.mark.spec("LIFE-21")
@pytest.mark.parametrize("work", WORK)
def test_the_copy_refuses(path: Path, work: str) -> None:
    with qcow2bm.open(path, "r+") as image:
        tracker = image.track()
        tracker.mark(3 << 20, 1)
        refused = in_child(lambda: WORK[work](tracker))
        assert refused == "StateError: the tracker is forked, but must be tracking" or (
            refused.startswith("StateError: the tracker is forked, but must be tracking or ")
        )
        tracker.mark(2 << 20, 1)  # the parent goes on
        tracker.stop()
    assert dirty(path) == [32, 48]


@pytest.mark.spec("LIFE-21")
@pytest.mark.parametrize("end", ["abandon", "close"])
def test_the_copy_can_be_ended_and_the_parent_keeps_its_lock(path: Path, end: str) -> None:
    with qcow2bm.open(path, "r+") as image:
        tracker = image.track()
        assert in_child(tracker.abandon if end == "abandon" else image.close) == "None"
        with pytest.raises(qcow2bm.ImageLockedError):
            qcow2bm.open(path, "r+")
        tracker.mark(1 << 20, 1)
        tracker.stop()
    assert dirty(path) == [16]


@pytest.mark.spec("LIFE-21")
def test_a_given_away_image_stays_the_parents(path: Path) -> None:
    with qcow2bm.open(path, "r+") as image:
        tracker = image.track()
        tracker.inactivate()
        assert "the tracker is forked" in in_child(tracker.activate)
        tracker.activate()
        tracker.stop()


def test_locks_that_other_threads_hold_do_not_stop_the_copy(path: Path) -> None:
    """Each fork comes while other threads mark, write and flush."""
    with qcow2bm.open(path, "r+") as image:
        tracker = image.track()
        is_over = threading.Event()

        def mark() -> None:
            while not is_over.is_set():
                with tracker.writing(5 << 20, 1):
                    tracker.mark(0, SIZE // 2)

        def flush() -> None:
            while not is_over.is_set():
                tracker.flush()

        threads = [threading.Thread(target=work) for work in (mark, mark, flush)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(20):
                refused = in_child(lambda: tracker.mark(1 << 20, 1))
                assert "the tracker is forked" in refused
                assert in_child(image.close) == "None"
        finally:
            is_over.set()
            for thread in threads:
                thread.join()
        tracker.stop()
    assert 80 in dirty(path)


def test_a_write_in_flight_ends_in_parent_and_child(path: Path) -> None:
    with qcow2bm.open(path, "r+") as image:
        tracker = image.track()
        with tracker.writing(1 << 20, 1):
            assert "the tracker is forked" in in_child(lambda: tracker.mark(2 << 20, 1))
            child = os.fork()
        if not child:
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        tracker.stop()
    assert dirty(path) == [16]


def try_to_mark(tracker: qcow2bm.Tracker, answers: multiprocessing.Queue[str]) -> None:
    try:
        tracker.mark(1 << 20, 1)
    except qcow2bm.StateError as error:
        answers.put(str(error))
    else:
        answers.put("marked")


@pytest.mark.spec("LIFE-21")
def test_multiprocessing(path: Path) -> None:
    """A forked worker is refused; for a spawned one, a tracker cannot be sent."""
    with qcow2bm.open(path, "r+") as image:
        tracker = image.track()
        forking = multiprocessing.get_context("fork")
        answers: multiprocessing.Queue[str] = forking.Queue()
        worker = forking.Process(target=try_to_mark, args=(tracker, answers))
        worker.start()
        assert answers.get(timeout=60).startswith("the tracker is forked")
        worker.join()
        spawning = multiprocessing.get_context("spawn")
        spawned = spawning.Process(target=try_to_mark, args=(tracker, answers))
        with pytest.raises((TypeError, pickle.PicklingError)):
            spawned.start()
        tracker.stop()


@pytest.mark.spec("LIFE-21")
def test_a_server_that_forks_its_workers_beforehand(path: Path) -> None:
    """The workers ask the parent, which tracks, for each mark; their own copy refuses."""
    with qcow2bm.open(path, "r+") as image:
        tracker = image.track()
        forking = multiprocessing.get_context("fork")
        requests: multiprocessing.Queue[int | None] = forking.Queue()
        marked = forking.Semaphore(0)

        def serve(number: int) -> None:
            with pytest.raises(qcow2bm.StateError, match="forked"):
                tracker.mark(number << 20, 1)
            requests.put(number << 20)
            assert marked.acquire(timeout=60)  # only now the write may be acknowledged
            requests.put(None)

        workers = [forking.Process(target=serve, args=(number,)) for number in range(4)]
        for worker in workers:
            worker.start()
        ended = 0
        while ended < len(workers):
            start = requests.get(timeout=60)
            if start is None:
                ended += 1
            else:
                tracker.mark(start, 1)
                marked.release()
        for worker in workers:
            worker.join()
            assert worker.exitcode == 0
        tracker.stop()
    assert dirty(path) == [0, 16, 32, 48]
