"""Every state a loss of power can leave an image in, from a plan of writes and barriers.

A sector is on the disk whole or not at all. Of what is written between two barriers any choice of
sectors may be on the disk, each sector as any of the writes to it left it, and the file may end
anywhere between its old length and its new one.

`judge_states` goes through the states of a plan. Most of them differ only in sectors that no reader
looks at, such as clusters that nothing refers to yet. A reader that reads the same bytes finds the
same, so `Views` reads an image once for all states that agree in what the reader looked at.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from math import prod
from random import Random
from typing import Any, Generic, NamedTuple, TypeVar

from qcow2bm.clusters.plan import SECTOR_SIZE, Barrier, Plan, Write
from qcow2bm.storage.memory import MemoryStorage

MAX_SUBSETS = 1 << 10
"""Up to so many choices of sectors are all gone through; of more, there are samples."""

SAMPLES = 1000

Choice = tuple[tuple[int, ...], int]
"""The content that each sector has, 0 for the old one, and the length of the file."""

Found = TypeVar("Found")
"""The findings of a reader in an image."""


class BrokenStateError(AssertionError):
    """A state that must not be."""


class Interval(NamedTuple):
    """The writes between two barriers, on top of ``before``.

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
        """The lengths that the file can have, in steps of a sector; the last is the new length."""
        old, new = len(self.before), len(self.after)
        grown = range(old - old % SECTOR_SIZE + SECTOR_SIZE, new, SECTOR_SIZE)
        return [old, *grown, new] if new > old else [new]

    def choices(self, random: Random) -> list[Choice]:
        """All states, or samples that have all states of interest, each state once."""
        found = dict.fromkeys(map(self._distinct, self._choices(random)))
        return list(found)

    @property
    def last(self) -> Choice:
        """The choice that is ``after``."""
        versions = dict.fromkeys(self.contents, 0)
        for sector, version, _ in self.order:
            versions[sector] = version
        return tuple(versions.values()), len(self.after)

    def _distinct(self, choice: Choice) -> Choice:
        """One choice for all that differ only in what lies behind the end of the file."""
        versions, length = choice
        if length >= len(self.after):
            return choice
        kept = (
            v * (s * SECTOR_SIZE < length) for s, v in zip(self.contents, versions, strict=True)
        )
        return tuple(kept), length

    def _choices(self, random: Random) -> Iterator[Choice]:
        counts = [len(contents) for contents in self.contents.values()]
        *earlier, end = self.lengths
        none, all_ = tuple(0 for _ in counts), tuple(count - 1 for count in counts)

        def anything() -> tuple[int, ...]:
            density, chance = random.random(), random.random
            return tuple(
                (1 if n == 2 else random.randrange(1, n)) if chance() < density else 0
                for n in counts
            )

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
        """Returns the words for a state, for a message."""
        versions, length = choice
        chosen = {s: v for s, v in zip(self.contents, versions, strict=True) if v}
        return f"steps {self.first_step}-{self.stop_step}, sectors {chosen}, length {length}"


class ObservedImage(MemoryStorage):
    """A state of an image that notes which sectors are read."""

    def __init__(self, data: bytes | bytearray) -> None:
        super().__init__(data, "<state>")
        self.data = data
        self.sectors: set[int] = set()

    def note(self, offset: int, length: int) -> None:
        """Notes that these bytes are read, as far as they are in the file."""
        stop = min(offset + length, len(self.data))
        self.sectors.update(range(offset // SECTOR_SIZE, -(-stop // SECTOR_SIZE)))

    def read_into(self, offset: int, buffer: memoryview) -> int:
        self.note(offset, len(buffer))
        return super().read_into(offset, buffer)

    def unpack(self, form: str, offset: int) -> tuple[Any, ...]:
        """The numbers that stand at an offset, by the format of `struct`."""
        self.note(offset, struct.calcsize(form))
        return struct.unpack_from(form, self.data, offset)

    def close(self) -> None:
        """Stays open: a state is read several times."""


class Views(Generic[Found]):
    """The findings of a reader in the states of an interval.

    Two states are the same to the reader if the file has the same length and every sector that
    was read in the one is the same in the other.
    """

    def __init__(self, interval: Interval, read: Callable[[ObservedImage], Found]) -> None:
        self._interval, self._read = interval, read
        self._known: dict[tuple[int, ...], dict[Choice, Found]] = {}

    def __getitem__(self, choice: Choice) -> Found:
        versions, length = choice
        for places, found in self._known.items():
            key = tuple(versions[place] for place in places), length
            if key in found:
                return found[key]
        image = ObservedImage(self._interval.image(choice))
        result = self._read(image)
        sectors = enumerate(self._interval.contents)
        places = tuple(place for place, sector in sectors if sector in image.sectors)
        key = tuple(versions[place] for place in places), length
        return self._known.setdefault(places, {}).setdefault(key, result)


class State(NamedTuple):
    """One state: a choice in an interval; ``is_after`` if the interval's barrier is done too."""

    interval: Interval
    choice: Choice
    is_after: bool

    @property
    def data(self) -> bytes | bytearray:
        """The bytes of the state."""
        return self.interval.image(self.choice)


def judge_states(
    image: bytes,
    plan: Plan,
    random: Random,
    read: Callable[[ObservedImage], Found],
    judge: Callable[[Found, State], object],
    most: int | None = None,
) -> int:
    """Judges the states that a plan can leave; returns how many there were.

    Args:
        image: the image before the plan.
        plan: the writes and barriers.
        random: chooses where there are too many states.
        read: returns what a reader finds in a state; must depend on nothing but what is read.
        judge: raises `BrokenStateError` unless this may be found in a state.
        most: at most so many states of an interval, besides the one after its barrier.

    Raises:
        BrokenStateError: a state must not be; the message says which one.
    """
    count = 0
    for interval in intervals(image, plan):
        views = Views(interval, read)
        choices = interval.choices(random)
        if most is not None and len(choices) > most:
            choices = random.sample(choices, most)
        states = [State(interval, choice, is_after=False) for choice in choices]
        for state in (*states, State(interval, interval.last, is_after=True)):
            try:
                judge(views[state.choice], state)
            except BrokenStateError as error:
                steps = [step.what for step in plan.steps[interval.first_step : interval.stop_step]]
                where = f"{interval.describe(state.choice)} of {steps}"
                raise BrokenStateError(f"{where}: {error}") from None
        count += len(choices) + 1
    return count


def intervals(data: bytes, plan: Plan) -> Iterator[Interval]:
    """The intervals between the barriers of a plan, each on top of all those before it."""
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
