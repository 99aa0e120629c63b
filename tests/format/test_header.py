from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.hostile_bytes import U8, U32, U64, hostile

from qcow2bm.errors import FormatError, UnsupportedError
from qcow2bm.format.header import FIELD_OFFSETS, Header, build_header, parse_header

# Field, offset and length as the specification has them, not as the schema does.
SPECIFIED = (
    ("magic", 0, 4),
    ("version", 4, 4),
    ("backing_file_offset", 8, 8),
    ("backing_file_size", 16, 4),
    ("cluster_bits", 20, 4),
    ("size", 24, 8),
    ("crypt_method", 32, 4),
    ("l1_size", 36, 4),
    ("l1_table_offset", 40, 8),
    ("refcount_table_offset", 48, 8),
    ("refcount_table_clusters", 56, 4),
    ("nb_snapshots", 60, 4),
    ("snapshots_offset", 64, 8),
    ("incompatible_features", 72, 8),
    ("compatible_features", 80, 8),
    ("autoclear_features", 88, 8),
    ("refcount_order", 96, 4),
    ("header_length", 100, 4),
    ("compression_type", 104, 1),
    ("padding", 105, 7),
)
Numbers = dict[str, st.SearchStrategy[Any]]
V2_NUMBERS: Numbers = {name: (U32, U64)[length == 8] for name, _, length in SPECIFIED[2:13]}
V3_NUMBERS: Numbers = {name: (U32, U64)[length == 8] for name, _, length in SPECIFIED[13:17]}

V3 = bytes.fromhex("514649fb 00000003") + bytes(92) + bytes.fromhex("00000070") + bytes(8)


@st.composite
def v3_headers(draw: st.DrawFn) -> Header:
    header_length = draw(st.integers(104, 136))
    tail = draw(st.binary(min_size=header_length - 104, max_size=header_length - 104))
    numbers: dict[str, Any] = draw(st.fixed_dictionaries(V2_NUMBERS | V3_NUMBERS))
    return Header(
        version=3,
        **numbers,
        header_length=header_length,
        compression_type=tail[0] if tail else None,
        padding=tail[1:8],
        additional_fields=tail[8:],
    )


v2_headers = st.fixed_dictionaries(V2_NUMBERS).map(lambda numbers: Header(2, **numbers))
headers = st.one_of(v2_headers, v3_headers())


@given(headers, st.binary(max_size=32))
def test_a_header_survives_being_built_and_parsed(header: Header, following: bytes) -> None:
    built = build_header(header)
    assert len(built) == header.header_length
    assert parse_header(built + following) == header


@given(hostile(headers.map(build_header)))
def test_what_is_parsed_is_built_again_byte_for_byte(data: bytes) -> None:
    try:
        header = parse_header(data)
    except (FormatError, UnsupportedError):
        return
    if header.header_length > len(data):  # where the header ends is unknown: nothing is made up
        assert (header.compression_type, header.padding) == (None, b"")
        if header.version == 3:
            with pytest.raises(FormatError):
                build_header(header)
        return
    assert (
        build_header(header)
        == data[: max(header.header_length, 72 if header.version == 2 else 104)]
    )


@given(
    st.builds(
        Header,
        version=st.sampled_from((2, 3)),
        **V2_NUMBERS,
        **V3_NUMBERS,
        header_length=st.integers(72, 120),
        compression_type=st.one_of(st.none(), U8),
        padding=st.binary(max_size=8),
        additional_fields=st.binary(max_size=9),
    )
)
def test_building_refuses_what_it_cannot_keep(header: Header) -> None:
    try:
        built = build_header(header)
    except FormatError:
        return
    assert parse_header(built) == header


@pytest.mark.parametrize(("field", "offset", "length"), SPECIFIED[2:])
def test_each_field_stands_where_the_specification_says(
    field: str, offset: int, length: int
) -> None:
    marked = bytearray(V3)
    content = bytes(range(0xA1, 0xA1 + length))
    if field == "header_length":
        content = b"\0\0\0\x6f"
    marked[offset : offset + length] = content
    value = getattr(parse_header(bytes(marked)), field)
    assert value == (content if field == "padding" else int.from_bytes(content, "big"))
    assert FIELD_OFFSETS[field] == offset


def test_the_offsets_are_those_of_all_fields() -> None:
    assert {name: offset for name, offset, _ in SPECIFIED} == FIELD_OFFSETS


def test_version_2_implies_the_later_fields() -> None:
    header = parse_header(b"QFI\xfb\0\0\0\2" + bytes(64) + b"\xff" * 40)
    assert header[12:] == (0, 0, 0, 4, 72, None, b"", b"")
    assert (header.refcount_bits, header.cluster_size) == (16, 1)


@pytest.mark.parametrize("header_length", [0, 103, 113, 0xFFFFFFFF])
def test_an_impossible_header_length_is_kept_and_nothing_after_it_is_read(
    header_length: int,
) -> None:
    header = parse_header(V3[:100] + struct.pack(">I", header_length) + b"\xff" * 8)
    assert header[16:] == (header_length, None, b"", b"")


@pytest.mark.parametrize("data", [b"QFI", b"QFI\xfa" + V3[4:], bytes(512), b"KDMV" + V3[4:]])
def test_a_header_with_another_magic_is_refused(data: bytes) -> None:
    with pytest.raises(FormatError, match="not a qcow2 image") as caught:
        parse_header(data)
    assert (caught.value.structure, caught.value.field, caught.value.offset) == (
        "header",
        "magic",
        0,
    )


@pytest.mark.parametrize("version", [0, 1, 4, 0xFFFFFFFF])
def test_other_versions_are_unsupported(version: int) -> None:
    with pytest.raises(UnsupportedError, match=f"^not supported: qcow2 version {version}$"):
        parse_header(V3[:4] + struct.pack(">I", version) + V3[8:])


@pytest.mark.parametrize(
    ("field", "offset", "length"), [("version", 4, 4), ("size", 24, 8), ("header_length", 100, 4)]
)
def test_a_header_cut_off_names_the_field_and_its_place(
    field: str, offset: int, length: int
) -> None:
    with pytest.raises(FormatError, match=r"is cut off$") as caught:
        parse_header(V3[: offset + length - 1])
    assert (caught.value.field, caught.value.offset) == (field, offset)


def test_a_value_too_large_for_its_field_is_named() -> None:
    header = parse_header(V3)._replace(l1_size=1 << 32)
    with pytest.raises(FormatError, match="l1_size"):
        build_header(header)
