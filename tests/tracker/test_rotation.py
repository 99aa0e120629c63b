"""Rotation, and edits of what is tracked: every mark is where it belongs, and nowhere else."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.faulty_storage import Fault, FaultyStorage
from support.images import ONES, ZEROES, Stored, build_image

import qcow2bm
from qcow2bm.format.directory import FLAG_AUTO
from qcow2bm.tracker.tracker import Tracker

GRANULE = 4096
SIZE = 64 << 20


def image(*names: bytes, **options: Any) -> bytearray:
    """Enabled bitmaps of these names, and a disabled one; three clusters of 512 bytes each."""
    table = (b"\x01", ZEROES, b"\x00\x80", ONES)
    bitmaps = [Stored(name, table, granularity_bits=12) for name in names]
    off = Stored(b"off", (b"\x07",), granularity_bits=16, flags=0)
    return build_image(*bitmaps, off, size=SIZE, **options).data


@contextmanager
def tracking(data: bytearray | FaultyStorage) -> Iterator[Tracker]:
    with qcow2bm.open(data, "r+") as opened, opened.track() as tracker:
        yield tracker


def granules(data: bytearray, name: str) -> set[int]:
    """The dirty granules of a bitmap, which must be valid."""
    with qcow2bm.open(data) as opened:
        bitmap = opened.bitmaps[name]
        size = bitmap.granularity
        return {
            granule
            for rows in bitmap.extents()
            for start, length in rows.tolist()
            for granule in range(start // size, -(-(start + length) // size))
        }


def facts(data: bytearray) -> dict[str, tuple[str, bool]]:
    with qcow2bm.open(data) as opened:
        assert not any(problem.is_serious for problem in opened.problems)
        return {name: (b.status, b.auto) for name, b in opened.bitmaps.items()}


@pytest.mark.spec("TRACK-13")
@pytest.mark.parametrize("names", [(b"a",), (b"a", b"z")])
def test_a_rotation_divides_the_marks(names: tuple[bytes, ...]) -> None:
    data = image(*names)
    old = granules(data, "a")
    with tracking(data) as tracker:
        tracker.mark(10 * GRANULE, 1)
        tracker.rotate("a", "b")
        assert sorted(tracker.names) == sorted(["b", *(n.decode() for n in names if n != b"a")])
        assert granules(data, "a") == old | {10}  # valid and readable while others are tracked
        tracker.mark(10 * GRANULE, 1)
        tracker.mark(20 * GRANULE, 1)
        tracker.flush()
        tracker.rotate("b", "c")
        tracker.mark(30 * GRANULE, 1)
    assert granules(data, "a") == old | {10}
    assert granules(data, "b") == {10, 20}
    assert granules(data, "c") == {30}
    if b"z" in names:
        assert granules(data, "z") == old | {10, 20, 30}
    expected = {"a": ("valid", False), "b": ("valid", False), "c": ("valid", True)}
    assert {name: found for name, found in facts(data).items() if name in expected} == expected


@pytest.mark.spec("TRACK-22")
def test_what_was_rotated_away_is_read_while_others_are_tracked(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(image(b"a"))
    old = granules(bytearray(path.read_bytes()), "a")
    with qcow2bm.open(path, "r+") as opened, opened.track() as tracker:
        tracker.mark(10 * GRANULE, 1)
        with pytest.raises(qcow2bm.BitmapInconsistentError, match="rotate or disable it"):
            opened.bitmaps["a"].count()
        before = opened.bitmaps["a"]
        tracker.rotate("a", "b")
        frozen = opened.bitmaps["a"]
        assert frozen.count() == GRANULE * len(old | {10})
        with pytest.raises(qcow2bm.StateError, match="outdated by a commit"):
            before.count()
        with pytest.raises(qcow2bm.BitmapInconsistentError, match="rotate or disable it"):
            opened.bitmaps["b"].count()
        tracker.mark(20 * GRANULE, 1)
        tracker.flush()
        assert frozen.count() == opened.bitmaps["a"].count()
        with qcow2bm.open(path, force_share=True) as beside:
            assert beside.bitmaps["a"].count() == GRANULE * len(old | {10})
            assert beside.bitmaps["b"].status == "inconsistent"
        with tracker.edit() as edit:
            edit.remove("a")
            edit.add("in its place", GRANULE, enabled=False)
            edit.merge("in its place", "b")
        with pytest.raises((qcow2bm.StateError, qcow2bm.ChangedWhileReadingError)):
            frozen.count()
        assert opened.bitmaps["in its place"].count() == GRANULE
        tracker.mark(30 * GRANULE, 1)
    assert granules(bytearray(path.read_bytes()), "b") == {20, 30}


@pytest.mark.spec("TRACK-13")
def test_what_was_refused_leaves_tracking_as_it_was() -> None:
    data = image(b"a")
    with tracking(data) as tracker:
        for name, error in (
            ("off", qcow2bm.BitmapExistsError),
            ("", ValueError),
            ("n" * 1024, ValueError),
        ):
            with pytest.raises(error):
                tracker.rotate("a", name)
        with pytest.raises(qcow2bm.BitmapNotFoundError):
            tracker.rotate("off", "new")
        tracker.mark(9 * GRANULE, 1)
        assert tracker.state == "tracking"
    assert 9 in granules(data, "a")


@pytest.mark.spec("TRACK-6")
def test_a_rotation_waits_for_writes_under_way() -> None:
    data = image(b"a")
    with tracking(data) as tracker:
        rotating = threading.Thread(target=tracker.rotate, args=("a", "b"))
        with tracker.writing(10 * GRANULE, 1):
            rotating.start()
            rotating.join(0.2)
            assert rotating.is_alive()
            assert tracker.names == ["a"]
        rotating.join(60)
        assert tracker.names == ["b"]
    assert 10 in granules(data, "a")


@pytest.mark.spec("TRACK-13")
@pytest.mark.parametrize("names", [(b"a",), (b"a", b"z")])
def test_no_write_falls_between(names: tuple[bytes, ...]) -> None:
    """Every write is in the bitmap that was recording when it began, or in the one after."""
    data = image(*names)
    written: list[list[int]] = [[] for _ in range(4)]
    is_over = threading.Event()

    def write(place: int) -> None:
        granule = place
        while not is_over.is_set():
            granule = (granule + 4) % (SIZE // GRANULE)
            with tracker.writing(granule * GRANULE, 1):
                written[place].append(granule)

    with tracking(data) as tracker:
        threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for number in range(6):
            tracker.rotate("a" if number == 0 else f"r{number}", f"r{number + 1}")
            tracker.flush()
        is_over.set()
        for thread in threads:
            thread.join()
    found = [granules(data, name) for name in ("a", *(f"r{n}" for n in range(1, 7)))]
    assert set().union(*written) <= set().union(*found)


@pytest.mark.spec("TRACK-12")
def test_every_failing_call_of_a_rotation() -> None:
    fault_free = FaultyStorage(image(b"a"))
    with tracking(fault_free) as tracker:
        tracker.mark(10 * GRANULE, 1)
        first = len(fault_free.calls)
        tracker.rotate("a", "b")
        stop = len(fault_free.calls)
    struck = 0
    for number in range(first, stop):
        storage = FaultyStorage(image(b"a"), Fault(number))
        with qcow2bm.open(storage, "r+") as opened:
            tracker = opened.track()
            tracker.mark(10 * GRANULE, 1)
            try:
                tracker.rotate("a", "b")
            except qcow2bm.Qcow2BmError:
                struck += 1
                if tracker.state == "failed":
                    with pytest.raises(qcow2bm.StateError):
                        tracker.mark(0, 1)
            if tracker.state == "tracking":
                tracker.mark(20 * GRANULE, 1)
                tracker.stop()
        found = facts(storage.data)
        assert found["off"] == ("valid", False)
        if found["a"][0] == "valid":
            assert 10 in granules(storage.data, "a")
        if found.get("b", ("", True))[0] == "valid":
            assert 20 in granules(storage.data, "b")
    assert struck


@pytest.mark.spec("TRACK-14")
def test_an_edit_of_what_is_tracked() -> None:
    data = image(b"a", b"z")
    old, off = granules(data, "a"), granules(data, "off")
    with tracking(data) as tracker:
        tracker.mark(10 * GRANULE, 1)
        with tracker.edit() as edit:
            edit.add("fine", 512)
            edit.add("plain", 65536, enabled=False)
            edit.enable("off")
            edit.merge("a", "off")
            edit.merge("plain", "a")  # sees what was merged before
        assert tracker.names == ["a", "z", "fine", "off"]
        tracker.mark(10 * GRANULE, 1)
        tracker.mark(1000 * GRANULE, 512)
        with tracker.edit() as edit:
            edit.disable("z")
            edit.remove("off")
        tracker.mark(2000 * GRANULE, 1)
        assert tracker.names == ["a", "fine"]
        with (
            pytest.raises(qcow2bm.BitmapError, match="nothing can be taken"),
            tracker.edit() as edit,
        ):
            edit.merge("a", "z", "subtract")
    coarse = {granule for wide in off for granule in range(16 * wide, 16 * wide + 16)}
    assert granules(data, "a") == old | coarse | {10, 1000, 2000}
    assert granules(data, "z") == old | {10, 1000}
    assert granules(data, "fine") == {80, 8000, 16000}
    assert granules(data, "plain") == {granule // 16 for granule in old | coarse | {10}}
    assert facts(data) == {
        "a": ("valid", True),
        "z": ("valid", False),
        "plain": ("valid", False),
        "fine": ("valid", True),
    }


@pytest.mark.spec("TRACK-14")
def test_an_edit_that_raises_changes_nothing() -> None:
    data = image(b"a")
    with tracking(data) as tracker:
        before = bytes(data)
        with pytest.raises(KeyError), tracker.edit() as edit:
            edit.remove("never there")
        assert data == before
        assert tracker.names == ["a"]
        with tracker.edit() as edit:
            edit.remove("a")
        assert tracker.names == []
        tracker.mark(0, SIZE)
    assert facts(data) == {"off": ("valid", False)}


@pytest.mark.spec("TRACK-3")
def test_nothing_else_happens_to_the_image_meanwhile() -> None:
    with qcow2bm.open(image(b"a"), "r+") as opened:
        with opened.track() as tracker:
            for begin in (opened.edit, opened.track):
                with pytest.raises(qcow2bm.StateError, match="being tracked"):
                    begin()
        assert tracker.state == "stopped"
        with opened.edit() as edit:
            edit.disable("a")
        assert opened.directory[0].flags & FLAG_AUTO == 0
