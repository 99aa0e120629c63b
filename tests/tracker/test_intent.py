"""Tracking with intent: when a write may begin, what is taken out, recovered and refused."""

from __future__ import annotations

import asyncio
import gc
import os
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import cycle
from pathlib import Path
from threading import Barrier, Event, Thread
from typing import TYPE_CHECKING
from uuid import UUID

import numpy as np
import pytest
from support.faulty_storage import Fault, FaultyStorage
from support.images import Stored, build_image
from support.recording import RecordingStorage

import qcow2bm
from qcow2bm.api import recover
from qcow2bm.migration.intent import is_intent

if TYPE_CHECKING:
    from typing_extensions import Buffer

MIB = 1 << 20
SIZE = 1024 * MIB
GRANULARITY = 64 << 10


def image() -> bytearray:
    return build_image(
        Stored(b"a", granularity_bits=16), Stored(b"b", granularity_bits=20), size=SIZE
    ).data


class Slow(RecordingStorage):
    """A storage whose barriers wait, and can fail."""

    def __init__(self, data: bytearray) -> None:
        super().__init__(data)
        self.may_go = Event()
        self.may_go.set()
        self.error: Exception | None = None
        self.barriers_left = 1 << 30  # and then so many fail
        self.barriers_fail = 1 << 30

    def barrier(self) -> None:
        self.may_go.wait(60)
        self.barriers_left -= 1
        if self.barriers_left < 0 and self.barriers_fail:
            self.barriers_fail -= 1
            raise qcow2bm.StorageError(self.name, 0, 0, "no", action="writing")
        if self.error:
            raise self.error
        super().barrier()


class Capped(RecordingStorage):
    """A storage that has room for so many bytes."""

    most: int | None = None

    def capacity(self) -> int | None:
        return self.most


def crashed(data: bytes | bytearray) -> bytearray:
    """The image as it is, with the bitmaps of a tracker that is gone."""
    return bytearray(data)


def dirty(data: bytearray, name: str) -> set[int]:
    """The dirty granules of a bitmap that is valid."""
    with qcow2bm.open(data) as opened:
        bits = np.unpackbits(opened.bitmaps[name].packed(), bitorder="little")
        return set(np.flatnonzero(bits).tolist())


def regions(opened: qcow2bm.Image) -> set[int]:
    """The regions of the intent bitmap as it is on disk."""
    (name,) = [n for n, b in opened.bitmaps.items() if is_intent(n) and b.auto]
    bits = np.unpackbits(opened.bitmaps[name].packed(), bitorder="little")
    return set(np.flatnonzero(bits).tolist())


def recovered(data: bytearray) -> bytearray:
    with qcow2bm.open(data, "r+") as opened:
        assert {*opened.recoverable} == {"a", "b"}
        assert {*opened.recover().names} == {"a", "b"}
        assert not any(map(is_intent, opened.bitmaps))
        assert {bitmap.status for bitmap in opened.bitmaps.values()} == {"valid"}
    return data


@pytest.mark.spec("INTENT-1", "INV-INTENT")
@pytest.mark.parametrize("way", ["writing", "mark", "mark_many", "asyncio"])
def test_a_write_waits_for_the_barrier(way: str) -> None:
    storage = Slow(image())
    begun = Event()

    async def write_in_a_task(tracker: qcow2bm.Tracker) -> None:
        async with tracker.async_writing(700 * MIB, 1):
            begun.set()

    def write() -> None:
        if way == "writing":
            with tracker.writing(700 * MIB, 1):
                begun.set()
        elif way == "mark":
            tracker.mark(700 * MIB, 1)
        elif way == "mark_many":
            tracker.mark_many(np.array([(700 * MIB, 1), (300 * MIB, 4)]))
        else:
            asyncio.run(write_in_a_task(tracker))
        begun.set()

    with qcow2bm.open(storage, "r+") as opened, opened.track(intent=True) as tracker:
        storage.may_go.clear()
        thread = Thread(target=write)
        thread.start()
        assert not begun.wait(0.05)
        storage.may_go.set()
        thread.join()
        assert begun.is_set()
        with tracker.writing(700 * MIB, 2):  # of the same region, which is durable
            pass
        assert tracker.intent
        assert tracker.intent == qcow2bm.IntentReport(waits=1, barriers=1) or way == "mark_many"
        lost = recovered(crashed(storage.data))
    assert {700 * 16} <= dirty(lost, "a")
    assert dirty(lost, "b") >= {700}


@pytest.mark.spec("INTENT-2")
def test_writers_that_wait_share_one_barrier() -> None:
    storage = Slow(image())
    with qcow2bm.open(storage, "r+") as opened, opened.track(intent=True) as tracker:
        storage.may_go.clear()
        tracker_waits = Barrier(33)

        def write(number: int) -> None:
            tracker_waits.wait()
            with tracker.writing(30 * number * MIB, 1):
                pass

        threads = [Thread(target=write, args=(number,)) for number in range(32)]
        for thread in threads:
            thread.start()
        tracker_waits.wait()
        while (tracker.intent or (0, 0))[0] < 31:  # one region may be set from the beginning
            pass
        storage.may_go.set()
        for thread in threads:
            thread.join()
        assert tracker.intent
        assert tracker.intent.barriers <= 3


@pytest.mark.spec("INTENT-2")
def test_who_writes_in_sequence_waits_seldom() -> None:
    with qcow2bm.open(image(), "r+") as opened, opened.track(intent=True) as tracker:
        for start in range(0, SIZE, MIB // 4):
            with tracker.writing(start, MIB // 4):
                pass
        assert tracker.intent
        assert tracker.intent.waits <= 12


@pytest.mark.spec("INTENT-1")
def test_what_is_durable_in_the_bitmaps_needs_no_intent() -> None:
    with qcow2bm.open(image(), "r+") as opened, opened.track(intent=True) as tracker:
        for start in range(0, 200 * MIB, MIB):
            with tracker.writing(start, GRANULARITY):
                pass
        for _ in range(100):  # what is stored ahead may just have been stored
            tracker.flush()
            if not regions(opened):
                break
        assert regions(opened) == set()
        before = tracker.intent
        for start in range(0, 200 * MIB, MIB):
            with tracker.writing(start + 512, 4096):
                pass
        assert tracker.intent == before
        with tracker.writing(5 * MIB + GRANULARITY, 1):  # another granule of a region taken out
            pass
        assert tracker.intent != before
        assert regions(opened) == {5}


@pytest.mark.spec("INTENT-3")
def test_regions_are_taken_out_once_they_are_stored() -> None:
    data = image()
    with qcow2bm.open(data, "r+") as opened, opened.track(intent=True) as tracker:
        with tracker.writing(10 * MIB, 1):
            pass
        tracker.flush()
        assert 10 in regions(opened)
        tracker.flush()
        assert 10 not in regions(opened)
        with tracker.writing(20 * MIB, 1):
            pass
        lost = recovered(crashed(data))
    assert dirty(lost, "a") == {10 * 16, *range(20 * 16, 21 * 16)}


@pytest.mark.spec("INTENT-4")
def test_an_edit_loses_nothing_that_was_merged() -> None:
    data = image()
    with qcow2bm.open(data, "r+") as opened:
        with opened.edit() as edit:
            edit.add("off", GRANULARITY, enabled=False)
            edit.set("off", 400 * MIB, MIB)
        tracker = opened.track(intent=True)
        with tracker.edit() as changes:
            changes.merge("a", "off")
            changes.remove("off")
        lost = recovered(crashed(data))
        tracker.abandon()
    assert {*range(400 * 16, 401 * 16)} <= dirty(lost, "a")


@pytest.mark.spec("INTENT-4")
def test_after_a_migration_all_of_it_counts_until_it_is_stored(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(image())
    with qcow2bm.open(path, "r+") as opened, opened.track(intent=True) as tracker:
        with tracker.writing(10 * MIB, 1):
            pass
        tracker.inactivate()
        tracker.activate()
        lost = recovered(crashed(path.read_bytes()))
        assert dirty(lost, "a") == {*range(SIZE // GRANULARITY)}
        for _ in range(3):
            tracker.flush()
        with tracker.writing(20 * MIB, 1):
            pass
        lost = recovered(crashed(path.read_bytes()))
        assert dirty(lost, "a") == {10 * 16, *range(20 * 16, 21 * 16)}
    with qcow2bm.open(path) as again:
        assert [*again.bitmaps] == ["a", "b"]
        assert again.bitmaps["a"].count() == 2 * GRANULARITY


@pytest.mark.spec("INTENT-1")
def test_a_bit_that_cannot_be_stored_ends_tracking() -> None:
    storage = Slow(image())
    with qcow2bm.open(storage, "r+") as opened:
        tracker = opened.track(intent=True)
        storage.error = qcow2bm.StorageError("disk", 0, 0, "no")
        with pytest.raises(qcow2bm.StateError, match="failed"), tracker.writing(MIB, 1):
            pass
        while tracker.state == "tracking":
            pass
        assert tracker.state == "failed"
        storage.error = None


@pytest.mark.spec("INTENT-1")
def test_a_write_that_waits_does_not_outlive_the_tracker() -> None:
    storage = Slow(image())
    with qcow2bm.open(storage, "r+") as opened:
        tracker = opened.track(intent=True)
        storage.may_go.clear()
        errors: list[Exception] = []

        def write() -> None:
            try:
                with tracker.writing(MIB, 1):
                    pass
            except qcow2bm.StateError as error:
                errors.append(error)

        thread = Thread(target=write)
        thread.start()
        while not tracker.intent or not tracker.intent.waits:
            pass
        ending = Thread(target=tracker.abandon)
        ending.start()
        thread.join()
        storage.may_go.set()
        ending.join()
        assert len(errors) == 1


@pytest.mark.spec("INTENT-3")
def test_a_limited_flush_takes_out_regions_if_it_stores_all() -> None:
    with qcow2bm.open(image(), "r+") as opened, opened.track(intent=True) as tracker:
        for start in range(0, 100 * MIB, 2 * MIB):
            tracker.mark(start, 1)
        tracker.flush(max_bytes=1)
        assert len(regions(opened)) == 50
        for _ in range(3):
            tracker.flush(max_bytes=1 << 30)
        assert regions(opened) == set()


@pytest.mark.spec("INTENT-5")
def test_where_all_bitmaps_are_valid_there_is_nothing_to_recover() -> None:
    data = image()
    before = bytes(data)
    with qcow2bm.open(data, "r+") as opened:
        assert opened.recover().names == ()
        with pytest.raises(qcow2bm.IntentError, match="there is no intent bitmap"):
            opened.recover(["a"])
    assert data == before


LATER = 500 * MIB
"""Where the guest writes after tracking has ended."""


def abandoned(opened: qcow2bm.Image) -> None:
    opened.track(intent=True).abandon()


def failed(opened: qcow2bm.Image) -> None:
    tracker = opened.track(intent=True)
    tracker._session.fail(OSError("no space left"))


def left_by_an_exception(opened: qcow2bm.Image) -> qcow2bm.Tracker:
    with suppress(ZeroDivisionError), opened.track(intent=True) as tracker:
        raise ZeroDivisionError
    return tracker


def interrupted_while_it_stores(opened: qcow2bm.Image) -> qcow2bm.Tracker:
    tracker = opened.track(intent=True)
    tracker._session.fail(KeyboardInterrupt())
    return tracker


def closed(opened: qcow2bm.Image) -> None:
    opened.track(intent=True)
    opened.close()


@pytest.mark.spec("INTENT-9")
@pytest.mark.parametrize(
    ("end", "is_recoverable"),
    [
        (abandoned, False),
        (failed, False),
        (left_by_an_exception, True),
        (interrupted_while_it_stores, True),
        (closed, True),
    ],
)
def test_a_program_that_may_go_on_without_tracking(
    end: Callable[[qcow2bm.Image], object], is_recoverable: bool
) -> None:
    """Then the bitmaps miss its writes, and nothing makes them valid again."""
    data = image()
    with qcow2bm.open(data, "r+") as opened:
        end(opened)
    with qcow2bm.open(data, "r+") as opened:
        assert {opened.bitmaps[name].status for name in "ab"} == {"inconsistent"}
        assert opened.recoverable == (("a", "b") if is_recoverable else ())
        if not is_recoverable:
            with pytest.raises(qcow2bm.BitmapError, match="no bitmap of the image is valid"):
                opened.track()


def session(storage: FaultyStorage) -> str:
    """Tracks until a call of the storage fails; returns at which step, or "end"."""
    step = "open"
    try:
        with qcow2bm.open(storage, "r+") as opened:
            step = "track"
            tracker = opened.track(intent=True)
            step = "go on"
            try:
                with tracker.writing(10 * MIB, 1):
                    pass
                tracker.flush()
                tracker.rotate("a", "c")
                with tracker.writing(20 * MIB, 1):
                    pass
                with tracker.edit() as edit:
                    edit.add("d", GRANULARITY)
                tracker.flush()
                tracker.mark(LATER, 1)
                step = "give away"
                tracker.inactivate()
                tracker.activate()
                step = "go on"
                tracker.flush()
                step = "stop"
                tracker.stop()
                step = "end"
            finally:
                if step != "end":  # the program knows, and goes on without tracking
                    tracker.abandon()
    except qcow2bm.Qcow2BmError:
        return step
    return step


@pytest.mark.spec("INTENT-9")
def test_every_call_that_fails() -> None:
    """The guest goes on without tracking: nothing makes a bitmap valid that misses its writes."""
    steps: Counter[str] = Counter()
    for number in range(0, 2000, 2):
        storage = FaultyStorage(image(), Fault(number))
        step = session(storage)
        if not storage.was_hit:
            break
        steps[step] += 1
        with qcow2bm.open(bytearray(storage.data), "r+") as opened:
            assert opened.recoverable == (), (number, step)
            valid = {n for n, b in opened.bitmaps.items() if b.status == "valid" and b.auto}
            if step == "go on":
                assert not valid, number  # "a" is disabled once it is rotated away
            if step in ("stop", "give away"):  # where they are valid, all is stored
                granule = LATER // MIB
                assert all(
                    opened.bitmaps[name].packed()[granule // 8] >> granule % 8 & 1
                    for name in valid & {"b"}
                )
    print(f"calls that failed: {dict(steps)}")
    assert steps["track"] > 10
    assert steps["go on"] > 30
    assert steps["stop"] > 1


@pytest.mark.spec("INTENT-9")
@pytest.mark.parametrize("end", [left_by_an_exception, interrupted_while_it_stores])
def test_abandoning_after_the_end(end: Callable[[qcow2bm.Image], qcow2bm.Tracker]) -> None:
    """A program that goes on without tracking may say so when tracking has ended already."""
    storage = Slow(image())
    with qcow2bm.open(storage, "r+") as opened:
        tracker = end(opened)
        assert opened.recoverable == ("a", "b")
        tracker.abandon()
        with qcow2bm.open(bytearray(storage.data)) as again:
            assert again.recoverable == ()
        writes = len(storage.steps)
        tracker.abandon()
        assert len(storage.steps) == writes


@pytest.mark.spec("INTENT-9")
def test_abandoning_when_the_image_is_closed_already() -> None:
    data = image()
    with qcow2bm.open(data, "r+") as opened:
        tracker = opened.track(intent=True)
        tracker.mark(0, 1)
    with pytest.raises(qcow2bm.StateError, match="invalidate"):
        tracker.abandon()
    with qcow2bm.open(data) as again:
        assert again.recoverable == ("a", "b")


@pytest.mark.spec("INTENT-9")
def test_abandoning_again_when_the_image_is_given_away() -> None:
    data = image()
    with qcow2bm.open(data, "r+") as opened, opened.track(intent=True) as tracker:
        tracker.inactivate()
        before = bytes(data)
        tracker.abandon()
        tracker.abandon()
    tracker.abandon()
    assert data == before


@pytest.mark.spec("INTENT-9")
def test_abandoning_leaves_the_intent_of_the_next_tracker_alone() -> None:
    data = image()
    with qcow2bm.open(data, "r+") as opened:
        first = opened.track(intent=True)
        with suppress(ZeroDivisionError), first:
            raise ZeroDivisionError
        second = opened.track(intent=True)
        second.mark(5 * MIB, 1)
        first.abandon()
        assert dirty(recovered(crashed(data)), "a") >= {5 * 16}
        second.stop()


@pytest.mark.spec("INTENT-9")
@pytest.mark.parametrize("what", ["mark", "flush", "abandon"])
def test_distrust_is_durable_after_a_barrier_that_failed(what: str) -> None:
    class Durable(Slow):
        durable = b""

        def barrier(self) -> None:
            super().barrier()
            self.durable = bytes(self.data)

    storage = Durable(image())
    with qcow2bm.open(storage, "r+") as opened:
        tracker = opened.track(intent=True)
        tracker.mark(0, 1)
        if what != "abandon":
            storage.barriers_left = 0
            storage.barriers_fail = 1
            with pytest.raises(qcow2bm.Qcow2BmError):
                tracker.mark(100 * MIB, 1) if what == "mark" else tracker.flush()
            while tracker.state == "tracking":
                pass
        tracker.abandon()
    with qcow2bm.open(bytearray(storage.durable)) as again:
        assert again.recoverable == ()
        assert again.bitmaps["a"].status == "inconsistent"


@pytest.mark.spec("INTENT-9", "TRACK-12")
def test_an_interrupt_while_a_failure_is_handled() -> None:
    """A disk fails and then hangs: the user presses Ctrl-C, and nothing may be stored any more."""

    class Hanging(Slow):
        is_failing = is_hanging = False

        def write(self, offset: int, parts: Sequence[Buffer]) -> None:
            if self.is_failing:
                self.is_failing, self.is_hanging = False, True
                raise qcow2bm.StorageError(self.name, offset, 0, "no", action="writing")
            super().write(offset, parts)

        def barrier(self) -> None:
            if self.is_hanging:
                self.is_hanging = False
                raise KeyboardInterrupt
            super().barrier()

    storage = Hanging(image())
    with qcow2bm.open(storage, "r+") as opened:
        with pytest.raises(KeyboardInterrupt), opened.track(intent=True) as tracker:  # noqa: PT012
            tracker.mark(10 * MIB, 1)
            tracker.flush()
            tracker.mark(300 * MIB, 1)
            storage.is_failing = True
            tracker.flush()
        assert tracker.state == "failed"
        assert {opened.bitmaps[name].status for name in "ab"} == {"inconsistent"}


@pytest.mark.spec("INTENT-9")
def test_a_migration_that_carries_a_bitmap_and_is_given_up() -> None:
    """What the migration carries is in_use in the image, and nobody records it there."""
    data = image()
    with qcow2bm.open(data, "r+") as opened:
        tracker = opened.track(intent=True)
        with tracker.writing(10 * MIB, 1):
            pass
        tracker.begin_migration(carried=["a"])
        with qcow2bm.open(crashed(data)) as again:
            assert again.recoverable == ("a", "b")
        tracker.inactivate()
        tracker.abandon()
    with qcow2bm.open(data) as again:
        assert again.recoverable == ()
        assert [again.bitmaps[name].status for name in "ab"] == ["inconsistent", "valid"]


@pytest.mark.spec("INTENT-9")
def test_tracking_without_intent_that_does_not_begin_beside_an_old_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def edit(*arguments: object, **options: object) -> None:
        raise qcow2bm.NoRoomError("disk", 512, 512, 0)

    data = image()
    with qcow2bm.open(data, "r+") as opened:
        tracker = opened.track(intent=True)
        tracker.mark(0, 1)
        monkeypatch.setattr(recover, "Edit", edit)  # so that the intent bitmap stays
        tracker.stop()
    steps = Counter[str]()
    for number in range(1000):
        faulty = FaultyStorage(bytearray(data), Fault(number))
        with suppress(qcow2bm.Qcow2BmError), qcow2bm.open(faulty, "r+") as opened:
            opened.track().abandon()
        if not faulty.was_hit:
            break
        with qcow2bm.open(bytearray(faulty.data)) as again:
            assert again.recoverable == ()
            steps[again.bitmaps["a"].status] += 1
    assert steps["valid"] > 10
    assert steps["inconsistent"] > 2


@pytest.mark.parametrize(("size", "cluster_bits"), [(1 << 50, 16), (3 << 50, 21)])
def test_a_disk_that_is_too_large(size: int, cluster_bits: int) -> None:
    data = build_image(Stored(b"a", granularity_bits=31), size=size, cluster_bits=cluster_bits).data
    before = bytes(data)
    with qcow2bm.open(data, "r+") as opened, pytest.raises(qcow2bm.LimitError, match="intent"):
        opened.track(intent=True)
    assert data == before


@pytest.mark.spec("INTENT-9")
def test_tracking_that_does_not_begin() -> None:
    """Its bitmaps may be in_use already, and the program may go on without tracking."""
    seen = set()
    for number in range(10):
        storage = Slow(image())
        with qcow2bm.open(storage, "r+") as opened:
            storage.barriers_left = number
            try:
                opened.track(intent=True)
            except qcow2bm.CommitError:
                with qcow2bm.open(bytearray(storage.data)) as again:
                    seen.add(again.bitmaps["a"].status)
                    assert again.recoverable == ()
            else:
                break
    assert seen == {"valid", "inconsistent"}


@pytest.mark.spec("INTENT-1")
def test_a_mark_that_waits_while_the_image_is_given_away() -> None:
    """It is in no `writing`, which the rules forbid; but it must not wait for ever."""
    storage = Slow(image())
    with qcow2bm.open(storage, "r+") as opened, opened.track(intent=True) as tracker:
        storage.may_go.clear()
        errors: list[Exception] = []

        def mark() -> None:
            try:
                tracker.mark(700 * MIB, 1)
            except qcow2bm.StateError as error:
                errors.append(error)

        thread = Thread(target=mark)
        thread.start()
        while not tracker.intent or not tracker.intent.waits:
            pass
        giving = Thread(target=tracker.inactivate)
        giving.start()
        thread.join(0.1)
        storage.may_go.set()
        giving.join()
        thread.join()
        tracker.activate()
        with tracker.writing(700 * MIB, 1):
            pass


@pytest.mark.spec("INTENT-4")
def test_an_image_that_comes_back_stale(tmp_path: Path) -> None:
    """There is nothing left to be tracked, and nothing that a crash could cost."""
    path = tmp_path / "disk.qcow2"
    path.write_bytes(image())
    with qcow2bm.open(path, "r+") as opened, opened.track(intent=True) as tracker:
        tracker.inactivate()
        data = bytearray(path.read_bytes())
        stale(data)
        path.write_bytes(data)
        assert tracker.activate().outcome == "changed"
        assert tracker.names == []
        with tracker.writing(5 * MIB, 1):
            pass
        for _ in range(3):
            tracker.flush()
    with qcow2bm.open(path) as again:
        assert {again.bitmap(number).status for number in range(2)} == {"stale"}
        assert {found.severity for found in again.check().problems} == {"leak"}  # what is stale


def test_a_tracker_that_is_dropped_leaves_no_lock(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(image())

    def track() -> None:
        tracker = qcow2bm.open(path, "r+").track(intent=True)
        tracker.mark(0, 1)
        tracker.mark(700 * MIB, 1)

    track()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()
    qcow2bm.open(path, "r+").close()


def test_operations_on_a_file_while_the_guest_writes(tmp_path: Path) -> None:
    """The bits of the intent bitmap are written while the metadata are read."""
    path = tmp_path / "disk.qcow2"
    path.write_bytes(image())
    with qcow2bm.open(path, "r+") as opened, opened.track(intent=True) as tracker:
        is_over = Event()

        def write(number: int) -> None:
            for place in cycle(range(number, 1024, 7)):
                with tracker.writing(place * MIB, 1):
                    pass
                if is_over.is_set():
                    return

        threads = [Thread(target=write, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        try:
            for number in range(12):
                tracker.rotate(next(name for name in tracker.names if name != "b"), f"r{number}")
                with tracker.edit() as edit:
                    edit.add(f"e{number}", GRANULARITY)
                    edit.disable(f"e{number}")
                tracker.flush()
                tracker.begin_migration()
                tracker.cancel_migration()
        finally:
            is_over.set()
            for thread in threads:
                thread.join()
    assert tracker.state == "stopped"


def test_many_marks_of_a_list() -> None:
    with qcow2bm.open(image(), "r+") as opened, opened.track(intent=True) as tracker:
        tracker.mark_many([(0, 1), (700 * MIB, 1)])  # type: ignore[arg-type]
        assert 700 in regions(opened)


@pytest.mark.spec("INTENT-7")
@pytest.mark.parametrize("intent", [False, True])
def test_without_room_nothing_is_lost(intent: bool) -> None:
    """A disk is full on which a crash left bitmaps in use: they can be recovered later."""
    storage = Capped(image())
    with qcow2bm.open(storage, "r+") as opened:
        tracker = opened.track(intent=True)
        for place in range(0, SIZE, 100 * MIB):
            tracker.mark(place, 1)
    storage.most = len(storage.data)
    before = bytes(storage.data)
    with qcow2bm.open(storage, "r+") as opened, pytest.raises(qcow2bm.NoRoomError):
        opened.track(intent=intent)
    assert storage.data == before
    storage.most = None
    with qcow2bm.open(storage, "r+") as opened:
        assert {*opened.recover().names} == {"a", "b"}


def spoiled(change: Callable[[bytearray], None]) -> tuple[str, ...]:
    """What can be recovered of an image that has crashed and been changed."""
    data = image()
    with qcow2bm.open(data, "r+") as opened:
        opened.track(intent=True)
        lost = crashed(data)
    change(lost)
    with qcow2bm.open(lost) as again:
        found = again.recoverable
        if not found:
            with pytest.raises(qcow2bm.IntentError, match="cannot be recovered"):
                again.recover(dry_run=True)
    return found


def edited(operate: Callable[[qcow2bm.Edit, list[str]], None]) -> Callable[[bytearray], None]:
    def change(data: bytearray) -> None:
        with qcow2bm.open(data, "r+") as opened, opened.edit() as edit:
            operate(edit, sorted(filter(is_intent, edit.names)))

    return change


def stale(data: bytearray) -> None:
    data[95] &= ~1


def cleared(edit: qcow2bm.Edit, names: list[str]) -> None:
    for name in names:
        edit.clear(name)


def tracked_by_another(data: bytearray) -> None:
    """Without intent, and killed; the intent bitmap records, so it is tracked, too."""
    with qcow2bm.open(data, "r+") as opened, opened.edit() as edit:
        for name in filter(is_intent, [*edit.names]):
            edit.invalidate(name)


@pytest.mark.spec("INTENT-6", "INTENT-8")
@pytest.mark.parametrize(
    "change",
    [
        stale,
        tracked_by_another,
        edited(cleared),
        edited(lambda edit, names: edit.remove(names[0])),
        edited(lambda edit, names: edit.remove(names[1])),
        edited(lambda edit, names: edit.disable(names[0])),
        edited(lambda edit, names: edit.enable(names[1])),
        edited(lambda edit, names: edit.rename(names[0], "another")),
        edited(lambda edit, names: edit.copy(names[0], f"qcow2bm-intent-{UUID(int=1)}")),
        edited(lambda edit, names: edit.invalidate("a")),
    ],
    ids=[
        "stale", "in_use", "cleared", "no intent", "no canary", "disabled", "enabled", "renamed",
        "several", "invalidated",
    ],
)  # fmt: skip
def test_what_proves_nothing(change: Callable[[bytearray], None]) -> None:
    assert spoiled(lambda data: None) == ("a", "b")
    assert spoiled(change) == ()


@pytest.mark.spec("INTENT-5")
def test_some_of_them_and_others_are_refused() -> None:
    data = image()
    with qcow2bm.open(data, "r+") as opened, opened.edit() as edit:
        edit.add("lost before")
        edit.invalidate("lost before")
    with qcow2bm.open(data, "r+") as opened:
        opened.track(["a", "b"], intent=True)
        lost = crashed(data)
    with qcow2bm.open(lost, "r+") as opened:
        with pytest.raises(qcow2bm.BitmapError, match="does not stand for it"):
            opened.recover(["lost before"])
        assert opened.recover(["b"]).names == ("b",)
        with pytest.raises(qcow2bm.BitmapError, match="it is valid"):
            opened.recover(["b"])
        assert opened.recoverable == ("a",)
        assert opened.recover().names == ("a",)
        assert not any(map(is_intent, opened.bitmaps))
        with pytest.raises(qcow2bm.IntentError, match="there is no intent bitmap"):
            opened.recover()


@pytest.mark.spec("INTENT-7")
@pytest.mark.parametrize("intent", [False, True])
def test_the_next_tracker_recovers(intent: bool) -> None:
    data = image()
    with qcow2bm.open(data, "r+") as opened:
        tracker = opened.track(intent=True)
        with tracker.writing(10 * MIB, 1):
            pass
        lost = crashed(data)
    with qcow2bm.open(lost, "r+") as opened, opened.track(intent=intent) as tracker:
        assert tracker.names == ["a", "b"]
        assert any(map(is_intent, opened.bitmaps)) == intent
    with qcow2bm.open(lost) as opened:
        assert [*opened.bitmaps] == ["a", "b"]
    assert {10 * 16} <= dirty(lost, "a")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_marks_nothing() -> None:
    """Not even what is durable already."""
    with qcow2bm.open(image(), "r+") as opened, opened.track(intent=True) as tracker:
        tracker.mark(0, 1)
        for _ in range(3):
            tracker.flush()
        tracker.mark(0, 1)
        child = os.fork()
        if child == 0:
            try:
                tracker.mark(0, 1)
            except qcow2bm.StateError:
                os._exit(0)
            os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
        tracker.stop()
        with pytest.raises(qcow2bm.StateError):
            tracker.mark(0, 1)


def test_the_largest_intent_bitmap_has_a_cluster() -> None:
    """Its bits would fill a cluster exactly, and all ones would be a table entry without one."""
    data = build_image(Stored(b"a", granularity_bits=26), cluster_bits=16, size=16 << 40).data
    with qcow2bm.open(data, "r+") as opened, opened.track(intent=True) as tracker:
        tracker.inactivate()
        tracker.activate()
        with tracker.writing(0, 16 << 40):
            pass
        tracker.stop()


def test_too_many_bitmaps() -> None:
    names = [f"b{number}" for number in range(73)]
    data = build_image(*(Stored(name.encode(), granularity_bits=20) for name in names), size=SIZE)
    with (
        qcow2bm.open(data.data, "r+") as opened,
        pytest.raises(qcow2bm.LimitError, match="tracked with intent"),
    ):
        opened.track(intent=True)


@pytest.mark.spec("INTENT-7")
@pytest.mark.parametrize("is_stopped", [False, True])
def test_a_group(is_stopped: bool) -> None:
    """Each disk has an intent bitmap of its own."""
    disks = {name: image() for name in ("vda", "vdb")}
    images = {name: qcow2bm.open(data, "r+") for name, data in disks.items()}
    trackers = {name: opened.track(intent=True) for name, opened in images.items()}
    group = qcow2bm.TrackerGroup(trackers)
    for number, tracker in enumerate(trackers.values()):
        with tracker.writing(number * 100 * MIB, 1):
            pass
    if is_stopped:
        assert all(isinstance(report, qcow2bm.StopReport) for report in group.stop().values())
    left = {name: crashed(data) for name, data in disks.items()}
    for opened in images.values():
        opened.close()
    for number, data in enumerate(left.values()):
        with qcow2bm.open(data, "r+") as again:
            assert again.recoverable == (() if is_stopped else ("a", "b"))
            if again.recoverable:
                again.recover()
            assert [*again.bitmaps] == ["a", "b"]
            for bitmap in again.bitmaps.values():
                assert bitmap.status == "valid"
                starts = np.concatenate([*bitmap.extents()])[:, 0]
                assert starts.max() == number * 100 * MIB
