from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcow2bm.units import align_up, ceil_div, escape, format_size

sizes = st.integers(0, (1 << 64) - 1)
names = st.one_of(
    st.text(st.characters(exclude_categories=())),
    st.binary().map(lambda name: name.decode("utf-8", "surrogateescape")),
)


@given(sizes, st.integers(1, 1 << 63))
def test_rounding_up_reaches_and_does_not_exceed(value: int, unit: int) -> None:
    quotient = ceil_div(value, unit)
    assert (quotient - 1) * unit < value <= quotient * unit
    assert align_up(value, unit) == quotient * unit


@given(names)
def test_escaped_text_is_printable_and_plain_text_stays(text: str) -> None:
    escaped = escape(text)
    assert escaped.isprintable()
    if text.isprintable() and not set(text) & {'"', "\\"}:
        assert escaped == text


@given(names, names)
def test_two_names_never_look_alike(one: str, other: str) -> None:
    assert (escape(one) == escape(other)) == (one == other)


def test_a_raw_byte_and_a_control_character_do_not_look_alike() -> None:
    raw = b"\x85".decode("utf-8", "surrogateescape")
    assert escape(raw) == "\\x85"
    assert escape("\x85") != escape(raw)


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("", ""),
        ("daily é 日", "daily é 日"),
        ('a"b\\c', 'a\\"b\\\\c'),
        ("\n\t\0\x1b[31m\x7f", "\\n\\t\\x00\\x1b[31m\\x7f"),
        ("\u202eevil\u2028", "\\u202eevil\\u2028"),
        ("\U000e0001", "\\U000e0001"),
        ("\udcff", "\\xff"),
        ("\ud800", "\\ud800"),
    ],
)
def test_escaping(text: str, escaped: str) -> None:
    assert escape(text) == escaped


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (1, "1 byte"),
        (512, "512 bytes"),
        (1023, "1023 bytes"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (65536, "64 KiB"),
        (1000 << 10, "1000 KiB"),
        (10 << 20, "10 MiB"),
        (1 << 40, "1 TiB"),
        (1 << 62, "4 EiB"),
        (1 << 70, "1024 EiB"),
    ],
)
def test_sizes_as_people_say_them(size: int, text: str) -> None:
    assert format_size(size) == text


@given(sizes)
def test_a_size_is_said_within_one_part_in_a_hundred(size: int) -> None:
    number, unit = format_size(size).split()
    power = ("byte", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB").index(unit.replace("bytes", "byte"))
    said = Fraction(number) * 1024**power
    assert abs(said - size) <= Fraction(size, 20)
    assert Fraction(number) <= 1024
