"""Tracking writes no more bytes and barriers than promised, as the storage counts them."""

from __future__ import annotations

from random import Random
from typing import NamedTuple

import numpy as np
import pytest
from support.audit import Audit
from support.images import ONES, Built, Stored, build_image
from support.interrupted_edits import EDITS
from support.recording import (
    Place,
    RecordingStorage,
    cover,
    intervals_of,
    random_ranges,
    stored_bits,
)

import qcow2bm
from qcow2bm.clusters.plan import Plan
from qcow2bm.format.bitmap_table import ENTRY_LENGTH
from qcow2bm.units import ceil_div

KiB = 1 << 10
PIECE = 4 * KiB
CLUSTER = 64 * KiB
FINE, COARSE = 64 * KiB, 256 * KiB
A_PIECE = 8 * PIECE * FINE
"""The guest bytes that a piece of the bitmap of the finer granularity covers."""
A_CLUSTER = 8 * CLUSTER * FINE
SIZE = 4 * A_CLUSTER

GARBAGE = b"\xaa"


class Costs(NamedTuple):
    """The bytes and barriers of one call, by its report and by the storage."""

    report: tuple[int, int]
    plan: Plan

    @property
    def intervals(self) -> list[list[Place]]:
        """The places that were written, barrier by barrier; asserts that the report agrees."""
        assert self.report == (self.plan.length, self.plan.barriers)
        return intervals_of(self.plan)


class Session:
    """A tracker of an image whose storage counts."""

    def __init__(self, data: bytearray) -> None:
        self.storage = RecordingStorage(data)
        self.image = qcow2bm.open(self.storage, "r+")
        self.tracker = self.image.track()
        self.begun = Plan(tuple(self.storage.steps))

    def flush(self, max_bytes: int | None = None, deadline: float | None = None) -> Costs:
        first = len(self.storage.steps)
        report = self.tracker.flush(max_bytes, deadline)
        return Costs((report.bytes_written, report.barriers), self.storage.since(first))

    def stop(self) -> Costs:
        first = len(self.storage.steps)
        report = self.tracker.stop()
        return Costs((report.bytes_written, report.barriers), self.storage.since(first))


def dense() -> Built:
    """Two bitmaps, of which every cluster is allocated but one of all ones."""
    some = b"\x01"
    fine = Stored(b"fine", [some, ONES, some, some], 16)
    return build_image(fine, Stored(b"coarse", [some], 18), cluster_bits=16, size=SIZE)


def sparse(cluster_bits: int = 16, garbage: int = 6) -> Built:
    """A bitmap without any cluster, and free clusters that are not empty."""
    size = 4 * (8 << cluster_bits) * FINE
    built = build_image(Stored(b"fine"), cluster_bits=cluster_bits, size=size)
    built.data.extend(GARBAGE * (garbage << cluster_bits))
    return built


def flags(built: Built, bitmap: int) -> Place:
    """The flags of a bitmap and how long they are."""
    return built.offset("directory-entry", bitmap, "flags"), 4


def piece(built: Built, cluster: int, number: int, bitmap: int = 0) -> Place:
    """A piece of a cluster that is stored."""
    return built.offset("bitmap-data", bitmap, cluster) + number * PIECE, PIECE


def table_sector(built: Built, entry: int) -> Place:
    """The sector of the first bitmap's table that has an entry, as far as the table goes."""
    start = built.offset("bitmap-table", 0)
    end = start + ENTRY_LENGTH * built.entries[0].bitmap_table_size
    first = start + ENTRY_LENGTH * entry // 512 * 512
    return first, min(512, end - first)


# --- a stop --------------------------------------------------------------------------------------


@pytest.mark.spec("TRACK-9")
@pytest.mark.spec("TRACK-11")
def test_a_stop_writes_the_pieces_that_changed_and_the_flags() -> None:
    built = dense()
    session = Session(built.data)
    session.tracker.mark(A_PIECE, 1)  # in the second piece of the fine one, the first of the other
    session.tracker.mark(2 * A_CLUSTER + 5 * A_PIECE, 2 * A_PIECE)
    assert session.stop().intervals == [
        [
            piece(built, 0, 1),
            (piece(built, 2, 5)[0], 2 * PIECE),
            piece(built, 0, 0, bitmap=1),
            # A cluster of the fine one is four pieces of the coarse one.
            piece(built, 0, 2 * 4 + 1, bitmap=1),
        ],
        [flags(built, 0), flags(built, 1)],
    ]


def test_with_nothing_left_a_stop_writes_the_flags() -> None:
    built = dense()
    session = Session(built.data)
    session.tracker.mark(A_PIECE, A_PIECE)
    assert session.flush().plan.length == 2 * PIECE
    assert session.flush() == ((0, 0), Plan())
    assert session.stop().intervals == [[flags(built, 0), flags(built, 1)]]


@pytest.mark.spec("TRACK-5")
def test_writing_where_it_is_dirty_costs_nothing() -> None:
    built = dense()
    session = Session(built.data)
    ranges = [(0, 1), (A_CLUSTER, A_CLUSTER), (3 * A_PIECE + FINE, 2 * A_PIECE)]
    for _ in range(3):
        for start, length in ranges:
            session.tracker.mark(start, length)
        session.tracker.mark_many(np.array(ranges))
        with session.tracker.writing(*ranges[0]):
            pass
        session.flush()
    assert session.tracker.pending[:2] == (0, 0)
    before = session.storage.data[:]
    assert session.stop().intervals == [[flags(built, 0), flags(built, 1)]]
    changed = [n for n, pair in enumerate(zip(before, built.data, strict=True)) if len({*pair}) > 1]
    assert changed == [flags(built, 0)[0] + 3, flags(built, 1)[0] + 3]


def test_what_is_all_ones_is_never_written() -> None:
    built = dense()
    session = Session(built.data)
    session.tracker.mark(A_CLUSTER, A_CLUSTER)
    first, last = (piece(built, 0, number, bitmap=1) for number in (4, 7))
    assert session.stop().intervals == [
        [(first[0], last[0] + last[1] - first[0])],  # of the coarse one
        [flags(built, 0), flags(built, 1)],
    ]
    assert Audit(built.data).bitmaps[0].words[1] == ONES


def test_bits_shorter_than_a_piece_are_written_as_long_as_they_are() -> None:
    bits = Stored(b"short", [b"\x01", b"\x01", b"\x01"], 9)
    built = build_image(bits, size=2 * 8 * 512 * 512 + 512)  # two clusters of 512 bytes and a bit
    session = Session(built.data)
    session.tracker.mark(512, 1)
    assert session.stop().intervals[0] == [(built.offset("bitmap-data", 0, 0), 3 * 512)]


@pytest.mark.spec("TRACK-11")
def test_a_stop_that_allocates_has_one_barrier_more() -> None:
    built = sparse()
    session = Session(built.data)
    session.tracker.mark(A_CLUSTER, 1)
    costs = session.stop()
    block = built.offset("refcount-block")
    cluster = Audit(built.data).bitmaps[0].words[1]
    data, tables, marks = costs.intervals
    assert [place for place in data if place[0] != cluster] == [(block, 512)]
    assert (cluster, CLUSTER) in data
    assert (tables, marks) == ([table_sector(built, 1)], [flags(built, 0)])
    assert costs.plan.barriers == 3


def test_only_the_sectors_of_a_table_that_changed_are_written() -> None:
    """A sector has 64 entries."""
    covered, entries = 8 * 512 * FINE, 200
    built = build_image(Stored(b"long"), size=entries * covered)
    session = Session(built.data)
    for entry in (3, 5, 130):
        session.tracker.mark(entry * covered, 1)
    _, tables, _ = session.stop().intervals
    assert tables == [table_sector(built, 3), table_sector(built, 130)]


# --- a flush -------------------------------------------------------------------------------------


def test_a_flush_writes_once_what_a_stop_need_not_write_then() -> None:
    built = dense()
    session = Session(built.data)
    session.tracker.mark(A_PIECE, 1)
    assert session.flush().intervals == [[piece(built, 0, 1), piece(built, 0, 0, bitmap=1)]]
    session.tracker.mark(2 * A_CLUSTER + FINE, 1)
    assert session.stop().intervals == [
        [piece(built, 2, 0), piece(built, 0, 8, bitmap=1)],
        [flags(built, 0), flags(built, 1)],
    ]


def test_a_flush_writes_no_more_than_it_may() -> None:
    session = Session(dense().data)
    for number in range(10):
        session.tracker.mark(number * A_PIECE, 1)
    pieces = session.tracker.pending.pieces
    for most, expected in ((3 * PIECE, 3), (PIECE + 1, 1), (1, 1), (4 * PIECE, 4)):
        costs = session.flush(max_bytes=most)
        assert costs.plan.length == expected * PIECE
        assert costs.plan.barriers == 1
        pieces -= expected
        assert session.tracker.pending[:2] == (pieces * PIECE, pieces)
    session.flush()
    assert session.tracker.pending[:2] == (0, 0)


@pytest.mark.parametrize("deadline", [0, 1e9])
def test_a_flush_with_a_deadline_goes_on_until_then(deadline: float) -> None:
    """A flush with a deadline must store at least one batch, and stop at the deadline."""
    clusters = 300
    size = clusters * 8 * CLUSTER * 512
    bits = Stored(b"long", [b"\x01"] * clusters, 9)
    session = Session(build_image(bits, cluster_bits=16, size=size).data)
    session.tracker.mark(0, size)
    pieces = session.tracker.pending.pieces
    costs = session.flush(deadline=deadline)
    left = session.tracker.pending.pieces
    assert costs.intervals
    assert left == 0 if deadline else 0 < left < pieces


@pytest.mark.parametrize("cluster_bits", [9, 12, 16])
def test_what_stood_in_free_clusters_does_not_show(cluster_bits: int) -> None:
    built = sparse(cluster_bits)
    session = Session(built.data)
    free = {*range(len(built.data) >> cluster_bits)} - set(Audit(built.data).refcounts)
    session.tracker.mark(9 * FINE, 1)
    session.flush()
    session.tracker.mark(3 * (8 << cluster_bits) * FINE, 1)
    session.stop()
    audit = Audit(built.data)
    (bitmap,) = audit.bitmaps
    assert audit.dirty(bitmap) == {9, 3 * (8 << cluster_bits)}
    assert len(bitmap.data_offsets) == 2
    assert {offset >> cluster_bits for offset in bitmap.data_offsets} <= free
    assert audit.miscounted == {}


@pytest.mark.spec("TRACK-9")
@pytest.mark.parametrize("cluster_bits", [9, 12, 16])
def test_counted_and_whole_before_a_table_leads_there(cluster_bits: int) -> None:
    """A cluster and its refcount must be durable before a table leads to the cluster."""
    built = sparse(cluster_bits)
    session = Session(built.data)
    session.tracker.mark(9 * FINE, 1)
    data, tables = session.flush().intervals
    word = Audit(built.data).bitmaps[0].words[0]
    assert (word, 1 << cluster_bits) in data
    assert tables == [table_sector(built, 0)]
    in_block = built.offset("refcount-block") + 2 * (word >> cluster_bits)
    assert any(start <= in_block < start + length for start, length in data)


def test_all_pieces_of_a_new_cluster_are_written_with_it() -> None:
    """A limit is for what has its place already."""
    built = sparse()
    session = Session(built.data)
    session.tracker.mark(0, 3 * A_PIECE)
    assert session.flush(max_bytes=PIECE).plan.barriers == 2
    assert Audit(built.data).dirty(Audit(built.data).bitmaps[0]) == set(range(3 * 8 * PIECE))


# --- refcount structures -------------------------------------------------------------------------


@pytest.mark.spec("TRACK-10")
@pytest.mark.parametrize("name", ["refcount block", "refcount table"])
def test_refcount_structures_grow_before_anything_is_tracked(name: str) -> None:
    """Refcount structures must grow at the beginning, so that there is room for all later marks."""
    data = EDITS[name].image()
    before = Audit(data)
    session = Session(data)
    begun = Audit(data)
    assert [*begun._blocks()] != [*before._blocks()]
    session.tracker.mark(0, session.image.virtual_size // 2)
    intervals = session.flush().intervals
    session.tracker.mark(0, session.image.virtual_size)
    *others, marks = session.stop().intervals
    intervals += others
    audit = Audit(data)
    assert (audit.table_offset, audit.table_clusters) == (begun.table_offset, begun.table_clusters)
    assert [*audit._blocks()] == [*begun._blocks()]
    assert audit.miscounted == {}
    assert {length for _, length in marks} == {4}
    # A cluster is a sector here.
    expected = {offset // 512 for _, offset in audit._blocks()}
    for bitmap in audit.bitmaps:
        table_sectors = ceil_div(ENTRY_LENGTH * len(bitmap.words), 512)
        expected |= {bitmap.table_offset // 512 + n for n in range(table_sectors)}
        expected |= {offset // 512 for offset in bitmap.data_offsets}
    for start, length in (place for places in intervals for place in places):
        assert {*range(start // 512, ceil_div(start + length, 512))} <= expected


@pytest.mark.spec("TRACK-10")
def test_after_a_flush_of_all_a_stop_needs_no_cluster() -> None:
    random = Random("clusters")
    built = sparse(9, garbage=0)
    session = Session(built.data)
    size = session.image.virtual_size
    session.tracker.mark(0, size)
    session.flush()
    length, counts = len(built.data), Audit(built.data).refcounts
    session.tracker.mark_many(np.array(random_ranges(random, size, 100, size)))
    assert session.stop().intervals == [[flags(built, 0)]]
    assert (len(built.data), Audit(built.data).refcounts) == (length, counts)


def test_set_aside_is_not_counted() -> None:
    """Clusters that are set aside must not be counted; if never needed, they would leak."""
    built = sparse()
    before = Audit(built.data).refcounts
    session = Session(built.data)
    assert Audit(built.data).refcounts == before
    assert intervals_of(session.begun) == [[flags(built, 0)]]
    session.stop()
    assert Audit(built.data).refcounts == before


@pytest.mark.parametrize("seed", range(10))
def test_reports_are_what_the_storage_saw(seed: int) -> None:
    random = Random(seed)
    built = random.choice((dense, sparse))()
    session = Session(built.data)
    size = session.image.virtual_size
    expected = stored_bits(built.data)
    for _ in range(8):
        ranges = random_ranges(random, size, 20, size // 50)
        session.tracker.mark_many(np.array(ranges))
        for name, bits in expected.items():
            cover(bits, {"fine": FINE, "coarse": COARSE}[name], ranges)
        assert len(session.flush(random.choice((None, 3 * PIECE))).intervals) <= 2
    assert 1 <= len(session.stop().intervals) <= 3
    for name, bits in stored_bits(built.data).items():
        assert np.array_equal(bits, expected[name])
