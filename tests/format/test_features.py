from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.hostile_bytes import U8, U64

from qcow2bm.errors import FormatError
from qcow2bm.format import features
from qcow2bm.format.features import (
    Feature,
    FeatureName,
    FeatureNames,
    build_feature_names,
    parse_feature_names,
)

NO_NAMES = FeatureNames()

tables = st.builds(
    FeatureNames,
    st.lists(st.builds(FeatureName, U8, U8, st.binary(min_size=46, max_size=46)), max_size=5).map(
        tuple
    ),
    st.binary(max_size=47),
)


def named(kind: int, bit: int, name: bytes) -> FeatureName:
    return FeatureName(kind, bit, name.ljust(46, b"\0"))


@given(tables)
def test_a_table_survives_being_built_and_parsed(table: FeatureNames) -> None:
    assert parse_feature_names(build_feature_names(table)) == table


@given(st.one_of(st.binary(max_size=150), tables.map(build_feature_names)))
def test_any_bytes_are_a_table_and_none_is_lost(data: bytes) -> None:
    table = parse_feature_names(data)
    assert len(table.entries) == len(data) // 48
    assert build_feature_names(table) == data


@given(st.binary(max_size=60).filter(lambda name: len(name) != 46))
def test_a_name_that_does_not_fill_its_field_is_refused(name: bytes) -> None:
    with pytest.raises(FormatError, match="name"):
        build_feature_names(FeatureNames((FeatureName(0, 0, name),)))


@pytest.mark.parametrize(
    ("field", "text"),
    [
        (b"dirty bit" + bytes(37), "dirty bit"),
        (b"x" * 46, "x" * 46),
        (bytes(46), ""),
        (b"a\0b" + bytes(43), "a"),
        (b"\xff" + bytes(45), "\udcff"),
    ],
)
def test_the_text_of_a_name(field: bytes, text: str) -> None:
    assert FeatureName(0, 0, field).text == text


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (
            "incompatible",
            [
                "dirty bit",
                "corrupt bit",
                "external data file",
                "compression type",
                "extended L2 entries",
            ],
        ),
        ("compatible", ["lazy refcounts"]),
        ("autoclear", ["bitmaps", "raw external data"]),
    ],
)
def test_the_bits_the_specification_names(kind: str, names: list[str]) -> None:
    found = features.features(kind, (1 << 64) - 1, NO_NAMES)
    assert [feature.bit for feature in found] == list(range(64))
    assert [feature.name for feature in found] == names + [None] * (64 - len(names))


@given(st.sampled_from(features.KINDS), U64)
def test_each_bit_set_is_listed_once_lowest_first(kind: str, mask: int) -> None:
    bits = [feature.bit for feature in features.features(kind, mask, NO_NAMES)]
    assert bits == sorted(bits)
    assert sum(1 << bit for bit in bits) == mask


def test_the_image_names_what_the_specification_does_not() -> None:
    names = FeatureNames(
        (
            named(2, 63, b"generation"),
            named(0, 63, b"another kind"),
            named(2, 0, b"not the bitmaps"),
            named(2, 62, b""),
        )
    )
    assert features.features("autoclear", 0b111 << 61 | 1, names) == (
        Feature(0, "bitmaps"),
        Feature(61, None),
        Feature(62, None),
        Feature(63, "generation"),
    )


def test_the_bits_are_those_of_the_specification() -> None:
    assert (
        features.INCOMPATIBLE_DIRTY,
        features.INCOMPATIBLE_CORRUPT,
        features.INCOMPATIBLE_DATA_FILE,
        features.INCOMPATIBLE_COMPRESSION,
        features.INCOMPATIBLE_EXTENDED_L2,
    ) == (0x01, 0x02, 0x04, 0x08, 0x10)
    assert (features.AUTOCLEAR_BITMAPS, features.AUTOCLEAR_RAW_DATA_FILE) == (0x01, 0x02)
    assert (features.KNOWN_INCOMPATIBLE, features.KNOWN_AUTOCLEAR) == (0x1F, 0x03)
