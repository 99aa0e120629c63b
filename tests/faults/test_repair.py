"""A storage that fails at any one call of a repair, or of undoing one.

Each bitmap is as before or as after, and what was kept before the first write leads back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache
from random import Random

import pytest
from support.faulty_storage import Fault, FaultyStorage, faults_at
from support.problem_images import broken
from support.repair_cases import CRASHES, bitmap_facts

from qcow2bm.api import repair as api
from qcow2bm.checking.undo import plan_undo
from qcow2bm.clusters.plan import execute
from qcow2bm.errors import CommitError, StorageError
from qcow2bm.format.undo_file import UndoLog
from qcow2bm.storage.memory import MemoryStorage

Work = Callable[[FaultyStorage], object]

each = pytest.mark.parametrize("id", CRASHES)
both_ways = pytest.mark.parametrize("way", ["repair", "undo"])


@cache
def states(id: str) -> tuple[bytes, bytes, UndoLog]:
    """An image before a repair and after it, and what leads back."""
    data, kept = bytearray(broken(id)), []

    def keep(undo: UndoLog) -> Callable[[int], None]:
        kept.append(undo)
        return lambda mtime_ns: None

    api.repair(data, keep)
    (undo,) = kept
    return broken(id), bytes(data), undo


def begun(id: str, way: str) -> tuple[bytes, bytes, Work]:
    """The image before, the image after, and the work that leads from one to the other."""
    before, after, undo = states(id)
    if way == "undo":
        return after, before, lambda storage: api.undo(storage, undo, is_asserted=True)
    return before, after, lambda storage: api.repair(storage)


@cache
def calls(id: str, way: str) -> tuple[str, ...]:
    """The calls where nothing fails."""
    start, end, work = begun(id, way)
    storage = FaultyStorage(bytearray(start))
    work(storage)
    assert storage.data == end
    return tuple(storage.calls)


def run_faulty(id: str, way: str, fault: Fault, keeps: Callable[[int], bool]) -> str:
    """The outcome of the work, after asserting everything that must hold for any outcome."""
    start, end, work = begun(id, way)
    storage = FaultyStorage(bytearray(start), fault, keeps=keeps)
    try:
        work(storage)
        came = "done"
        assert storage.data == end
    except CommitError as error:
        came = error.outcome
    except StorageError:
        came = "after all" if storage.effects else "refused"
    data = bytes(storage.data)
    if came == "refused":
        assert data == start
    before, after, undo = states(id)
    assert bitmap_facts(data) in (bitmap_facts(before), bitmap_facts(after))
    back = MemoryStorage(bytearray(data))
    plan = plan_undo(back, undo, is_asserted=True)
    execute(plan, back, None)
    back.truncate(undo.file_size)
    content = bytearray(back.size())
    back.read_into(0, memoryview(content))
    assert content == before
    return came


@each
@both_ways
def test_some_faults(id: str, way: str) -> None:
    found = list(faults_at(calls(id, way)))
    for fault in Random(f"{id} {way}").sample(found, min(len(found), 15)):
        run_faulty(id, way, fault, lambda sector: True)


@pytest.mark.deep
@each
@both_ways
@pytest.mark.parametrize("kept", [1, 2, 3])
def test_every_fault(id: str, way: str, kept: int) -> None:
    """The bitmaps must be those before or after, whatever a failed barrier has lost."""
    came: Counter[str] = Counter()
    for fault in faults_at(calls(id, way)):
        came[run_faulty(id, way, fault, lambda sector: kept == 1 or sector % 2 == kept - 2)] += 1
    print(f"{way} of {id}: {came.total()} faults: {dict(came)}")
    assert came["refused"] > 0
    assert came["old"] + came["unknown"] > 0
