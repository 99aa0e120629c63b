"""The refcount table and refcount blocks, for all seven refcount widths: parsing and building.

*Spec*: spec/refcounts.md.
"""

from __future__ import annotations

from array import array
from functools import cache
from typing import Any

from construct import Array, BitsInteger, BitStruct, Bitwise, Int8ub, Int16ub, Int32ub, Int64ub

from qcow2bm.format.header import MAX_REFCOUNT_ORDER
from qcow2bm.format.schema import bit_masks, parse
from qcow2bm.format.words import build_words, parse_words

ENTRY_LENGTH = 8  # of the refcount table

TABLE_ENTRY = BitStruct("offset" / BitsInteger(55), "reserved" / BitsInteger(9))
TABLE_OFFSET_MASK = bit_masks(TABLE_ENTRY)["offset"]
TABLE_RESERVED_MASK = bit_masks(TABLE_ENTRY)["reserved"]

_WHOLE_BYTES = {3: (Int8ub, "B"), 4: (Int16ub, "H"), 5: (Int32ub, "I"), 6: (Int64ub, "Q")}


def byte_schema(refcount_order: int) -> Any:  # noqa: ANN401
    """The schema of a byte that holds several refcounts, the one in the highest bits first."""
    width = 1 << refcount_order
    return Bitwise(Array(8 // width, BitsInteger(width)))


@cache
def _refcounts_of_bytes(refcount_order: int) -> tuple[bytes, ...]:
    """The refcounts in each of the 256 byte values, the one in the lowest bits first (REF-1)."""
    schema = byte_schema(refcount_order)
    return tuple(
        bytes(reversed(parse(schema, bytes([byte]), "refcount block", 0))) for byte in range(256)
    )


def parse_refcount_table(data: bytes) -> array[int]:
    """Parses a refcount table: uint64[len(data) // 8], including reserved bits.

    Raises:
        ValueError: ``len(data)`` is not a multiple of 8.
    """
    return parse_words(data)


def build_refcount_table(words: array[int]) -> bytes:
    """Builds the bytes of a refcount table from its entries, uint64[n]."""
    return build_words(words)


def parse_refcount_block(data: bytes, refcount_order: int) -> array[int]:
    """Parses a refcount block: uint8[n] up to order 3, else uint16[n], uint32[n] or uint64[n].

    ``n`` is ``8 * len(data) >> refcount_order``.

    Raises:
        ValueError: ``len(data)`` is not a whole number of refcounts, or the order is not 0..6.
    """
    _require_order(refcount_order)
    if refcount_order < 3:
        return array("B", b"".join(map(_refcounts_of_bytes(refcount_order).__getitem__, data)))
    return parse_words(data, _WHOLE_BYTES[refcount_order][1])


def build_refcount_block(refcounts: array[int], refcount_order: int) -> bytes:
    """Builds the bytes of a refcount block.

    Raises:
        ValueError: the refcounts do not fill whole bytes, one does not fit its width, or the
            order is not 0..6.
    """
    _require_order(refcount_order)
    width = 1 << refcount_order
    try:
        if refcount_order >= 3:
            return build_words(array(_WHOLE_BYTES[refcount_order][1], refcounts))
        numbers = {counts: byte for byte, counts in enumerate(_refcounts_of_bytes(refcount_order))}
        raw = bytes(refcounts.tolist())
        return bytes(numbers[raw[i : i + 8 // width]] for i in range(0, len(raw), 8 // width))
    except (KeyError, OverflowError, ValueError):
        raise ValueError(f"the refcounts are not whole bytes of {width}-bit refcounts") from None


def _require_order(refcount_order: int) -> None:
    if not 0 <= refcount_order <= MAX_REFCOUNT_ORDER:
        raise ValueError(f"refcount_order is {refcount_order}, must be 0..{MAX_REFCOUNT_ORDER}")
