"""The fast parsers and builders, which do not call construct, agree with the schemas."""

from __future__ import annotations

import construct
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcow2bm.errors import FormatError
from qcow2bm.format.directory import (
    HEAD_LENGTH,
    Directory,
    DirectoryEntry,
    build_directory,
    build_entry,
    build_entry_head,
    parse_directory,
)
from qcow2bm.format.extensions import END, EXTENSION, parse_extensions

_lengths = st.one_of(st.integers(0, 40), st.sampled_from([0xFFFFFFFF, 0x80000000]))


@st.composite
def _areas(draw: st.DrawFn) -> bytes:
    """Draws extensions, most with lengths that fit, and any bytes between them."""
    parts = []
    for _ in range(draw(st.integers(0, 6))):
        length = draw(_lengths)
        type = draw(st.one_of(st.just(END), st.integers(0, 0xFFFFFFFF)))
        parts.append(type.to_bytes(4, "big") + length.to_bytes(4, "big"))
        parts.append(draw(st.binary(max_size=min(length, 48) + 8)))
    return b"".join(parts)


@given(_areas())
def test_header_extensions(data: bytes) -> None:
    area = parse_extensions(data)
    places = area.offsets(0)
    for extension, place in zip(area.extensions, places, strict=True):
        fields = EXTENSION.parse(data[place:])
        assert (fields.type, fields.data) == (extension.type, extension.data)
        assert fields.length == len(extension.data)
    end = sum(extension.size for extension in area.extensions)
    if area.fault:
        try:
            fields = EXTENSION.parse(data[end:])
        except construct.StreamError:
            return
        raise AssertionError(f"construct reads {fields} where the fast reader does not")
    assert area.end == data[end : end + 8]
    assert not area.end or area.end[:4] == bytes(4)


@given(st.binary(min_size=HEAD_LENGTH, max_size=HEAD_LENGTH), st.binary(max_size=40))
def test_heads_of_directory_entries(head: bytes, rest: bytes) -> None:
    for entry in parse_directory(head + rest, 0, 10).entries:
        assert build_entry_head(entry) == (head + rest)[entry.offset :][:HEAD_LENGTH]
        if entry.name_bytes is not None:
            assert build_entry(entry).startswith(build_entry_head(entry))


@given(
    st.builds(
        DirectoryEntry,
        *(st.integers(0, (1 << bits) + 1) for bits in (4, 8, 64, 32, 32, 8, 8)),
        name_size=st.integers(0, 9),
        extra_data_size=st.integers(0, 9),
        extra_data=st.binary(max_size=9),
        name_bytes=st.binary(max_size=9),
        padding=st.binary(max_size=8),
    )
)
def test_building_directory_entries(entry: DirectoryEntry) -> None:
    fitting = entry._replace(
        name_size=len(entry.name_bytes or b""),
        extra_data_size=len(entry.extra_data),
        padding=bytes(-len((entry.name_bytes or b"") + entry.extra_data) % 8),
    )
    for candidate in (entry, fitting):
        try:
            expected = build_entry(candidate)
        except FormatError as error:
            with pytest.raises(FormatError, match=str(error.reason)):
                build_directory(Directory((candidate,), b""))
            continue
        assert build_directory(Directory((candidate,), b"rest")) == expected + b"rest"
