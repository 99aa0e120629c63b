from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.hostile_bytes import U8, U32, U64, hostile, padding

from qcow2bm.errors import FormatError
from qcow2bm.format import extensions
from qcow2bm.format.extensions import (
    BitmapsExtension,
    CryptoHeader,
    HeaderExtension,
    HeaderExtensions,
    build_bitmaps_extension,
    build_crypto_header,
    build_extensions,
    parse_bitmaps_extension,
    parse_crypto_header,
    parse_extensions,
)

KNOWN = {
    0xE2792ACA: "backing format",
    0x6803F857: "feature name table",
    0x23852875: "bitmaps",
    0x0537BE77: "crypto header",
    0x44415441: "external data file name",
    0x51424D47: "generation of qcow2bm",
    0x51424D50: "padding of qcow2bm",
}
END_MARKER = bytes(8)


@st.composite
def header_extensions(draw: st.DrawFn) -> HeaderExtension:
    type = draw(st.one_of(st.sampled_from(sorted(KNOWN)), U32.filter(bool)))
    data = draw(st.binary(max_size=60))
    return HeaderExtension(type, data, draw(padding(len(data))))


areas = st.builds(
    HeaderExtensions,
    st.lists(header_extensions(), max_size=5).map(tuple),
    st.sampled_from([END_MARKER, b""]),
    st.none(),
)


@given(areas, st.binary(max_size=16))
def test_an_area_survives_being_built_and_parsed(area: HeaderExtensions, after: bytes) -> None:
    built = build_extensions(area)
    # What follows the end marker is not part of the area; without a marker nothing may follow.
    assert parse_extensions(built + (after if area.end else b""), 512) == area


def left(data: bytes, area: HeaderExtensions) -> int:
    """The number of bytes of the area behind its last extension."""
    return len(data) - sum(extension.size for extension in area.extensions)


@given(hostile(areas.map(build_extensions)))
def test_nothing_read_is_ever_lost(data: bytes) -> None:
    area = parse_extensions(data)
    assert area.end in (b"", data[len(data) - left(data, area) :][:8])
    built = build_extensions(area)
    assert data.startswith(built)
    if not area.fault and not area.end:
        assert built == data


@given(hostile(areas.map(build_extensions)))
def test_reading_stops_where_the_area_has_too_little_left(data: bytes) -> None:
    area = parse_extensions(data, 512)
    rest = data[len(data) - left(data, area) :]
    length = int.from_bytes(rest[4:8], "big")
    if area.fault is None:
        assert area.end == rest[:8]
        assert not rest or (rest[:4] == bytes(4) and length <= len(rest) - 8)
    elif len(rest) < 8:
        assert rest
        assert area.fault.offset == 512 + len(data) - len(rest)
    else:
        assert length > len(rest) - 8
        assert area.fault.offset == 512 + len(data) - len(rest) + 4


@given(hostile(areas.map(build_extensions)), st.integers(72, 4096))
def test_offsets_lead_to_the_extensions(data: bytes, start: int) -> None:
    area = parse_extensions(data, start)
    offsets = area.offsets(start)
    assert len(offsets) == len(area.extensions)
    for offset, extension in zip(offsets, area.extensions, strict=True):
        head = offset - start
        assert data[head : head + 4] == extension.type.to_bytes(4, "big")
        assert data[head + 8 :].startswith(extension.data + extension.padding)
        assert extension.size == 8 + len(extension.data + extension.padding)


@given(
    st.lists(st.builds(HeaderExtension, U32, st.binary(max_size=9), st.binary(max_size=9))),
    st.binary(max_size=9),
)
def test_building_refuses_what_it_cannot_keep(
    extensions: list[HeaderExtension], end: bytes
) -> None:
    area = HeaderExtensions(tuple(extensions), end)
    try:
        built = build_extensions(area)
    except FormatError:
        return
    assert parse_extensions(built) == area


def test_the_types_and_what_they_are_called() -> None:
    assert KNOWN == extensions.NAMES
    assert HeaderExtension(0x23852875, b"", b"").name == "bitmaps"
    assert HeaderExtension(0x12345678, b"", b"").name is None


def test_a_length_beyond_the_area_keeps_what_came_before() -> None:
    sound = HeaderExtension(0x12345678, b"abc", bytes(5))
    data = build_extensions(HeaderExtensions((sound,), b"")) + bytes.fromhex("23852875 00000018")
    area = parse_extensions(data + bytes(23), 112)
    assert (area.extensions, area.end) == ((sound,), b"")
    assert str(area.fault) == ("header extension: length at 0x84 is 24, but only 23 bytes follow")


@pytest.mark.parametrize("left", range(1, 8))
def test_leftovers_too_small_for_an_extension_are_a_fault(left: int) -> None:
    area = parse_extensions(bytes.fromhex("12345678 00000000") + bytes(left), 112)
    assert (len(area.extensions), area.end) == (1, b"")
    assert str(area.fault) == (
        f"header extension: length at 0x78 is missing: {left} bytes are left"
    )


def test_the_length_of_an_end_marker_must_fit() -> None:
    marker = bytes.fromhex("00000000 00000003")
    assert parse_extensions(marker + bytes(3)) == HeaderExtensions((), marker)
    area = parse_extensions(marker + bytes(2), 112)
    assert (area.extensions, area.end) == ((), b"")
    assert str(area.fault) == "header extension: length at 0x74 is 3, but only 2 bytes follow"


def test_only_the_last_padding_may_be_cut_off() -> None:
    cut = HeaderExtension(0xE2792ACA, b"qcow2", b"\1")
    area = parse_extensions(bytes.fromhex("e2792aca 00000005") + b"qcow2\1")
    assert area == HeaderExtensions((cut,), b"")


@given(st.builds(BitmapsExtension, U32, U32, U64, U64))
def test_the_bitmaps_extension_survives(extension: BitmapsExtension) -> None:
    assert parse_bitmaps_extension(build_bitmaps_extension(extension)) == extension


@given(st.binary(min_size=24, max_size=24))
def test_every_24_bytes_are_a_bitmaps_extension(data: bytes) -> None:
    assert build_bitmaps_extension(parse_bitmaps_extension(data)) == data


@given(st.builds(CryptoHeader, U64, U64))
def test_the_crypto_header_survives(header: CryptoHeader) -> None:
    assert parse_crypto_header(build_crypto_header(header)) == header


@given(st.binary(min_size=16, max_size=16))
def test_every_16_bytes_are_a_crypto_header(data: bytes) -> None:
    assert build_crypto_header(parse_crypto_header(data)) == data


@given(st.binary(max_size=40).filter(lambda data: len(data) != 24))
def test_a_bitmaps_extension_of_another_length_is_refused(data: bytes) -> None:
    with pytest.raises(FormatError, match=rf"at 0x74 is {len(data)}, must be 24$"):
        parse_bitmaps_extension(data, 0x78)


@given(st.binary(max_size=40).filter(lambda data: len(data) != 16))
def test_a_crypto_header_of_another_length_is_refused(data: bytes) -> None:
    with pytest.raises(FormatError, match=rf"at 0x74 is {len(data)}, must be 16$"):
        parse_crypto_header(data, 0x78)


@given(U8)
def test_numbers_too_large_for_their_field_are_named(excess: int) -> None:
    with pytest.raises(FormatError, match="nb_bitmaps"):
        build_bitmaps_extension(BitmapsExtension((1 << 32) + excess, 0, 0, 0))
    with pytest.raises(FormatError, match="length"):
        build_crypto_header(CryptoHeader(0, (1 << 64) + excess))
    with pytest.raises(FormatError, match="type"):
        build_extensions(HeaderExtensions((HeaderExtension(-1 - excess, b"", b""),), b""))
