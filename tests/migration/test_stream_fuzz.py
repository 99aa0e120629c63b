"""Streams that were tampered with: events or the library's own errors, in little memory."""

from __future__ import annotations

import random
import tracemalloc
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.mutants import different
from support.streams import FORMS, cut, outcome

from qcow2bm.errors import FormatError, Qcow2BmError
from qcow2bm.migration.stream_bitmaps import read_stream
from qcow2bm.migration.stream_writer import OutgoingBitmap

BITMAPS = [
    OutgoingBitmap("disk", "daily", 65536, True, True, b"\x05" * 200, 200 * 8 * 65536 - 512),
    OutgoingBitmap("disk", "clear", 512, True, False, bytes(1300), 1290 * 8 * 512),
    OutgoingBitmap("other", "größe", 1 << 20, False, True, b"\xff", 3 << 20),
]

INTERESTING = (
    *(0, 1, 2, 7, 8, 9, 31, 32, 33, 63, 64, 255, 256, 511, 512, 1024, 4096, 10240, 10241, 65536),
    *(1 << 31, (1 << 32) - 1, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1),
)
LIMIT = 1 << 20


def mutate(data: bytes, rng: random.Random) -> bytes:
    mutant = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        place = rng.randrange(len(mutant))
        width = rng.choice((1, 2, 4, 8))
        match rng.randrange(7):
            case 0 | 1:
                mutant[place] ^= 1 << rng.randrange(8)
            case 2:
                mutant[place] = rng.choice((*range(10), 0x7E, rng.randrange(256)))
            case 3:
                value = rng.choice(INTERESTING) & (1 << 8 * width) - 1
                mutant[place : place + width] = value.to_bytes(width, "big")
            case 4:
                del mutant[place : place + rng.choice((1, width, 40))]
            case 5:
                start = rng.randrange(len(data))
                mutant[place:place] = data[start : start + rng.choice((1, width, 40, 200))]
            case _ if rng.random() < 0.2:
                del mutant[place:]
        mutant = mutant or bytearray(b"\0")
    return bytes(mutant)


def judged(data: bytes) -> str:
    """How a stream ends; raises anything but the errors that are promised."""
    try:
        found = read_stream([data], LIMIT)
    except Qcow2BmError as error:
        return type(error).__name__
    for bitmap in found.complete:
        packed = bitmap.packed().tobytes()
        assert len(packed) == -(-bitmap.bits // 8)
        assert int.from_bytes(packed, "little") >> bitmap.bits == 0
        assert 0 <= bitmap.dirty_bytes <= bitmap.disk_size
        assert len(bitmap.sha256()) == 64
    assert found.is_complete == (found.fault is None)
    if found.is_complete:
        assert found.complete == found.all
        return "complete"
    assert isinstance(found.fault, FormatError)
    assert str(found.fault).isprintable()
    return "cut off" if "cut off" in str(found.fault) else "fault"


def fuzz(seed: int, count: int, part: int = 0, parts: int = 1) -> None:
    seeds = [form(BITMAPS) for form in FORMS.values()]
    assert {judged(data) for data in seeds} == {"complete"}  # and all is loaded that is needed
    ends: Counter[str] = Counter()
    peak = 0
    rng = random.Random(part)
    tracemalloc.start()
    try:
        for number, data in different(
            lambda rng: mutate(rng.choice(seeds), rng), seed, count, part, parts
        ):
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]  # what the test itself keeps
            try:
                ends[judged(data)] += 1
                peak = max(peak, tracemalloc.get_traced_memory()[1] - before)
                places = [rng.randrange(len(data) + 1) for _ in range(5)]
                assert outcome(cut(data, places)) == outcome([data])
            except BaseException as error:
                error.add_note(f"seed {seed}, mutant {number}: {data.hex()}")
                raise
    finally:
        tracemalloc.stop()
    total = ends.total()
    print(f"{total} different ones of {count} mutants: {dict(ends)}; at most {peak >> 10} KiB")
    assert ends["complete"] > total // 20  # or they are too broken to test much
    assert ends["fault"] > total // 20
    assert peak < 4 * LIMIT


def test_mutants() -> None:
    fuzz(seed=1, count=2000)


@pytest.mark.deep
@pytest.mark.parametrize("part", range(10))
def test_many_mutants(part: int) -> None:
    fuzz(seed=2, count=50_000, part=part, parts=10)


@given(data=st.binary(max_size=500))
def test_arbitrary_bytes(data: bytes) -> None:
    for beginning in (b"", b"QEVM\0\0\0\3", b"\1\0\0\0\1\x0cdirty-bitmap\0\0\0\0\0\0\0\1"):
        judged(beginning + data)
