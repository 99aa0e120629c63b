"""A stream that a real QEMU sent: every bitmap comes out as that QEMU had it."""

from __future__ import annotations

import json
import lzma
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.streams import Outcome, cut, outcome

from qcow2bm.migration.stream_bitmaps import read_stream

DATA = Path(__file__).parents[1] / "data"


@cache
def sample() -> bytes:
    return lzma.decompress((DATA / "stream.bin.xz").read_bytes())


@cache
def expected() -> Outcome:
    return outcome([sample()])


def truth() -> list[dict[str, Any]]:
    bitmaps: list[dict[str, Any]] = json.loads((DATA / "stream.json").read_text("utf-8"))["bitmaps"]
    return bitmaps


@pytest.mark.spec("STREAM-1")
def test_every_bitmap_is_as_qemu_had_it() -> None:
    data = sample()
    bitmaps = read_stream(data[start : start + 5000] for start in range(0, len(data), 5000))
    assert (bitmaps.is_complete, bitmaps.fault) == (True, None)
    found = [
        {
            "node_alias": bitmap.node_alias,
            "bitmap_alias": bitmap.bitmap_alias,
            "size": bitmap.disk_size,
            "granularity": bitmap.granularity,
            "persistent": bitmap.persistent,
            "recording": bitmap.enabled,
            "sha256": bitmap.sha256(),
            # QEMU does not clip the last granule.
            "count": -(-bitmap.dirty_bytes // bitmap.granularity) * bitmap.granularity,
        }
        for bitmap in bitmaps.complete
    ]
    assert len(found) == 6
    assert found == [{key: bitmap[key] for key in found[0]} for bitmap in truth()]


@pytest.mark.spec("STREAM-12")
@given(st.lists(st.integers(0, len(sample())), max_size=8))
@settings(max_examples=8)
def test_it_may_come_in_any_pieces(places: list[int]) -> None:
    assert outcome(cut(sample(), places)) == expected()


@pytest.mark.spec("STREAM-12")
def test_it_may_come_byte_by_byte() -> None:
    """From the last page of memory on; those before are all alike."""
    data = sample()
    place = 0x151000
    pieces = [data[:place], *(data[n : n + 1] for n in range(place, len(data)))]
    assert outcome(pieces) == expected()


@pytest.mark.spec("STREAM-2")
def test_what_follows_the_bitmaps_may_be_anything() -> None:
    device = sample().index(b"\x04", 0x153338)
    assert outcome([sample()[: device + 1], b"\xff" * 100_000]) == expected()
