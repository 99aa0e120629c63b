"""The rules of tracking: a refused operation changes nothing, and marks are complete."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.audit import Audit
from support.faulty_storage import FaultyStorage
from support.images import ONES, ZEROES, Stored, build_image

import qcow2bm
from qcow2bm.errors import (
    BitmapError,
    BitmapInconsistentError,
    BitmapNotFoundError,
    FormatError,
    ReadOnlyImageError,
    StateError,
    UnsupportedError,
)
from qcow2bm.format.directory import FLAG_AUTO, FLAG_IN_USE

COVERED = 8 * 512 * 512
SIZE = 4 * COVERED + 1024

DAILY = Stored(b"daily", granularity_bits=9)
WEEKLY = Stored(b"weekly", [b"\x01", b"\x02"], 11)
DISABLED = Stored(b"disabled", granularity_bits=9, flags=0)
CRASHED = Stored(b"crashed", granularity_bits=9, flags=FLAG_AUTO | FLAG_IN_USE)


def image(*bitmaps: Stored, **options: Any) -> bytearray:
    """An image with these bitmaps, or all four."""
    return build_image(*(bitmaps or (DAILY, DISABLED, CRASHED, WEEKLY)), size=SIZE, **options).data


def flags(data: bytearray) -> dict[str, int]:
    """The flags of all bitmaps as they stand there."""
    return {bitmap.name.decode(): bitmap.flags for bitmap in Audit(data).bitmaps}


Tracking = Callable[[qcow2bm.Image], object]


@pytest.mark.spec("INV-AUTO")
@pytest.mark.parametrize(
    ("track", "error", "message"),
    [
        (lambda i: i.track(["disabled"]), BitmapError, "disabled: enable it"),
        (lambda i: i.track(["daily", "disabled"], others="mark-in-use"), BitmapError, "enable it"),
        (lambda i: i.track(["crashed"]), BitmapInconsistentError, "crashed"),
        (lambda i: i.track(["unheard-of"]), BitmapNotFoundError, "unheard-of"),
        (lambda i: i.track(["unheard-of"]), KeyError, "unheard-of"),
        (lambda i: i.track(["daily"]), BitmapError, "weekly.*would miss writes"),
        (lambda i: i.track(["daily"], others="ignore"), ValueError, "mark-in-use"),
        (lambda i: i.track([]), ValueError, "no names"),
        (lambda i: i.track([], others="mark-in-use"), ValueError, "no names"),
    ],
)
def test_not_tracked(track: Tracking, error: type[Exception], message: str) -> None:
    data = image()
    storage = FaultyStorage(data)
    before = bytes(data)
    with qcow2bm.open(storage, "r+") as opened:
        with pytest.raises(error, match=message):
            track(opened)
        assert storage.effects == []
        assert data == before
        with opened.track(["weekly", "daily"]) as tracker:  # as if nothing had been
            tracker.mark(0, 1)


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (image(DISABLED, CRASHED), BitmapError),
        (build_image(size=SIZE).data, BitmapError),
        (image(autoclear=False), BitmapError),
        (build_image(DAILY, size=SIZE, version=2).data, UnsupportedError),
        (image(DAILY, header={"incompatible_features": 1}), FormatError),
        (image(DAILY, header={"incompatible_features": 2}), FormatError),
        (image(DAILY, WEEKLY._replace(table=[4096 << 20, ZEROES])), FormatError),
    ],
    ids=["none enabled", "none", "stale", "version 2", "dirty", "corrupt", "a broken bitmap"],
)
def test_images_not_tracked(data: bytearray, error: type[Exception]) -> None:
    before = bytes(data)
    with qcow2bm.open(data, "r+") as opened, pytest.raises(error):
        opened.track()
    assert data == before


def test_an_image_open_for_reading_is_not_tracked() -> None:
    with qcow2bm.open(image()) as opened, pytest.raises(ReadOnlyImageError):
        opened.track()


@pytest.mark.spec("TRACK-3")
def test_one_thing_at_a_time() -> None:
    with qcow2bm.open(image(), "r+") as opened:
        with opened.edit(), pytest.raises(StateError):
            opened.track()
        with opened.track():
            with pytest.raises(StateError):
                opened.track()
            with pytest.raises(StateError), opened.edit():
                pass
        with opened.edit() as edit:
            edit.disable("daily")
        with opened.track() as tracker:
            assert tracker.names == ["weekly"]


def test_an_edit_from_before_changes_nothing() -> None:
    data = image()
    with qcow2bm.open(data, "r+") as opened:
        outdated = opened.edit(), opened.edit()
        tracker = opened.track()
        before = bytes(data)
        with pytest.raises(qcow2bm.Qcow2BmError), outdated[0] as edit:
            edit.clear("weekly")
        assert data == before
        tracker.stop()
        before = bytes(data)
        with pytest.raises(StateError), outdated[1] as edit:
            edit.clear("weekly")
        assert data == before


def test_bitmaps_from_before_are_outdated() -> None:
    """A bitmap object from before tracking must raise: its bits may have changed."""
    with qcow2bm.open(image(DAILY), "r+") as opened:
        before = opened.bitmaps["daily"]
        with opened.track() as tracker:
            tracker.mark(0, 512)
        with pytest.raises(StateError):
            before.count()
        assert opened.bitmaps["daily"].count() == 512


@pytest.mark.spec("INV-AUTO")
@pytest.mark.spec("TRACK-2")
def test_all_that_record_are_tracked_and_no_others() -> None:
    data = image()
    with qcow2bm.open(data, "r+") as opened:
        tracker = opened.track()
        assert (tracker.names, tracker.state) == (["daily", "weekly"], "tracking")
        both = FLAG_AUTO | FLAG_IN_USE
        assert flags(data) == {"daily": both, "weekly": both, "crashed": both, "disabled": 0}
        tracker.stop()
        assert tracker.state == "stopped"
    assert flags(data) == {"daily": FLAG_AUTO, "weekly": FLAG_AUTO, "crashed": both, "disabled": 0}


@pytest.mark.spec("INV-AUTO")
@pytest.mark.spec("TRACK-2")
def test_others_are_lost_if_the_caller_says_so() -> None:
    """Durably before anything is marked, and for good."""
    data = image()
    storage = FaultyStorage(data)
    with qcow2bm.open(storage, "r+") as opened:
        tracker = opened.track(["weekly"], others="mark-in-use")
        assert storage.effects[-1] == "barrier"
        assert tracker.names == ["weekly"]
        tracker.mark(0, SIZE)
        tracker.stop()
        assert opened.bitmaps["daily"].status == "inconsistent"
        assert opened.bitmaps["weekly"].status == "valid"
    assert flags(data)["daily"] == FLAG_AUTO | FLAG_IN_USE


def test_a_name_given_twice_is_tracked_once() -> None:
    with qcow2bm.open(image(DAILY), "r+") as opened:
        assert opened.track(["daily", "daily"]).names == ["daily"]


def test_the_block_stops_or_abandons() -> None:
    data = image(DAILY)
    with qcow2bm.open(data, "r+") as opened:
        with opened.track() as tracker:
            tracker.mark(0, 1)
        assert (tracker.state, flags(data)["daily"]) == ("stopped", FLAG_AUTO)
        with pytest.raises(ZeroDivisionError), opened.track() as tracker:
            raise ZeroDivisionError
        assert (tracker.state, flags(data)["daily"]) == ("abandoned", FLAG_AUTO | FLAG_IN_USE)
        with pytest.raises(BitmapError):
            opened.track()


@pytest.mark.parametrize("end", ["stop", "abandon"])
def test_after_the_end_nothing_is_marked(end: str) -> None:
    data = image(DAILY)
    with qcow2bm.open(data, "r+") as opened:
        tracker = opened.track()
        mark = tracker.mark
        tracker.mark(0, 1)
        getattr(tracker, end)()
        before = bytes(data)
        works: list[Callable[[], object]] = [
            lambda: mark(0, 1),  # where it is dirty already
            lambda: mark(COVERED, 1),
            lambda: mark(0, SIZE),
            lambda: mark(SIZE, 1),
            lambda: tracker.mark_many(np.array([[0, 1]])),
            lambda: tracker.mark_many(np.array([[0, SIZE]])),
            lambda: tracker.writing(0, 1).__enter__(),
            lambda: tracker.pending,
            tracker.flush,
            tracker.stop,
        ]
        for work in works:
            with pytest.raises(StateError, match=tracker.state):
                work()
        tracker.abandon()
        assert tracker.state == {"stop": "stopped", "abandon": "abandoned"}[end]
        assert data == before


@pytest.mark.spec("TRACK-4")
@pytest.mark.parametrize(
    ("start", "length"),
    [
        *((-1, 1), (-512, 1024), (0, -1), (512, -512)),
        *((0, SIZE + 1), (SIZE, 1), (SIZE - 1, 2), (SIZE + 1, 0)),
        *((1 << 62, 1), (1, 1 << 62), ((1 << 63) - 1, 1)),
    ],
)
def test_what_is_not_on_the_disk_is_refused(start: int, length: int) -> None:
    """If one of many ranges is not on the disk, none of them may be marked."""
    with qcow2bm.open(image(DAILY), "r+") as opened:
        tracker = opened.track()
        with pytest.raises(ValueError, match="does not lie on the disk"):
            tracker.mark(start, length)
        ranges = np.array([[0, 512], [start, length], [COVERED - 1, 2]])
        for given in (ranges, ranges[1:], ranges[:2]):
            with pytest.raises(ValueError, match="does not lie on the disk"):
                tracker.mark_many(given)
        with pytest.raises(ValueError, match="does not lie on the disk"):
            tracker.writing(start, length).__enter__()
        assert tracker.pending.pieces == 0
        tracker.stop()
        assert opened.bitmaps["daily"].count() == 0


@pytest.mark.spec("TRACK-4")
@pytest.mark.parametrize("start", [0, 1, 100, 511, 512, COVERED, SIZE - 1, SIZE])
def test_nothing_is_marked_by_nothing(start: int) -> None:
    with qcow2bm.open(image(DAILY, WEEKLY), "r+") as opened:
        tracker = opened.track()
        tracker.mark(start, 0)
        tracker.mark_many(np.array([[start, 0]]))
        tracker.mark_many(np.empty((0, 2), np.int64))
        with tracker.writing(start, 0):
            pass
        assert tracker.pending.pieces == 0


RANGES = [(0, 1), (511, 2), (3000, 30_000), (COVERED - 1, 2)]


@pytest.mark.parametrize("dtype", ["i4", "u4", "i8", "u8", ">i8", ">u4"])
def test_ranges_of_any_integers(dtype: str) -> None:
    with qcow2bm.open(image(DAILY), "r+") as opened:
        with opened.track() as tracker:
            tracker.mark_many(np.array(RANGES, dtype))
        many = opened.bitmaps["daily"].sha256()
    with qcow2bm.open(image(DAILY), "r+") as opened:
        with opened.track() as tracker:
            for start, length in np.array(RANGES, dtype):
                tracker.mark(start, length)
        assert opened.bitmaps["daily"].sha256() == many
    with qcow2bm.open(image(DAILY), "r+") as opened:
        with opened.track() as tracker:
            for begin, size in RANGES:
                tracker.mark(begin, size)
        assert opened.bitmaps["daily"].sha256() == many


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize(
    ("dtype", "start", "length"),
    [("u4", 2**32 - 65536, 2 * 65536), ("i4", 2**31 - 65536, 3 * 65536), ("u4", 2**32 - 1, 2)],
)
def test_a_range_that_wraps_around_is_not_lost(dtype: str, start: int, length: int) -> None:
    """numpy's integers wrap where Python's grow; a write must be marked, or the caller told."""
    coarse = Stored(b"coarse", granularity_bits=16)
    data = build_image(coarse, size=8 << 30, cluster_bits=12).data
    with qcow2bm.open(data, "r+") as opened:
        tracker = opened.track()
        one, other = np.array([start, length], dtype)
        try:
            tracker.mark(one, other)
        except ValueError:
            return
        tracker.stop()
        found = [extent for part in opened.bitmaps["coarse"].extents() for extent in part.tolist()]
        end = -(-(start + length) >> 16 << 16)
        assert found == [[start >> 16 << 16, end - (start >> 16 << 16)]]


@pytest.mark.parametrize(
    "ranges",
    [[0, 1], [[0, 1, 2]], [[[0, 1]]], [[0.0, 1.0]], [[True, True]], [["0", "1"]], 5],
)
def test_what_are_no_ranges_is_refused(ranges: Any) -> None:
    with qcow2bm.open(image(DAILY), "r+") as opened:
        tracker = opened.track()
        with pytest.raises(ValueError, match=r"must be int64\[n, 2\]"):
            tracker.mark_many(np.array(ranges))
        assert tracker.pending.pieces == 0


def test_a_mark_with_a_float_is_refused() -> None:
    with qcow2bm.open(image(DAILY), "r+") as opened:
        tracker = opened.track()
        with pytest.raises(TypeError):
            tracker.mark(0.0, 512)  # type: ignore[arg-type]
        assert tracker.pending.pieces == 0


def test_all_ones_stay_as_they_are() -> None:
    full = Stored(b"full", [ONES, ONES, ZEROES, ONES, ZEROES], 9)
    data = image(full)
    with qcow2bm.open(data, "r+") as opened, opened.track() as tracker:
        tracker.mark(0, 2 * COVERED)
        tracker.mark(4 * COVERED, 1)
    (bitmap,) = Audit(data).bitmaps
    assert [bool(word > ONES) for word in bitmap.words] == [False] * 4 + [True]
    assert Audit(data).dirty(bitmap) == {*range(2 * 4096), *range(3 * 4096, 4 * 4096), 4 * 4096}


def test_a_tracker_is_not_pickled() -> None:
    with qcow2bm.open(image(DAILY), "r+") as opened, pytest.raises(TypeError):
        pickle.dumps(opened.track())


@pytest.mark.spec("INV-INUSE")
@pytest.mark.spec("TRACK-1")
def test_closing_the_image_leaves_in_use() -> None:
    """Without a stop the bitmaps stay in_use, and nothing can be written."""
    data = image(DAILY)
    with qcow2bm.open(data, "r+") as opened:
        tracker = opened.track()
        tracker.mark(0, 1)
    before = bytes(data)
    with pytest.raises(qcow2bm.Qcow2BmError):
        tracker.stop()
    with pytest.raises(StateError):
        tracker.mark(0, 1)
    assert data == before
    assert flags(data)["daily"] == FLAG_AUTO | FLAG_IN_USE


@pytest.mark.spec("TRACK-23")
def test_a_python_without_the_global_lock_tracks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    data = build_image(Stored(b"a"), size=1 << 30).data
    before = bytes(data)
    monkeypatch.setattr(sys, "abiflags", "t")
    monkeypatch.setattr(sys, "flags", SimpleNamespace(gil=None))
    with qcow2bm.open(data, "r+") as image:
        with pytest.raises(qcow2bm.UnsupportedError, match=r"free-threaded.* PYTHON_GIL=1"):
            image.track()
        assert data == before
        monkeypatch.setattr(sys, "flags", SimpleNamespace(gil=1))
        image.track().stop()
