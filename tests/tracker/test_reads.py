"""An operation of a tracker reads each structure of the metadata at most once.

What counts is what reaches the storage below all of the library. The header counts by the reads
of its whole cluster: before these, its first 512 bytes are read, which say how large a cluster
is. Asking the storage for its change token or its size reads nothing of the image, and does not
count; neither do refcounts, and the bitmap data of bitmaps that are loaded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from support.audit import Audit
from support.images import ONES, ZEROES, Stored, Word, build_image
from support.recording import RecordingStorage

import qcow2bm
from qcow2bm.tracker.tracker import Tracker

CLUSTER = 4096
GRANULE = 512
SIZE = 3 * 8 * CLUSTER * GRANULE
"""The size of a disk whose bitmaps of the finest granularity have three clusters."""


class Counting(RecordingStorage):
    """A storage that counts how often each host byte was read."""

    def __init__(self, data: bytearray) -> None:
        super().__init__(data)
        self.reads: list[tuple[int, int]] = []

    def read_into(self, offset: int, buffer: memoryview) -> int:
        self.reads.append((offset, len(buffer)))
        return super().read_into(offset, buffer)

    def times_read(self, start: int, length: int) -> int:
        """Counts the reads that have any of these bytes."""
        return sum(o < start + length and start < o + n for o, n in self.reads)


def image() -> bytearray:
    table: list[Word] = [b"\x01", ZEROES, b"\x80"]
    return build_image(
        Stored(b"a", table, 9),
        Stored(b"b", [ZEROES, ONES, b"\x04"], 9),
        Stored(b"off", table, 9, flags=0),
        Stored(b"spare", table, 9, flags=0),
        Stored(b"gone", table, 9, flags=0),
        cluster_bits=12,
        size=SIZE,
    ).data


def places(data: bytearray) -> dict[str, tuple[int, int]]:
    """Returns the places of the directory and of every bitmap table: host offset and length."""
    with qcow2bm.open(bytes(data)) as opened:
        tables = {
            f"table of {entry.name}": (entry.bitmap_table_offset, 8 * entry.bitmap_table_size)
            for entry in opened.directory
        }
        first = opened.directory[0].offset
        length = sum(entry.size for entry in opened.directory)
    return {"directory": (first, length), **tables}


def marked(tracker: Tracker) -> None:
    """Marks in clusters that are stored and in such as are not."""
    for start in range(0, SIZE, SIZE // 6):
        tracker.mark(start, GRANULE)


def edit(tracker: Tracker) -> None:
    """Everything that an edit can do, each with other bitmaps."""
    with tracker.edit() as edit:
        edit.add("new", GRANULE)
        edit.add("plain", GRANULE, enabled=False)
        edit.remove("gone")
        edit.enable("spare")
        edit.merge("b", "off")
        edit.merge("off", "a")
        edit.merge("plain", "off")
        edit.disable("a")


def give_away(storage: Counting, tracker: Tracker) -> None:
    tracker.mark(0, SIZE)
    tracker.inactivate()


def give_to_another_writer(storage: Counting, tracker: Tracker) -> None:
    """Gives the image to a writer that does not know the generation, and so ends the generation."""
    give_away(storage, tracker)
    storage.data[88] &= 0x7F


Before = Callable[[Counting, Tracker], object]
OPERATIONS: dict[str, tuple[Before, Callable[[Tracker], object]]] = {
    "rotate": (lambda storage, tracker: marked(tracker), lambda tracker: tracker.rotate("a", "c")),
    "edit": (lambda storage, tracker: marked(tracker), edit),
    "begin_migration": (
        lambda storage, tracker: marked(tracker),
        lambda tracker: tracker.begin_migration(carried=["b"]),
    ),
    "activate": (give_away, lambda tracker: tracker.activate()),
    "activate after another writer": (give_to_another_writer, lambda tracker: tracker.activate()),
}
"""By name what comes before an operation, and the operation itself."""


@contextmanager
def tracking(
    *, reserve: bool = False, generation: bool | None = None
) -> Iterator[tuple[Counting, Tracker]]:
    storage = Counting(image())
    with qcow2bm.open(storage, "r+") as opened:
        yield storage, opened.track(reserve=reserve, generation=generation)


@pytest.mark.parametrize("generation", [None, True])
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_reads_the_metadata_once(name: str, generation: bool | None) -> None:
    before, operation = OPERATIONS[name]
    with tracking(generation=generation) as (storage, tracker):
        for _ in range(2):  # the second time with what the first one has left
            before(storage, tracker)
            old = places(storage.data)
            storage.reads.clear()
            operation(tracker)
            new = places(storage.data)
            times = Counter(
                {
                    f"{what} at {place[0]:#x}": storage.times_read(*place)
                    for what, place in {**old, **{f"new {k}": v for k, v in new.items()}}.items()
                }
            )
            assert max(times.values()) == 1, times
            assert storage.reads.count((0, CLUSTER)) == 1
            assert storage.times_read(0, CLUSTER) <= 2
            if name == "begin_migration":
                tracker.cancel_migration()
            if name in ("rotate", "edit"):
                break
        tracker.abandon()


def test_what_a_commit_left_is_known_as_it_is_on_disk() -> None:
    """After a commit the tracker must know the metadata on disk, without reading them again."""
    with tracking() as (storage, tracker):
        for number in range(3):
            marked(tracker)
            edit_number(tracker, number)
            require_as_on_disk(storage, tracker)
            tracker.flush()
            tracker.rotate(tracker.names[0], f"rotated{number}")
            require_as_on_disk(storage, tracker)
            tracker.begin_migration()
            require_as_on_disk(storage, tracker)
            tracker.inactivate()
            tracker.activate()
            require_as_on_disk(storage, tracker)
        tracker.stop()
    assert Audit(storage.data).miscounted == {}


def edit_number(tracker: Tracker, number: int) -> None:
    with tracker.edit() as edit:
        edit.add(f"new{number}", GRANULE << number)
        if number:
            edit.remove(f"new{number - 1}")
        edit.merge("b", "off")


def require_as_on_disk(storage: Counting, tracker: Tracker) -> None:
    """Entries, tables and metadata in memory are those of an image that is opened now."""
    store = tracker._session.store
    with qcow2bm.open(bytes(storage.data)) as opened:
        assert store.metadata.directory.entries == tuple(opened.directory)
        assert store.metadata.file.header == opened.header
        entries = {entry.name: entry for entry in opened.directory}
    words = {bitmap.name.decode(): list(bitmap.words) for bitmap in Audit(storage.data).bitmaps}
    for bitmap in tracker._session.recording.bitmaps:
        assert bitmap.entry == entries[bitmap.name]
        assert list(bitmap.words) == words[bitmap.name]
    assert Audit(storage.data).miscounted == {}
