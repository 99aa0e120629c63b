"""Every state a loss of power can leave an image in, from a plan of writes and barriers.

A sector is on the disk whole or not at all. Of what is written between two barriers any choice of
sectors may be there, each as any of the writes to it left it, and the file may end anywhere
between its old length and its new one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from math import prod
from random import Random
from typing import NamedTuple

from qcow2bm.clusters.plan import SECTOR_SIZE, Barrier, Plan, Write

MAX_SUBSETS = 1 << 10
"""So many choices of sectors are all gone through; of more, there are samples."""

SAMPLES = 1000

Choice = tuple[tuple[int, ...], int]
"""Which of its contents each sector has, 0 the old one, and the length of the file."""


class Interval(NamedTuple):
    """What is written between two barriers, on top of ``before``.

    ``contents`` are by sector those it can have, the old one first, and ``order`` has for each
    sector written in turn its number, which of its contents that is, and how long the file is
    then. Writes that change nothing are left out. ``first_step`` and ``stop_step`` are the steps
    of the plan, without the barrier.
    """

    first_step: int
    stop_step: int
    before: bytes
    after: bytes
    contents: dict[int, list[bytes]]
    order: list[tuple[int, int, int]]

    @property
    def lengths(self) -> list[int]:
        """Where the file can end, at the unit of a sector; the last is the new length."""
        old, new = len(self.before), len(self.after)
        grown = range(old - old % SECTOR_SIZE + SECTOR_SIZE, new, SECTOR_SIZE)
        return [old, *grown, new] if new > old else [new]

    def choices(self, random: Random) -> list[Choice]:
        """All states, or samples that have all states of interest, each state once."""
        found = dict.fromkeys(map(self._distinct, self._choices(random)))
        return list(found)

    def _distinct(self, choice: Choice) -> Choice:
        """The same for all choices that differ only in what lies behind the end of the file."""
        versions, length = choice
        kept = (
            v * (s * SECTOR_SIZE < length) for s, v in zip(self.contents, versions, strict=True)
        )
        return tuple(kept), length

    def _choices(self, random: Random) -> Iterator[Choice]:
        counts = [len(contents) for contents in self.contents.values()]
        *earlier, end = self.lengths
        none, all_ = tuple(0 for _ in counts), tuple(count - 1 for count in counts)

        def anything() -> tuple[int, ...]:
            density = random.random()
            return tuple(random.randrange(1, n) * (random.random() < density) for n in counts)

        if prod(counts) <= MAX_SUBSETS:
            yield from ((versions, end) for versions in product(*map(range, counts)))
        else:
            yield from ((none, end), (all_, end))
            yield from self._prefixes(none)
            for place, count in enumerate(counts):
                for version in range(count):
                    yield (*none[:place], version, *none[place + 1 :]), end
                    yield (*all_[:place], version, *all_[place + 1 :]), end
            yield from ((anything(), end) for _ in range(SAMPLES))
        yield from ((random.choice((none, all_, anything())), length) for length in earlier)

    def _prefixes(self, none: tuple[int, ...]) -> Iterator[Choice]:
        places = {sector: place for place, sector in enumerate(self.contents)}
        versions = list(none)
        for sector, version, length in self.order:
            versions[places[sector]] = version
            yield tuple(versions), length

    def image(self, choice: Choice) -> bytearray:
        """The bytes of a state."""
        versions, length = choice
        data = bytearray(self.before)
        data.extend(bytes(max(0, length - len(data))))
        for (sector, contents), version in zip(self.contents.items(), versions, strict=True):
            if version:
                start = sector * SECTOR_SIZE
                data[start : start + SECTOR_SIZE] = contents[version]
        del data[length:]
        return data

    def describe(self, choice: Choice) -> str:
        """Which state that is, for a message."""
        versions, length = choice
        chosen = {s: v for s, v in zip(self.contents, versions, strict=True) if v}
        return f"steps {self.first_step}-{self.stop_step}, sectors {chosen}, length {length}"


def intervals(data: bytes, plan: Plan) -> Iterator[Interval]:
    """The stretches between the barriers of a plan, each on top of all those before it."""
    first: int = 0
    for number, step in enumerate((*plan.steps, Barrier("the end"))):
        if isinstance(step, Barrier):
            writes = [step for step in plan.steps[first:number] if isinstance(step, Write)]
            if writes:
                interval = _interval(first, number, data, writes)
                yield interval
                data = interval.after
            first = number + 1


def _interval(first: int, stop: int, before: bytes, writes: Sequence[Write]) -> Interval:
    image, length = bytearray(before), len(before)
    contents: dict[int, list[bytes]] = {}
    order: list[tuple[int, int, int]] = []
    for write in writes:
        data = b"".join(write.parts)
        end = write.offset + len(data)
        image.extend(bytes(max(0, -(-end // SECTOR_SIZE) * SECTOR_SIZE - len(image))))
        for sector in range(write.offset // SECTOR_SIZE, -(-end // SECTOR_SIZE)):
            place = slice(sector * SECTOR_SIZE, (sector + 1) * SECTOR_SIZE)
            old = bytes(image[place])
            low, high = max(place.start, write.offset), min(place.stop, end)
            image[low:high] = data[low - write.offset : high - write.offset]
            length = max(length, high)
            new = bytes(image[place])
            if new == old and sector not in contents:
                continue
            known = contents.setdefault(sector, [old])
            if new not in known:
                known.append(new)
            order.append((sector, known.index(new), length))
    del image[length:]
    return Interval(first, stop, before, bytes(image), contents, order)
