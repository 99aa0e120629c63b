"""Where a file holds the data of its disk as they are is found; anything else is left out."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.images import build_image

from qcow2bm.clusters.file import ClusterFile
from qcow2bm.clusters.plain_clusters import PlainClusters
from qcow2bm.storage.memory import MemoryStorage

CLUSTER = 1024
ENTRIES = CLUSTER // 8
SIZE = 3 * ENTRIES * CLUSTER
COPIED, COMPRESSED, ZERO = 1 << 63, 1 << 62, 1


class Disk(NamedTuple):
    """An image whose second L2 table has some entries; the data are one cluster per number."""

    file: ClusterFile
    data: bytearray
    first: int  # host offset of the data


def disk(
    numbers: dict[int, int], more: dict[int, int] | None = None, l1_word: int | None = None
) -> Disk:
    """Maps clusters of the disk, by number, to clusters of the data; ``more`` are whole entries."""
    data = bytearray(build_image(size=SIZE, cluster_bits=10).data)
    l1 = ClusterFile(MemoryStorage(bytes(data)), force_share=True).header.l1_table_offset
    table = len(data)
    first = table + CLUSTER
    words = np.zeros(ENTRIES, ">u8")
    for number, place in numbers.items():
        words[number] = COPIED | first + place * CLUSTER
    for number, word in (more or {}).items():
        words[number] = word + (first if word & COMPRESSED == 0 and word > 1 else 0)
    data[l1 + 8 : l1 + 16] = (COPIED | table if l1_word is None else l1_word).to_bytes(8, "big")
    data += words.tobytes()
    for number in range(ENTRIES):
        data += bytes([number]) * CLUSTER
    file = ClusterFile(MemoryStorage(bytes(data)), force_share=True)
    return Disk(file, data, first)


@pytest.mark.spec("SALVAGE-7")
@settings(max_examples=60, deadline=None)
@given(
    st.permutations(range(ENTRIES)),
    st.integers(0, ENTRIES),
    st.integers(0, ENTRIES * CLUSTER - 1),
    st.integers(1, 20 * CLUSTER),
)
def test_runs_lead_to_the_data(places: list[int], joined: int, start: int, length: int) -> None:
    places = sorted(places[:joined]) + places[joined:]
    made = disk(dict(enumerate(places)))
    content = b"".join(bytes([place]) * CLUSTER for place in places)
    length = min(length, len(content) - start)
    runs = PlainClusters(made.file).runs(ENTRIES * CLUSTER + start, length)
    first, last = start // CLUSTER, (start + length - 1) // CLUSTER
    breaks = sum(places[n] != places[n - 1] + 1 for n in range(first + 1, last + 1))
    if breaks >= 16:
        assert runs is None
        return
    assert runs is not None
    assert len(runs) == breaks + 1
    assert (
        b"".join(made.data[at : at + size] for at, size in runs)
        == (content[start : start + length])
    )


PLAIN = {n: n for n in range(8)}


@pytest.mark.spec("SALVAGE-7")
@pytest.mark.parametrize(
    "word",
    [
        pytest.param(0, id="unallocated"),
        pytest.param(ZERO, id="zero"),
        pytest.param(COPIED | ZERO, id="also zero"),
        pytest.param(COPIED | COMPRESSED | 512, id="compressed"),
        pytest.param(COPIED | 512, id="unaligned"),
        pytest.param(COPIED | 1 << 57, id="reserved"),
        pytest.param(COPIED | 1 << 40, id="behind the end"),
    ],
)
def test_what_is_stored_in_another_way_is_left_out(word: int) -> None:
    clusters = PlainClusters(disk(PLAIN, {4: word}).file)
    base = ENTRIES * CLUSTER
    assert clusters.runs(base, 5 * CLUSTER) is None
    assert clusters.runs(base + 4 * CLUSTER + 100, 1) is None
    assert clusters.runs(base, 4 * CLUSTER) is not None
    assert clusters.runs(base + 5 * CLUSTER, 3 * CLUSTER) is not None


@pytest.mark.parametrize("word", [0, COPIED | 1 << 40, COPIED | 512, COPIED | 1 << 60])
def test_an_l2_table_that_cannot_be_read_is_left_to_qemu(word: int) -> None:
    clusters = PlainClusters(disk(PLAIN, l1_word=word).file)
    assert clusters.runs(ENTRIES * CLUSTER, CLUSTER) is None
    assert clusters.runs(0, CLUSTER) is None


def test_a_range_in_two_l2_tables_is_left_to_qemu() -> None:
    clusters = PlainClusters(disk({ENTRIES - 1: 0}).file)
    base = 2 * ENTRIES * CLUSTER
    assert clusters.runs(base - CLUSTER, CLUSTER) is not None
    assert clusters.runs(base - CLUSTER, CLUSTER + 1) is None


@pytest.mark.spec("SALVAGE-7")
@pytest.mark.parametrize(
    ("offset", "value"), [(79, 4), (79, 16), (72, 128), (35, 1)],
    ids=["data file", "subclusters", "unknown feature", "encrypted"],
)  # fmt: skip
def test_an_image_of_another_kind_is_left_to_qemu(offset: int, value: int) -> None:
    made = disk(PLAIN)
    made.data[offset] |= value
    file = ClusterFile(MemoryStorage(bytes(made.data)), force_share=True)
    assert PlainClusters(made.file).runs(ENTRIES * CLUSTER, CLUSTER) is not None
    assert PlainClusters(file).runs(ENTRIES * CLUSTER, CLUSTER) is None
