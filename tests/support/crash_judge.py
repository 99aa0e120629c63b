"""Judges whether a state of an image is one that an edit may leave behind.

The bitmaps are judged by what this library reads, the refcounts by a separate count.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Iterator
from functools import lru_cache
from random import Random
from typing import Generic, Literal, NamedTuple, TypeVar

import numpy as np
from support.crash_states import (
    BrokenStateError,
    Choice,
    Interval,
    ObservedImage,
    State,
    judge_states,
)
from support.plans import after

import qcow2bm
from qcow2bm.clusters.plan import Plan
from qcow2bm.format.extensions import BITMAPS, PADDING, HeaderExtension
from qcow2bm.format.features import AUTOCLEAR_BITMAPS, KNOWN_AUTOCLEAR
from qcow2bm.format.header import Header

Seen = TypeVar("Seen")

Phase = Literal["old", "either", "new"]
"""The bitmaps that a state may have."""


class Recorded(NamedTuple):
    """A bitmap as a reader sees it; ``dirty`` are its bits as one number."""

    name: str
    flags: int
    granularity: int
    dirty: int
    status: str = "valid"


class Facts(NamedTuple):
    """The facts that an edit must keep, ``fixed``, and those that it changes at once, ``bitmaps``.

    ``faults`` are the problems for which QEMU would refuse the image or a bitmap be unusable.
    """

    fixed: tuple[Header, str | None, tuple[HeaderExtension, ...]]
    bitmaps: tuple[Recorded, ...]
    faults: frozenset[str]
    has_unknown_autoclear: bool


class Findings(NamedTuple, Generic[Seen]):
    """The facts that a reader finds in a state, and the clusters with too low a refcount."""

    facts: Seen
    under_counted: list[str]

    def require_counted(self, image: bytes) -> None:
        """Raises `BrokenStateError` if a refcount is too low that was not too low in ``image``.

        Clusters whose refcounts were too low before must be left alone: a cluster that an edit
        uses has one more reference.
        """
        if found := set(self.under_counted) - _under_counted_before(image):
            raise BrokenStateError(f"refcounts are too low: {found}")


@lru_cache(maxsize=4)
def _under_counted_before(image: bytes) -> frozenset[str]:
    return frozenset(under_counted(image))


def reader(look: Callable[[ObservedImage], Seen]) -> Callable[[ObservedImage], Findings[Seen]]:
    """A reader of states that finds what ``look`` returns, and counts the references.

    The reader raises `BrokenStateError` if it cannot read a state.
    """

    def read(image: ObservedImage) -> Findings[Seen]:
        try:
            return Findings(look(image), under_counted(image))
        except qcow2bm.Qcow2BmError as error:
            raise BrokenStateError(f"it cannot be read: {error}") from error
        except (struct.error, ValueError) as error:
            raise BrokenStateError(f"a table ends behind the end of the file: {error}") from error

    return read


def look(data: bytes | bytearray | ObservedImage) -> Facts:
    """The facts about an image, as this library reads them."""
    with qcow2bm.open(data) as image:
        return facts_of(image)


def facts_of(image: qcow2bm.Image) -> Facts:
    """The facts about an image that is open."""
    header = image.header
    # Without the autoclear bit a bitmaps extension is as good as none.
    faults = {p.id for p in image.problems if p.severity in ("refused", "unusable")}
    faults.discard("bitmaps-extension.autoclear.off")
    is_marked = bool(header.autoclear_features & AUTOCLEAR_BITMAPS)
    if is_marked and image.bitmaps_extension is None:
        raise BrokenStateError("the autoclear bit is set without a bitmaps extension")
    entries = range(len(image.directory)) if is_marked else ()
    fixed = header._replace(
        backing_file_offset=bool(header.backing_file_offset),
        refcount_table_offset=0,
        refcount_table_clusters=0,
        autoclear_features=header.autoclear_features & KNOWN_AUTOCLEAR & ~AUTOCLEAR_BITMAPS,
    )
    kept = (e for _, e in image.extensions if e.type not in (BITMAPS, PADDING))
    return Facts(
        (fixed, image.backing_file, tuple(kept)),
        tuple(_recorded(image.bitmap(number)) for number in entries),
        frozenset(faults),
        bool(header.autoclear_features & ~KNOWN_AUTOCLEAR),
    )


def _recorded(bitmap: qcow2bm.Bitmap) -> Recorded:
    status = bitmap.status
    packed = bitmap.packed() if status == "valid" else bitmap.stale_bits()
    dirty = int.from_bytes(packed.tobytes(), "little")
    return Recorded(bitmap.name, bitmap.entry.flags, bitmap.granularity, dirty, status)


def under_counted(image: bytes | bytearray | ObservedImage) -> list[str]:
    """The clusters with a smaller refcount than references, and those beyond the file's end."""
    data = image if isinstance(image, ObservedImage) else ObservedImage(image)
    (cluster_bits,) = data.unpack(">I", 20)
    table, table_clusters = data.unpack(">QI", 48)
    (order,) = data.unpack(">I", 96)
    per_block = 8 << cluster_bits >> order
    data.note(table, table_clusters << cluster_bits)
    blocks = np.frombuffer(data.data, ">u8", (table_clusters << cluster_bits) // 8, table)
    found = []
    references = Counter(_references(data))
    references.update(
        cluster
        for start, length in [
            (table, table_clusters),
            *((b, 1) for b in blocks[blocks > 0].tolist()),
        ]
        for cluster in range(start >> cluster_bits, (start >> cluster_bits) + length)
    )
    for cluster, count in references.items():
        index, entry = divmod(cluster, per_block)
        block = int(blocks[index]) if index < len(blocks) else 0
        refcount = _refcount(data, block, entry, order) if block else 0
        if refcount < count:
            found.append(f"cluster {cluster} has {count} references and refcount {refcount}")
        if cluster << cluster_bits >= data.size():
            found.append(f"cluster {cluster} lies beyond the end of the file")
    return found


def _refcount(image: ObservedImage, block: int, entry: int, order: int) -> int:
    width, bit = 1 << order, entry << order
    place = block + bit // 8
    length = max(1, width // 8)
    image.note(place, length)
    count = int.from_bytes(image.data[place : place + length], "big")
    return count if width >= 8 else count >> bit % 8 & (1 << width) - 1


_OFFSET = (1 << 56) - (1 << 9)  # in entries of L1, L2 and bitmap tables


def _references(data: ObservedImage) -> Iterator[int]:
    """The clusters that the header leads to, each as often as it does, but those of refcounts.

    Raises ValueError or struct.error if a table ends behind the end of the file.
    """
    (cluster_bits,) = data.unpack(">I", 20)
    l1_size, l1_offset = data.unpack(">IQ", 36)
    nb_snapshots, snapshots = data.unpack(">IQ", 60)
    incompatible, _, autoclear = data.unpack(">QQQ", 72)

    def clusters(offset: int, length: int) -> range:
        """The clusters of a table, or of another structure that lies in the file as a whole."""
        if length and offset + length > data.size():
            raise ValueError(f"a structure at {offset:#x} of {length} bytes is not in the file")
        return range(
            offset >> cluster_bits, (offset + length + (1 << cluster_bits) - 1) >> cluster_bits
        )

    def words(offset: int, count: int) -> list[int]:
        """The places a table leads to."""
        data.note(offset, 8 * count)
        entries = np.frombuffer(data.data, ">u8", count, offset) & np.uint64(_OFFSET)
        places: list[int] = entries[entries > 0].tolist()
        return places

    yield 0
    l1_tables = [(l1_offset, l1_size)]
    place = snapshots
    for _ in range(nb_snapshots):
        offset, size, id_size, name_size = data.unpack(">QIHH", place)
        (extra_size,) = data.unpack(">I", place + 36)
        l1_tables.append((offset, size))
        place += 40 + (id_size + name_size + extra_size + 7) // 8 * 8
    yield from clusters(snapshots, place - snapshots)
    for offset, size in l1_tables:
        yield from clusters(offset, 8 * size)
        for l2 in words(offset, size):
            yield l2 >> cluster_bits
            if not incompatible & 4:  # else the data are in a file of their own
                yield from (p >> cluster_bits for p in words(l2, (1 << cluster_bits) // 8))
    if not autoclear & 1:
        return
    nb_bitmaps, directory_size, directory = _bitmaps_extension(data)
    yield from clusters(directory, directory_size)
    for _ in range(nb_bitmaps):
        table, table_size = data.unpack(">QI", directory)
        name_size, extra_size = data.unpack(">HI", directory + 18)
        yield from clusters(table, 8 * table_size)
        yield from (p >> cluster_bits for p in words(table, table_size))
        directory += 24 + (name_size + extra_size + 7) // 8 * 8


def _bitmaps_extension(data: ObservedImage) -> tuple[int, int, int]:
    (place,) = data.unpack(">I", 100)
    while True:
        kind, length = data.unpack(">II", place)
        if kind == BITMAPS:
            count, _, size, offset = data.unpack(">IIQQ", place + 8)
            return count, size, offset
        if not kind:
            raise BrokenStateError("the bitmaps extension cannot be found")
        place += 8 + (length + 7) // 8 * 8


read = reader(look)


class Judge(NamedTuple):
    """Judges the states of one image while it is edited."""

    image: bytes
    old: Facts
    new: tuple[Recorded, ...]

    def judge(self, data: bytes | bytearray, phase: Phase) -> Facts:
        """The facts about a state; raises `BrokenStateError` unless all is well."""
        found = read(ObservedImage(data))
        self._judge(found, phase, lambda: data != self.image)
        return found.facts

    def _judge(self, found: Findings[Facts], phase: Phase, is_changed: Callable[[], bool]) -> None:
        facts = found.facts
        if facts.fixed != self.old.fixed:
            raise BrokenStateError(f"the header has {facts.fixed}, not {self.old.fixed}")
        is_old, is_new = facts.bitmaps == self.old.bitmaps, facts.bitmaps == self.new
        if not {"old": is_old, "new": is_new, "either": is_old or is_new}[phase]:
            raise BrokenStateError(f"bitmaps are neither or too soon: {names(facts.bitmaps)}")
        excused = any(bitmap.status == "broken" for bitmap in facts.bitmaps)
        if facts.faults and not (excused and facts.faults <= self.old.faults):
            raise BrokenStateError(f"there are new faults: {set(facts.faults)}")
        # A program that set an unknown bit must find all that it knows, or the bit cleared.
        if facts.has_unknown_autoclear and is_changed():
            raise BrokenStateError("an unknown autoclear bit is still set after a change")
        found.require_counted(self.image)

    def judge_state(self, interval: Interval, choice: Choice, plan: Plan) -> Facts:
        """The facts about one state of an interval; raises as `judge` does."""
        try:
            return self.judge(interval.image(choice), phase(plan, interval))
        except BrokenStateError as error:
            steps = [step.what for step in plan.steps[interval.first_step : interval.stop_step]]
            raise BrokenStateError(f"{interval.describe(choice)} of {steps}: {error}") from None

    def judge_all(self, plan: Plan, random: Random, most: int | None = None) -> int:
        """Judges the states that a plan can leave; returns how many.

        At most ``most`` states of an interval are judged.
        """

        def judge(found: Findings[Facts], state: State) -> None:
            expected = phase(plan, state.interval, is_complete=state.is_after)
            self._judge(found, expected, lambda: state.data != self.image)

        count = judge_states(self.image, plan, random, read, judge, most)
        end = after(self.image, plan.steps)
        facts = self.judge(end, "new")
        # The padding extension of this library is in no state but one in between.
        with qcow2bm.open(end) as image:
            if any(extension.type == PADDING for _, extension in image.extensions):
                raise BrokenStateError("the padding extension is still there")
            if facts.has_unknown_autoclear or (image.is_consistent != bool(self.new)):
                raise BrokenStateError("the autoclear bits are not as they must be")
        return count


def phase(plan: Plan, interval: Interval, *, is_complete: bool = False) -> Phase:
    """Returns which bitmaps are to be found in an interval of a plan, or at its end."""
    point = plan.commit_point
    if point is None or interval.stop_step <= point:
        return "old"
    if interval.first_step > point or is_complete:
        return "new"
    return "either"


def names(bitmaps: tuple[Recorded, ...]) -> list[str]:
    """A short text about each bitmap, for a message."""
    return [f"{b.name}: {b.flags} {b.granularity} {b.dirty.bit_count()}" for b in bitmaps]
