"""The bitmap table: one big-endian 64-bit word for each cluster of bitmap data.

*Spec*: spec/bitmaps.md, "Bitmap table".
"""

from __future__ import annotations

import sys
from array import array
from typing import NamedTuple

from construct import BitsInteger, BitStruct

from qcow2bm.format.schema import bit_masks

ENTRY_LENGTH = 8

ENTRY = BitStruct(
    "reserved_high" / BitsInteger(8),
    "offset" / BitsInteger(47),
    "reserved_low" / BitsInteger(8),
    "all_ones" / BitsInteger(1),
)


class TableMasks(NamedTuple):
    """The parts of a bitmap table entry as masks of a 64-bit integer."""

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
    """The entries in ``data`` as uint64[len(data) // 8].

    Accepts any whole number of entries: what an entry means is judged with `MASKS`.

    Raises:
        ValueError: ``len(data)`` is not a multiple of 8.
    """
    words = array("Q", data)
    if sys.byteorder == "little":
        words.byteswap()
    return words


def build_bitmap_table(words: array[int]) -> bytes:
    """The bytes of a bitmap table with these entries, uint64[n]."""
    if sys.byteorder == "little":
        words = words[:]
        words.byteswap()
    return words.tobytes()
