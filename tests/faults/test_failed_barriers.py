"""After a failed barrier, written data may be lost in part, and later barriers prove nothing.

Linux marks pages clean when writing them back failed. What they had may be gone from the page
cache, and the next fdatasync succeeds over the lost data.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from random import Random

import pytest
from support.faulty_storage import Fault, FaultyStorage
from support.interrupted_edits import EDITS, calls, plan, state_of, states

import qcow2bm
from qcow2bm.errors import CommitError, StateError

every_edit = pytest.mark.parametrize("name", EDITS)

PAGE_SECTORS = 8

Keeps = Callable[[int], bool]


def losses(seed: str, samples: int) -> Iterator[Keeps]:
    """Yields functions that say which sectors reached the disk before the barrier failed."""
    yield lambda sector: False
    yield lambda sector: True
    yield lambda sector: sector == 0  # the header, and nothing it leads to
    yield lambda sector: sector != 0
    yield lambda sector: sector // PAGE_SECTORS % 2 == 0
    yield lambda sector: sector // PAGE_SECTORS % 2 == 1
    random = Random(seed)
    for _ in range(samples):
        salt = random.randrange(1 << 30)
        yield lambda sector, salt=salt: Random(salt + sector).random() < 0.5  # type: ignore[misc]


def fail_barrier(name: str, number: int, keeps: Keeps) -> str:
    """The outcome of an edit whose barrier fails: call ``number``, and never again."""
    storage = FaultyStorage(EDITS[name].image(), Fault(number), keeps=keeps)
    assert calls(name)[number] == "barrier"
    with qcow2bm.open(storage, "r+") as image:
        with pytest.raises(CommitError) as caught:
            EDITS[name].run(image)
        assert storage.effects[-1] == "barrier"  # nothing undone, nothing tried again
        with pytest.raises(StateError, match="in doubt"):
            EDITS[name].run(image)
        for bitmap in image.bitmaps.values():  # nor is it told what they were
            with pytest.raises(StateError, match="in doubt"):
                bitmap.count()
    assert storage.calls[number:].count("barrier") == 1
    assert storage.effects[-1] == "barrier"
    old, new = states(name)
    found = state_of(storage.data)
    outcome = caught.value.outcome
    assert found in {"old": [old], "new": [new], "unknown": [old, new]}[outcome]
    return outcome


@every_edit
def test_whatever_is_lost_the_image_is_what_the_error_says(name: str) -> None:
    barriers = [number for number, call in enumerate(calls(name)) if call == "barrier"]
    steps = [number for number, _ in enumerate(plan(name).steps) if plan(name).is_barrier(number)]
    for number, step in zip(barriers, steps, strict=True):
        for keeps in losses(f"{name} {number}", samples=5):
            assert fail_barrier(name, number, keeps) == plan(name).outcome(step)


@pytest.mark.deep
@every_edit
def test_many_losses(name: str) -> None:
    barriers = [number for number, call in enumerate(calls(name)) if call == "barrier"]
    for number in barriers:
        for keeps in losses(f"{name} {number} deep", samples=30):
            fail_barrier(name, number, keeps)
    print(f"{name}: {len(barriers)} barriers, 36 losses each")


@every_edit
def test_the_commit_barrier_is_the_only_one_that_leaves_anything_unknown(name: str) -> None:
    steps = range(len(plan(name).steps))
    outcomes = [plan(name).outcome(step) for step in steps if plan(name).is_barrier(step)]
    assert outcomes.count("unknown") == 1
    assert outcomes == sorted(outcomes, key=("old", "unknown", "new").index)


def test_an_unknown_outcome_can_be_either() -> None:
    """The outcome "unknown" must be needed: the image can have the old or the new state."""
    name, found = "set", []
    _, number, _ = (number for number, call in enumerate(calls(name)) if call == "barrier")
    for keeps in (lambda sector: False, lambda sector: True):
        storage = FaultyStorage(EDITS[name].image(), Fault(number, errno.EIO), keeps=keeps)
        with qcow2bm.open(storage, "r+") as image, pytest.raises(CommitError, match="unknown"):
            EDITS[name].run(image)
        found.append(state_of(storage.data))
    assert tuple(found) == states(name)


def test_reopened_after_the_failure_the_image_is_edited_again() -> None:
    """The storage has lost pages, and no later call reports it."""
    name = "several"
    barriers = [number for number, call in enumerate(calls(name)) if call == "barrier"]
    for number in barriers:
        for keeps in losses(name, samples=3):
            storage = FaultyStorage(EDITS[name].image(), Fault(number), keeps=keeps)
            with qcow2bm.open(storage, "r+") as image, pytest.raises(CommitError):
                EDITS[name].run(image)
            with qcow2bm.open(storage, "r+") as image:
                if "first" not in image.bitmaps:
                    EDITS[name].run(image)
            assert state_of(storage.data) == states(name)[1]
