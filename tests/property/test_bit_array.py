"""A bit array against a set of numbers: one model for everything that reads packed bits."""

from __future__ import annotations

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from qcow2bm.bits import counting, pure_python
from qcow2bm.bits.extents import ExtentFinder

WORDS = 40
BITS = 64 * WORDS - 17  # the last word is not full

positions = st.integers(0, BITS - 1)
lengths = st.one_of(st.just(1), st.integers(1, 80), st.integers(1, BITS))


class BitArray(RuleBasedStateMachine):
    """Sets and clears bits in packed form and, one by one, in a set."""

    def __init__(self) -> None:
        super().__init__()
        self.packed = bytearray(8 * WORDS)
        self.dirty: set[int] = set()

    @initialize(granularity_bits=st.integers(9, 31), missing=st.integers(0, 511))
    def choose_the_disk(self, granularity_bits: int, missing: int) -> None:
        self.granularity = 1 << granularity_bits
        self.virtual_size = BITS * self.granularity - missing

    def _write(self, start: int, stop: int, value: bool) -> None:
        for bit in range(start, stop):
            mask = 1 << bit % 8
            self.packed[bit // 8] = self.packed[bit // 8] & ~mask | mask * value

    @rule(start=positions, length=lengths)
    def set(self, start: int, length: int) -> None:
        stop = min(start + length, BITS)
        self._write(start, stop, True)
        self.dirty.update(range(start, stop))

    @rule(start=positions, length=lengths)
    def reset(self, start: int, length: int) -> None:
        stop = min(start + length, BITS)
        self._write(start, stop, False)
        self.dirty.difference_update(range(start, stop))

    @rule(step=st.integers(2, 70))
    def set_every_so_many(self, step: int) -> None:
        for bit in range(0, BITS, step):
            self._write(bit, bit + 1, True)
            self.dirty.add(bit)

    def _edges(self) -> list[int]:
        return [bit for bit in range(BITS + 1) if (bit in self.dirty) != (bit - 1 in self.dirty)]

    @invariant()
    def counts_agree(self) -> None:
        for module in (pure_python, counting):
            assert module.count_bits(self.packed) == len(self.dirty)
            assert module.count_edges(self.packed, 0) == len(self._edges())

    @rule(words=st.integers(1, WORDS))
    def extents_agree(self, words: int) -> None:
        finder = ExtentFinder(self.granularity, self.virtual_size)
        found: list[list[int]] = []
        for start in range(0, len(self.packed), 8 * words):
            part = bytes(self.packed[start : start + 8 * words])
            found += finder.bits(np.frombuffer(part, np.uint8)).tolist()
        found += finder.finish().tolist()
        edges = iter(self._edges())
        assert found == [
            [
                start * self.granularity,
                min(stop * self.granularity, self.virtual_size) - start * self.granularity,
            ]
            for start, stop in zip(edges, edges, strict=True)
        ]


TestBitArray = BitArray.TestCase
TestBitArray.settings = settings(max_examples=25, stateful_step_count=20)
