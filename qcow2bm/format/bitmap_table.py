"""The bitmap table, one 64-bit word for each cluster of bitmap data: parsing and building.

*Spec*: spec/bitmaps.md, "Bitmap table".
"""

from __future__ import annotations

from array import array
from typing import NamedTuple

from construct import BitsInteger, BitStruct

from qcow2bm.format.schema import bit_masks
from qcow2bm.format.words import build_words, parse_words

ENTRY_LENGTH = 8

ENTRY = BitStruct(
    "reserved_high" / BitsInteger(8),
    "offset" / BitsInteger(47),
    "reserved_low" / BitsInteger(8),
    "all_ones" / BitsInteger(1),
)


class TableMasks(NamedTuple):
    """The fields of a bitmap table entry as masks of a 64-bit integer."""

    offset: int
    all_ones: int
    reserved: int


def _masks() -> TableMasks:
    masks = bit_masks(ENTRY)
    return TableMasks(
        masks["offset"], masks["all_ones"], masks["reserved_high"] | masks["reserved_low"]
    )


MASKS = _masks()


def parse_bitmap_table(data: bytes) -> array[int]:
    """Parses the entries in ``data``: uint64[len(data) // 8].

    Accepts any whole number of entries. The meaning of an entry is judged with `MASKS`.

    Raises:
        ValueError: ``len(data)`` is not a multiple of 8.
    """
    return parse_words(data)


def build_bitmap_table(words: array[int]) -> bytes:
    """Builds the bytes of a bitmap table from its entries, uint64[n]."""
    return build_words(words)
