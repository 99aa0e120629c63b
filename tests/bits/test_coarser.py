"""Counting bits at coarser granularities, compared with plain sets of granules."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcow2bm.bits import coarser
from qcow2bm.bits.algebra import coarsen
from qcow2bm.bits.coarser import CoarserCounter, GranularityTotals

# What is fed: packed bits, or a number of bytes of one value.
pieces = st.lists(
    st.one_of(
        st.binary(max_size=12),
        st.tuples(st.booleans(), st.integers(0, 300)),
        st.integers(0, 5).map(lambda count: bytes(count) + b"\x80"),
    ),
    min_size=1,
    max_size=6,
)
Pieces = list[bytes | tuple[bool, int]]


def octets_of(fed: Pieces) -> bytes:
    return b"".join(p if isinstance(p, bytes) else bytes([255 * p[0]]) * p[1] for p in fed)


def expected(dirty: set[int], granularity: int, steps: int, size: int) -> list[GranularityTotals]:
    """The totals, counted granule by granule."""
    found = []
    for step in range(steps + 1):
        coarse = {number >> step for number in dirty}
        unit = granularity << step
        length = sum(min((number + 1) * unit, size) - number * unit for number in coarse)
        starts = sum(number - 1 not in coarse for number in coarse)
        found.append(GranularityTotals(unit, length, starts))
        if length in (0, size):
            break
    return found


@pytest.mark.spec("MEASURE-4")
@given(fed=pieces, steps=st.integers(0, 12), least_block=st.sampled_from([1, 64, 1 << 20]),
       past_end=st.integers(0, 15), last_part=st.integers(1, 512))  # fmt: skip
def test_the_totals_are_those_of_plain_sets(
    fed: Pieces, steps: int, least_block: int, past_end: int, last_part: int
) -> None:
    octets = octets_of(fed)
    bits = max(1, 8 * len(octets) - past_end)
    size = 512 * (bits - 1) + last_part
    dirty = {n for n in range(8 * len(octets)) if octets[n // 8] >> n % 8 & 1 and n < bits}
    if past_end or not octets:  # the last bytes come as they are stored: clear behind the end
        whole = bytearray(len(octets) or 1)
        for n in dirty:
            whole[n // 8] |= 1 << n % 8
        fed = [bytes(whole)]
    with mock.patch.object(coarser, "_BLOCK_BYTES", least_block):
        counter = CoarserCounter(512, 512 << steps, size)
    for piece in fed:
        if isinstance(piece, bytes):
            counter.bits(np.frombuffer(piece, np.uint8))
        else:
            counter.constant(*piece)
    assert list(counter.finish()) == expected(dirty, 512, steps, size)


@given(octets=st.binary(max_size=40), factor=st.sampled_from([2, 4, 8, 16]))
def test_bits_are_made_coarser_as_their_numbers_are(octets: bytes, factor: int) -> None:
    coarse = coarsen(np.frombuffer(octets, np.uint8), factor)
    bits = np.unpackbits(np.frombuffer(octets, np.uint8), bitorder="little")
    dirty = {int(number) // factor for number in np.flatnonzero(bits)}
    assert set(np.flatnonzero(np.unpackbits(coarse, bitorder="little")).tolist()) == dirty
    assert len(coarse) == -(-len(octets) // factor)
