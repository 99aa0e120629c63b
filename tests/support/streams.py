"""Migration streams for tests: made record by record, and read in pieces."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from hypothesis import strategies as st
from support.model import Model

from qcow2bm.errors import Qcow2BmError
from qcow2bm.migration.stream_bitmaps import StreamBitmap
from qcow2bm.migration.stream_reader import StreamReader
from qcow2bm.migration.stream_records import Event
from qcow2bm.migration.stream_writer import OutgoingBitmap, write_stream

PAGE = 4096
EOF = b"\0"
EOS = b"\x01"
VMDESCRIPTION = b"\x06" + struct.pack(">I", 2) + b"{}"

FULL = b"\x04" + struct.pack(">I", 9) + b"\x05timer" + struct.pack(">II", 0, 2) + b"opaque \x7e"


def envelope(*subsections: bytes, machine: bytes | None = b"pc-i440fx-7.2") -> bytes:
    """The beginning of a whole stream."""
    head = b"QEVM" + struct.pack(">I", 3)
    if machine is None:
        return head
    return head + b"\x07" + struct.pack(">I", len(machine)) + machine + b"".join(subsections)


def subsection(idstr: bytes, body: bytes) -> bytes:
    return b"\x05" + string(idstr) + struct.pack(">I", 1) + body


def string(text: bytes) -> bytes:
    return bytes([len(text)]) + text


def start(idstr: bytes, body: bytes, section_id: int, *, footer: bool = True) -> bytes:
    version = 4 if idstr == b"ram" else 1
    head = b"\x01" + struct.pack(">I", section_id) + string(idstr) + struct.pack(">II", 0, version)
    return head + body + _footer(section_id, footer)


def more(type: int, body: bytes, section_id: int, *, footer: bool = True) -> bytes:
    """A SECTION_PART or SECTION_END."""
    return bytes([type]) + struct.pack(">I", section_id) + body + _footer(section_id, footer)


def _footer(section_id: int, footer: bool) -> bytes:
    return b"\x7e" + struct.pack(">I", section_id) if footer else b""


def command(number: int, data: bytes = b"") -> bytes:
    return b"\x08" + struct.pack(">HH", number, len(data)) + data


def package(content: bytes) -> bytes:
    return command(7, struct.pack(">I", len(content))) + content


def page(flags: int, body: bytes = b"", block: bytes | None = None, address: int = 0) -> bytes:
    """One word of the section ram, and what follows; CONTINUE is set where no block is given."""
    if block is None:
        return struct.pack(">Q", address | flags | 0x20) + body
    return struct.pack(">Q", address | flags) + string(block) + body


def memory(*blocks: tuple[bytes, int, bytes]) -> bytes:
    """The list of blocks: of each its name, its length, and what more is there."""
    body = b"".join(string(name) + struct.pack(">Q", size) + more for name, size, more in blocks)
    return struct.pack(">Q", sum(size for _, size, _ in blocks) | 4) + body


RAM_EOS = struct.pack(">Q", 0x10)

PAGES = (
    page(0x02, b"\0", b"pc.ram"),
    page(0x08, b"\x7e" * PAGE, address=PAGE),
    page(0x40, b"\x01" + struct.pack(">H", 3) + b"abc", address=2 * PAGE),
    page(0x100, struct.pack(">I", 5) + b"\x01\x02\x03\x04\x05", b"vga", 3 * PAGE),
    page(0x02, b"\xff"),
    struct.pack(">Q", 0x80),
    struct.pack(">Q", 0x200),
)
"""One of each kind."""


class Parts(NamedTuple):
    """The bodies of the bitmaps' sections, as they are in a stream of the writer's own."""

    begin: bytes
    bits: bytes
    end: bytes


def parts(bitmaps: Sequence[OutgoingBitmap]) -> Parts:
    """The content of SECTION_START, and with the bits that of SECTION_END, without EOS."""
    pieces = list(write_stream(bitmaps, None))
    count = len(bitmaps)
    begin, rest = pieces[1 : 1 + count], pieces[3 + count : -1]
    return Parts(b"".join(begin), b"".join(rest[:-count]), b"".join(rest[-count:]))


def precopy(bitmaps: Sequence[OutgoingBitmap], *, footer: bool = True) -> bytes:
    """A stream as QEMU sends it, with some memory and a device."""
    sent = parts(bitmaps)
    blocks = memory((b"pc.ram", 4 * PAGE, b""), (b"vga", PAGE, b""))
    return b"".join(
        (
            envelope(subsection(b"configuration/uuid", bytes(16))),
            command(3),
            start(b"ram", blocks + RAM_EOS, 2, footer=footer),
            start(b"dirty-bitmap", sent.begin + EOS, 3, footer=footer),
            more(2, b"".join(PAGES) + RAM_EOS, 2, footer=footer),
            more(2, EOS, 3, footer=footer),
            more(3, RAM_EOS, 2, footer=footer),
            more(3, sent.bits + sent.end + EOS, 3, footer=footer),
            *(FULL, EOF, VMDESCRIPTION),
        )
    )


def postcopy(bitmaps: Sequence[OutgoingBitmap]) -> bytes:
    """The same stream with the bits after the devices."""
    sent = parts(bitmaps)
    return b"".join(
        (
            envelope(),
            command(3, bytes(16)),
            start(b"ram", memory((b"pc.ram", PAGE, struct.pack(">Q", 2 << 20))) + RAM_EOS, 2),
            start(b"dirty-bitmap", sent.begin + EOS, 3),
            more(3, RAM_EOS, 2),
            package(command(4) + FULL + command(5)),
            more(2, sent.bits + EOS, 3),
            more(3, RAM_EOS, 2),
            more(3, sent.end + EOS, 3),
            EOF,
        )
    )


def section_only(bitmaps: Sequence[OutgoingBitmap]) -> bytes:
    return b"".join(write_stream(bitmaps, None))


def whole(bitmaps: Sequence[OutgoingBitmap]) -> bytes:
    return b"".join(write_stream(bitmaps, "pc-i440fx-7.2"))


MAPPED = subsection(b"configuration/capabilities", b"\0\0\0\1" + string(b"mapped-ram"))


def mapped(
    bitmaps: Sequence[OutgoingBitmap],
    gaps: Sequence[tuple[int, int]] = ((8, 40),),
    version: int = 1,
) -> bytes:
    """A file in which each page of memory has its place.

    Each block has a page. Of each, ``gaps`` has the bytes between its header and the bits that say
    which pages were written, and those between the header and the pages.
    """
    sent = parts(bitmaps)
    data = envelope(MAPPED) + b"\x01" + struct.pack(">I", 2) + string(b"ram")
    data += struct.pack(">IIQ", 0, 4, PAGE * len(gaps) | 4)
    for number, (before, gap) in enumerate(gaps):
        data += string(b"block%d" % number) + struct.pack(">Q", PAGE)
        here = len(data) + 28
        data += struct.pack(">IQQQ", version, PAGE, here + before, here + gap)
        data += bytes(max(0, gap)) + b"\xff" * PAGE
    data += RAM_EOS + _footer(2, True)
    data += start(b"dirty-bitmap", sent.begin + EOS, 3) + more(3, RAM_EOS, 2)
    return data + more(3, sent.bits + sent.end + EOS, 3) + FULL + EOF + VMDESCRIPTION


FORMS = {
    "precopy": precopy,
    "postcopy": postcopy,
    "section-only": section_only,
    "whole": whole,
    "mapped": mapped,
}


class Outcome(NamedTuple):
    """All events, and the error that came after them, if any."""

    events: list[Event]
    error: str | None


def outcome(pieces: Iterable[bytes]) -> Outcome:
    """The outcome of a reader that gets a stream in these pieces."""
    reader, events = StreamReader(), []
    try:
        for piece in pieces:
            events += reader.feed(piece)
        events += reader.finish()
    except Qcow2BmError as error:
        return Outcome(events, f"{type(error).__name__}: {error}")
    return Outcome(events, None)


def cut(data: bytes, places: Iterable[int]) -> Iterator[bytes]:
    """The data in pieces that end at these places, some of which may be the same."""
    last = 0
    for place in (*sorted(places), len(data)):
        yield data[last:place]
        last = place


def sent(bitmap: OutgoingBitmap) -> tuple[object, ...]:
    """The facts that must arrive about a bitmap that is sent."""
    model = Model.of_packed(bytes(bitmap.packed), bitmap.granularity, bitmap.disk_size)
    facts = bitmap.enabled, bitmap.persistent, bitmap.disk_size, model.dirty_bytes, model.sha256
    return bitmap.node_alias, bitmap.name, bitmap.granularity, *facts, model.packed


def came(bitmap: StreamBitmap) -> tuple[object, ...]:
    """The facts that arrived about a bitmap."""
    facts = bitmap.enabled, bitmap.persistent, bitmap.disk_size, bitmap.dirty_bytes, bitmap.sha256()
    packed = bitmap.packed().tobytes()
    return bitmap.node_alias, bitmap.bitmap_alias, bitmap.granularity, *facts, packed


_NAMES = st.binary(min_size=1, max_size=8).map(lambda raw: raw.decode("utf-8", "surrogateescape"))


@st.composite
def outgoing(draw: st.DrawFn) -> OutgoingBitmap:
    """A bitmap of up to some chunks, with runs of clear bits and with bits past the disk."""
    granularity = 512 << draw(st.integers(0, 22))
    per_bit = granularity // 512
    bits = draw(st.one_of(st.integers(1, 130), st.integers(8192 - 2, 8192 + 65), st.just(25000)))
    sectors = per_bit * bits - draw(st.integers(0, per_bit - 1))
    length = -(-bits // 8)
    packed = bytearray(length + draw(st.integers(0, 40)))
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, len(packed) - 1))
        run = draw(st.binary(min_size=1, max_size=40))
        packed[place : place + len(run)] = run[: len(packed) - place]
    flags = draw(st.tuples(st.booleans(), st.booleans()))
    node = draw(st.sampled_from(["disk", "größe", "other"]))
    return OutgoingBitmap(node, draw(_NAMES), granularity, *flags, bytes(packed), 512 * sectors)


def several() -> st.SearchStrategy[list[OutgoingBitmap]]:
    """Bitmaps whose names are all different."""
    return st.lists(outgoing(), min_size=1, max_size=4, unique_by=lambda bitmap: bitmap.key)
