"""Maps in which every guest offset is its host offset, and maps in which one is not."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable

import pytest
from support.plans import opened

from qcow2bm.clusters.identity_map import require_identity_map
from qcow2bm.errors import FormatError, LimitError, UnsupportedError
from qcow2bm.format.features import INCOMPATIBLE_DATA_FILE, INCOMPATIBLE_EXTENDED_L2
from qcow2bm.format.header import Header, build_header
from qcow2bm.format.l1_l2 import L1_MASKS, L2_MASKS, SUBCLUSTERS, SUBCLUSTERS_PER_CLUSTER
from qcow2bm.format.schema import bit_masks
from qcow2bm.units import ceil_div

COPIED = 1 << 63
COMPRESSED = 1 << 62
ZERO = 1
ALL_SUBCLUSTERS = (1 << 32) - 1


class Mapped:
    """An image of a header, an L1 table and L2 tables, which begin as an identity map."""

    def __init__(self, size: int, *, cluster_bits: int = 9, extended: bool = False) -> None:
        self.cluster = 1 << cluster_bits
        self.width = 16 if extended else 8
        per_table = self.cluster // self.width
        self.clusters = ceil_div(size, self.cluster)
        tables = ceil_div(self.clusters, per_table)
        first = 1 + ceil_div(8 * tables, self.cluster)
        self.l1 = [COPIED | (first + n) * self.cluster for n in range(tables)]
        self.l2 = [COPIED | n * self.cluster for n in range(self.clusters)]
        self.subclusters = [ALL_SUBCLUSTERS] * self.clusters
        if rest := size % self.cluster:
            unit = self.cluster // SUBCLUSTERS_PER_CLUSTER
            self.subclusters[-1] = (1 << ceil_div(rest, unit)) - 1
        self.after = [0] * (tables * per_table - self.clusters)
        features = INCOMPATIBLE_DATA_FILE | (INCOMPATIBLE_EXTENDED_L2 if extended else 0)
        self.header = Header(
            version=3,
            backing_file_offset=0,
            backing_file_size=0,
            cluster_bits=cluster_bits,
            size=size,
            crypt_method=0,
            l1_size=tables,
            l1_table_offset=self.cluster,
            refcount_table_offset=0,
            refcount_table_clusters=0,
            nb_snapshots=0,
            snapshots_offset=0,
            incompatible_features=features,
            header_length=104,
        )

    def check(self) -> None:
        l1 = struct.pack(f">{len(self.l1)}Q", *self.l1)
        l1 += bytes(-len(l1) % self.cluster)
        words = self.l2 + self.after
        if self.width == 16:
            seconds = self.subclusters + self.after
            words = [word for pair in zip(words, seconds, strict=True) for word in pair]
        l2 = struct.pack(f">{len(words)}Q", *words)
        header = build_header(self.header).ljust(self.cluster, b"\0")
        require_identity_map(opened(header + l1 + l2))


SIZES = (512, 32768, 32768 + 512, 5 * 32768, 5 * 32768 - 512, 70 * 32768)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("cluster_bits", [9, 12, 16])
def test_an_identity_map_is_accepted(size: int, cluster_bits: int) -> None:
    Mapped(size, cluster_bits=cluster_bits).check()


@pytest.mark.parametrize("size", [512, 1 << 20, (1 << 20) + 512, 70 << 20])
@pytest.mark.parametrize("cluster_bits", [14, 16])
def test_an_identity_map_of_subclusters_is_accepted(size: int, cluster_bits: int) -> None:
    Mapped(size, cluster_bits=cluster_bits, extended=True).check()


@pytest.mark.parametrize("extended", [False, True])
@pytest.mark.parametrize("size", [1 << 20, (3 << 20) + 512])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda word: 0, "is not allocated"),
        (lambda word: word | ZERO, "reads as zeros"),
        (lambda word: ZERO, "reads as zeros"),
        (lambda word: word | COMPRESSED, "is compressed"),
        (lambda word: word + (1 << 14), "is at host offset"),
        (lambda word: word & ~COPIED | 1 << 40, "is at host offset"),
        (lambda word: word | 1 << 56, "has the L2 entry"),
        (lambda word: word | 2, "has the L2 entry"),
    ],
)
def test_a_single_cluster_that_is_not_plain_is_found(
    extended: bool, size: int, change: Callable[[int], int], message: str
) -> None:
    mapped = Mapped(size, cluster_bits=14, extended=extended)
    place = random.Random(f"{size} {message}").randrange(mapped.clusters)
    for number in {0, place, mapped.clusters - 1}:
        plain = mapped.l2[number]
        mapped.l2[number] = change(plain)
        with pytest.raises(UnsupportedError, match=f"guest offset {number << 14:#x} {message}"):
            mapped.check()
        mapped.l2[number] = plain


def test_the_first_cluster_counts_as_missing_without_its_flag() -> None:
    mapped = Mapped(1 << 20)
    mapped.l2[0] &= ~COPIED  # offset 0: only the flag tells it from one that is not allocated
    with pytest.raises(UnsupportedError, match="guest offset 0x0 is not allocated"):
        mapped.check()


@pytest.mark.parametrize("bit", [0, 17, 31, 32, 63])
def test_a_single_subcluster_that_is_not_plain_is_found(bit: int) -> None:
    mapped = Mapped(5 << 20, cluster_bits=16, extended=True)
    mapped.subclusters[7] ^= 1 << bit  # allocated no more, or zero from now on
    with pytest.raises(UnsupportedError, match="guest offset 0x70000 has subclusters that are not"):
        mapped.check()


def test_subclusters_matter_as_far_as_the_disk_goes() -> None:
    mapped = Mapped((1 << 20) + 3 * 2048, cluster_bits=16, extended=True)
    assert mapped.subclusters[-1] == 0b111
    mapped.subclusters[-1] |= 1 << 3 | 1 << 35
    mapped.check()
    mapped.subclusters[-1] |= 1 << 34
    with pytest.raises(UnsupportedError, match="guest offset 0x100000"):
        mapped.check()


def test_entries_past_the_disk_do_not_matter() -> None:
    mapped = Mapped(33 * 512)
    mapped.after = [ZERO | COMPRESSED] * len(mapped.after)
    mapped.check()


@pytest.mark.parametrize("word", [0, COPIED])
def test_a_missing_l2_table_is_found(word: int) -> None:
    mapped = Mapped(5 * 32768)
    mapped.l1[3] = word
    with pytest.raises(UnsupportedError, match="entry 3 of the L1 table"):
        mapped.check()


@pytest.mark.parametrize("offset", [512 + 256, 1 << 40])
def test_an_offset_where_no_l2_table_can_be_is_found(offset: int) -> None:
    mapped = Mapped(5 * 32768)
    mapped.l1[3] = COPIED | offset
    with pytest.raises(FormatError, match="L1 table: entry 3 at 0x218"):
        mapped.check()


def test_two_l1_entries_with_one_table_are_found() -> None:
    mapped = Mapped(5 * 32768)
    mapped.l1[3] = mapped.l1[2]
    with pytest.raises(UnsupportedError, match=f"guest offset {3 * 32768:#x} is at host offset"):
        mapped.check()


def test_an_l1_table_that_is_too_short_or_not_there() -> None:
    mapped = Mapped(5 * 32768)
    good = mapped.header
    mapped.header = good._replace(l1_size=4)
    with pytest.raises(FormatError, match="L1 table at 0x200 has 4 entries, and the disk needs 5"):
        mapped.check()
    mapped.header = good._replace(l1_table_offset=1 << 30)
    with pytest.raises(LimitError):
        mapped.check()


@pytest.mark.parametrize("masks", [L1_MASKS, L2_MASKS, bit_masks(SUBCLUSTERS)])
def test_every_bit_of_an_entry_has_one_field(masks: dict[str, int]) -> None:
    assert sum(masks.values()) == (1 << 64) - 1
