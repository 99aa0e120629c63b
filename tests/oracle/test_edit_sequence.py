"""Long random sequences in which this library and QEMU take turns on one image.

After every operation both must find the bits that a plain model gives, and no fault.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest
from support.model import OPERATORS
from support.qemu import StorageDaemon
from support.twin import KINDS, SECTOR, KiB, Kind, MiB, Step, Twin

GRANULARITIES = (512, 1 * KiB, 4 * KiB, 64 * KiB, 1 * MiB)
MOST = 8  # bitmaps at a time


@pytest.fixture(scope="module")
def daemon() -> Iterator[StorageDaemon]:
    with StorageDaemon() as daemon:
        yield daemon


class Sequence:
    """One random operation after the other; the seed says which."""

    def __init__(self, twin: Twin, seed: str) -> None:
        self._twin = twin
        self._random = Random(seed)
        self._added = 0

    @property
    def _names(self) -> list[str]:
        return list(self._twin.bitmaps.by_name)

    def _name(self) -> str:
        return self._random.choice(self._names)

    def _new_name(self) -> str:
        self._added += 1
        return f"{self._added} " + "n" * self._random.choice((0, 0, 3, 40, 300))

    def _range(self) -> tuple[int, int]:
        """Bytes: mostly few, now and then much of the disk, or up to its end."""
        size = self._twin.size
        start = self._random.choice((0, self._random.randrange(size)))
        most = self._random.choice((1, 5 * KiB, MiB, size))
        return start, self._random.choice((size - start, self._random.randrange(1, most + 1)))

    def _ranges(self) -> list[tuple[int, int]]:
        size = self._twin.size
        count = self._random.choice((2, 30, 200))
        found = [self._range() for _ in range(2)]
        found += [(self._random.randrange(size), self._random.randrange(9)) for _ in range(count)]
        return [(start, min(length, size - start)) for start, length in found]

    def _step(self) -> Step:
        """An operation of this library that makes sense now."""
        random, names = self._random, self._names
        if not names or (len(names) < MOST and random.random() < 0.15):
            granularity = random.choice((None, *GRANULARITIES))
            return "add", (self._new_name(), granularity, random.random() < 0.7)
        if len(names) < MOST and random.random() < 0.15:
            granularity = random.choice((None, *GRANULARITIES))
            return "copy", (self._name(), self._new_name(), granularity)
        kind = random.choice(
            ("set", "set", "reset", "set_many", "reset_many", "invert", "clear", "enable")
            + ("merge",) * 4
            + ("disable", "rename", "remove", *["remove_all"] * (random.random() < 0.1))
        )
        start, length = self._range()
        arguments: dict[str, tuple[object, ...]] = {
            "set": (start, min(length, self._twin.size - start)),
            "reset": (start, min(length, self._twin.size - start)),
            "set_many": (self._ranges(),),
            "reset_many": (self._ranges(),),
            "rename": (self._new_name(),),
            "merge": (self._name(), random.choice(list(OPERATORS))),
        }
        return kind, () if kind == "remove_all" else (self._name(), *arguments.get(kind, ()))

    def ours(self) -> None:
        """One edit with one operation, or some that build on each other."""
        count = self._random.choice((1, 1, 1, 2, 5))
        if count == 1:
            self._twin.edit(self._step())
            return
        names = self._names
        steps: list[Step] = []
        for number in range(count):
            # Only what is there from the beginning to the end of the edit, and what is new.
            start, length = self._range()
            target = self._random.choice([*names, *(f"new {n}" for n in range(number))] or [""])
            if not target or number == 0:
                steps.append(("add", (f"new {number}", self._random.choice(GRANULARITIES))))
                names = [name for name in names if name != f"new {number}"]
                continue
            steps.append(("copy", (target, f"new {number}")))
            length = min(length, self._twin.size - start)
            steps.append(("set", (f"new {number}", start, length)))
            steps.append(("merge", (target, f"new {number}", self._random.choice([*OPERATORS]))))
        steps += [("remove", (f"new {number}",)) for number in range(1, count)]
        steps.append(("rename", ("new 0", self._new_name())))
        self._twin.edit(*steps)

    def write(self) -> None:
        """The guest writes, one to three times."""
        size, ranges = self._twin.size, []
        for _ in range(self._random.randrange(1, 4)):
            start = self._random.randrange(size // SECTOR) * SECTOR
            length = SECTOR * self._random.choice((1, 9, 200))
            ranges.append((start, min(length, size - start)))
        self._twin.write(*ranges)

    def qemu(self) -> None:
        """qemu-img bitmap."""
        random, twin = self._random, self._twin
        if not self._names or (len(self._names) < MOST and random.random() < 0.25):
            granularity = random.choice(GRANULARITIES)
            twin.qemu_add(self._new_name(), granularity, enabled=random.random() < 0.7)
            return
        action = random.choice(("remove", "clear", "enable", "disable", "merge", "merge"))
        twin.qemu(action, self._name(), *([self._name()] if action == "merge" else []))

    def resize(self) -> None:
        """qemu-img resize."""
        self._twin.qemu_resize(self._random.randrange(1, 24 * MiB // (64 * KiB)) * 64 * KiB)

    def turn(self) -> None:
        """One operation of either."""
        turns: list[Callable[[], None]] = [self.ours] * 10 + [self.qemu] * 5 + [self.write] * 4
        self._random.choice([*turns, self.resize])()


def play(kind: Kind, folder: Path, daemon: StorageDaemon, seed: str, count: int) -> None:
    twin = Twin.create(kind, folder)
    sequence = Sequence(twin, seed)
    for done in range(count):
        try:
            sequence.turn()
            twin.verify(daemon)
        except BaseException as error:
            error.add_note(f"operation {done} of seed {seed!r}")
            raise
    print(f"{seed}: {count} operations, {count} times agreed")


SAMPLED = ("cluster-4k", "data-file-raw", "refcount-1")


@pytest.mark.parametrize("kind", SAMPLED)
def test_taking_turns(tmp_path: Path, daemon: StorageDaemon, kind: str) -> None:
    play(KINDS[kind], tmp_path, daemon, f"sample {kind}", 60)


@pytest.mark.deep
@pytest.mark.parametrize("part", range(2))
def test_taking_turns_for_long(tmp_path: Path, daemon: StorageDaemon, part: int) -> None:
    """QEMU and this library must agree after each of 1,000 operations, with small clusters."""
    play(KINDS["cluster-512"], tmp_path, daemon, f"long cluster-512, part {part}", 500)
