"""Hazards that could make a bitmap valid although it misses a mark; none of them may succeed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import pytest
from support.faulty_storage import FaultyStorage
from support.images import Stored, build_image

import qcow2bm
from qcow2bm.tracker import fanout
from qcow2bm.tracker.tracker import Tracker

if TYPE_CHECKING:
    from typing_extensions import Buffer

GRANULE = 4096
SIZE = 64 << 20


def image(*names: bytes) -> bytearray:
    """Enabled bitmaps, and the disabled one "off"."""
    off = Stored(b"off", granularity_bits=12, flags=0)
    return build_image(*(Stored(n, granularity_bits=12) for n in names), off, size=SIZE).data


def dirty(data: bytearray, name: str) -> set[int]:
    with qcow2bm.open(data) as opened:
        return {
            granule
            for rows in opened.bitmaps[name].extents()
            for start, length in rows.tolist()
            for granule in range(start // GRANULE, -(-(start + length) // GRANULE))
        }


class Hooked(FaultyStorage):
    """Calls something whenever a barrier is asked for."""

    hook: Callable[[], None] = staticmethod(lambda: None)

    def barrier(self) -> None:
        self.hook()
        super().barrier()

    def write(self, offset: int, parts: Sequence[Buffer]) -> None:
        super().write(offset, parts)


@pytest.mark.parametrize("names", [(b"a",), (b"a", b"b")])
def test_a_merge_takes_what_was_marked_a_moment_ago(names: tuple[bytes, ...]) -> None:
    data = image(*names)
    with qcow2bm.open(data, "r+") as opened, opened.track() as tracker:
        tracker.mark(5 * GRANULE, 1)
        with tracker.edit() as edit:
            edit.merge("off", "a")
    assert dirty(data, "off") == {5}


@pytest.mark.spec("TRACK-14")
@pytest.mark.parametrize("names", [(b"a",), (b"a", b"b")])
def test_what_is_marked_during_a_commit_is_in_the_bitmap_that_begins(
    names: tuple[bytes, ...],
) -> None:
    storage = Hooked(image(*names))
    with qcow2bm.open(storage, "r+") as opened, opened.track() as tracker:
        tracker.mark(5 * GRANULE, 1)
        storage.hook = lambda: tracker.mark(7 * GRANULE, 1)
        with tracker.edit() as edit:
            edit.disable("a")
            edit.add("new", GRANULE)
            edit.merge("new", "off")
            edit.enable("off")
        storage.hook = lambda: None
    assert dirty(storage.data, "a") == {5}
    assert dirty(storage.data, "new") == {7}
    assert dirty(storage.data, "off") == {7}


@pytest.mark.parametrize("number", range(20))
def test_marks_while_one_of_two_bitmaps_goes(number: int) -> None:
    """If one of two bitmaps is removed while marks come in, the other bitmap must miss no mark."""
    data = image(b"a", b"b")
    marked: list[int] = []
    is_over = threading.Event()

    def write() -> None:
        granule = number
        while not is_over.is_set():
            granule = (granule + 1) % (SIZE // GRANULE)
            tracker.mark(granule * GRANULE, 1)
            marked.append(granule)

    with qcow2bm.open(data, "r+") as opened, opened.track() as tracker:
        thread = threading.Thread(target=write)
        thread.start()
        with tracker.edit() as edit:
            edit.remove("a")
        is_over.set()
        thread.join()
    assert dirty(data, "b") == set(marked)


def test_nothing_else_is_done_inside_an_edit() -> None:
    data = image(b"a")
    with qcow2bm.open(data, "r+") as opened, opened.track() as tracker:
        tracker.mark(5 * GRANULE, 1)
        with tracker.edit() as edit:
            edit.add("new")
            others: tuple[Callable[[], object], ...] = (
                tracker.stop,
                tracker.flush,
                lambda: tracker.rotate("a", "b"),
                lambda: edit_again(tracker),
                lambda: tracker.pending,
            )
            for other in others:
                with pytest.raises(qcow2bm.StateError, match="being edited"):
                    other()
        with pytest.raises(qcow2bm.StateError, match="not going on"):
            edit.remove("a")
        with pytest.raises(qcow2bm.StateError, match="finished"), edit:
            pytest.fail("was entered twice")
    assert dirty(data, "a") == {5}


@pytest.mark.parametrize("names", [(b"a",), (b"a", b"b")])
def test_what_begins_and_ends_in_one_edit_has_what_was_merged(names: tuple[bytes, ...]) -> None:
    data = image(*names)
    with qcow2bm.open(data, "r+") as opened, opened.track() as tracker:
        tracker.mark(5 * GRANULE, 1)
        with tracker.edit() as edit:
            edit.add("new", GRANULE)
            edit.merge("new", "a")
            edit.add("next", GRANULE)
            edit.merge("next", "new")
            edit.disable("new")
            edit.add("gone", GRANULE)
            edit.merge("gone", "a")
            edit.remove("gone")
            edit.add("gone", GRANULE)
        tracker.mark(7 * GRANULE, 1)
    assert dirty(data, "new") == {5}
    assert dirty(data, "next") == {5, 7}
    assert dirty(data, "gone") == {7}


@pytest.mark.parametrize("names", [(b"a",), (b"a", b"b")])
def test_what_is_merged_into_before_it_begins(names: tuple[bytes, ...]) -> None:
    """A merge into a bitmap before it is tracked must survive every later flush."""
    data = image(*names)
    with qcow2bm.open(data, "r+") as opened, opened.track() as tracker:
        tracker.mark(5 * GRANULE, 1)
        with tracker.edit() as edit:
            edit.merge("off", "a")
            edit.enable("off")
            edit.add("new", GRANULE, enabled=False)
            edit.merge("new", "off")
            edit.enable("new")
            edit.disable("new")
            edit.enable("new")
        tracker.mark(7 * GRANULE, 1)
    assert (dirty(data, "off"), dirty(data, "new")) == ({5, 7}, {5, 7})


def test_what_an_edit_has_ended_is_left_alone_by_it() -> None:
    with qcow2bm.open(image(b"a"), "r+") as opened, opened.track() as tracker:
        with tracker.edit() as edit:
            edit.disable("a")
            changes: tuple[Callable[[], object], ...] = (
                lambda: edit.enable("a"),
                lambda: edit.merge("a", "off"),
                lambda: edit.merge("off", "a"),
                lambda: edit.remove("a"),
            )
            for change in changes:
                with pytest.raises(qcow2bm.BitmapError, match="ended by this edit"):
                    change()
        assert tracker.names == []


@pytest.mark.spec("TRACK-6")
def test_inside_a_write_nothing_is_waited_for() -> None:
    with qcow2bm.open(image(b"a"), "r+") as opened, opened.track() as tracker:
        with tracker.writing(0, 1), tracker.writing(GRANULE, 1):
            for other in (tracker.stop, tracker.flush, lambda: tracker.rotate("a", "b")):
                with pytest.raises(qcow2bm.StateError, match="inside a write"):
                    other()
        tracker.flush()


def test_a_write_may_end_in_another_thread() -> None:
    with qcow2bm.open(image(b"a"), "r+") as opened, opened.track() as tracker:
        writing = tracker.writing(0, 1)
        writing.__enter__()
        thread = threading.Thread(target=writing.__exit__, args=(None, None, None))
        thread.start()
        thread.join()
        assert tracker.flush().pieces == 1


def test_a_group_does_not_wait_for_its_own_thread() -> None:
    with qcow2bm.open(image(b"a"), "r+") as opened, opened.track() as tracker:
        group = qcow2bm.TrackerGroup({"disk": tracker})
        with tracker.writing(0, 1), pytest.raises(qcow2bm.StateError, match="inside a write"):
            group.stop()
        with tracker.edit(), pytest.raises(qcow2bm.StateError, match="being edited"):
            group.stop()


def edit_again(tracker: Tracker) -> None:
    with tracker.edit():
        pytest.fail("was let in")


def interrupted(tracker: Tracker, call: Callable[[], object]) -> None:
    """Ctrl-C came in the middle: if the program goes on and stops, no bitmap becomes valid."""
    with pytest.raises(KeyboardInterrupt):
        call()
    if tracker.state == "tracking":
        tracker.stop()
    else:
        with pytest.raises(qcow2bm.StateError, match="failed"):
            tracker.stop()


@pytest.mark.parametrize("where", ["coarsen", "_add_pieces", "_set"])
@pytest.mark.parametrize("what", ["flush", "stop", "rotate", "pending"])
def test_an_interrupt_loses_no_mark(where: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = image(b"a", b"b")
    with qcow2bm.open(data, "r+") as opened:
        tracker = opened.track()
        tracker.mark(5 * GRANULE, 1)
        real = getattr(fanout, where)
        is_armed = [True]

        def interrupt(*arguments: object) -> object:
            if is_armed.pop():
                raise KeyboardInterrupt
            return real(*arguments)

        def interrupt_once(*arguments: object) -> object:
            return interrupt(*arguments) if is_armed else real(*arguments)

        monkeypatch.setattr(fanout, where, interrupt_once)
        calls: dict[str, Callable[[], object]] = {
            "flush": tracker.flush,
            "stop": tracker.stop,
            "rotate": lambda: tracker.rotate("a", "c"),
            "pending": lambda: tracker.pending,
        }
        interrupted(tracker, calls[what])
        monkeypatch.undo()
    with qcow2bm.open(data) as found:
        for name in ("a", "b"):
            if found.bitmaps[name].status == "valid":
                assert dirty(data, name) == {5}


def test_a_closed_image_is_written_to_no_more() -> None:
    storage = FaultyStorage(image(b"a"))
    opened = qcow2bm.open(storage, "r+")
    tracker = opened.track()
    tracker.mark(0, 1)
    opened.close()
    before = bytes(storage.data)
    for call in (tracker.stop, tracker.flush, lambda: tracker.mark(0, 1)):
        with pytest.raises(qcow2bm.StateError, match="abandoned"):
            call()
    assert storage.data == before


def test_a_block_whose_tracking_has_failed_does_not_end_quietly() -> None:
    storage = Hooked(image(b"a"))

    def fail() -> None:
        raise qcow2bm.StorageError("<hooked>", 0, 0, "is gone")

    def work() -> None:
        with opened.track() as tracker:
            tracker.mark(0, 1)
            storage.hook = fail
            with pytest.raises(qcow2bm.CommitError, match="stay in use"):
                tracker.flush()

    with qcow2bm.open(storage, "r+") as opened, pytest.raises(qcow2bm.StateError, match="failed"):
        work()


@pytest.mark.spec("TRACK-10")
def test_with_clusters_reserved_no_stop_needs_new_ones() -> None:
    data = image(b"a", b"b")
    with qcow2bm.open(data, "r+") as opened:
        tracker = opened.track(reserve=True)
        tracker.mark(5 * GRANULE, 1)
        assert tracker.stop().barriers == 2
        assert opened.bitmaps["a"].clusters == (0, 0, 4)
        tracker = opened.track(reserve=True)
        tracker.rotate("a", "c")
        tracker.mark(7 * GRANULE, 1)
        assert tracker.stop().barriers == 2
        assert opened.problems == ()
    assert (dirty(data, "a"), dirty(data, "b"), dirty(data, "c")) == ({5}, {5, 7}, {7})
