"""Feature bits of the header, their names, and the feature name table of an image.

*Spec*: spec/header.md, "Feature bits".
"""

from typing import NamedTuple

from construct import Bytes, GreedyBytes, GreedyRange, Int8ub, Struct

from qcow2bm.format.schema import build, parse

INCOMPATIBLE_DIRTY = 1 << 0
INCOMPATIBLE_CORRUPT = 1 << 1
INCOMPATIBLE_DATA_FILE = 1 << 2
INCOMPATIBLE_COMPRESSION = 1 << 3
INCOMPATIBLE_EXTENDED_L2 = 1 << 4
AUTOCLEAR_BITMAPS = 1 << 0
AUTOCLEAR_RAW_DATA_FILE = 1 << 1

AUTOCLEAR_GENERATION = 1 << 63
"""A bit of this library, see spec/lifecycle.md. It means nothing without its extension."""
GENERATION_NAME = "qcow2bm generation"

KNOWN_INCOMPATIBLE = 0b11111
KNOWN_AUTOCLEAR = 0b11

KINDS = (
    "incompatible",
    "compatible",
    "autoclear",
)  # the kinds 0, 1, 2 of the name table

_KNOWN_NAMES = {
    ("incompatible", 0): "dirty bit",
    ("incompatible", 1): "corrupt bit",
    ("incompatible", 2): "external data file",
    ("incompatible", 3): "compression type",
    ("incompatible", 4): "extended L2 entries",
    ("compatible", 0): "lazy refcounts",
    ("autoclear", 0): "bitmaps",
    ("autoclear", 1): "raw external data",
}

_ENTRY = Struct("kind" / Int8ub, "bit" / Int8ub, "name" / Bytes(46))
_TABLE = Struct("entries" / GreedyRange(_ENTRY), "rest" / GreedyBytes)


class FeatureName(NamedTuple):
    """One entry of the feature name table; ``name`` is the whole field, 46 bytes with padding."""

    kind: int
    bit: int
    name: bytes

    @property
    def text(self) -> str:
        """The name without its zero padding."""
        return self.name.partition(b"\0")[0].decode("utf-8", "surrogateescape")


class FeatureNames(NamedTuple):
    """The feature name table; ``rest`` is the bytes after the last whole entry."""

    entries: tuple[FeatureName, ...] = ()
    rest: bytes = b""


class Feature(NamedTuple):
    """A feature bit that is set; ``name`` is None if neither specification nor image names it."""

    bit: int
    name: str | None


def parse_feature_names(data: bytes) -> FeatureNames:
    """Parses the data of the header extension of the feature name table. Accepts any bytes."""
    table = parse(_TABLE, data, "feature name table", 0)
    return FeatureNames(
        tuple(FeatureName(entry.kind, entry.bit, entry.name) for entry in table.entries),
        table.rest,
    )


def build_feature_names(names: FeatureNames) -> bytes:
    """Builds the data of the header extension of the feature name table.

    Raises:
        FormatError: a number or name does not fit its field.
    """
    entries = [entry._asdict() for entry in names.entries]
    return build(_TABLE, {"entries": entries, "rest": names.rest}, "feature name table")


def with_generation_name(data: bytes) -> bytes:
    """Adds the name of this library's own bit to the data of a feature name table."""
    names = parse_feature_names(data)
    bit = AUTOCLEAR_GENERATION.bit_length() - 1
    own = FeatureName(KINDS.index("autoclear"), bit, GENERATION_NAME.encode().ljust(46, b"\0"))
    others = tuple(e for e in names.entries if (e.kind, e.bit) != (own.kind, own.bit))
    return build_feature_names(FeatureNames((*others, own), names.rest))


def features(kind: str, mask: int, names: FeatureNames) -> tuple[Feature, ...]:
    """Names the bits that are set in ``mask``, the lowest first; ``kind`` is one of `KINDS`.

    A bit that the specification does not name has its name from ``names``, the table of the image.
    """
    table = {(entry.kind, entry.bit): entry.text for entry in names.entries}
    number = KINDS.index(kind)
    return tuple(
        Feature(bit, _KNOWN_NAMES.get((kind, bit)) or table.get((number, bit)) or None)
        for bit in range(64)
        if mask >> bit & 1
    )
