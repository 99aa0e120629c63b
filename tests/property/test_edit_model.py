"""Many edits of one image against a model of its bitmaps: names, flags, granularities and bits.

After every commit all refcounts are counted again, and everything is read back twice: by what
stands in the bytes, and by the library from a fresh start.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from support.audit import Audit
from support.images import build_image, extension
from support.model import Bitmaps

import qcow2bm
from qcow2bm.bits.operations import OPS
from qcow2bm.format.extensions import BACKING_FORMAT

GRANULARITY_BITS = st.integers(9, 16)
NAMES = st.sampled_from(("a", "b", "weekly", "n" * 1000, "caf\udce9", "\u20ac"))
MAX_SIZE = 6 << 20  # 12,288 granules of the finest kind


Operation = Callable[[qcow2bm.Edit | Bitmaps], object]


class EditedImage(RuleBasedStateMachine):
    """Gathers operations, and commits them, or some of the time does not."""

    @initialize(
        cluster_bits=st.sampled_from((9, 9, 10, 12)),
        order=st.integers(0, 6),
        size=st.integers(1, MAX_SIZE // 512).map(lambda n: 512 * n),
        is_overlay=st.booleans(),
        garbage=st.integers(0, 100),
        bits=st.lists(GRANULARITY_BITS, min_size=1, max_size=3),
    )
    def create(
        self,
        cluster_bits: int,
        order: int,
        size: int,
        is_overlay: bool,
        garbage: int,
        bits: list[int],
    ) -> None:
        extensions = [extension(BACKING_FORMAT, b"qcow2"), extension(0x12345678, b"unknown")]
        image = build_image(
            cluster_bits=cluster_bits,
            refcount_order=order,
            size=size,
            extensions=extensions[: 2 * is_overlay],
            backing_name=b"/images/base.qcow2" if is_overlay else b"",
        )
        self.data = image.data + b"\xaa" * (garbage << cluster_bits)
        self.size = size
        self.unknown = Audit(self.data).unknown
        self.stored = Bitmaps(size)
        self.model = Bitmaps(size)
        self.operations: list[Operation] = []
        for name, granularity_bits in zip("xyz", bits, strict=False):
            self._add(name, granularity_bits, True)

    def _add(self, name: str, bits: int, enabled: bool) -> None:
        self._then(lambda edit: edit.add(name, 1 << bits, enabled))

    def _then(self, operation: Operation) -> None:
        """Does the operation to the model now, and to the image at the next commit."""
        operation(self.model)
        self.operations.append(operation)

    def _pick(self, number: int) -> str:
        return self.model.names[number % len(self.model)]

    def _range(self, start: int, length: int) -> tuple[int, int]:
        """Some of the numbers, made to lie on the disk."""
        start %= self.size + 1
        return start, min(length, self.size - start)

    @rule(name=NAMES, bits=GRANULARITY_BITS, enabled=st.booleans())
    def add(self, name: str, bits: int, enabled: bool) -> None:
        if name not in self.model:
            self._add(name, bits, enabled)

    @precondition(lambda self: len(self.model) > 2)
    @rule(number=st.integers(0, 5))
    def remove(self, number: int) -> None:
        name = self._pick(number)
        self._then(lambda edit: edit.remove(name))

    @precondition(lambda self: len(self.model) > 4)  # or there would seldom be many
    @rule()
    def remove_all(self) -> None:
        self._then(lambda edit: edit.remove_all())

    @precondition(lambda self: self.model)
    @rule(number=st.integers(0, 5))
    def invalidate_and_salvage(self, number: int) -> None:
        """Salvaging the stored bits takes the invalidation back."""
        name = self._pick(number)

        def operate(edit: qcow2bm.Edit | Bitmaps) -> None:
            if isinstance(edit, qcow2bm.Edit):
                edit.invalidate(name)
                edit.salvage(name, trust_stored=True)

        self._then(operate)

    @precondition(lambda self: self.model)
    @rule(number=st.integers(0, 5), new=NAMES)
    def rename(self, number: int, new: str) -> None:
        name = self._pick(number)
        if new not in self.model:
            self._then(lambda edit: edit.rename(name, new))

    @precondition(lambda self: self.model)
    @rule(number=st.integers(0, 5), new=NAMES, bits=st.none() | GRANULARITY_BITS)
    def copy(self, number: int, new: str, bits: int | None) -> None:
        name = self._pick(number)
        if new not in self.model:
            granularity = None if bits is None else 1 << bits
            self._then(lambda edit: edit.copy(name, new, granularity))

    @precondition(lambda self: self.model)
    @rule(number=st.integers(0, 5), enabled=st.booleans())
    def enable(self, number: int, enabled: bool) -> None:
        name = self._pick(number)
        self._then(lambda edit: edit.enable(name) if enabled else edit.disable(name))

    @precondition(lambda self: self.model)
    @rule(
        number=st.integers(0, 5),
        verb=st.sampled_from(("set", "reset")),
        start=st.integers(0, MAX_SIZE),
        length=st.integers(0, MAX_SIZE) | st.sampled_from((1, 512, 1 << 16)),
    )
    def fill(self, number: int, verb: str, start: int, length: int) -> None:
        name = self._pick(number)
        start, length = self._range(start, length)
        self._then(lambda edit: getattr(edit, verb)(name, start, length))

    @precondition(lambda self: self.model)
    @rule(
        number=st.integers(0, 5),
        verb=st.sampled_from(("set", "reset")),
        step=st.integers(3, 200).map(lambda n: 512 * n + n),
        length=st.integers(0, 40_000),
    )
    def fill_many(self, number: int, verb: str, step: int, length: int) -> None:
        name = self._pick(number)
        ranges = [self._range(start, length) for start in range(0, self.size, step)]
        array = np.array(ranges, np.int64)
        self._then(lambda edit: getattr(edit, f"{verb}_many")(name, array))

    @precondition(lambda self: self.model)
    @rule(number=st.integers(0, 5), clears=st.booleans())
    def invert(self, number: int, clears: bool) -> None:
        name = self._pick(number)
        self._then(lambda edit: edit.clear(name) if clears else edit.invert(name))

    @precondition(lambda self: self.model)
    @rule(number=st.integers(0, 5), other=st.integers(0, 5), op=st.sampled_from(OPS))
    def merge(self, number: int, other: int, op: Any) -> None:
        target, source = self._pick(number), self._pick(other)
        self._then(lambda edit: edit.merge(target, source, op))

    @rule(commits=st.integers(0, 5).map(lambda n: n < 5))
    def commit(self, commits: bool) -> None:
        before = bytes(self.data)
        operations, self.operations = self.operations, []
        with qcow2bm.open(self.data, "r+" if commits else "r") as image:
            with image.edit(dry_run=not commits) as edit:
                for operation in operations:
                    operation(edit)
                assert edit.names == self.model.names
                plan = edit.plan()
            if commits:
                self.stored = deepcopy(self.model)
            assert list(image.bitmaps) == self.stored.names
        self.model = deepcopy(self.stored)
        assert (self.data != before) <= (commits and bool(plan.steps))
        self.check()

    def check(self) -> None:
        audit = Audit(self.data)
        audit.check()
        assert audit.unknown == self.unknown
        assert [
            (
                bitmap.name.decode("utf-8", "surrogateescape"),
                bool(bitmap.flags),
                1 << bitmap.granularity_bits,
                audit.dirty(bitmap),
            )
            for bitmap in audit.bitmaps
        ] == [
            (name, model.enabled, model.granularity, model.numbers)
            for name, model in self.stored.by_name.items()
        ]
        with qcow2bm.open(bytes(self.data), strict=True) as image:
            assert list(image.bitmaps) == self.stored.names
            for name, model in self.stored.by_name.items():
                assert image.bitmaps[name].packed().tobytes() == model.packed


def run(examples: int, steps: int) -> None:
    run_state_machine_as_test(
        EditedImage,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_any_sequence_of_edits() -> None:
    run(80, 40)


@pytest.mark.deep
def test_any_sequence_of_edits_at_length() -> None:
    run(400, 80)
