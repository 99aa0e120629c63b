"""A storage that keeps what is done to it, and images with bitmaps to track in it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from random import Random
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from support.images import ONES, ZEROES, Stored, Word

import qcow2bm
from qcow2bm.clusters.plan import Barrier, Plan, Step, Write
from qcow2bm.storage.memory import MemoryStorage
from qcow2bm.units import ceil_div

if TYPE_CHECKING:
    from typing_extensions import Buffer

Place = tuple[int, int]
"""The place of a write: host offset and length."""

Octets = NDArray[np.uint8]


class RecordingStorage(MemoryStorage):
    """An image in memory of which every write and every barrier is known, as steps of a plan."""

    def __init__(self, data: bytearray) -> None:
        super().__init__(data, "<recording>")
        self.data = data
        self.steps: list[Step] = []

    def write(self, offset: int, parts: Sequence[Buffer]) -> None:
        self.steps.append(Write(offset, (b"".join(parts),), "something"))
        super().write(offset, parts)

    def barrier(self) -> None:
        self.steps.append(Barrier("all of it"))
        super().barrier()

    def since(self, first: int) -> Plan:
        """The steps from number ``first`` on."""
        return Plan(tuple(self.steps[first:]))


def intervals_of(plan: Plan) -> list[list[Place]]:
    """Returns the places that a plan writes before its first barrier, then before the next."""
    assert not plan.steps or isinstance(plan.steps[-1], Barrier), "what is not durable is no use"
    groups = groupby(plan.steps, key=lambda step: isinstance(step, Write))
    return [
        sorted((step.offset, step.length) for step in steps if isinstance(step, Write))
        for is_write, steps in groups
        if is_write
    ]


def random_table(random: Random, size: int, granularity: int, cluster_size: int) -> list[Word]:
    """Clusters of all kinds; the last has no bit set that lies behind the disk."""
    bits = ceil_div(size, granularity)
    table: list[Word] = []
    for first in range(0, bits, 8 * cluster_size):
        kinds: list[Word] = [ZEROES, random.randbytes(cluster_size), b"\x10", b""]
        room = bits - first
        if room >= 8 * cluster_size:
            table.append(random.choice([*kinds, ONES]))
            continue
        word = random.choice(kinds)
        if isinstance(word, bytes):
            number = int.from_bytes(word, "little") & (1 << room) - 1
            word = number.to_bytes(cluster_size, "little")
        table.append(word)
    return table


def random_bitmap(
    random: Random, name: str, size: int, granularity_bits: int, cluster_bits: int, flags: int
) -> Stored:
    """A bitmap with such a table."""
    table = random_table(random, size, 1 << granularity_bits, 1 << cluster_bits)
    return Stored(name.encode(), table, granularity_bits, flags)


def stored_bits(data: bytes | bytearray) -> dict[str, Octets]:
    """The bits that stand in an image now, in_use or not, one byte each, by bitmap."""
    with qcow2bm.open(bytes(data)) as image:
        return {
            name: np.unpackbits(bitmap.stale_bits(), bitorder="little")[
                : ceil_div(image.virtual_size, bitmap.granularity)
            ]
            for name, bitmap in image.bitmaps.items()
        }


def number_of(bits: Octets) -> int:
    """The bits, one byte each, as one number, of which bit n is bit n."""
    return int.from_bytes(np.packbits(bits, bitorder="little").tobytes(), "little")


def cover(bits: Octets, granularity: int, ranges: Iterable[Place]) -> None:
    """Sets the bits, one byte each, of whatever the ranges of guest bytes touch."""
    for start, length in ranges:
        if length:
            bits[start // granularity : ceil_div(start + length, granularity)] = 1


def random_ranges(random: Random, size: int, count: int, most: int) -> list[Place]:
    """Ranges on the disk of up to ``most`` bytes, most of them short, some empty."""
    ranges = []
    for _ in range(count):
        start = random.randrange(size)
        length = random.choice((0, 1, 512, random.randrange(most + 1)))
        ranges.append((start, min(length, size - start)))
    return ranges
