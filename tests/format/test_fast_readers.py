"""What is read past construct for speed is what construct reads by the declared schema."""

from __future__ import annotations

import construct
from hypothesis import given
from hypothesis import strategies as st

from qcow2bm.format.directory import (
    HEAD_LENGTH,
    build_entry,
    build_entry_head,
    parse_directory,
)
from qcow2bm.format.extensions import END, EXTENSION, parse_extensions

_lengths = st.one_of(st.integers(0, 40), st.sampled_from([0xFFFFFFFF, 0x80000000]))


@st.composite
def _areas(draw: st.DrawFn) -> bytes:
    """Extensions with lengths that fit, mostly, and bytes of any kind between them."""
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
