"""What may be in a stream, what may not, and how far it is good where it breaks off."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import streams
from support.streams import (
    EOF,
    EOS,
    FORMS,
    FULL,
    PAGE,
    PAGES,
    RAM_EOS,
    came,
    command,
    envelope,
    mapped,
    memory,
    more,
    outcome,
    package,
    page,
    parts,
    precopy,
    sent,
    several,
    start,
    string,
    subsection,
)
from support.traced_memory import traced_memory

from qcow2bm.bitmaps.directory import MAX_BITMAPS
from qcow2bm.errors import FormatError, LimitError, Qcow2BmError, StateError, UnsupportedError
from qcow2bm.migration.stream_bitmaps import StreamBitmaps, read_stream
from qcow2bm.migration.stream_reader import StreamReader
from qcow2bm.migration.stream_records import BitmapChunk, StreamEnd
from qcow2bm.migration.stream_writer import OutgoingBitmap

ONE = OutgoingBitmap("disk", "daily", 65536, True, True, b"\x05", 8 * 65536)
TWO = OutgoingBitmap("disk", "größe", 512, False, False, bytes(1024) + b"\x01", 512 * 8200)

BEGIN = b"\x1c" + string(b"disk") + string(b"daily") + struct.pack(">IB", 512, 3)


def sections(begin: bytes, end: bytes) -> bytes:
    """A whole stream of just these records."""
    dirty = start(b"dirty-bitmap", begin + EOS, 3), more(3, end + EOS, 3)
    return b"".join((envelope(), *dirty, EOF))


def bits(start_sector: int, nr_sectors: int, data: bytes | None = None, size: int = -1) -> bytes:
    """A BITS record of the bitmap before."""
    if data is None:
        return struct.pack(">BQI", 0x42, start_sector, nr_sectors)
    size = len(data) if size < 0 else size
    return struct.pack(">BQIQ", 0x40, start_sector, nr_sectors, size) + data


def refusal(data: bytes) -> FormatError:
    """The error of a stream that is refused, and not just cut off."""
    reader = StreamReader()
    try:
        reader.feed(data)
        reader.feed(b"")
    except FormatError as error:
        return error
    pytest.fail("it is not refused")


# --- what a stream may look like --------------------------------------------------------------


@pytest.mark.spec("STREAM-1")
@pytest.mark.parametrize("footer", [True, False])
def test_footers_may_be_missing(footer: bool) -> None:
    found = read_stream([precopy([ONE, TWO], footer=footer)])
    assert found.is_complete
    assert [came(bitmap) for bitmap in found.complete] == [sent(ONE), sent(TWO)]


@pytest.mark.spec("STREAM-1")
def test_the_configuration_may_be_missing() -> None:
    data = precopy([ONE])
    shorter = envelope(machine=None) + data[data.index(command(3)) :]
    assert outcome([shorter]) == outcome([data])


@pytest.mark.spec("STREAM-1")
@pytest.mark.parametrize("bits", [10, 13, 16])
def test_pages_may_have_another_size(bits: int) -> None:
    told = subsection(b"configuration/target-page-bits", struct.pack(">I", bits))
    pages = page(8, b"\x7e" * (1 << bits), b"pc.ram") + RAM_EOS
    data = precopy([ONE])
    data = data[data.index(b"\x01\0\0\0\x03\x0cdirty") :].replace(b"".join(PAGES) + RAM_EOS, pages)
    ram = start(b"ram", memory((b"pc.ram", 1 << bits, b"")) + RAM_EOS, 2)
    found = read_stream([envelope(told) + ram + data])
    assert [came(bitmap) for bitmap in found.complete] == [sent(ONE)]


@pytest.mark.spec("STREAM-1")
def test_shared_memory_has_addresses() -> None:
    told = subsection(
        b"configuration/capabilities", struct.pack(">I", 1) + string(b"x-ignore-shared")
    )
    blocks = memory((b"pc.ram", PAGE, bytes(8)), (b"vga", PAGE, b"\0" * 7 + b"\x10"))
    data = envelope(told) + start(b"ram", blocks + RAM_EOS, 2) + EOF
    assert outcome([data]).events == [StreamEnd()]


@pytest.mark.spec("STREAM-1")
@pytest.mark.parametrize("size", [1, 7, 4096, 1 << 20])
def test_mapped_ram_is_passed_over(size: int) -> None:
    data = mapped([ONE], [(8, 5000), (0, 0)])
    found = read_stream(data[start : start + size] for start in range(0, len(data), size))
    assert [came(bitmap) for bitmap in found.complete] == [sent(ONE)]
    assert "is cut off" in str(read_stream([data[:6000]]).fault)


@pytest.mark.spec("STREAM-11")
def test_mapped_ram_that_lies_elsewhere() -> None:
    assert "version" in str(refusal(mapped([ONE], version=2)))
    for gaps in ((8, 7), (-1, 10), (1 << 62, 1)):
        assert "pages_offset" in str(refusal(mapped([ONE], [gaps])))


@pytest.mark.spec("STREAM-1")
def test_blocks_of_huge_pages_say_so_where_memory_may_come_late() -> None:
    huge = struct.pack(">Q", 1 << 21)
    blocks = memory((b"small", PAGE, b""), (b"huge", 1 << 21, huge), (b"s", PAGE, b""))
    advise = command(3, bytes(16))
    assert outcome([envelope() + advise + start(b"ram", blocks + RAM_EOS, 2) + EOF]).error is None


@pytest.mark.spec("STREAM-2")
@pytest.mark.parametrize("end", [EOF, FULL])
def test_what_follows_the_end_is_not_looked_at(end: bytes) -> None:
    data = envelope() + start(b"dirty-bitmap", EOS, 3) + end
    reader = StreamReader()
    assert reader.feed(data + b"\xff" * 100) == [StreamEnd()]
    assert reader.feed(b"\xff" * 100) == []
    assert reader.finish() == []


@pytest.mark.spec("STREAM-2")
def test_a_package_is_passed_over() -> None:
    assert outcome([envelope() + package(FULL + EOF + b"\xff" * 70000) + EOF]).error is None


@pytest.mark.spec("STREAM-3")
@pytest.mark.parametrize(
    ("data", "what"),
    [
        (envelope() + start(b"spapr/htab", b"", 5), 'section "spapr/htab"'),
        (
            envelope(subsection(b"configuration/new\x1b", b"")),
            r'subsection "configuration/new\x1b"',
        ),
        (
            envelope(
                subsection(b"configuration/capabilities", b"\0\0\0\1" + string(b"new-layout"))
            ),
            'capability "new-layout"',
        ),
    ],
)
def test_what_cannot_be_passed_over(data: bytes, what: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        read_stream([data])
    assert what in str(caught.value)


# --- what is refused --------------------------------------------------------------------------

NAMES = string(b"disk") + string(b"daily")
NO_STREAM = [b"QFI\xfb" + bytes(100), b"QEVM\0\0\0\x02", b"{}", b"\x02" + bytes(20)]


@pytest.mark.spec("STREAM-11")
@pytest.mark.parametrize("data", NO_STREAM)
def test_what_is_no_stream_at_all(data: bytes) -> None:
    with pytest.raises(FormatError, match="migration stream"):
        read_stream([data])


REFUSED = {
    "machine name": b"QEVM\0\0\0\x03\x07\0\0\x01\0",
    "page bits": envelope(subsection(b"configuration/target-page-bits", b"\0\0\0\x11")),
    "few page bits": envelope(subsection(b"configuration/target-page-bits", b"\0\0\0\x09")),
    "record type": envelope() + b"\x09",
    "a subsection": envelope() + start(b"dirty-bitmap", EOS, 3) + b"\x05",
    "a description": envelope() + b"\x06",
    "a section that never began": envelope() + more(2, b"", 7),
    "a section twice": envelope() + 2 * start(b"dirty-bitmap", EOS, 3),
    "an id twice": envelope() + start(b"dirty-bitmap", EOS, 3) + start(b"ram", RAM_EOS, 3),
    "a section's version": envelope() + start(b"ram", b"", 3)[:-9] + b"\0\0\0\x05",
    "another's footer": envelope() + start(b"dirty-bitmap", EOS, 3, footer=False) + b"\x7e\0\0\0\4",
    "a footer alone": envelope() + b"\x7e\0\0\0\0",
    "a package's size": envelope() + command(7, b"\0\0\0\0\0"),
    "page flags": envelope() + start(b"ram", page(0x01, b""), 2),
    "page flags together": envelope() + start(b"ram", page(0x0A, b""), 2),
    "xbzrle encoding": envelope() + start(b"ram", page(0x40, b"\2\0\1a"), 2),
    "xbzrle length": envelope() + start(b"ram", page(0x40, b"\1\xff\xff"), 2),
    "compressed length": envelope() + start(b"ram", page(0x100, b"\xff\0\0\0"), 2),
    "more blocks than memory": envelope()
    + start(b"ram", struct.pack(">Q", PAGE | 4) + string(b"b") + struct.pack(">Q", 2 * PAGE), 2),
}

REFUSED_RECORDS: dict[str, tuple[str, bytes, bytes]] = {
    "flags of two bytes": ("STREAM-4", BEGIN, b"\xc0\x80"),
    "a record that says nothing": ("STREAM-4", BEGIN, b"\x0c" + NAMES),
    "zeroes of nothing": ("STREAM-4", BEGIN, b"\x03"),
    "no names": ("STREAM-4", b"", b"\x20"),
    "no name of a bitmap": ("STREAM-4", b"\x18" + string(b"disk") + BEGIN[-5:], b""),
    "an empty node alias": ("STREAM-4", b"\x1c\0" + string(b"b") + BEGIN[-5:], b""),
    "an empty bitmap alias": ("STREAM-4", b"\x1c" + string(b"b") + b"\0" + BEGIN[-5:], b""),
    "granularity 256": ("STREAM-5", b"\x1c" + NAMES + struct.pack(">IB", 256, 0), b""),
    "granularity 0": ("STREAM-5", b"\x1c" + NAMES + struct.pack(">IB", 0, 0), b""),
    "granularity 1000": ("STREAM-5", b"\x1c" + NAMES + struct.pack(">IB", 1000, 0), b""),
    "reserved flags": ("STREAM-5", b"\x1c" + NAMES + struct.pack(">IB", 512, 8), b""),
    "a bitmap twice": ("STREAM-6", BEGIN + BEGIN, b""),
    "bits that do not begin at 0": ("STREAM-7", BEGIN, bits(64, 64)),
    "bits twice": ("STREAM-7", BEGIN, bits(0, 64) + bits(0, 64)),
    "bits left out": ("STREAM-7", BEGIN, bits(0, 64) + bits(128, 64)),
    "bits within a word": ("STREAM-7", BEGIN, bits(0, 63) + bits(63, 65)),
    "no sectors": ("STREAM-7", BEGIN, bits(0, 0)),
    "too few bits": ("STREAM-8", BEGIN, bits(0, 65, bytes(8))),
    "no whole word": ("STREAM-8", BEGIN, bits(0, 1, bytes(7))),
    "too much padding": ("STREAM-8", BEGIN, bits(0, 64, bytes(33))),
    "a buffer beyond the limit": ("STREAM-8", BEGIN, bits(0, 8 * 10248, b"", 10248)),
    "a buffer of 2^64": ("STREAM-8", BEGIN, bits(0, 64, b"", (1 << 64) - 1)),
    "a bitmap without bits": ("STREAM-10", BEGIN, b"\x20"),
    "complete twice": ("STREAM-10", BEGIN, bits(0, 64) + b"\x20\x20"),
    "bits after complete": ("STREAM-10", BEGIN, bits(0, 64) + b"\x20" + bits(64, 64)),
    "bits of an unknown bitmap": ("STREAM-10", BEGIN, b"\x46" + string(b"no") + bits(0, 64)[1:]),
    "complete of an unknown bitmap": ("STREAM-10", BEGIN, b"\x28" + string(b"no")),
    "never complete": ("STREAM-11", BEGIN, bits(0, 64)),
}


@pytest.mark.spec("STREAM-11")
@pytest.mark.parametrize("data", REFUSED.values(), ids=REFUSED)
def test_what_breaks_a_rule(data: bytes) -> None:
    assert 0 < refusal(data).offset <= len(data)


@pytest.mark.spec("STREAM-4", "STREAM-5", "STREAM-6", "STREAM-7", "STREAM-8", "STREAM-10")
@pytest.mark.parametrize("name", REFUSED_RECORDS)
def test_a_record_that_breaks_a_rule(name: str) -> None:
    _, begin, end = REFUSED_RECORDS[name]
    data = sections(begin, end)
    error = refusal(data)
    assert len(envelope()) < error.offset < len(data)
    assert outcome([data]) == outcome(data[n : n + 1] for n in range(len(data)))
    found = read_stream([data])
    assert found.fault is not None
    assert str(found.fault) == str(error)
    assert not found.is_complete


@pytest.mark.parametrize("padding", range(4))
@pytest.mark.spec("STREAM-8")
def test_padding_is_up_to_32_bytes(padding: int) -> None:
    data = bits(0, 64, b"\xaa" * 8 + b"\xff" * 8 * padding)
    found = read_stream([sections(BEGIN, data + b"\x20")])
    assert found.complete[0].packed().tobytes() == b"\xaa" * 8


@pytest.mark.spec("INV-TAIL")
@pytest.mark.spec("STREAM-9")
@pytest.mark.parametrize("sectors", [1, 7, 8, 9, 63, 64, 65])
def test_bits_past_the_disk_are_ignored(sectors: int) -> None:
    data = bits(0, sectors, b"\xff" * (8 if sectors <= 64 else 16))
    (bitmap,) = read_stream([sections(BEGIN, data + b"\x20")]).complete
    assert int.from_bytes(bitmap.packed().tobytes(), "little") == (1 << sectors) - 1
    assert bitmap.dirty_bytes == bitmap.disk_size == 512 * sectors


def test_flags_together_go_by_their_order() -> None:
    """START before COMPLETE before BITS; EOS may be with any of them."""
    begin = bytes([BEGIN[0] | 0x60]) + BEGIN[1:]
    data = start(b"dirty-bitmap", bytes([begin[0] | 1]) + begin[1:], 3)
    data += more(2, bytes([bits(0, 64)[0] | 1]) + bits(0, 64)[1:], 3) + more(3, b"\x61", 3)
    found = read_stream([envelope() + data + EOF])
    assert (found.is_complete, len(found.complete)) == (True, 1)


# --- streams that end early -------------------------------------------------------------------


@pytest.mark.spec("STREAM-10", "STREAM-11")
@pytest.mark.parametrize("form", FORMS)
def test_every_beginning_of_a_stream(form: str) -> None:
    """Complete bitmaps are right, and a cut is always reported."""
    data = FORMS[form]([ONE, TWO])
    truth = [sent(ONE), sent(TWO)]
    last = len(data)
    if form in ("precopy", "mapped"):
        last = data.index(FULL) + 1  # of a device one byte says all
    elif form == "section-only":
        last = len(data) - 5  # the footer may be missing
    counts = set()
    for length in range(len(data)):
        try:
            found = read_stream([data[:length]])
        except FormatError:
            assert length < 60
            continue
        assert [came(bitmap) for bitmap in found.complete] == truth[: len(found.complete)]
        is_whole = length >= last and not (form == "section-only" and length > last)
        assert (found.fault is None, found.is_complete) == (is_whole, is_whole), length
        counts.add(len(found.complete))
    assert counts == {0, 1, 2}


@pytest.mark.spec("STREAM-10")
def test_an_incomplete_bitmap_gives_no_bits() -> None:
    found = read_stream([sections(BEGIN, bits(0, 64, b"\x01" + bytes(7)))])
    (bitmap,) = found.all
    assert found.complete == []
    assert (bitmap.is_complete, bitmap.dirty_bytes, bitmap.disk_size) == (False, 512, 64 * 512)
    for read in (bitmap.packed, bitmap.sha256):
        with pytest.raises(StateError, match=r'"daily" of the stream is incomplete'):
            read()


@pytest.mark.spec("STREAM-12")
def test_events_before_a_fault_are_not_lost() -> None:
    data = sections(BEGIN, bits(0, 64) + b"\x20" + b"\x80")
    reader = StreamReader()
    assert len(reader.feed(data)) == 3
    for _ in range(2):
        with pytest.raises(FormatError, match="more than one byte"):
            reader.feed(b"")
        with pytest.raises(FormatError, match="more than one byte"):
            reader.finish()


@pytest.mark.spec("STREAM-12")
@given(bitmaps=several(), data=st.data())
@settings(max_examples=60)
def test_a_fault_is_the_same_in_any_pieces(
    bitmaps: Sequence[OutgoingBitmap], data: st.DataObject
) -> None:
    content = bytearray(precopy(bitmaps))
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    whole = outcome([bytes(content)])
    assert outcome(bytes([byte]) for byte in content) == whole
    places = data.draw(st.lists(st.integers(0, len(content)), max_size=5))
    assert outcome(streams.cut(bytes(content), places)) == whole


# --- limits -----------------------------------------------------------------------------------


def claims(*records: bytes) -> bytes:
    return sections(BEGIN, b"".join(records))


@pytest.mark.spec("STREAM-13")
def test_more_bits_than_qemu_has() -> None:
    most = 0xFFFFFFC0  # sectors, whole words
    with pytest.raises(LimitError, match="length of a bitmap"):
        read_stream([claims(bits(0, most), bits(most, 128))])
    fine = read_stream([claims(bits(0, most), bits(most, 64), b"\x20")])
    assert fine.complete[0].disk_size == 2 << 40


@pytest.mark.spec("STREAM-13")
def test_more_bits_than_the_caller_allows() -> None:
    with pytest.raises(LimitError, match="all bitmaps of the stream"):
        read_stream([claims(bits(0, 8 * 1001))], limit_bytes=1000)
    read_stream([claims(bits(0, 8 * 1000))], limit_bytes=1000)


@pytest.mark.spec("STREAM-13")
def test_more_bitmaps_than_an_image_has() -> None:
    flags = struct.pack(">IB", 512, 0)
    names = (b"\x14" + string(b"%d" % number) + flags for number in range(MAX_BITMAPS))
    data = envelope() + start(b"dirty-bitmap", BEGIN + b"".join(names), 3)
    with pytest.raises(LimitError, match="number of bitmaps"):
        read_stream([data])


@pytest.mark.spec("STREAM-13")
@pytest.mark.parametrize(
    "data",
    [
        claims(bits(0, 0xFFFFFFC0), b"\x20"),
        envelope() + struct.pack(">BHHI", 8, 7, 4, 0xFFFFFFFF) + bytes(5 << 20),
        envelope() + start(b"ram", 20_000 * page(2, b"\0", b"r" * 255), 2),
        envelope() + start(b"ram", struct.pack(">Q", (1 << 64) - 4096 | 4) + 90_000 * bytes(9), 2),
        FULL[:1] * (1 << 20),
    ],
)
def test_a_stream_takes_no_more_memory_than_its_bitmaps(data: bytes) -> None:
    pieces = [data[start : start + 4096] for start in range(0, len(data), 4096)]

    def read() -> None:
        try:
            for bitmap in read_stream(pieces).complete:
                bitmap.sha256()
        except Qcow2BmError:
            pass

    read()
    with traced_memory() as memory:
        read()
    assert memory.peak < 1 << 20


def test_bits_are_a_view_that_cannot_be_written_to() -> None:
    (bitmap,) = read_stream([streams.whole([TWO])]).complete
    packed = bitmap.packed()
    assert not packed.flags.writeable
    assert bitmap.packed() is not packed
    assert bitmap.packed().tobytes() == packed.tobytes()
    assert "größe" in repr(bitmap)


def test_events_may_be_collected_by_hand() -> None:
    reader, bitmaps = StreamReader(), StreamBitmaps()
    events = reader.feed(streams.whole([TWO]))
    assert [event.length for event in events if isinstance(event, BitmapChunk)] == [
        8192 * 512,
        8 * 512,
    ]
    bitmaps.add(events)
    bitmaps.add(reader.finish())
    assert bitmaps.is_complete
    assert [came(bitmap) for bitmap in bitmaps.complete] == [sent(TWO)]
    assert parts([TWO]).begin[0] == 0x1C
