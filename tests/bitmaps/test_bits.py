"""Reading a bitmap gives the same as the plainest model of the bitmap."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.images import ONES, ZEROES, Built, Stored, Word, build_image
from support.model import Model

import qcow2bm
from qcow2bm.bitmaps.bit_reader import CHUNK_BYTES
from qcow2bm.format.directory import FLAG_IN_USE


def max_size(cluster_bits: int) -> int:
    """The largest disk that an image with such clusters can have."""
    return min(1 << 62, ((1 << 31) - 1) << (2 * cluster_bits - 3))


class Case(NamedTuple):
    """A bitmap in an image, and the disk it is of."""

    cluster_bits: int
    granularity_bits: int
    header_size: int
    table: Sequence[Word]
    whole_clusters: bool = True

    @property
    def virtual_size(self) -> int:
        return self.header_size & ~511

    def build(self, flags: int = 0, padding_words: Sequence[Word] = ()) -> Built:
        return build_image(
            Stored(b"other", flags=FLAG_IN_USE, table=[ONES]),
            Stored(
                table=(*self.table, *padding_words),
                granularity_bits=self.granularity_bits,
                flags=flags,
                after_table=b"\xff" * 24,
            ),
            cluster_bits=self.cluster_bits,
            size=min(self.header_size, 1 << 30),  # an L1 table for more takes memory, and no part
            header={"size": self.header_size},
            whole_clusters=self.whole_clusters,
        )

    @property
    def model(self) -> Model:
        return Model.of_table(
            self.table, 1 << self.cluster_bits, 1 << self.granularity_bits, self.virtual_size
        )


def words(cluster_size: int) -> st.SearchStrategy[Word]:
    """Clusters of each kind; what is stored may be all zeros or all ones as well."""
    pattern = st.binary(min_size=1, max_size=24) | st.sampled_from([b"\0", b"\xff", b"\x01"])
    stored = st.builds(
        lambda start, rest: (start + rest * cluster_size)[:cluster_size],
        st.binary(max_size=16),
        pattern,
    )
    return st.sampled_from([ZEROES, ONES]) | stored


@st.composite
def cases(draw: st.DrawFn, max_bytes: int) -> Case:
    cluster_bits = draw(st.sampled_from([9, 10, 12]))
    cluster_size = 1 << cluster_bits
    table: list[Word] = []
    for _ in range(draw(st.integers(1, 6))):
        most = max_bytes // cluster_size - len(table)
        repeat = draw(st.sampled_from([1, 2, 3, 15, 33]))
        table += [draw(words(cluster_size))] * min(repeat, most)
    # Any size for which the table has the right length, whole granules or not.
    limit = (max_size(cluster_bits) // (8 * cluster_size * len(table))).bit_length() - 1
    granularity_bits = draw(st.integers(0, limit))
    per_cluster = 8 * cluster_size << granularity_bits
    least, most = (len(table) - 1) * per_cluster, len(table) * per_cluster
    sectors = draw(
        st.integers(least // 512 + 1, most // 512)
        | st.sampled_from([most // 512, least // 512 + 1])
    )
    odd = draw(st.sampled_from([0, 1, 511])) if sectors * 512 < most else 0
    return Case(cluster_bits, granularity_bits, sectors * 512 + odd, table, draw(st.booleans()))


@contextmanager
def chunks_of(size: int) -> Iterator[None]:
    """All the sizes in which the reader works, made small, so that small bitmaps cross them."""
    with (
        mock.patch.multiple(
            "qcow2bm.bitmaps.bit_reader",
            CHUNK_BYTES=size,
            _LONG_BYTES=size // 2,
            _STEP_BYTES=size // 4,
        ),
        mock.patch("qcow2bm.bits.extents.WINDOW_BYTES", size // 8),
    ):
        yield


@contextmanager
def numpy_pays() -> Iterator[None]:
    """Counting then uses numpy, however few bits there are."""
    with mock.patch.multiple("qcow2bm.bitmaps.bit_reader", _NUMPY_PAYS=0, _FEW_BYTES=0):
        yield


@contextmanager
def numpy_not_loaded() -> Iterator[None]:
    """Counting then goes without numpy."""
    hidden = {name: module for name, module in sys.modules.items() if name != "numpy"}
    with mock.patch.dict(sys.modules, hidden, clear=True):
        yield
        assert "numpy" not in sys.modules


def assert_reads_as(bitmap: qcow2bm.Bitmap, model: Model) -> None:
    arrays = list(bitmap.extents())
    assert all(e.dtype == np.int64 and e.ndim == 2 and len(e) for e in arrays)
    extents = model.extents
    assert [row for e in arrays for row in e.tolist()] == extents
    packed = model.packed
    assert bitmap.packed().tobytes() == packed
    assert bitmap.stale_bits().tobytes() == packed
    assert bitmap.sha256() == model.sha256
    totals = model.dirty_bytes, len(extents)
    for counting in (numpy_pays, numpy_not_loaded):
        with counting():
            assert bitmap.count() == totals[0]
            assert bitmap.totals() == totals
            assert bitmap.stale_totals() == totals


@given(case=cases(max_bytes=24 << 10), chunk=st.sampled_from([64, 512, 1536, 65536]))
@settings(max_examples=80, deadline=None)
def test_bits_are_those_of_the_model(case: Case, chunk: int) -> None:
    image = qcow2bm.open(case.build().data)
    bitmap = image.bitmaps["daily"]
    with chunks_of(chunk):
        assert bitmap.status == "valid"
        assert_reads_as(bitmap, case.model)
    assert bitmap.clusters == (
        case.table.count(ZEROES),
        case.table.count(ONES),
        sum(isinstance(word, bytes) for word in case.table),
    )


KINDS: tuple[Word, ...] = (ZEROES, ONES, (b"\x81" + bytes(62) + b"\x80") * 1024)


@pytest.mark.parametrize("first", KINDS, ids=["zeroes", "ones", "stored"])
@pytest.mark.parametrize("second", KINDS, ids=["zeroes", "ones", "stored"])
@pytest.mark.parametrize("third", KINDS, ids=["zeroes", "ones", "stored"])
def test_long_runs_next_to_each_other(first: Word, second: Word, third: Word) -> None:
    case = Case(16, 16, (3 * 8 * 65536 - 13 << 16) - 512, [first, second, third])
    assert_reads_as(qcow2bm.open(case.build().data).bitmaps["daily"], case.model)


def test_more_bits_than_are_read_at_once() -> None:
    table = [*KINDS, *KINDS[2:] * 16, *KINDS, *KINDS[1:], *KINDS[2:]]
    assert len(table) * 65536 > CHUNK_BYTES
    case = Case(16, 16, (len(table) * 8 * 65536 - 13 << 16) - 512, table)
    assert_reads_as(qcow2bm.open(case.build().data).bitmaps["daily"], case.model)


@pytest.mark.parametrize("cluster_bits", [9, 12, 21])
@pytest.mark.parametrize("last", [ONES, b"\xff" * (1 << 21)], ids=["ones", "stored"])
@pytest.mark.parametrize("bits", [1, 7, 8, 9, 63, 64, 65, 4095, 4096])
def test_bits_past_the_disk_are_zero(cluster_bits: int, last: Word, bits: int) -> None:
    """INV-TAIL: whatever stands there on disk."""
    word = last if isinstance(last, int) else last[: 1 << cluster_bits]
    case = Case(cluster_bits, 16, (bits << 16) - 512, [word])
    bitmap = qcow2bm.open(case.build().data).bitmaps["daily"]
    assert bitmap.count() == case.virtual_size
    assert sum(byte.bit_count() for byte in bitmap.packed().tolist()) == bits
    assert_reads_as(bitmap, case.model)


@pytest.mark.parametrize("granularity_bits", [0, 8, 9, 31, 32, 61, 62, 63])
@pytest.mark.parametrize("size", [512, 1 << 30, (1 << 62) - 512, 1 << 62])
def test_the_largest_disks_and_granularities(granularity_bits: int, size: int) -> None:
    size = min(size, 40000 << granularity_bits)  # the fewer bits, the faster the model
    case = Case(18, granularity_bits, size, [b"\xff" * (1 << 18)])
    bitmap = qcow2bm.open(case.build().data).bitmaps["daily"]
    assert bitmap.count() == case.virtual_size
    assert_reads_as(bitmap, case.model)


def test_an_extent_is_in_one_piece_over_any_number_of_arrays() -> None:
    table: list[Word] = [b"\xff" * 512] * 40 + [ONES] * 40 + [b"\xff" * 100]
    case = Case(9, 16, 8 * 512 * len(table) << 16, table)
    bitmap = qcow2bm.open(case.build().data).bitmaps["daily"]
    with chunks_of(64):
        (only,) = bitmap.extents()
    assert only.tolist() == [[0, (80 * 512 + 100) * 8 << 16]]


# --- stale_bits: what is not known is dirty (INV-COARSE) --------------------------------------

PAST_EOF = 1 << 40
UNKNOWN = {
    "reserved bit": 2,
    "high reserved bit": 1 << 63,
    "unaligned": (4096 + 512),
    "all-ones bit and offset": 4096 | 1,
    "past the end": PAST_EOF,
    "largest": (1 << 56) - 512,
}


@pytest.mark.parametrize("word", UNKNOWN.values(), ids=UNKNOWN)
@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("flags", [0, FLAG_IN_USE])
def test_stale_bits_are_dirty_where_the_table_makes_no_sense(
    word: int, place: int, flags: int
) -> None:
    table: list[Word] = [b"\x05", ZEROES, b"\x50"]
    table[place] = word
    case = Case(12, 16, (3 * 8 * 4096 << 16) - (5 << 16), table)
    bitmap = qcow2bm.open(case.build(flags).data).bitmaps["daily"]
    assert bitmap.status == "broken"
    assert bitmap.stale_bits().tobytes() == case.model.packed
    assert bitmap.stale_totals() == (case.model.dirty_bytes, len(case.model.extents))


@pytest.mark.parametrize("flags", [0, FLAG_IN_USE])
def test_stale_bits_are_dirty_behind_a_table_that_is_too_short(flags: int) -> None:
    case = Case(9, 16, 3 * 8 * 512 << 16, [b"\x01"])
    bitmap = qcow2bm.open(case.build(flags).data).bitmaps["daily"]
    assert bitmap.status == ("inconsistent" if flags else "broken")
    assert case.model.text == "1" + "0" * 4095 + "1" * 8192
    assert bitmap.stale_bits().tobytes() == case.model.packed
    assert bitmap.stale_totals() == (case.model.dirty_bytes, 2)


@pytest.mark.parametrize("flags", [0, FLAG_IN_USE])
def test_stale_bits_ignore_what_a_table_has_too_many(flags: int) -> None:
    case = Case(9, 16, 8 * 512 << 16, [b"\x01"])
    bitmap = qcow2bm.open(case.build(flags, [ONES, b"\xff", 3]).data).bitmaps["daily"]
    assert bitmap.stale_bits().tobytes() == case.model.packed


def test_stale_bits_are_dirty_where_the_file_ends_inside_the_data() -> None:
    case = Case(9, 16, 3 * 8 * 512 << 16, [b"\x01", ZEROES, ZEROES])
    image = case.build()
    end = len(image.data)
    image.plant(end, "bitmap-table", 1, 1)
    image.plant(end + 512, "bitmap-table", 1, 2)
    image.data.extend(b"\x01".ljust(512, b"\0") + b"\x01")  # the third cluster ends after a byte
    bitmap = qcow2bm.open(image.data).bitmaps["daily"]
    assert bitmap.status == "broken"
    assert bitmap.stale_bits().tobytes() == b"\x01".ljust(512, b"\0") * 2 + b"\xff" * 512


def test_the_end_of_a_file_may_lie_behind_the_last_byte_of_bits() -> None:
    """The file may end in the last cluster, but only after the last byte that has bits."""
    case = Case(9, 16, (8 * 512 + 12) << 16, [ZEROES, ZEROES])
    image = case.build()
    image.plant(len(image.data), "bitmap-table", 1, 1)
    image.data.extend(b"\xff\xff")
    bitmap = qcow2bm.open(image.data).bitmaps["daily"]
    assert bitmap.status == "valid"
    assert bitmap.count() == 12 << 16
    assert qcow2bm.open(image.data[:-1]).bitmaps["daily"].status == "broken"


def test_stale_bits_that_would_fill_the_memory_are_refused() -> None:
    """A table of one entry for a disk of 2^61 bytes, bit by byte."""
    image = build_image(Stored(table=[ZEROES], granularity_bits=0), header={"size": 1 << 61})
    bitmap = qcow2bm.open(image.data).bitmap(0)
    assert bitmap.status == "broken"
    with pytest.raises(qcow2bm.Qcow2BmError):
        bitmap.stale_bits()
