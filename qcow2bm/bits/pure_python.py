"""Counting and setting bits, and classifying bitmap tables, with Python's own integers and arrays.

On inputs of up to some tens of megabytes, these functions take less time than importing numpy.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from qcow2bm.bits.runs import ALL_ONES, ALL_ZEROES, ALLOCATED, INVALID, Run
from qcow2bm.units import ceil_div

_BLOCK = 1 << 16  # bytes; a larger integer does not fit into the processor's cache


def table_runs(words: array[int], offset_mask: int, cluster_size: int) -> Iterator[Run]:
    """Splits the entries of a bitmap table, uint64[n], into runs, in order.

    ``offset_mask`` has the bits of an entry that hold the host offset.

    *Twin*: `qcow2bm.bits.table_runs.table_runs`.
    """
    kind, first, start, expected = -1, 0, 0, -1
    for index, word in enumerate(words):
        if word == 0:
            this = ALL_ZEROES
        elif word == 1:
            this = ALL_ONES
        elif word & offset_mask == word and word % cluster_size == 0:
            if word == expected:
                expected += cluster_size
                continue
            this = ALLOCATED
        else:
            this = INVALID
        if this == kind and this != ALLOCATED:
            continue
        if kind >= 0:
            yield Run(kind, first, index - first, start)
        kind, first = this, index
        start = word if this == ALLOCATED else 0
        expected = word + cluster_size if this == ALLOCATED else -1
    if kind >= 0:
        yield Run(kind, first, len(words) - first, start)


def count_bits(data: bytes | bytearray | memoryview) -> int:
    """Counts the bits that are set.

    *Twin*: `qcow2bm.bits.counting.count_bits`.
    """
    return int.from_bytes(data, "little").bit_count()


def dirty_bytes(octets: bytes | bytearray | memoryview, granularity: int, disk_size: int) -> int:
    """Counts the dirty guest bytes of a disk; the last granule ends where the disk ends.

    ``octets`` are the packed bits. Bits after the last octet count as clear.
    """
    view = memoryview(octets)
    blocks = (view[start : start + _BLOCK] for start in range(0, len(view), _BLOCK))
    dirty = granularity * sum(count_bits(block) for block in blocks)
    bits = ceil_div(disk_size, granularity)
    last = bits - 1
    if 8 * len(view) > last >= 0 and view[last // 8] >> last % 8 & 1:
        dirty -= bits * granularity - disk_size
    return dirty


def count_edges(data: bytes | bytearray | memoryview, carry: int) -> int:
    """Counts the bits that differ from the bit before them; ``carry``, 0 or 1, comes before bit 0.

    *Twin*: `qcow2bm.bits.extents.edges`, whose result has this length.
    """
    bits = int.from_bytes(data, "little")
    # The shift moves the last bit beyond the end, where the bit would count as an edge.
    last = bits >> (8 * len(data) - 1) if len(data) else carry
    return (bits ^ (bits << 1 | carry)).bit_count() - last


def fill(buffer: bytearray | memoryview, first: int, stop: int, *, is_set: bool) -> None:
    """Sets or clears the bits from ``first`` to ``stop``; ``stop`` itself is not changed.

    *Twin*: `qcow2bm.bits.algebra.mask_of`, which returns such bits as a mask.
    """
    if stop <= first:
        return
    first_byte, last_byte = first // 8, (stop - 1) // 8
    head, tail = 0xFF << first % 8 & 0xFF, 0xFF >> (7 - (stop - 1) % 8)
    if first_byte == last_byte:
        head &= tail
    else:
        buffer[last_byte] = buffer[last_byte] | tail if is_set else buffer[last_byte] & ~tail
        inside = last_byte - first_byte - 1
        buffer[first_byte + 1 : last_byte] = (b"\xff" if is_set else b"\0") * inside
    buffer[first_byte] = buffer[first_byte] | head if is_set else buffer[first_byte] & ~head
