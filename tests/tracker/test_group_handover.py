"""All disks of a machine given away together, and what else meets a tracker that is inactive."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from support.faulty_storage import FaultyStorage
from support.images import Stored, build_image, extension
from support.recording import RecordingStorage

import qcow2bm
from qcow2bm.bitmaps.tracked_bitmap import Bits
from qcow2bm.errors import (
    BitmapNotFoundError,
    CommitError,
    ImageLockedError,
    StateError,
    StorageError,
)
from qcow2bm.format.directory import FLAG_AUTO, FLAG_IN_USE
from qcow2bm.format.extensions import DATA_FILE
from qcow2bm.migration.sentinel import PREFIX, is_sentinel
from qcow2bm.tracker.fanout import Recording
from qcow2bm.tracker.group import TrackerGroup
from qcow2bm.tracker.recorder import Recorder
from qcow2bm.tracker.reports import Activation, StopReport
from qcow2bm.tracker.tracker import Tracker

if TYPE_CHECKING:
    from typing_extensions import Buffer

GRANULE = 4096
SIZE = 8 << 20
OLD_SENTINEL = PREFIX + "00000000-0000-4000-8000-000000000000"


def image(*names: str, **options: Any) -> bytearray:
    bitmaps = [Stored(name.encode(), granularity_bits=12) for name in names or ("a",)]
    return build_image(*bitmaps, **{"cluster_bits": 12, "size": SIZE, **options}).data


def statuses(data: bytes | bytearray) -> dict[str, str]:
    with qcow2bm.open(bytes(data)) as opened:
        return {name: bitmap.status for name, bitmap in opened.bitmaps.items()}


def dirty(data: bytes | bytearray, name: str) -> set[int]:
    with qcow2bm.open(bytes(data)) as opened:
        bits = np.unpackbits(opened.bitmaps[name].packed(), bitorder="little")
        return set(np.flatnonzero(bits).tolist())


def write_elsewhere(data: bytearray, granule: int) -> None:
    """The other side, which keeps all bitmaps."""
    with qcow2bm.open(data, "r+") as opened:
        names = [b.name for b in opened.bitmaps.values() if b.auto and b.status == "valid"]
        with opened.edit() as edit:
            for name in names:
                edit.set(name, granule * GRANULE, 1)


# --- several disks ------------------------------------------------------------------------------


class Shared(FaultyStorage):
    """Other hosts do not see its lock."""

    excludes_other_hosts = False


class Lockable(FaultyStorage):
    """A storage whose lock another process can hold."""

    is_locked = False

    @contextmanager
    def write_lock(self, timeout: float) -> Iterator[None]:
        if self.is_locked:
            raise ImageLockedError("<faulty>", "writes to it", "writing")
        with super().write_lock(timeout):
            yield


class Disks:
    """Three disks, each with a bitmap "a", and marks in the granule of its number."""

    def __init__(self, kind: type[FaultyStorage] = FaultyStorage) -> None:
        self.storages = {name: kind(image("a", "b")) for name in ("vda", "vdb", "vdc")}
        self.images = {n: qcow2bm.open(s, "r+") for n, s in self.storages.items()}
        self.trackers = {name: opened.track() for name, opened in self.images.items()}
        for number, tracker in enumerate(self.trackers.values()):
            tracker.mark(number * GRANULE, 1)
        self.group = TrackerGroup(self.trackers)

    @property
    def states(self) -> list[str]:
        return [tracker.state for tracker in self.trackers.values()]

    def data(self, disk: str) -> bytearray:
        return self.storages[disk].data

    def lock(self, *disks: str) -> None:
        """Another process has the locks of these disks, and of no other."""
        for disk, storage in self.storages.items():
            assert isinstance(storage, Lockable)
            storage.is_locked = disk in disks

    def activate(self, **options: Any) -> dict[str, str]:
        """The outcome of each disk, or what kind of error there was."""
        back = self.group.activate(**options)
        assert list(back) == list(self.trackers)
        return {
            disk: found.outcome if isinstance(found, Activation) else type(found).__name__
            for disk, found in back.items()
        }

    def break_barrier(self, disk: str) -> None:
        def fail() -> None:
            raise StorageError("<faulty>", 0, 0, "broken")

        self.storages[disk].barrier = fail  # type: ignore[method-assign]


def test_all_of_them_there_and_back() -> None:
    disks = Disks()
    assert disks.group.begin_migration() == dict.fromkeys(disks.trackers)
    assert disks.states == ["migrating"] * 3
    assert all(isinstance(r, StopReport) for r in disks.group.inactivate().values())
    assert disks.states == ["inactive"] * 3
    for number, disk in enumerate(disks.trackers):
        assert set(statuses(disks.data(disk)).values()) == {"valid"}
        assert dirty(disks.data(disk), "a") == {number}
    back = disks.group.activate()
    assert list(back) == ["vda", "vdb", "vdc"]
    assert [r.outcome for r in back.values() if isinstance(r, Activation)] == ["unchanged"] * 3
    assert disks.states == ["tracking"] * 3
    assert all(isinstance(r, StopReport) for r in disks.group.stop().values())


def test_a_migration_that_is_cancelled() -> None:
    disks = Disks()
    disks.group.begin_migration(carried={"vdb": ["b"]})
    assert disks.group.cancel_migration() == dict.fromkeys(disks.trackers)
    assert disks.states == ["tracking"] * 3
    assert not any(map(is_sentinel, statuses(disks.data("vda"))))
    disks.group.inactivate()
    assert statuses(disks.data("vdb"))["b"] == "valid"


def test_each_disk_carries_what_is_said_of_it() -> None:
    disks = Disks()
    disks.group.begin_migration(carried={"vda": ["a"], "vdc": ("a", "b")}, sentinel=False)
    disks.group.inactivate()
    found = {disk: statuses(disks.data(disk)) for disk in disks.trackers}
    lost, valid = "inconsistent", "valid"
    assert found == {
        "vda": {"a": lost, "b": valid},
        "vdb": {"a": valid, "b": valid},
        "vdc": {"a": lost, "b": lost},
    }
    back = disks.group.activate()
    assert {r.outcome for r in back.values() if isinstance(r, Activation)} == {"unknown"}


def test_one_cannot_begin_and_the_others_do() -> None:
    disks = Disks()
    found = disks.group.begin_migration(carried={"vdb": ["none"]})
    assert isinstance(found["vdb"], BitmapNotFoundError)
    assert (found["vda"], found["vdc"]) == (None, None)
    assert disks.states == ["migrating", "tracking", "migrating"]
    # It begins when it is given away at the latest.
    assert all(isinstance(r, StopReport) for r in disks.group.inactivate().values())


def test_one_fails_and_the_others_are_reported() -> None:
    disks = Disks()
    disks.group.begin_migration()
    disks.break_barrier("vdb")
    found = disks.group.inactivate()
    assert isinstance(found["vdb"], CommitError)
    assert isinstance(found["vda"], StopReport)
    assert isinstance(found["vdc"], StopReport)
    assert disks.states == ["inactive", "failed", "inactive"]
    assert statuses(disks.data("vdb"))["a"] == "inconsistent"
    for number, disk in ((0, "vda"), (2, "vdc")):
        assert dirty(disks.data(disk), "a") == {number}
    for _ in range(2):
        assert disks.activate() == {"vda": "unchanged", "vdb": "StateError", "vdc": "unchanged"}
        assert disks.states == ["tracking", "failed", "tracking"]
    ended = disks.group.activate()["vdb"]
    assert isinstance(ended, StateError)
    assert isinstance(ended.__cause__, CommitError)


def test_one_cannot_be_taken_back_and_the_others_are() -> None:
    disks = Disks()
    disks.group.inactivate()
    disks.break_barrier("vdb")
    for _ in range(2):
        found = disks.activate()
        assert found == {"vda": "unchanged", "vdb": "CommitError", "vdc": "unchanged"}
        assert disks.states == ["tracking", "inactive", "tracking"]
    del disks.storages["vdb"].barrier
    assert disks.activate() == dict.fromkeys(disks.trackers, "unchanged")
    assert disks.states == ["tracking"] * 3


@pytest.mark.spec("LIFE-16")
@pytest.mark.parametrize("locked", [("vda",), ("vdc",), ("vda", "vdc"), ("vdb", "vdc")])
def test_a_changed_disk_stays_in_the_result_of_every_retry(locked: tuple[str, ...]) -> None:
    """A changed disk must be in the result of every retry.

    Otherwise the machine would go on with a changed disk once the other disks are back.
    """
    disks = Disks(Lockable)
    disks.group.inactivate()
    write_elsewhere(disks.data("vdb"), 100)
    sound = {"vda": "unchanged", "vdb": "changed", "vdc": "unchanged"}
    disks.lock(*locked)
    for _ in range(2):
        assert disks.activate() == sound | dict.fromkeys(locked, "ImageLockedError")
        assert [disks.trackers[disk].state for disk in locked] == ["inactive"] * len(locked)
    disks.lock(*locked[1:])
    disks.activate()
    disks.lock()
    assert disks.activate() == sound
    assert disks.states == ["tracking"] * 3
    disks.trackers["vdb"].mark(200 * GRANULE, 1)
    disks.group.begin_migration()
    disks.group.cancel_migration()
    again = disks.group.activate()["vdb"]
    assert isinstance(again, Activation)
    assert again.outcome == "changed"
    assert again.changed is not None
    assert again.changed.tolist() == [[100 * GRANULE, 512]]
    assert {fate.kind for fate in again.bitmaps.values()} == {"reloaded"}
    # Until they are given away again.
    disks.group.inactivate()
    assert disks.activate() == dict.fromkeys(disks.trackers, "unchanged")


def test_what_was_found_is_forgotten_when_they_are_given_away_again() -> None:
    """Giving the disks away again must forget the last result, even if giving away fails."""
    disks = Disks()
    disks.group.inactivate()
    write_elsewhere(disks.data("vdb"), 100)
    assert disks.activate()["vdb"] == "changed"
    with pytest.raises(ValueError, match="no disk"):
        disks.group.inactivate(data_files={"none": "path"})
    assert disks.activate()["vdb"] == "changed"
    disks.break_barrier("vda")
    disks.group.inactivate()
    assert disks.activate() == {"vda": "StateError", "vdb": "unchanged", "vdc": "unchanged"}


def test_a_disk_that_was_not_taken_back_never_counts_as_unchanged() -> None:
    disks = Disks(Lockable)
    disks.group.inactivate()
    disks.lock("vda")
    assert disks.activate()["vda"] == "ImageLockedError"
    disks.trackers["vda"].abandon()
    assert disks.activate()["vda"].endswith("Error")


def test_one_is_changed_and_the_others_are_not() -> None:
    disks = Disks()
    disks.group.inactivate()
    write_elsewhere(disks.data("vdb"), 100)
    back = disks.group.activate()
    outcomes = {n: r.outcome for n, r in back.items() if isinstance(r, Activation)}
    assert outcomes == {"vda": "unchanged", "vdb": "changed", "vdc": "unchanged"}
    disks.group.stop()
    assert dirty(disks.data("vdb"), "a") >= {1, 100}


def test_those_that_are_not_given_away_are_left_alone() -> None:
    disks = Disks()
    disks.trackers["vda"].inactivate()
    disks.trackers["vdb"].stop()
    disks.trackers["vdc"].mark(9 * GRANULE, 1)
    calls, names = list(disks.storages["vdc"].calls), disks.trackers["vdc"].names
    for _ in range(2):
        assert disks.activate() == {"vda": "unchanged", "vdb": "StateError", "vdc": "unchanged"}
        assert disks.states == ["tracking", "stopped", "tracking"]
        assert disks.storages["vdc"].calls == calls
    never = disks.group.activate()["vdc"]
    assert isinstance(never, Activation)
    assert {name: fate.kind for name, fate in never.bitmaps.items()} == {"a": "kept", "b": "kept"}
    assert list(never.bitmaps) == names
    assert never.changed is not None
    assert never.changed.dtype == np.int64
    assert never.changed.shape == (0, 2)
    assert "not given away" in never.reason
    disks.trackers["vdc"].begin_migration()
    assert disks.activate()["vdc"] == "unchanged"  # it is still here
    assert disks.states[2] == "migrating"


@pytest.mark.parametrize("end", ["stop", "abandon"])
def test_a_disk_whose_tracking_has_ended_keeps_the_machine_from_going_on(end: str) -> None:
    disks = Disks()
    getattr(disks.trackers["vdb"], end)()
    disks.group.inactivate()
    for _ in range(2):
        assert disks.activate() == {"vda": "unchanged", "vdb": "StateError", "vdc": "unchanged"}


def test_what_is_refused_is_reported_for_each_disk() -> None:
    disks = Disks()
    disks.trackers["vdb"].inactivate()
    for call in (disks.group.begin_migration, disks.group.stop):
        assert isinstance(call()["vdb"], StateError)
    assert isinstance(disks.group.converge(10)["vdb"], StateError)
    assert isinstance(disks.group.cancel_migration()["vdb"], StateError)
    assert disks.trackers["vdb"].state == "inactive"
    assert TrackerGroup({}).activate() == {}


def test_the_word_of_the_caller_and_the_policy_are_for_all() -> None:
    disks = Disks(Shared)
    disks.group.begin_migration(carried={disk: ["a", "b"] for disk in disks.trackers})
    disks.group.inactivate()
    assert all(isinstance(r, StateError) for r in disks.group.activate().values())
    assert disks.states == ["inactive"] * 3
    for disk in disks.trackers:
        write_elsewhere(disks.data(disk), 100)
    back = disks.group.activate("merge", other_side_has_stopped=True)
    for found in back.values():
        assert isinstance(found, Activation)
        assert found.outcome == "changed"
        assert {fate.kind for fate in found.bitmaps.values()} == {"kept"}
    disks.group.stop()
    assert dirty(disks.data("vdc"), "a") == {2, 100}


def test_data_files_are_by_disk(tmp_path: Path) -> None:
    paths = {disk: tmp_path / f"{disk}.raw" for disk in ("vda", "vdb")}
    trackers = {}
    for disk, path in paths.items():
        path.write_bytes(b"the data")
        named = [extension(DATA_FILE, str(path).encode())]
        data = image(extensions=named, header={"incompatible_features": 4})
        trackers[disk] = qcow2bm.open(data, "r+").track()
    group = TrackerGroup(trackers)
    group.inactivate(data_files={"vda": paths["vda"]})
    outcomes = {n: r.outcome for n, r in group.activate().items() if isinstance(r, Activation)}
    assert outcomes == {"vda": "unchanged", "vdb": "unknown"}
    group.inactivate(data_files=paths)
    paths["vdb"].write_bytes(b"other data")
    outcomes = {n: r.outcome for n, r in group.activate().items() if isinstance(r, Activation)}
    assert outcomes == {"vda": "unchanged", "vdb": "changed"}


def test_a_group_does_not_wait_for_its_own_thread() -> None:
    disks = Disks()
    calls: list[Callable[[], object]] = [
        disks.group.begin_migration,
        disks.group.cancel_migration,
        disks.group.inactivate,
        disks.group.activate,
    ]
    for call in calls:
        with (
            disks.trackers["vdb"].writing(0, 1),
            pytest.raises(StateError, match="inside a write"),
        ):
            call()
    assert disks.states == ["tracking"] * 3


@pytest.mark.parametrize("names", ["a", "ab", ""])
def test_one_name_is_not_names(names: str) -> None:
    """A name of one letter would be taken for a list of it; the rest would seem to be missing."""
    disks = Disks()
    for tracker in disks.trackers.values():
        with pytest.raises(TypeError, match="not one name"):
            tracker.begin_migration(carried=names)
    assert disks.states == ["tracking"] * 3
    found = disks.group.begin_migration(carried={"vda": names})
    assert isinstance(found["vda"], TypeError)
    assert disks.states == ["tracking", "migrating", "migrating"]
    assert list(statuses(disks.data("vda"))) == ["a", "b"]
    disks.group.inactivate()
    assert set(statuses(disks.data("vda")).values()) == {"valid"}


# --- sentinels that were left behind ------------------------------------------------------------

FLAGS = {"valid": FLAG_AUTO, "in_use": FLAG_AUTO | FLAG_IN_USE, "disabled": 0}


def with_sentinels(*flags: int, **options: Any) -> bytearray:
    old = [
        Stored(OLD_SENTINEL[:-1].encode() + b"%d" % number, [b"\x01"], 16, flag)
        for number, flag in enumerate(flags)
    ]
    return build_image(Stored(b"a", granularity_bits=12), *old, size=SIZE, **options).data


@pytest.mark.spec("LIFE-11")
@pytest.mark.parametrize("flags", [("valid",), ("in_use",), ("disabled",), tuple(FLAGS)])
@pytest.mark.parametrize("generation", [None, True])
def test_all_of_them_go_by_one_commit(flags: tuple[str, ...], generation: bool | None) -> None:
    storage = RecordingStorage(with_sentinels(*(FLAGS[flag] for flag in flags)))
    with qcow2bm.open(storage, "r+") as opened:
        tracker = opened.track(generation=generation)
        assert tracker.names == ["a"]
        assert list(statuses(storage.data)) == ["a"]
        tracker.mark(0, 1)
        tracker.stop()
        assert list(opened.bitmaps) == ["a"]
        assert opened.problems == ()


@pytest.mark.spec("LIFE-11")
def test_in_an_image_whose_bitmaps_are_stale_nothing_is_touched() -> None:
    data = with_sentinels(FLAG_AUTO, autoclear=False)
    before = bytes(data)
    with qcow2bm.open(data, "r+") as opened, pytest.raises(qcow2bm.BitmapError):
        opened.track()
    assert data == before


@pytest.mark.spec("LIFE-11")
def test_those_of_others_go_when_the_image_is_taken_back() -> None:
    """The other side died in a migration of its own, and left its sentinel behind."""
    data = image()
    with qcow2bm.open(data, "r+") as opened:
        tracker = opened.track()
        tracker.inactivate()
        with qcow2bm.open(data, "r+") as theirs, theirs.edit() as edit:
            edit.add(OLD_SENTINEL, GRANULE)
        found = tracker.activate()
        assert set(found.bitmaps) == {"a"}
        assert list(statuses(data)) == ["a"]


@pytest.mark.spec("LIFE-11")
def test_a_canary_goes_with_or_without_its_sentinel() -> None:
    for names in ([OLD_SENTINEL + "-canary"], [OLD_SENTINEL, OLD_SENTINEL + "-canary"]):
        old = [Stored(name.encode(), [b"\x01"], 16, 0) for name in names]
        data = build_image(Stored(b"a", granularity_bits=12), *old, size=SIZE).data
        with qcow2bm.open(data, "r+") as opened:
            assert opened.track().names == ["a"]
            assert list(statuses(data)) == ["a"]


@pytest.mark.parametrize("names", [["none"], [], ["off"]])
def test_who_may_not_track_changes_nothing(names: list[str]) -> None:
    data = build_image(
        Stored(b"a", granularity_bits=12),
        Stored(b"off", flags=0),
        Stored(OLD_SENTINEL.encode()),
        size=SIZE,
    ).data
    before = bytes(data)
    with (
        qcow2bm.open(data, "r+") as opened,
        pytest.raises((qcow2bm.BitmapError, ValueError)),
    ):
        opened.track(names, others="mark-in-use")
    assert data == before


def test_a_bitmap_with_a_similar_name_stays() -> None:
    data = image("a", OLD_SENTINEL + "0", PREFIX + "mine")
    with qcow2bm.open(data, "r+") as opened, opened.track() as tracker:
        assert tracker.names == ["a", OLD_SENTINEL + "0", PREFIX + "mine"]


# --- ends while the image is in other hands -----------------------------------------------------


def test_a_block_that_ends_while_the_image_is_away() -> None:
    data = image()
    with qcow2bm.open(data, "r+") as opened:
        with opened.track() as tracker:
            tracker.mark(0, 1)
            tracker.inactivate()
            before = bytes(data)
        assert tracker.state == "abandoned"
        assert data == before
        with pytest.raises(StateError, match="in other hands"):
            opened.header  # noqa: B018
        for again in (opened.edit, opened.track):
            with pytest.raises(StateError, match="other hands"):
                again()
    assert data == before
    assert statuses(data)["a"] == "valid"


def test_an_exception_while_the_image_is_away() -> None:
    data = image()

    def work() -> None:
        with opened.track() as tracker:
            tracker.inactivate()
            raise ZeroDivisionError

    with qcow2bm.open(data, "r+") as opened, pytest.raises(ZeroDivisionError):
        work()
    assert statuses(data)["a"] == "valid"


@pytest.mark.parametrize("state", ["migrating", "inactive"])
def test_an_image_that_is_closed(state: str) -> None:
    storage = RecordingStorage(image())
    opened = qcow2bm.open(storage, "r+")
    tracker = opened.track()
    tracker.begin_migration()
    if state == "inactive":
        tracker.inactivate()
    before = bytes(storage.data)
    opened.close()
    opened.close()
    assert tracker.state == "abandoned"
    for call in (tracker.activate, tracker.stop, tracker.inactivate, lambda: tracker.mark(0, 1)):
        with pytest.raises(StateError, match="abandoned"):
            call()
    assert storage.data == before


def test_a_block_that_ends_while_migrating_stops() -> None:
    data = image("a", "b")
    with qcow2bm.open(data, "r+") as opened, opened.track() as tracker:
        tracker.begin_migration(carried=["b"])
        tracker.mark(0, 1)
    assert statuses(data) == {"a": "valid", "b": "valid"}
    assert dirty(data, "b") == {0}


@pytest.mark.parametrize("state", ["migrating", "inactive"])
def test_neither_is_pickled(state: str) -> None:
    with qcow2bm.open(image(), "r+") as opened:
        tracker = opened.track()
        getattr(tracker, "begin_migration" if state == "migrating" else "inactivate")()
        for part in (tracker, opened):
            with pytest.raises(TypeError, match="cannot be pickled"):
                pickle.dumps(part)


def test_an_image_abandoned_while_away_can_be_opened_again(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(image())
    with qcow2bm.open(path, "r+") as opened:
        tracker = opened.track()
        tracker.inactivate()
        with qcow2bm.open(path, "r+") as theirs, theirs.edit() as edit:
            edit.add("theirs")
        tracker.abandon()
        with qcow2bm.open(path, "r+") as again, again.track() as other:
            assert other.names == ["a", "theirs"]


# --- threads ------------------------------------------------------------------------------------


def inside(tracker: Tracker, begun: Event, over: Event, log: list[str]) -> None:
    with tracker.writing(5 * GRANULE, 1):
        begun.set()
        over.wait(0.05)
        log.append("written")


@pytest.mark.spec("LIFE-1")
@pytest.mark.parametrize("begins_before", [False, True])
def test_inactivate_waits_for_writes(begins_before: bool) -> None:
    data = image()
    log: list[str] = []
    begun, over = Event(), Event()
    with qcow2bm.open(data, "r+") as opened:
        tracker = opened.track()
        if begins_before:
            tracker.begin_migration()
        thread = Thread(target=inside, args=(tracker, begun, over, log))
        thread.start()
        begun.wait()
        tracker.inactivate()
        log.append("inactive")
        over.set()
        thread.join()
        assert log == ["written", "inactive"]
        assert dirty(data, "a") == {5}
        with pytest.raises(StateError, match="inactive"), tracker.writing(0, 1):
            pytest.fail("was let in")


class Slow(RecordingStorage):
    """Lets another thread in at each barrier."""

    hook: Callable[[], None] = staticmethod(lambda: None)

    def barrier(self) -> None:
        super().barrier()
        self.hook()

    def write(self, offset: int, parts: Sequence[Buffer]) -> None:
        super().write(offset, parts)
        self.hook()


@pytest.mark.spec("LIFE-6")
@pytest.mark.parametrize("number", range(5))
def test_marks_of_other_threads_while_it_is_taken_back(number: int) -> None:
    """Each is refused, or in the bitmap; a mark is accepted once the bitmaps are in_use."""
    storage = Slow(image("a", "b"))
    accepted: set[int] = set()
    is_over = Event()

    def mark() -> None:
        granule = 0
        while not is_over.is_set():
            granule = (granule + 1) % (SIZE // GRANULE)
            with suppress(StateError):
                tracker.mark(granule * GRANULE, 1)
                accepted.add(granule)
                assert statuses(storage.data)["a"] == "inconsistent"

    with qcow2bm.open(storage, "r+") as opened:
        tracker = opened.track()
        tracker.inactivate()
        if number % 2:
            write_elsewhere(storage.data, 1000)
        threads = [Thread(target=mark) for _ in range(2)]
        for thread in threads:
            thread.start()
        storage.hook = lambda: time.sleep(0.001)
        tracker.activate()
        while not accepted:
            time.sleep(0.001)
        storage.hook = lambda: None
        is_over.set()
        for thread in threads:
            thread.join()
        tracker.stop()
    assert accepted <= dirty(storage.data, "a")
    assert accepted <= dirty(storage.data, "b")


def test_what_a_tracker_found_by_itself_the_group_knows() -> None:
    disks = Disks()
    disks.group.inactivate()
    write_elsewhere(disks.data("vdb"), 100)
    assert disks.trackers["vdb"].activate().outcome == "changed"
    found = disks.group.activate()
    assert {n: getattr(f, "outcome", f) for n, f in found.items()} == {
        "vda": "unchanged",
        "vdb": "changed",
        "vdc": "unchanged",
    }


class Interleaving(int):
    """A number, during whose comparison another thread does something."""

    work: Callable[[], object] = staticmethod(lambda: None)

    def __add__(self, other: int) -> int:
        end = Interleaving(int(self) + other)
        end.work = self.work
        return end

    def __le__(self, other: int) -> bool:
        answer = int(self) <= other
        self.work()
        return answer


def test_a_mark_just_when_it_is_opened_again_is_on_the_disk() -> None:
    bits = Bits.of(bytearray(4096))
    recording = Recording(SIZE, GRANULE, bits, ())
    recorder = Recorder(recording)
    recorder.close("inactive")
    start = Interleaving(0)
    turns = iter([lambda: recorder.reopen(recording)])
    start.work = lambda: next(turns, lambda: None)()
    recorder.mark(start, 1)
    assert bits.octets[0] == 1


def test_a_write_that_begins_while_it_is_given_away_is_refused() -> None:
    outcomes: list[str] = []
    storage = Slow(image())

    def write() -> None:
        try:
            with tracker.writing(7 * GRANULE, 1):
                outcomes.append("marked")
        except StateError:
            outcomes.append("refused")

    thread = Thread(target=write)
    with qcow2bm.open(storage, "r+") as opened:
        tracker = opened.track()
        tracker.begin_migration()
        tracker.mark(5 * GRANULE, 1)
        storage.hook = lambda: None if thread.ident else thread.start()
        tracker.inactivate()
        storage.hook = lambda: None
        thread.join()
    assert outcomes == ["refused"]
    assert dirty(storage.data, "a") == {5}


def test_only_one_of_many_threads_gives_it_away_and_one_takes_it_back() -> None:
    with qcow2bm.open(image(), "r+") as opened:
        tracker = opened.track()
        for call in (tracker.inactivate, tracker.activate):
            done: list[object] = []

            def work(call: Callable[[], object] = call, done: list[object] = done) -> None:
                with suppress(StateError):
                    done.append(call())

            threads = [Thread(target=work) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert len(done) == 1


def test_flushing_in_the_background_goes_on_after_the_image_came_back() -> None:
    storage = RecordingStorage(image())
    with qcow2bm.open(storage, "r+") as opened:
        tracker = opened.track()
        with tracker.background(0.002):
            tracker.mark(5 * GRANULE, 1)
            tracker.inactivate()
            steps = len(storage.steps)
            time.sleep(0.03)
            assert len(storage.steps) == steps
            tracker.activate()
            tracker.mark(6 * GRANULE, 1)
            for _ in range(100):
                if not tracker.pending.pieces:
                    break
                time.sleep(0.005)
            assert tracker.pending.pieces == 0


@pytest.mark.spec("LIFE-7")
def test_what_is_carried_is_not_pending() -> None:
    with qcow2bm.open(image("a", "b"), "r+") as opened:
        tracker = opened.track()
        tracker.begin_migration(carried=["b"])
        tracker.mark(5 * GRANULE, 1)
        assert tracker.pending.pieces == 1
        assert tracker.inactivate().pieces == 1


def test_an_image_whose_bitmaps_are_stale_can_be_given_away_again() -> None:
    data = image()
    with qcow2bm.open(data, "r+") as opened:
        tracker = opened.track()
        tracker.inactivate()
        data[88:96] = bytes(8)  # a program that does not know bitmaps
        assert tracker.activate().outcome == "changed"
        assert tracker.names == []
        tracker.mark(0, SIZE)
        tracker.inactivate()
        assert tracker.activate().outcome in ("changed", "unknown")


def test_an_interrupt_after_the_commit_ends_tracking() -> None:
    with qcow2bm.open(image(), "r+") as opened:
        tracker = opened.track()
        tracker.inactivate()

        def interrupt(ranges: object) -> None:
            raise KeyboardInterrupt

        tracker._session.recorder.mark_many = interrupt  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            tracker.activate()
        assert tracker.state == "failed"
        with pytest.raises(StateError):
            tracker.mark(0, 1)
