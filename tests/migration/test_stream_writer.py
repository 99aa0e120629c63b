"""What is written is read again; what cannot be sent is refused before the first byte."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.streams import FORMS, came, cut, outcome, outgoing, sent, several

from qcow2bm.errors import BitmapError, FormatError
from qcow2bm.format import stream, stream_bitmap
from qcow2bm.format.stream_buffer import NeedDataError, StreamBuffer
from qcow2bm.migration.stream_bitmaps import read_stream
from qcow2bm.migration.stream_writer import OutgoingBitmap, write_stream

ONE = OutgoingBitmap("disk", "daily", 65536, True, True, b"\x05", 8 * 65536)


@pytest.mark.spec("STREAM-1", "STREAM-14")
@pytest.mark.parametrize("form", FORMS)
@given(bitmaps=several())
@settings(max_examples=60)
def test_round_trip(form: str, bitmaps: list[OutgoingBitmap]) -> None:
    found = read_stream([FORMS[form](bitmaps)])
    assert (found.is_complete, found.fault) == (True, None)
    assert [came(bitmap) for bitmap in found.complete] == [sent(bitmap) for bitmap in bitmaps]


@pytest.mark.spec("STREAM-12")
@pytest.mark.parametrize("form", FORMS)
@given(bitmaps=several(), data=st.data())
@settings(max_examples=40)
def test_pieces_make_no_difference(
    form: str, bitmaps: list[OutgoingBitmap], data: st.DataObject
) -> None:
    content = FORMS[form](bitmaps)
    expected = outcome([content])
    places = data.draw(st.lists(st.integers(0, len(content)), max_size=10))
    assert outcome(cut(content, places)) == expected
    assert outcome(content[n : n + 1] for n in range(len(content))) == expected


@pytest.mark.spec("STREAM-14")
def test_the_sections_alone_are_a_part_of_the_whole() -> None:
    section = b"".join(write_stream([ONE], None))
    whole = b"".join(write_stream([ONE], "pc-q35-7.2"))
    assert whole == b"QEVM\0\0\0\x03\x07\0\0\0\x0apc-q35-7.2" + section + b"\0"


def test_no_bitmaps_make_sections_all_the_same() -> None:
    found = read_stream([b"".join(write_stream([], "pc"))])
    assert (found.is_complete, found.all) == (True, [])


def records(data: bytes) -> list[stream_bitmap.Record]:
    """All records of the bitmaps in the sections alone."""
    window = StreamBuffer(data)
    found: list[stream_bitmap.Record] = []
    while window.length:
        stream.parse_section(window)
        while not found or found[-1].flags != stream_bitmap.EOS:
            found.append(stream_bitmap.parse_record(window))
        stream.parse_section(window)  # the footer
        if window.length:
            found.pop()  # EOS ends the loop above
    return found[:-1]


@pytest.mark.spec("STREAM-15")
@given(outgoing())
def test_chunks_are_as_qemu_sends_them(bitmap: OutgoingBitmap) -> None:
    found = records(b"".join(write_stream([bitmap], None)))
    chunks = [record.body for record in found if isinstance(record.body, stream_bitmap.Bits)]
    per_bit = bitmap.granularity // 512
    assert chunks[0].start_sector == 0
    assert all(a.start_sector + a.nr_sectors == b.start_sector for a, b in pairwise(chunks))
    assert chunks[-1].start_sector + chunks[-1].nr_sectors == bitmap.disk_size // 512
    for chunk in chunks[:-1]:
        assert chunk.nr_sectors % (256 * per_bit) == 0
        full = 8192 * per_bit
        assert chunk.nr_sectors == full or (1 << 32) - 256 * per_bit <= chunk.nr_sectors < full
    for chunk in chunks:
        assert chunk.nr_sectors < 1 << 32
        if chunk.data is not None:
            assert any(chunk.data)
            bits = -(-chunk.nr_sectors // per_bit)
            needed = -(-bits // 8)
            assert len(chunk.data) == -(-needed // 32) * 32
            assert int.from_bytes(chunk.data, "little") >> bits == 0


@pytest.mark.spec("STREAM-15")
def test_a_clear_disk_costs_little() -> None:
    bitmap = ONE._replace(packed=bytes(1 << 20), disk_size=8 * 65536 << 20)
    assert sum(map(len, write_stream([bitmap], None))) < 14 * 1024 + 100


CANNOT: list[tuple[dict[str, Any], type[Exception]]] = [
    ({"name": ""}, BitmapError),
    ({"name": "n" * 256}, BitmapError),
    ({"name": "ü" * 128}, BitmapError),
    ({"node_alias": ""}, ValueError),
    ({"node_alias": "n" * 256}, ValueError),
    ({"granularity": 256}, BitmapError),
    ({"granularity": 1000}, BitmapError),
    ({"granularity": 1 << 32}, BitmapError),
    ({"disk_size": 0}, ValueError),
    ({"disk_size": 1000}, ValueError),
    ({"disk_size": 8 * 65536 + 512}, ValueError),
]


@pytest.mark.spec("STREAM-16")
@pytest.mark.parametrize(("change", "error"), CANNOT)
def test_what_cannot_be_sent_is_refused_at_once(
    change: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        write_stream([ONE, ONE._replace(name="other")._replace(**change)], "pc")


@pytest.mark.spec("STREAM-16")
def test_names_must_differ() -> None:
    with pytest.raises(BitmapError, match="twice"):
        write_stream([ONE, ONE], "pc")
    write_stream([ONE, ONE._replace(node_alias="other")], "pc")


@pytest.mark.spec("STREAM-16")
@pytest.mark.parametrize("machine", ["", "m" * 256])
def test_a_machine_has_a_name(machine: str) -> None:
    with pytest.raises(ValueError, match="machine"):
        write_stream([ONE], machine)


@pytest.mark.parametrize(
    "record",
    [
        stream_bitmap.Record(stream_bitmap.START, None, None, stream_bitmap.Start(1 << 32, 0)),
        stream_bitmap.Record(stream_bitmap.BITS, None, None, stream_bitmap.Bits(0, 1 << 32, None)),
        stream_bitmap.Record(stream_bitmap.BITS, None, None, stream_bitmap.Bits(-1, 1, bytes(8))),
        stream_bitmap.Record(stream_bitmap.BITMAP_NAME | stream_bitmap.COMPLETE, None, bytes(256)),
    ],
)
def test_a_record_that_does_not_fit_is_not_built(record: stream_bitmap.Record) -> None:
    with pytest.raises(FormatError):
        stream_bitmap.build_record(record)


def test_a_record_that_is_cut_off_waits() -> None:
    data = next(piece for piece in write_stream([ONE], None) if b"daily" in piece)
    for length in range(len(data)):
        with pytest.raises(NeedDataError):
            stream_bitmap.parse_record(StreamBuffer(data[:length]))
