"""Arbitrary bytes for a parser, which must accept them or refuse them with its own error."""

from __future__ import annotations

from hypothesis import strategies as st

U8, U16, U32, U64 = (st.integers(0, (1 << bits) - 1) for bits in (8, 16, 32, 64))


@st.composite
def mutated(draw: st.DrawFn, whole: st.SearchStrategy[bytes]) -> bytes:
    """Sound bytes with a few of them changed, cut off or followed by others."""
    data = bytearray(draw(whole))
    for position, byte in draw(st.lists(st.tuples(U16, U8), max_size=4)):
        if data:
            data[position % len(data)] = byte
    if draw(st.booleans()):
        del data[draw(st.integers(0, len(data))) :]
    return bytes(data + draw(st.binary(max_size=9)))


def hostile(whole: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """Sound, mutated and arbitrary bytes."""
    return st.one_of(whole, mutated(whole), st.binary(max_size=256))


def padding(size: int) -> st.SearchStrategy[bytes]:
    """Any bytes that fill up ``size`` bytes to the next multiple of 8."""
    return st.binary(min_size=-size % 8, max_size=-size % 8)
