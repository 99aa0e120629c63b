"""A storage that fails at any one call: an edit takes effect wholly, or says that it did not."""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Iterator
from itertools import takewhile
from random import Random

import pytest
from support.faulty_storage import Fault, FaultyStorage, faults_at
from support.interrupted_edits import EDITS, State, calls, plan, state_of, states

import qcow2bm
from qcow2bm.clusters.plan import Write
from qcow2bm.errors import CommitError, StateError, StorageError

every_edit = pytest.mark.parametrize("name", EDITS)
watched = pytest.mark.parametrize("is_watched", [True, False], ids=["watched", "unwatched"])


def faults(name: str, *, is_watched: bool = True) -> Iterator[Fault]:
    """Each kind of fault at each call."""
    return faults_at(calls(name, is_watched=is_watched))


def run_faulty(name: str, storage: FaultyStorage) -> str:
    """The outcome of an edit, after asserting everything that must hold for any outcome."""
    old, new = states(name)
    try:
        image = qcow2bm.open(storage, "r+")
    except StorageError:
        assert storage.effects == []
        return "not opened"
    with image:
        try:
            EDITS[name].run(image)
            came = "done"
        except CommitError as error:
            came = error.outcome
            require_in_doubt(image, storage)
        except StorageError:
            came = "refused"
            assert storage.effects == []
            if storage.fault and not storage.fault.is_sticky:
                EDITS[name].run(image)  # nothing was written, so it can simply be made again
                came = "done again"
    found = state_of(storage.data)
    either = {"old": [old], "refused": [old], "unknown": [old, new]}
    assert found in either.get(came, [new])
    require_editable(storage.data, found)
    return came


def require_in_doubt(image: qcow2bm.Image, storage: FaultyStorage) -> None:
    """Asserts that after a failed commit an image refuses every use, and is not written to."""
    effects = storage.effects
    for use in (image.edit, lambda: image.edit(dry_run=True), lambda: image.problems):
        with pytest.raises(StateError, match="in doubt after a failed commit"):
            use()
    for bitmap in image.bitmaps.values():
        with pytest.raises(StateError):
            bitmap.count()
    image.close()
    assert storage.effects == effects


def require_editable(data: bytearray, found: State) -> None:
    """Asserts that the next edit works on an image in which an edit failed."""
    with qcow2bm.open(data, "r+") as image, image.edit() as edit:
        if not image.is_consistent:
            edit.remove_all()  # what is left of the extension
        edit.add("after all", 65536)
    after = state_of(data)
    assert after.bitmaps[:-1] == found.bitmaps
    assert (after.bitmaps[-1].name, after[1:]) == ("after all", found[1:])


@every_edit
def test_the_edits_differ_in_effect_and_in_way(name: str) -> None:
    old, new = states(name)
    assert old != new
    assert plan(name).steps
    assert calls(name).count("write") == len(plan(name).writes)
    assert calls(name).count("barrier") == plan(name).barriers


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("overlay", "copy of the backing file name"),
        ("straddling", "copy of the header extensions"),
        ("remove last from the second sector", "end of the header extensions"),
        ("unknown autoclear", "autoclear bits of unknown features"),
        ("refcount block", "refcount table entries of new blocks"),
        ("refcount table", "place of the refcount table"),
    ],
)
def test_the_unusual_edits_take_an_unusual_way(name: str, way: str) -> None:
    with_it = [other for other in EDITS if way in {step.what for step in plan(other).steps}]
    assert with_it == [name]


@pytest.mark.spec("INV-ATOMIC")
@watched
@every_edit
def test_some_faults(name: str, is_watched: bool) -> None:
    some = Random(name).sample(list(faults(name, is_watched=is_watched)), 15)
    for fault in some:
        run_faulty(name, FaultyStorage(EDITS[name].image(), fault, is_watched=is_watched))


@pytest.mark.deep
@watched
@every_edit
def test_every_fault(name: str, is_watched: bool) -> None:
    came: Counter[str] = Counter()
    for fault in faults(name, is_watched=is_watched):
        storage = FaultyStorage(EDITS[name].image(), fault, is_watched=is_watched)
        came[run_faulty(name, storage)] += 1
        assert storage.was_hit
    print(f"{name}: {came.total()} faults: {dict(came)}")
    outcomes = {plan(name).outcome(number) for number, _ in enumerate(plan(name).steps)}
    assert set(came) == {"not opened", "refused", "done again", "done"} | outcomes


@every_edit
def test_a_commit_says_where_it_failed_and_how_that_ends(name: str) -> None:
    """The error must name the failed step, and the outcome that the plan has for this step."""
    steps = [n for n, call in enumerate(calls(name)) if call in ("write", "barrier")]
    for place, number in enumerate(steps):
        storage = FaultyStorage(EDITS[name].image(), Fault(number, errno.ENOSPC))
        with qcow2bm.open(storage, "r+") as image, pytest.raises(CommitError) as caught:
            EDITS[name].run(image)
        error = caught.value
        assert (error.path, error.reason) == (storage.name, os.strerror(errno.ENOSPC))
        assert error.outcome == plan(name).outcome(place)
        assert plan(name).steps[place].what in error.step
        assert isinstance(error.__cause__, StorageError)


def fresh_calls(name: str) -> list[int]:
    """The writes to new clusters with which an edit begins, by the numbers of the calls."""
    fresh = takewhile(lambda step: isinstance(step, Write) and step.is_fresh, plan(name).steps)
    numbers = [n for n, call in enumerate(calls(name)) if call == "write"]
    return numbers[: len(list(fresh))]


@every_edit
@pytest.mark.parametrize("share", [0, 0.5, 1])
@pytest.mark.parametrize("is_sticky", [False, True], ids=["once", "sticky"])
def test_what_cannot_be_written_to_new_clusters_leaves_no_trace(
    name: str, share: float, is_sticky: bool
) -> None:
    for number in fresh_calls(name):
        data = EDITS[name].image()
        before = bytes(data)
        storage = FaultyStorage(data, Fault(number, errno.ENOSPC, is_sticky, share))
        with qcow2bm.open(storage, "r+") as image, pytest.raises(CommitError):
            EDITS[name].run(image)
        assert len(data) == len(before)
        assert storage.effects[-1] == "truncate"
        if name != "reuse":  # where they are between others
            assert data == before


def test_most_edits_begin_with_new_clusters() -> None:
    without = {name for name in EDITS if not fresh_calls(name)}
    assert without == {
        "remove last",
        "remove last from the second sector",
        "straddling",
        "unknown autoclear",
    }


@every_edit
def test_a_file_that_cannot_be_shortened_again_is_whole_all_the_same(name: str) -> None:
    """The truncation is a courtesy: that it fails too must not hide what failed."""
    for number in fresh_calls(name):
        storage = FaultyStorage(EDITS[name].image(), Fault(number, errno.ENOSPC))
        storage.truncate = refuse  # type: ignore[method-assign]
        with qcow2bm.open(storage, "r+") as image, pytest.raises(CommitError, match="No space"):
            EDITS[name].run(image)
        assert state_of(storage.data) == states(name)[0]
        require_editable(storage.data, states(name)[0])


def refuse(size: int) -> None:
    raise StorageError("<faulty>", 0, 0, "cannot be shortened")


@every_edit
@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_an_interrupt_leaves_the_image_old_or_new_and_in_doubt(name: str, share: float) -> None:
    """Ctrl-C comes between any two calls, or within one."""
    steps = [n for n, call in enumerate(calls(name)) if call in ("write", "barrier")]
    for place, number in enumerate(steps):
        fault = Fault(number, KeyboardInterrupt(), share=share)
        storage = FaultyStorage(EDITS[name].image(), fault)
        with qcow2bm.open(storage, "r+") as image:
            with pytest.raises(KeyboardInterrupt):
                EDITS[name].run(image)
            require_in_doubt(image, storage)
        assert len(storage.effects) == place + 1
        assert state_of(storage.data) in states(name)
