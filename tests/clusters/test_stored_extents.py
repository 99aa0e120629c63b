"""What structures store outside of holes is found with few questions."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from support.spec_image import image

from qcow2bm.clusters.file import ClusterFile
from qcow2bm.clusters.stored_extents import stored_extents
from qcow2bm.storage.memory import MemoryStorage

SECTOR = 512
SECTORS = 60


class Holes(MemoryStorage):
    """The image of spec/image.md, followed by sectors that are holes or not, as given."""

    def __init__(self, is_data: list[bool]) -> None:
        super().__init__(image().ljust(len(is_data) * SECTOR, b"\0"))
        self._is_data = is_data
        self.asked = 0

    def _next(self, offset: int, *, wanted: bool) -> int:
        self.asked += 1
        place = offset
        while place < self.size() and self._is_data[place // SECTOR] != wanted:
            place = (place // SECTOR + 1) * SECTOR
        return min(place, self.size())

    def next_data(self, offset: int) -> int:
        return self._next(offset, wanted=True)

    def next_hole(self, offset: int) -> int:
        return self._next(offset, wanted=False)


@given(
    st.lists(st.booleans(), min_size=SECTORS, max_size=SECTORS),
    st.lists(st.integers(0, SECTORS * SECTOR), max_size=24, unique=True),
    st.integers(1, 8),
)
def test_every_byte_that_is_stored_is_found_once(
    is_data: list[bool], edges: list[int], longest_run: int
) -> None:
    is_data = [is_data[number // longest_run] for number in range(SECTORS)]
    edges.sort()
    edges = edges[: len(edges) // 2 * 2]
    starts, ends = edges[::2], edges[1::2]
    storage = Holes(is_data)
    file = ClusterFile(storage, force_share=True)
    found: list[tuple[int, int]] = []
    for extent in stored_extents(file, starts, ends):
        assert extent.first < extent.stop
        for number in range(extent.first, extent.stop):
            found.append((max(extent.start, starts[number]), min(extent.end, ends[number])))
    wanted = {
        byte
        for start, end in zip(starts, ends, strict=True)
        for byte in range(start, end)
        if is_data[byte // SECTOR]
    }
    assert all(low < high for low, high in found)
    assert sum(high - low for low, high in found) == len(wanted)
    assert {byte for low, high in found for byte in range(low, high)} == wanted
    stretches = sum(is_data[n] and not (n and is_data[n - 1]) for n in range(SECTORS))
    assert storage.asked <= 3 * stretches + 1


def test_behind_the_end_of_the_file_nothing_is_stored() -> None:
    file = ClusterFile(MemoryStorage(image()), force_share=True)
    end = file.file_size
    starts, ends = [0, end - 8, end, end + 4096], [512, end, end + 512, end + 8192]
    (extent,) = stored_extents(file, starts, ends)
    assert (extent.start, extent.first) == (0, 0)
    assert end <= extent.end < end + 512
    assert (file.next_data(end + 1), file.next_hole(end + 1)) == (end, end)
