"""Sidecars: what goes in comes out, and what is damaged does not come out at all."""

from __future__ import annotations

import hashlib
import random
import zlib
from collections import Counter
from functools import partial
from itertools import chain, repeat

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.images import build_image
from support.mutants import different
from support.traced_memory import traced_memory

from qcow2bm.errors import BitmapError, FormatError, LimitError, Qcow2BmError, UnsupportedError
from qcow2bm.format import sidecar
from qcow2bm.migration.sidecar import SavedBitmap, Sidecar, read_sidecar, write_sidecar
from qcow2bm.units import ceil_div

SIZE = 200 * 8 * 65536 - 512
HEADER = bytes(build_image().data[:4096])
DAILY = SavedBitmap("daily", 65536, True, SIZE, b"\x05" * 200)
BASE = SavedBitmap("größe", 1 << 20, False, SIZE, bytes(12) + b"\x0f")
SIDECAR = Sidecar(SIZE, HEADER, (DAILY, BASE))


def written(saved: Sidecar) -> bytes:
    return b"".join(write_sidecar(*saved))


def resealed(data: bytes) -> bytes:
    """With the digest that belongs to what stands before it."""
    return data[:-32] + hashlib.sha256(data[:-32]).digest()


@st.composite
def sidecars(draw: st.DrawFn) -> Sidecar:
    size = 512 * draw(st.integers(1, 1 << 20))
    bitmaps = []
    for name in draw(st.sets(st.binary(min_size=1, max_size=1023), max_size=4)):
        granularity = 1 << draw(st.integers(max(9, size.bit_length() - 16), 31))
        bits = ceil_div(size, granularity)
        value = draw(st.integers(0, (1 << bits) - 1))
        octets = value.to_bytes(ceil_div(bits, 8), "little")
        text = name.decode("utf-8", "surrogateescape")
        bitmaps.append(SavedBitmap(text, granularity, draw(st.booleans()), size, octets))
    return Sidecar(size, draw(st.sampled_from((b"", HEADER))), tuple(bitmaps))


@given(sidecars(), st.integers(1, 4096))
def test_what_was_saved_comes_back(saved: Sidecar, piece: int) -> None:
    data = written(saved)
    assert read_sidecar([data]) == saved
    assert read_sidecar(data[n : n + piece] for n in range(0, len(data), piece)) == saved


def test_the_bytes_that_the_specification_gives() -> None:
    data = written(Sidecar(1 << 20, b"", (SavedBitmap("b", 65536, True, 1 << 20, b"\3\0"),)))
    packed = zlib.compress(b"\3\0", 1)
    expected = (
        b"\x89qcow2bm\0\0\0\1\0\0\0\0" + (1 << 20).to_bytes(8, "big") + b"\0\0\0\1\0\0\0\0"
        + len(packed).to_bytes(8, "big") + b"\0\0\0\0\1\x10\0\1b" + packed
    )  # fmt: skip
    assert data == expected + hashlib.sha256(expected).digest()


@pytest.mark.spec("SIDECAR-1")
def test_every_bit_that_is_wrong_is_noticed() -> None:
    data = bytearray(written(SIDECAR._replace(header=b"")))
    for place in range(len(data)):
        for bit in range(8):
            data[place] ^= 1 << bit
            with pytest.raises((FormatError, UnsupportedError, LimitError)):
                read_sidecar([bytes(data)])
            data[place] ^= 1 << bit


@pytest.mark.spec("SIDECAR-1")
def test_every_length_that_is_wrong_is_noticed() -> None:
    data = written(SIDECAR)
    for length in range(len(data)):
        with pytest.raises(FormatError, match="cut off"):
            read_sidecar([data[:length]])
    for more in (b"\0", b"", data):
        pieces = [data, more]
        if more:
            with pytest.raises(FormatError, match="has bytes after its end"):
                read_sidecar(pieces)
        else:
            assert read_sidecar(pieces) == SIDECAR


def number(data: bytes, place: int, length: int, value: int) -> bytes:
    return data[:place] + value.to_bytes(length, "big") + data[place + length :]


FIRST = sidecar.HEAD_BYTES  # where the first bitmap is if there is no header


@pytest.mark.spec("SIDECAR-1")
@pytest.mark.parametrize(
    ("place", "length", "value", "said"),
    [
        (0, 1, 0x88, "sidecar: magic at 0x0 is not the magic of a sidecar"),
        (12, 4, (2 << 20) + 1, "sidecar: header_size at 0xc is 2097153, must be at most 2097152"),
        (16, 8, 0, "sidecar: disk_size at 0x10 is 0, must be a multiple of 512"),
        (16, 8, 513, "sidecar: disk_size at 0x10 is 513"),
        (24, 4, 65536, "sidecar: nb_bitmaps at 0x18 is 65536"),
        (28, 4, 1, "sidecar: reserved at 0x1c is 1"),
        (FIRST, 8, 1 << 63, "bitmap 0: data_size at 0x20 is 9223372036854775808, more than"),
        (FIRST + 8, 4, 1, "bitmap 0: reserved at 0x28 is 1, must be 0"),
        (FIRST + 12, 1, 2, "bitmap 0: flags at 0x2c is 2, must be 0 or 1"),
        (FIRST + 13, 1, 8, "bitmap 0: granularity_bits at 0x2d is 8, must be 9 to 31"),
        (FIRST + 13, 1, 32, "bitmap 0: granularity_bits at 0x2d is 32"),
        (FIRST + 13, 1, 17, "bitmap 0: data at 0x35 is damaged"),  # other bits than those expected
        (FIRST + 14, 2, 0, "bitmap 0: name_size at 0x2e is 0, must be 1 to 1023"),
        (FIRST + 14, 2, 1024, "bitmap 0: name_size at 0x2e is 1024"),
    ],
)
def test_a_field_that_breaks_a_rule(place: int, length: int, value: int, said: str) -> None:
    data = written(SIDECAR._replace(header=b""))
    assert data[FIRST + 16 : FIRST + 21] == b"daily"
    with pytest.raises(FormatError) as caught:
        read_sidecar([resealed(number(data, place, length, value))])
    assert str(caught.value).startswith(said)


@pytest.mark.spec("SIDECAR-1")
def test_other_rules() -> None:
    data = written(SIDECAR)
    with pytest.raises(UnsupportedError, match="version 2 of sidecars"):
        read_sidecar([resealed(number(data, 8, 4, 2))])
    twice = data.replace("größe".encode(), b"daily00").replace(b"\0\7daily00", b"\0\5daily")
    with pytest.raises(FormatError, match=r"bitmap 1: name at .* is there twice"):
        read_sidecar([resealed(twice)])
    with pytest.raises(FormatError, match="header"):
        read_sidecar([written(SIDECAR._replace(header=b"x" * 200))])
    past = DAILY._replace(octets=b"\xff" * 200, disk_size=SIZE - 65536)
    with pytest.raises(FormatError, match="past the end of the disk"):
        read_sidecar([written(Sidecar(SIZE - 65536, b"", (past,)))])


@pytest.mark.spec("SIDECAR-2")
def test_limits() -> None:
    huge = number(written(SIDECAR._replace(header=b"")), 16, 8, 1 << 60)
    with pytest.raises(LimitError, match="the length of a bitmap in bytes"):
        read_sidecar([resealed(huge)])
    data = written(SIDECAR)
    length = len(DAILY.octets) + len(BASE.octets)
    assert read_sidecar([data], length) == SIDECAR
    with pytest.raises(LimitError):
        read_sidecar([data], length - 1)


@pytest.mark.spec("SIDECAR-2")
@pytest.mark.parametrize("what", ["bomb", "noise", "endless"])
def test_memory_is_bounded(what: str) -> None:
    size = 8 << 20
    octets = bytes(size)
    bitmap = SavedBitmap("b", 512, True, 8 * 512 * size, octets)
    data = b"".join(write_sidecar(bitmap.disk_size, b"", [bitmap]))
    if what == "bomb":  # the same data for a bitmap of one byte
        data = resealed(number(data, 16, 8, 512))
    elif what == "noise":
        octets = random.Random(1).randbytes(size)
        bitmap = bitmap._replace(octets=octets)
        data = b"".join(write_sidecar(bitmap.disk_size, b"", [bitmap]))
    with traced_memory() as memory:
        if what == "noise":
            assert read_sidecar(data[n : n + 65536] for n in range(0, len(data), 65536)).bitmaps
        elif what == "endless":
            with pytest.raises(FormatError, match="has bytes after its end"):
                read_sidecar(chain([data], repeat(bytes(1 << 16))))
        else:
            with pytest.raises(FormatError):
                read_sidecar([data])
    assert memory.peak < (1 << 20 if what == "bomb" else 4 * size)


def test_what_cannot_be_written() -> None:
    with pytest.raises(BitmapError, match="twice"):
        write_sidecar(SIZE, b"", [DAILY, DAILY])
    with pytest.raises(BitmapError, match="another size"):
        write_sidecar(SIZE + 512, b"", [DAILY])
    with pytest.raises(LimitError):
        write_sidecar(SIZE, bytes((2 << 20) + 1), [])


def mutate(data: bytes, rng: random.Random) -> bytes:
    mutant = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        place = rng.randrange(len(mutant))
        match rng.randrange(4):
            case 0:
                mutant[place] ^= 1 << rng.randrange(8)
            case 1:
                width = rng.choice((1, 2, 4, 8))
                value = rng.choice((0, 1, 31, 255, 512, 1023, (1 << 32) - 1, (1 << 64) - 1))
                mutant[place : place + width] = (value & (1 << 8 * width) - 1).to_bytes(
                    width, "big"
                )
            case 2:
                del mutant[place : place + rng.choice((1, 4, 40))]
            case _:
                mutant[place:place] = data[place : place + rng.choice((1, 8, 60))]
        mutant = mutant or bytearray(1)
    return bytes(mutant)


def mutant_of(data: bytes, rng: random.Random) -> bytes:
    mutant = mutate(data, rng)
    if rng.random() < 0.9:  # by an attacker, who makes the digest right again
        return resealed(mutant + bytes(32)) if rng.random() < 0.1 else resealed(mutant)
    return mutant


def fuzz(seed: int, count: int) -> Counter[str]:
    data = written(SIDECAR._replace(header=HEADER[:300]))
    ends: Counter[str] = Counter()
    for _, mutant in different(partial(mutant_of, data), seed, count):
        try:
            found = read_sidecar([mutant], 1 << 20)
        except Qcow2BmError as error:
            ends[type(error).__name__ if str(error).isprintable() else "unprintable"] += 1
            continue
        ends["read"] += 1
        assert found.generation is None or len(found.generation) == 16
        for bitmap in found.bitmaps:
            assert 0 <= bitmap.dirty_bytes <= bitmap.disk_size
            assert len(bitmap.sha256()) == 64
    assert not ends["unprintable"]
    return ends


@pytest.mark.spec("SIDECAR-1")
def test_hostile_sidecars() -> None:
    ends = fuzz(0, 3000)
    assert ends["read"]
    assert ends["FormatError"] > 1000


@pytest.mark.deep
@pytest.mark.spec("SIDECAR-1")
@pytest.mark.parametrize("seed", range(1, 5))
def test_many_hostile_sidecars(seed: int) -> None:
    ends = fuzz(seed, 50_000)
    print("hostile sidecars:", dict(ends))
    assert ends["read"]


@settings(max_examples=30)
@given(st.binary(max_size=200))
def test_bytes_of_all_kinds(data: bytes) -> None:
    for content in (data, b"\x89qcow2bm\0\0\0\1" + data):
        with pytest.raises(Qcow2BmError):
            read_sidecar([content])
