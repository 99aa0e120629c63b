"""Tracking against a model of it: for each bitmap one number a bit, and what was marked since."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from support.audit import Audit
from support.images import ONES, build_image
from support.recording import (
    Place,
    RecordingStorage,
    cover,
    random_bitmap,
    random_ranges,
    stored_bits,
)

import qcow2bm
from qcow2bm.format.directory import FLAG_AUTO, FLAG_IN_USE
from qcow2bm.units import ceil_div

PIECE_BYTES = 4096
PIECE_BITS = 8 * PIECE_BYTES
GRANULARITY_BITS = range(9, 32)

# By cluster_bits, how coarse the finest bitmap can be: the L1 tables of such disks are still small.
COARSEST = {9: 3, 12: 9, 16: 20}

START = st.integers(0, 1 << 64)
SEED = st.integers(0, 1 << 30)


class TrackedImage(RuleBasedStateMachine):
    """Tracks all enabled bitmaps of an image, again and again."""

    @initialize(
        cluster_bits=st.sampled_from(tuple(COARSEST)),
        extra_bits=st.integers(0, max(COARSEST.values())),
        coarser=st.lists(st.integers(0, max(GRANULARITY_BITS)), max_size=3),
        clusters=st.integers(1, 3),
        seed=SEED,
    )
    def create(
        self, cluster_bits: int, extra_bits: int, coarser: list[int], clusters: int, seed: int
    ) -> None:
        random = Random(seed)
        finest = 9 + extra_bits % (1 + COARSEST[cluster_bits])
        granules = random.randrange(8 * clusters << cluster_bits) + 1
        self.size = max(512, (granules << finest) - 512 * random.randrange(1 << finest - 9))
        self.granularity = {"b0": 1 << finest}
        for number, more in enumerate(coarser, 1):
            self.granularity[f"b{number}"] = 1 << min(finest + more, max(GRANULARITY_BITS))
        bitmaps = [
            random_bitmap(
                random, name, self.size, granularity.bit_length() - 1, cluster_bits, FLAG_AUTO
            )
            for name, granularity in self.granularity.items()
        ]
        disabled = random_bitmap(random, "disabled", self.size, finest, cluster_bits, 0)
        built = build_image(*bitmaps, disabled, cluster_bits=cluster_bits, size=self.size)
        built.data.extend(b"\xaa" * (random.randrange(20) << cluster_bits))  # free, and not empty
        self.storage = RecordingStorage(built.data)
        self.data = built.data
        self.image = qcow2bm.open(self.storage, "r+")
        self.model = stored_bits(built.data)
        self._track()

    def _track(self) -> None:
        first = len(self.storage.steps)
        self.tracker = self.image.track()
        assert self.tracker.names == list(self.granularity)
        assert self.storage.since(first).length >= 4 * len(self.granularity)
        self.touched = {
            name: np.zeros(ceil_div(len(bits), PIECE_BITS), np.bool_)
            for name, bits in self.model.items()
            if name in self.granularity
        }
        self.is_exact = True

    def _cover(self, ranges: list[Place]) -> None:
        """Applies the ranges to the model, and notes the pieces that this changes."""
        for name, granularity in self.granularity.items():
            bits = self.model[name]
            before = bits.copy()
            cover(bits, granularity, ranges)
            self.touched[name][np.flatnonzero(bits != before) // PIECE_BITS] = True

    def _range(self, start: int, length: int) -> Place:
        start %= self.size + 1
        return start, min(length % (self.size + 1), self.size - start)

    @rule(start=START, length=st.just(1) | st.integers(0, 1 << 20) | START, waits=st.booleans())
    def mark(self, start: int, length: int, waits: bool) -> None:
        start, length = self._range(start, length)
        if not length:
            return
        if waits:
            with self.tracker.writing(start, length):
                self._cover([(start, length)])
        else:
            self.tracker.mark(start, length)
            self._cover([(start, length)])

    @rule(seed=SEED, count=st.integers(0, 200), part=st.integers(1, 1000))
    def mark_many(self, seed: int, count: int, part: int) -> None:
        ranges = random_ranges(Random(seed), self.size, count, self.size // part)
        self.tracker.mark_many(np.array(ranges, np.int64).reshape(-1, 2))
        self._cover(ranges)

    @rule(start=START, beyond=st.integers(1, 1 << 40))
    def mark_what_is_not_on_the_disk(self, start: int, beyond: int) -> None:
        start %= self.size
        with pytest.raises(ValueError, match="does not lie on the disk"):
            self.tracker.mark(start, self.size - start + beyond)
        with pytest.raises(ValueError, match="does not lie on the disk"):
            self.tracker.mark_many(np.array([(start, 1), (start, self.size - start + beyond)]))

    @rule(limit=st.none() | st.integers(1, 20))
    def flush(self, limit: int | None) -> None:
        pending, first = self.tracker.pending.pieces, len(self.storage.steps)
        report = self.tracker.flush(None if limit is None else limit * PIECE_BYTES)
        plan = self.storage.since(first)
        assert (report.bytes_written, report.barriers) == (plan.length, plan.barriers)
        assert report.pieces == (pending if limit is None else min(pending, limit))
        assert self.tracker.pending.pieces == pending - report.pieces
        assert plan.barriers <= 2
        self.is_exact = report.pieces == pending
        if self.is_exact:
            for flags in self.touched.values():
                flags[:] = False

    @invariant()
    def pending_is_what_is_not_stored(self) -> None:
        """INV-META, and only what changed."""
        stored = stored_bits(self.data)
        missing = most = 0
        for name, flags in self.touched.items():
            different = np.flatnonzero(self.model[name] != stored[name])
            missing += len(np.unique(different // PIECE_BITS))
            most += int(flags.sum())
        size, pieces, _ = self.tracker.pending
        assert size == PIECE_BYTES * pieces
        assert missing <= pieces <= most
        assert not self.is_exact or pieces == most

    @rule()
    def stop(self) -> None:
        assert {self.flags(name) for name in self.granularity} == {FLAG_AUTO | FLAG_IN_USE}
        pieces, first = self.tracker.pending.pieces, len(self.storage.steps)
        report = self.tracker.stop()
        plan = self.storage.since(first)
        assert (report.bytes_written, report.barriers) == (plan.length, plan.barriers)
        assert report.pieces == pieces
        assert plan.barriers <= 3
        self.check()
        assert {bitmap.status for bitmap in self.image.bitmaps.values()} == {"valid"}
        for name, bits in self.model.items():
            octets = np.packbits(bits, bitorder="little")
            assert self.image.bitmaps[name].packed().tobytes() == octets.tobytes()
        self._track()

    @rule()
    def abandon(self) -> None:
        """The bits no longer matter: QEMU would remove such a bitmap, so the next one is made."""
        steps = len(self.storage.steps)
        self.tracker.abandon()
        assert len(self.storage.steps) == steps
        assert {self.flags(name) for name in self.granularity} == {FLAG_AUTO | FLAG_IN_USE}
        self.check()
        with self.image.edit() as edit:
            for name, granularity in self.granularity.items():
                edit.remove(name)
                edit.add(name, granularity)
                self.model[name][:] = 0
        self._track()

    def flags(self, name: str) -> int:
        """The flags of a bitmap as they stand in the image."""
        audit = Audit(self.data)
        return next(bitmap.flags for bitmap in audit.bitmaps if bitmap.name == name.encode())

    def check(self) -> None:
        """Asserts: nothing leaks, no other bitmap has changed, no bit is set behind the disk."""
        audit = Audit(self.data)
        assert audit.miscounted == {}
        stored = stored_bits(self.data)
        assert np.array_equal(stored["disabled"], self.model["disabled"])
        assert self.flags("disabled") == 0
        for bitmap in audit.bitmaps:
            self.check_tail(audit, bitmap.words, bitmap.granularity_bits)

    def check_tail(self, audit: Audit, words: tuple[int, ...], granularity_bits: int) -> None:
        """INV-TAIL: the last cluster has no bit behind the disk."""
        per_cluster = 8 * audit.cluster_size
        room = (ceil_div(self.size, 1 << granularity_bits) - 1) % per_cluster + 1
        if words[-1] == ONES:
            assert room == per_cluster
        elif words[-1]:
            content = self.data[words[-1] : words[-1] + audit.cluster_size]
            assert int.from_bytes(content, "little") < 1 << room


def run(examples: int, steps: int) -> None:
    run_state_machine_as_test(
        TrackedImage,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.spec("INV-SUPERSET", "INV-META", "INV-TAIL")
@pytest.mark.spec("TRACK-8")
@pytest.mark.spec("TRACK-1")
def test_any_sequence() -> None:
    run(30, 25)


@pytest.mark.deep
def test_any_sequence_at_length() -> None:
    run(150, 60)
