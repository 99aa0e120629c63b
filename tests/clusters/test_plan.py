"""Plans as values, and their execution."""

from __future__ import annotations

import errno
import pickle
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcow2bm.clusters.plan import (
    SECTOR_SIZE,
    Barrier,
    Plan,
    Step,
    Write,
    coalesce,
    execute,
    is_in_one_sector,
    write_in_sectors,
)
from qcow2bm.errors import CommitError, CommitOutcome, StorageError
from qcow2bm.storage.memory import MemoryStorage

if TYPE_CHECKING:
    from typing_extensions import Buffer

SIZE = 1024
FRESH = Write(SIZE, (b"new",), "data", is_fresh=True)
MORE_FRESH = Write(SIZE + 512, (b"ta", b"ble"), "table", is_fresh=True)
COUNTS = Write(512, (b"counts",), "refcounts")
SWITCH = Write(0, (b"switch",), "switch")
LOWER = Write(512, (b"lower",), "lower refcounts")

PLAN = Plan(
    (FRESH, MORE_FRESH, COUNTS, Barrier("one"), SWITCH, Barrier("two"), LOWER, Barrier("three")), 4
)
OUTCOMES: tuple[CommitOutcome, ...] = (
    "old",
    "old",
    "old",
    "old",
    "unknown",
    "unknown",
    "new",
    "new",
)


class Failing(MemoryStorage):
    """Records all calls, and fails at one of them."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.bytes = bytearray(SIZE)
        super().__init__(self.bytes)
        self.calls: list[tuple[str, int]] = []
        self._fails_at = fails_at

    def _call(self, what: str, place: int) -> None:
        self.calls.append((what, place))
        if len(self.calls) - 1 == self._fails_at:
            raise StorageError(self.name, place, 1, "Input/output error", errno.EIO, what)

    def write(self, offset: int, parts: Sequence[Buffer]) -> None:
        super().write(offset, parts)
        self._call("write", offset)

    def barrier(self) -> None:
        self._call("barrier", 0)

    def truncate(self, size: int) -> None:
        super().truncate(size)
        self._call("truncate", size)


CALLS = [
    *(("write", SIZE), ("write", SIZE + 512), ("write", 512), ("barrier", 0)),
    *(("write", 0), ("barrier", 0), ("write", 512), ("barrier", 0)),
]


def test_the_steps_are_done_in_order() -> None:
    storage = Failing()
    execute(PLAN, storage, SIZE)
    assert storage.calls == CALLS
    expected = b"switch".ljust(512, b"\0") + b"lowers".ljust(512, b"\0")
    assert storage.bytes == expected + b"new".ljust(512, b"\0") + b"table"


@pytest.mark.parametrize("number", range(len(CALLS)))
def test_no_step_is_done_after_a_failure(number: int) -> None:
    storage = Failing(number)
    with pytest.raises(CommitError) as raised:
        execute(PLAN, storage, SIZE)
    error, step = raised.value, PLAN.steps[number]
    assert error.outcome == OUTCOMES[number] == PLAN.outcome(number)
    assert (error.path, error.reason) == ("<memory>", "Input/output error")
    assert isinstance(error.__cause__, StorageError)
    action = "making durable" if isinstance(step, Barrier) else "writing the"
    assert error.step == f"{action} {step.what}"
    done = CALLS[: number + 1]
    # Only what grew the file, and nothing uses yet, is taken back.
    assert storage.calls == (done if number > 1 else [*done, ("truncate", SIZE)])
    assert len(storage.bytes) == (SIZE if number < 2 else SIZE + 512 + 5)


def test_the_error_of_a_step_is_raised_even_if_shortening_the_file_fails() -> None:
    class Worse(Failing):
        def truncate(self, size: int) -> None:
            raise StorageError(self.name, size, 0, "another error")

    with pytest.raises(CommitError, match="Input/output error") as raised:
        execute(PLAN, Worse(0), SIZE)
    assert raised.value.outcome == "old"


def test_an_interrupt_is_not_turned_into_a_commit_error() -> None:
    class Interrupted(Failing):
        def barrier(self) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(PLAN, Interrupted(), SIZE)


def test_an_empty_plan_does_nothing() -> None:
    storage = Failing()
    execute(Plan(), storage, SIZE)
    assert storage.calls == []
    assert (Plan().writes, Plan().barriers, Plan().length) == ((), 0, 0)


def test_a_plan_without_commit_point_leaves_the_old_state() -> None:
    plan = PLAN._replace(commit_point=None)
    assert {plan.outcome(n) for n in range(len(plan.steps))} == {"old"}


def test_the_totals_of_a_plan() -> None:
    assert PLAN.writes == (FRESH, MORE_FRESH, COUNTS, SWITCH, LOWER)
    assert PLAN.barriers == 3
    assert PLAN.length == sum(map(len, (b"new", b"table", b"counts", b"switch", b"lower")))
    assert [PLAN.is_barrier(n) for n in range(8)] == [n in (3, 5, 7) for n in range(8)]
    assert Write(0, (memoryview(b"12345678").cast("Q"), b"9"), "words").length == 9


def test_a_plan_survives_pickle() -> None:
    assert pickle.loads(pickle.dumps(PLAN)) == PLAN


@given(st.integers(0, 3000), st.binary(max_size=2000))
def test_writes_in_sectors_are_the_same_bytes_the_last_sector_first(
    offset: int, data: bytes
) -> None:
    writes = write_in_sectors(offset, data, "some")
    assert all(w.length and is_in_one_sector(w.offset, w.length) for w in writes)
    assert all(w.what == "some" and not w.is_fresh for w in writes)
    assert all(one.offset == other.offset + other.length for one, other in pairwise(writes))
    assert b"".join(part for write in reversed(writes) for part in write.parts) == data
    assert not writes or writes[-1].offset == offset


@given(st.integers(0, 2000), st.integers(1, 600))
def test_bytes_lie_in_one_sector_if_all_have_one_sector_number(offset: int, length: int) -> None:
    sectors = {place // SECTOR_SIZE for place in range(offset, offset + length)}
    assert is_in_one_sector(offset, length) == (len(sectors) == 1)


pieces = st.builds(
    Write,
    st.integers(0, 12),
    st.lists(st.binary(max_size=3), max_size=2).map(tuple),
    st.sampled_from("ab"),
    st.just(True),
)


def effect(writes: Sequence[Step]) -> bytes:
    storage = MemoryStorage(data := bytearray(32))
    execute(Plan(tuple(writes)), storage, len(data))
    return bytes(data)


@given(st.lists(pieces, max_size=8))
def test_joined_writes_do_the_same(writes: list[Write]) -> None:
    joined = coalesce(writes)
    assert effect(joined) == effect(writes)
    assert all(
        one.offset + one.length != other.offset or one.what != other.what
        for one, other in pairwise(joined)
    )
    assert sum(w.length for w in joined) == sum(w.length for w in writes)


def test_only_neighbours_of_one_kind_are_joined() -> None:
    first = Write(0, (b"12",), "data", is_fresh=True)
    second, other = first._replace(offset=2), first._replace(offset=4, what="table")
    assert coalesce([first, second, other, first]) == (
        first._replace(parts=(b"12", b"12")),
        other,
        first,
    )
    assert coalesce([]) == ()
