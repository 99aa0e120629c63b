"""Edits that do not get as far as being written: not one call that changes anything is made."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from support.faulty_storage import FaultyStorage
from support.interrupted_edits import EDITS, SIZE

import qcow2bm
from qcow2bm.api import Edit
from qcow2bm.errors import (
    BitmapExistsError,
    BitmapInconsistentError,
    BitmapNotFoundError,
    StateError,
)

Change = Callable[[Edit], object]

WRONG: dict[type[Exception], list[Change]] = {
    ValueError: [
        lambda edit: edit.set("daily", SIZE, 1),
        lambda edit: edit.reset_many("daily", [(0, 512), (-1, 1)]),
        lambda edit: edit.add("x", granularity=1000),
        lambda edit: edit.add(""),
        lambda edit: edit.rename("daily", "x" * 1024),
        lambda edit: edit.merge("daily", "coarse", "nor"),  # type: ignore[arg-type]
    ],
    BitmapExistsError: [
        lambda edit: edit.add("daily"),
        lambda edit: edit.copy("daily", "coarse"),
        lambda edit: edit.rename("daily", "coarse"),
    ],
    BitmapNotFoundError: [
        lambda edit: edit.remove("none"),
        lambda edit: edit.clear("none"),
        lambda edit: edit.merge("daily", "none"),
    ],
    BitmapInconsistentError: [
        lambda edit: edit.enable("crashed"),
        lambda edit: edit.merge("daily", "crashed"),
        lambda edit: edit.copy("crashed", "x"),
    ],
}


class Stop(Exception):
    """An exception that the caller raises."""


def throw(error: BaseException) -> None:
    raise error


def change_in(edit: Edit, *changes: Change) -> None:
    with edit:
        for change in changes:
            change(edit)


@pytest.mark.parametrize("stop", [Stop(), KeyboardInterrupt(), SystemExit(3)], ids=repr)
@pytest.mark.parametrize("name", EDITS)
def test_an_exception_of_the_caller(name: str, stop: BaseException) -> None:
    storage = FaultyStorage(EDITS[name].image())
    before = bytes(storage.data)
    with qcow2bm.open(storage, "r+") as image:
        edit = image.edit()
        with pytest.raises(type(stop)) as caught:
            change_in(edit, EDITS[name].change, lambda edit: throw(stop))
        assert caught.value is stop
        with pytest.raises(StateError, match="the edit is finished"):
            EDITS[name].change(edit)
    assert storage.effects == []
    assert storage.data == before


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [(kind, wrong) for kind, several in WRONG.items() for wrong in several],
)
def test_an_operation_that_is_refused(kind: type[Exception], wrong: Change) -> None:
    storage = FaultyStorage(EDITS["several"].image())
    before = bytes(storage.data)
    with qcow2bm.open(storage, "r+") as image:
        bitmap = image.bitmaps["daily"]
        with pytest.raises(kind):
            change_in(image.edit(), lambda edit: edit.invert("daily"), wrong)
        assert storage.effects == []
        assert storage.data == before
        assert bitmap.count() > 0  # no commit: it is not outdated
        with image.edit() as edit:  # and the image can be edited all the same
            edit.invert("daily")
    assert "write" in storage.effects


@pytest.mark.parametrize("name", EDITS)
def test_a_dry_run(name: str) -> None:
    storage = FaultyStorage(EDITS[name].image())
    with qcow2bm.open(storage, "r+") as image, image.edit(dry_run=True) as edit:
        EDITS[name].change(edit)
        assert edit.plan().steps
    assert storage.effects == []


@pytest.mark.parametrize(
    "change",
    [
        lambda edit: None,
        lambda edit: edit.enable("daily"),
        lambda edit: edit.rename("daily", "daily"),
        lambda edit: (edit.rename("daily", "x"), edit.rename("x", "daily")),
        lambda edit: (edit.add("x"), edit.remove("x")),
        lambda edit: edit.set("daily", 0, 0),
        lambda edit: edit.reset("daily", 1, 510),
        lambda edit: edit.set_many("daily", []),
        lambda edit: edit.fit("daily"),
    ],
)
def test_an_edit_that_changes_nothing(change: Change) -> None:
    storage = FaultyStorage(EDITS["several"].image())
    with qcow2bm.open(storage, "r+") as image:
        bitmap = image.bitmaps["daily"]
        with image.edit() as edit:
            change(edit)
        bitmap.count()
    assert storage.effects == []
