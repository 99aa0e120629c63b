from __future__ import annotations

from typing import Any

import construct
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.hostile_bytes import U8, U32, U64, hostile, padding

from qcow2bm.errors import FormatError
from qcow2bm.format.directory import (
    ENTRY,
    FIELD_OFFSETS,
    Directory,
    DirectoryEntry,
    build_directory,
    build_entry,
    parse_directory,
)

MANY = 1000
HEAD = construct.Struct(*ENTRY.subcons[:7])

# One entry with everything unusual: in_use and auto, extra data, odd padding.
SAMPLE = bytes.fromhex(
    "0000000000050000 00000003 00000003 01 10 0005 00000004cafebabe6461696c79a1a2a3a4a5a6a7"
)


@st.composite
def directory_entries(draw: st.DrawFn) -> DirectoryEntry:
    extra, name = draw(st.binary(max_size=40)), draw(st.binary(max_size=40))
    return DirectoryEntry(
        number=0,
        offset=0,
        bitmap_table_offset=draw(U64),
        bitmap_table_size=draw(U32),
        flags=draw(U32),
        type=draw(st.integers(1, 255)),  # type 0 everywhere up to the end is no entry
        granularity_bits=draw(U8),
        name_size=len(name),
        extra_data_size=len(extra),
        extra_data=extra,
        name_bytes=name,
        padding=draw(padding(len(extra + name))),
    )


@st.composite
def directories(draw: st.DrawFn, start: int) -> Directory:
    entries: list[DirectoryEntry] = []
    for entry in draw(st.lists(directory_entries(), max_size=5)):
        entries.append(entry._replace(number=len(entries), offset=start))
        start += entry.size
    rest = st.one_of(st.binary(max_size=23), st.integers(0, 60).map(bytes))
    return Directory(tuple(entries), draw(rest))


def parsed_by_the_schema(data: bytes, offset: int, max_entries: int) -> Directory:
    """Does what `parse_directory` does, but parses every field with construct."""
    entries: list[DirectoryEntry] = []
    position = 0
    while len(entries) < max_entries and len(data) - position >= 24 and any(data[position:]):
        values: dict[str, Any] = {"number": len(entries), "offset": offset + position}
        fields: dict[str, Any]
        try:
            fields = ENTRY.parse(data[position:])
        except construct.StreamError:
            fields = HEAD.parse(data[position:]) | {"extra_data": b"", "name": None, "padding": b""}
        for name in DirectoryEntry._fields[2:]:
            values[name] = fields[name.removesuffix("_bytes")]
        entry = DirectoryEntry(**values)
        entries.append(entry)
        if entry.name_bytes is None:
            return Directory(tuple(entries), b"")
        position += len(ENTRY.build(fields))
    return Directory(tuple(entries), data[position:])


directory_bytes = hostile(directories(0).map(build_directory))


@given(directories(0xE000))
def test_a_directory_survives_being_built_and_parsed(directory: Directory) -> None:
    assert parse_directory(build_directory(directory), 0xE000, MANY) == directory


@given(directory_bytes, st.integers(0, 6))
def test_what_is_parsed_is_built_again_byte_for_byte(data: bytes, max_entries: int) -> None:
    directory = parse_directory(data, 0, max_entries)
    assert len(directory.entries) <= max_entries
    if directory.entries and directory.entries[-1].name_bytes is None:
        with pytest.raises(ValueError, match="cut off"):
            build_directory(directory)
        return
    assert build_directory(directory) == data


@given(directory_bytes, st.integers(0, 6), U32)
def test_the_fast_reader_is_the_schema(data: bytes, max_entries: int, offset: int) -> None:
    expected = parsed_by_the_schema(data, offset, max_entries)
    assert parse_directory(data, offset, max_entries) == expected


@given(st.lists(st.sampled_from((b"", SAMPLE, SAMPLE[:24], b"\xff" * 8, bytes(24))), max_size=6))
def test_the_fast_reader_is_the_schema_where_entries_meet(parts: list[bytes]) -> None:
    data = b"".join(parts)
    assert parse_directory(data, 0, MANY) == parsed_by_the_schema(data, 0, MANY)


@given(directories(0x5000))
def test_each_field_lies_where_the_entry_says(directory: Directory) -> None:
    data = build_directory(directory)
    for entry in directory.entries:
        assert len(build_entry(entry)) == entry.size
        for field, length in [*LENGTHS.items(), *variable_lengths(entry).items()]:
            start = entry.offset_of(field) - 0x5000
            stored = data[start : start + length]
            value = getattr(entry, "name_bytes" if field == "name" else field)
            assert value == (stored if field in variable_lengths(entry) else int.from_bytes(stored))


LENGTHS = {
    "bitmap_table_offset": 8,
    "bitmap_table_size": 4,
    "flags": 4,
    "type": 1,
    "granularity_bits": 1,
    "name_size": 2,
    "extra_data_size": 4,
}


def variable_lengths(entry: DirectoryEntry) -> dict[str, int]:
    return {
        "extra_data": entry.extra_data_size,
        "name": entry.name_size,
        "padding": len(entry.padding),
    }


def test_the_fixed_fields_lie_where_the_specification_says() -> None:
    assert FIELD_OFFSETS == {
        "bitmap_table_offset": 0,
        "bitmap_table_size": 8,
        "flags": 12,
        "type": 16,
        "granularity_bits": 17,
        "name_size": 18,
        "extra_data_size": 20,
    }


def test_a_sample_entry_means_what_it_says() -> None:
    (entry,), rest = parse_directory(SAMPLE, 0xE000, MANY)
    assert rest == b""
    assert (entry.index, entry.offset, entry.size) == (0, 0xE000, 40)
    assert (entry.bitmap_table_offset, entry.bitmap_table_size) == (0x50000, 3)
    assert (entry.in_use, entry.auto, entry.granularity) == (True, True, 65536)
    assert (entry.name, entry.extra_data) == ("daily", b"\xca\xfe\xba\xbe")
    assert entry.padding == b"\xa1\xa2\xa3\xa4\xa5\xa6\xa7"
    plain = entry._replace(flags=0xFFFFFFFC, name_bytes=b"\xff\0")
    assert (plain.in_use, plain.auto, plain.name) == (False, False, "\udcff\0")


@pytest.mark.parametrize("end", range(24, 40))
def test_an_entry_cut_off_keeps_its_head_and_cannot_be_built(end: int) -> None:
    (entry,), rest = parse_directory(SAMPLE[:end], 0, MANY)
    assert rest == b""
    assert (entry.name_size, entry.extra_data_size) == (5, 4)
    assert (entry.extra_data, entry.name_bytes, entry.name, entry.padding) == (b"", None, None, b"")
    with pytest.raises(ValueError, match="cut off"):
        build_entry(entry)


@pytest.mark.parametrize("end", range(24))
def test_less_than_a_head_is_no_entry(end: int) -> None:
    assert parse_directory(SAMPLE[:end], 0, MANY) == Directory((), SAMPLE[:end])


def test_zeros_up_to_the_end_are_no_entries_but_zeros_between_are() -> None:
    assert parse_directory(SAMPLE + bytes(80), 0, MANY).rest == bytes(80)
    between = parse_directory(SAMPLE + bytes(24) + SAMPLE, 0, MANY)
    assert [entry.type for entry in between.entries] == [1, 0, 1]


def test_the_largest_directory_is_read_to_its_end() -> None:
    directory = parse_directory(SAMPLE * 65536, 0, 65535)
    assert len(directory.entries) == 65535
    assert directory.entries[-1].offset == 65534 * len(SAMPLE)
    assert directory.rest == SAMPLE


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bitmap_table_offset", 1 << 64),
        ("bitmap_table_size", -1),
        ("flags", 1 << 32),
        ("type", 256),
        ("granularity_bits", 256),
        ("name_bytes", bytes(1 << 16)),
        ("padding", b""),
    ],
)
def test_what_does_not_fit_its_field_is_named(field: str, value: Any) -> None:
    (entry,), _ = parse_directory(SAMPLE, 0, MANY)
    with pytest.raises(FormatError) as caught:
        build_entry(entry._replace(**{field: value}))
    assert caught.value.structure == "bitmap directory entry"
    assert caught.value.field == {"name_bytes": "name_size"}.get(field, field)
