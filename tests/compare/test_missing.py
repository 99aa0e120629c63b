"""Which ranges differ though a bitmap is clean there."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.contents import MemoryContent, patched, places_in
from support.images import Stored, build_image
from support.traced_memory import traced_memory

import qcow2bm
from qcow2bm.compare import find_missing, missing
from qcow2bm.compare.pieces import PIECE_BYTES
from qcow2bm.errors import BitmapBrokenError, ChangedWhileReadingError
from qcow2bm.format.directory import FLAG_IN_USE

SIZE = 4 * PIECE_BYTES
GRANULE = 65536


def bitmap_of(granules: set[int], granularity_bits: int, size: int, flags: int = 2) -> Stored:
    """A bitmap in which these granules are dirty."""
    bits = np.zeros(-(-size >> granularity_bits), np.uint8)
    bits[list(granules)] = 1
    packed = np.packbits(bits, bitorder="little").tobytes()
    clusters = [packed[at : at + 512] for at in range(0, len(packed), 512)]
    return Stored(b"daily", clusters, granularity_bits, flags)


def found_in(
    stored: Stored, old: MemoryContent, new: MemoryContent, *, trust_stored: bool = False
) -> list[tuple[int, int]]:
    done: list[int] = []
    with qcow2bm.open(build_image(stored, size=new.size).data) as image:
        bitmap = image.bitmaps["daily"]
        arrays = find_missing(old, new, bitmap, trust_stored=trust_stored, progress=done.append)
        found = [(start, length) for array in arrays for start, length in array.tolist()]
    assert sum(done) == min(old.size, new.size)
    return found


def expected(
    dirty: set[int], granularity_bits: int, old: bytes, new: bytes
) -> list[tuple[int, int]]:
    """The plainest way: one granule after the other, joined."""
    ranges: list[tuple[int, int]] = []
    for number in range(-(-len(new) >> granularity_bits)):
        start = number << granularity_bits
        stop = min(start + (1 << granularity_bits), len(new))
        if number in dirty or (stop <= len(old) and old[start:stop] == new[start:stop]):
            continue
        if ranges and sum(ranges[-1]) == start:
            start, _ = ranges.pop()
        ranges.append((start, stop - start))
    return ranges


@pytest.mark.spec("VERIFY-1", "VERIFY-2", "VERIFY-3")
@settings(max_examples=60, deadline=None)
@given(
    places_in(SIZE),
    places_in(SIZE),
    places_in(SIZE),
    st.integers(1, SIZE >> 9),
    st.integers(1, SIZE >> 9),
    st.integers(9, 22),
    st.randoms(use_true_random=False),
    st.sampled_from([0, 0.02, 0.5, 0.95, 1]),
    st.sampled_from([64, 512, 1 << 18]),
)
def test_it_is_what_the_plainest_way_finds(
    common: dict[int, int],
    only_old: dict[int, int],
    only_new: dict[int, int],
    old_sectors: int,
    new_sectors: int,
    granularity_bits: int,
    random: object,
    density: float,
    part_bits: int,
) -> None:
    old = patched(common | only_old, 512 * old_sectors)
    new = patched(common | only_new, 512 * new_sectors)
    granules = range(-(-len(new) >> granularity_bits))
    dirty = {n for n in granules if random.random() < density}  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(missing, "_PART_BITS", part_bits)
        found = found_in(
            bitmap_of(dirty, granularity_bits, len(new)), MemoryContent(old), MemoryContent(new)
        )
    assert found == expected(dirty, granularity_bits, old, new)


@pytest.mark.spec("VERIFY-5")
@pytest.mark.parametrize("granularity_bits", [12, 16, 21])
def test_what_is_dirty_is_not_read(granularity_bits: int) -> None:
    old, new = MemoryContent(b"\1" * SIZE), MemoryContent(b"\2" * SIZE)
    granules = set(range(SIZE >> granularity_bits))
    clean = {len(granules) // 2}
    found = found_in(bitmap_of(granules - clean, granularity_bits, SIZE), old, new)
    (number,) = clean
    assert found == [(number << granularity_bits, 1 << granularity_bits)]
    start, stop = number << granularity_bits, (number + 1) << granularity_bits
    assert sorted(old.read) == sorted(new.read)
    assert sum(length for _, length in new.read) == 1 << granularity_bits
    assert all(start <= at and at + length <= stop for at, length in new.read)


@pytest.mark.spec("VERIFY-5")
def test_short_dirty_ranges_are_read_past_and_holes_are_not_read() -> None:
    new = MemoryContent(patched(dict.fromkeys(range(0, PIECE_BYTES, 512), 1), SIZE))
    every_second = set(range(0, SIZE >> 12, 2))
    found = found_in(bitmap_of(every_second, 12, SIZE), MemoryContent(bytes(SIZE)), new)
    assert found == [(n << 12, 4096) for n in range(1, PIECE_BYTES >> 12, 2)]
    assert len(new.read) == 1


class Pattern(MemoryContent):
    """A content of any size that repeats a few sectors."""

    def __init__(self, sectors: bytes, size: int) -> None:
        super().__init__(sectors * (PIECE_BYTES // len(sectors)))
        self.size = size

    def read_into(self, start: int, buffer: memoryview) -> None:
        assert not start % PIECE_BYTES
        buffer[:] = self.data[: len(buffer)]

    def next_data(self, start: int) -> int:
        return start


@pytest.mark.spec("VERIFY-5")
@pytest.mark.parametrize("size", [1 << 28, pytest.param(1 << 33, marks=pytest.mark.deep)])
def test_memory_does_not_grow_with_the_disk_or_the_bitmap(size: int) -> None:
    """Every other granule of 512 bytes is dirty, and half of the others are missing."""
    stored = Stored(b"daily", [b"\x55" * 4096] * (size >> 24), 9)
    old = Pattern(bytes(2048), size)
    new = Pattern(bytes(512) + b"\1" * 512 + bytes(1024), size)
    with qcow2bm.open(build_image(stored, size=size, cluster_bits=12).data) as image:
        bitmap = image.bitmaps["daily"]
        with traced_memory() as memory:
            count = sum(map(len, find_missing(old, new, bitmap)))
    print(f"{size >> 20} MiB: {count} ranges missing, at most {memory.peak >> 10} KiB of memory")
    assert count == size >> 11
    assert memory.peak < 32 << 20


class Changing(MemoryContent):
    def require_unchanged(self) -> None:
        raise ChangedWhileReadingError(self.name, "content")


@pytest.mark.spec("VERIFY-2")
def test_a_disk_that_changed_meanwhile_proves_nothing() -> None:
    data = b"\1" * PIECE_BYTES
    for old, new in (
        (Changing(data), MemoryContent(data)),
        (MemoryContent(data), Changing(data)),
    ):
        with pytest.raises(ChangedWhileReadingError):
            found_in(bitmap_of(set(), 16, len(data)), old, new)


@pytest.mark.spec("VERIFY-6")
def test_only_if_the_caller_says_so_are_stored_bits_trusted() -> None:
    old, new = b"\1" * SIZE, b"\2" * GRANULE + b"\1" * (SIZE - GRANULE)
    crashed = bitmap_of({1}, 16, SIZE, FLAG_IN_USE)
    with pytest.raises(qcow2bm.BitmapInconsistentError):
        found_in(crashed, MemoryContent(old), MemoryContent(new))
    found = found_in(crashed, MemoryContent(old), MemoryContent(new), trust_stored=True)
    assert found == [(0, GRANULE)]


@pytest.mark.spec("VERIFY-6")
@pytest.mark.parametrize("bits", [0, 5, 33, 63])
def test_a_stale_bitmap_of_an_impossible_granularity_is_refused(bits: int) -> None:
    built = build_image(Stored(b"daily", [b"\1"]), size=SIZE, autoclear=False)
    with qcow2bm.open(bytes(built.data)) as image:
        built.data[image.directory[0].offset_of("granularity_bits")] = bits
    content = MemoryContent(bytes(SIZE))
    with qcow2bm.open(built.data) as image, pytest.raises(BitmapBrokenError):
        list(find_missing(content, content, image.bitmaps["daily"], trust_stored=True))
