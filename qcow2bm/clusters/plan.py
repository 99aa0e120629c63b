"""Plans, which are changes to an image as values, and the function that executes them.

A plan is made without writing anything, and its safety can be seen from its steps alone: after a
loss of power, any subset of the sectors written between two barriers may be on the disk.

*Spec*: spec/edit.md, "Commit order".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from qcow2bm.errors import CommitError, CommitOutcome, StorageError
from qcow2bm.storage.interface import WritableStorage
from qcow2bm.units import escape

if TYPE_CHECKING:
    from typing_extensions import Buffer

SECTOR_SIZE = 512
"""The number of bytes that storage writes whole or not at all."""


class Write(NamedTuple):
    """A write of ``parts``, one after the other, from host ``offset`` on.

    ``what`` names the bytes in messages. ``is_fresh`` is true if the bytes go to clusters that are
    not in use yet. If such a write fails, the image is as if it had never been tried.
    """

    offset: int
    parts: tuple[Buffer, ...]
    what: str
    is_fresh: bool = False

    def __repr__(self) -> str:
        return f"<{self.length} bytes of {self.what} at {self.offset:#x}>"

    @property
    def length(self) -> int:
        """The number of bytes to write."""
        return sum(memoryview(part).nbytes for part in self.parts)


class Barrier(NamedTuple):
    """A barrier: all writes before it must be durable before any write after it begins."""

    what: str


Step = Write | Barrier


class Plan(NamedTuple):
    """Writes and barriers in order.

    ``commit_point`` is the number of the Write that turns the old state into the new state. This
    Write lies within one sector, and a Barrier follows. A plan that changes nothing that a reader
    could see has no commit point (None).
    """

    steps: tuple[Step, ...] = ()
    commit_point: int | None = None

    @property
    def writes(self) -> tuple[Write, ...]:
        """The writes without the barriers, in order."""
        return tuple(step for step in self.steps if isinstance(step, Write))

    @property
    def barriers(self) -> int:
        """The number of barriers."""
        return len(self.steps) - len(self.writes)

    @property
    def length(self) -> int:
        """The number of bytes to write."""
        return sum(write.length for write in self.writes)

    def outcome(self, failed: int) -> CommitOutcome:
        """Returns the state of the image if the step with the number ``failed`` fails."""
        if self.commit_point is None or failed < self.commit_point:
            return "old"
        end = next(n for n in range(self.commit_point, len(self.steps)) if self.is_barrier(n))
        return "unknown" if failed <= end else "new"

    def is_barrier(self, number: int) -> bool:
        """Whether the step with that number is a Barrier."""
        return isinstance(self.steps[number], Barrier)


def execute(
    plan: Plan,
    storage: WritableStorage,
    size: int | None,
    watch: Callable[[Step], None] = lambda step: None,
) -> None:
    """Executes a plan, step by step.

    ``size`` is the present length of the storage in bytes. If a step fails and only fresh clusters
    were written before, the storage gets that length back; with None it does not. ``watch`` is
    called with every step after the step is done.

    Raises:
        CommitError: a step failed. No step is tried again, and except for the length of the storage
            nothing is undone.
    """
    for number, step in enumerate(plan.steps):
        try:
            if isinstance(step, Write):
                storage.write(step.offset, step.parts)
            else:
                storage.barrier()
            watch(step)
        except Exception as error:  # a caller's own storage may raise anything
            done = plan.steps[: number + 1]
            if size is not None and all(isinstance(s, Write) and s.is_fresh for s in done):
                with suppress(Exception):
                    storage.truncate(size)
            action = "writing the" if isinstance(step, Write) else "making durable"
            reason = error.reason if isinstance(error, StorageError) else escape(str(error))
            raise CommitError(
                storage.name, f"{action} {step.what}", plan.outcome(number), reason
            ) from error


def write_in_sectors(offset: int, data: bytes, what: str) -> tuple[Write, ...]:
    """Splits a write into one Write for each sector, the last sector first.

    So when the first sector is written, the sectors behind it, to which it may lead, are written.
    """
    writes = []
    place = 0
    while place < len(data):
        stop = min(len(data), place + SECTOR_SIZE - (offset + place) % SECTOR_SIZE)
        writes.append(Write(offset + place, (data[place:stop],), what))
        place = stop
    return tuple(reversed(writes))


def is_in_one_sector(offset: int, length: int) -> bool:
    """Whether these bytes lie within one sector, so that a write of them cannot be torn."""
    return offset // SECTOR_SIZE == (offset + length - 1) // SECTOR_SIZE


def coalesce(writes: Sequence[Write]) -> tuple[Write, ...]:
    """Joins writes that follow one another in the file and have the same ``what``."""
    joined: list[Write] = []
    parts: list[Buffer] = []
    end = -1
    for write in writes:
        if joined and write.offset == end and write.what == joined[-1].what:
            parts.extend(write.parts)
        else:
            if joined:
                joined[-1] = joined[-1]._replace(parts=tuple(parts))
            joined.append(write)
            parts = list(write.parts)
        end = write.offset + write.length
    if joined:
        joined[-1] = joined[-1]._replace(parts=tuple(parts))
    return tuple(joined)
