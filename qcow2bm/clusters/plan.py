"""Changes to an image as values: what is written, in which order, and what must be durable when.

A plan is made without writing anything, and everything about its safety can be seen in it: of
the writes between two barriers any subset of sectors may be on the disk after a loss of power.

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
"""What storage writes whole or not at all, in bytes."""


class Write(NamedTuple):
    """Bytes for one place: ``parts``, one behind the other, from host ``offset`` on.

    ``is_fresh`` marks what goes to clusters that nothing uses or counts yet: if it fails, the
    image is as if it had never been tried.
    """

    offset: int
    parts: tuple[Buffer, ...]
    what: str
    is_fresh: bool = False

    def __repr__(self) -> str:
        return f"<{self.length} bytes of {self.what} at {self.offset:#x}>"

    @property
    def length(self) -> int:
        """How many bytes it writes."""
        return sum(memoryview(part).nbytes for part in self.parts)


class Barrier(NamedTuple):
    """All writes before it are to be durable before any write after it begins."""

    what: str


Step = Write | Barrier


class Plan(NamedTuple):
    """Writes and barriers in order.

    ``commit_point`` is the number of the Write that turns the old state into the new one; it
    lies within one sector, and a Barrier follows. It is None in a plan that changes nothing a
    reader could see.
    """

    steps: tuple[Step, ...] = ()
    commit_point: int | None = None

    @property
    def writes(self) -> tuple[Write, ...]:
        """The writes alone, in order."""
        return tuple(step for step in self.steps if isinstance(step, Write))

    @property
    def barriers(self) -> int:
        """How many barriers there are."""
        return len(self.steps) - len(self.writes)

    @property
    def length(self) -> int:
        """How many bytes are written."""
        return sum(write.length for write in self.writes)

    def outcome(self, failed: int) -> CommitOutcome:
        """What the image has if the step of that number is the one that fails."""
        if self.commit_point is None or failed < self.commit_point:
            return "old"
        end = next(n for n in range(self.commit_point, len(self.steps)) if self.is_barrier(n))
        return "unknown" if failed <= end else "new"

    def is_barrier(self, number: int) -> bool:
        """Whether the step of that number is a Barrier."""
        return isinstance(self.steps[number], Barrier)


def execute(
    plan: Plan,
    storage: WritableStorage,
    size: int | None,
    watch: Callable[[Step], None] = lambda step: None,
) -> None:
    """Does what the plan says.

    ``size`` is the present length of the storage in bytes, None where it is to keep what it grew.
    ``watch`` is called with every step once it is done.

    Raises:
        CommitError: a step failed. Nothing is undone and nothing tried again, except that a file
            that only grew gets its old length back.
    """
    for number, step in enumerate(plan.steps):
        try:
            if isinstance(step, Write):
                storage.write(step.offset, step.parts)
            else:
                storage.barrier()
            watch(step)
        except Exception as error:  # a storage of somebody else's may raise anything
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
    """One Write for each sector touched, the last first.

    So a reader that goes from front to back finds all of what a first sector leads to.
    """
    writes = []
    place = 0
    while place < len(data):
        stop = min(len(data), place + SECTOR_SIZE - (offset + place) % SECTOR_SIZE)
        writes.append(Write(offset + place, (data[place:stop],), what))
        place = stop
    return tuple(reversed(writes))


def is_in_one_sector(offset: int, length: int) -> bool:
    """Whether these bytes change all at once, if at all."""
    return offset // SECTOR_SIZE == (offset + length - 1) // SECTOR_SIZE


def coalesce(writes: Sequence[Write]) -> tuple[Write, ...]:
    """Writes that follow one another in the file, and are called the same, made one."""
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
