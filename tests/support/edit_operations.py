"""Every operation of an edit, for the crash tests, and what the operation makes of the bitmaps.

An operation is done to a `qcow2bm.Edit` and to a model of the bitmaps, which has the same methods.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from support.crash_judge import Judge, Recorded, look
from support.layouts import Layout, image
from support.model import Bitmaps, Model

import qcow2bm
from qcow2bm.clusters.plan import Plan
from qcow2bm.format.directory import FLAG_AUTO


class Operation(NamedTuple):
    """An edit, and how many bitmaps it needs.

    ``model`` does to the model what the edit does to an image, if the model has no such method.
    """

    name: str
    needs: int
    edit: Callable[[qcow2bm.Edit | Bitmaps], object]
    model: Callable[[Bitmaps], object] | None = None

    def expected(self, old: tuple[Recorded, ...], size: int) -> tuple[Recorded, ...]:
        """The bitmaps after the operation."""
        bitmaps = Bitmaps(size)
        for b in old:
            is_enabled = bool(b.flags & FLAG_AUTO)
            bitmaps.by_name[b.name] = Model(size, b.granularity, b.dirty, is_enabled, b.status)
        (self.model or self.edit)(bitmaps)
        return tuple(
            Recorded(name, model.flags, model.granularity, model.bits, model.status)
            for name, model in bitmaps.by_name.items()
        )


RENAMED = "renamed to something that is longer than it was " + "ö" * 60

START, STOP = 1 << 16, 3 << 20
"""A range of bytes; b00 has some of it dirty and some not."""


def _remove_all_and_more(edit: qcow2bm.Edit | Bitmaps) -> None:
    edit.remove_all()
    edit.add("other", 65536)
    edit.set("other", 65536, 1 << 17)


def _several(edit: qcow2bm.Edit | Bitmaps) -> None:
    edit.copy("b00", "copy")
    edit.clear("b00")
    edit.disable("b00")
    edit.rename("b00", RENAMED)
    edit.add("other", 65536)
    edit.invert("other")
    edit.remove("b01")


def _invalidate_two(edit: qcow2bm.Edit | Bitmaps) -> None:
    edit.invalidate("b00")
    edit.invalidate("b01")


def _change_and_invalidate(edit: qcow2bm.Edit | Bitmaps) -> None:
    edit.set("b00", START, STOP - START)
    edit.invalidate("b00")
    edit.invalidate("b01")
    edit.add("other", 65536)


def _add_two(edit: qcow2bm.Edit | Bitmaps) -> None:
    edit.add("first", 512)
    edit.set("first", 0, 512)
    edit.add("second", 4096, enabled=False)
    edit.invert("second")


def _fit(name: str) -> Callable[[qcow2bm.Edit | Bitmaps], None]:
    def edit(edit: qcow2bm.Edit | Bitmaps) -> None:
        assert isinstance(edit, qcow2bm.Edit)
        edit.fit(name)

    return edit


def _salvage(name: str, *, trust_stored: bool = False) -> Callable[[qcow2bm.Edit | Bitmaps], None]:
    def edit(edit: qcow2bm.Edit | Bitmaps) -> None:
        assert isinstance(edit, qcow2bm.Edit)
        edit.salvage(name, trust_stored=trust_stored)

    return edit


def _fitted(*, is_longer: bool) -> Callable[[Bitmaps], None]:
    def model(bitmaps: Bitmaps) -> None:
        fitted = bitmaps["b00"]
        fitted.status = "valid"
        # A shorter table has one cluster only, and where in it the disk ended is not known.
        fitted.bits = fitted.bits & fitted.mask if is_longer else fitted.mask

    return model


def _salvaged(name: str, *, is_stale: bool, is_all_dirty: bool) -> Callable[[Bitmaps], None]:
    """Returns the effect of salvaging; if the extension was stale, other bitmaps become in_use."""

    def model(bitmaps: Bitmaps) -> None:
        if is_stale:
            for b in look(image(12, 3)).bitmaps:
                is_enabled = bool(b.flags & FLAG_AUTO)
                bitmaps.by_name[b.name] = Model(
                    bitmaps.size, b.granularity, b.dirty, is_enabled, "inconsistent"
                )
        salvaged = bitmaps[name]
        salvaged.status = "valid"
        if is_all_dirty:
            salvaged.bits = salvaged.mask

    return model


OPERATIONS = (
    Operation("add", 0, lambda e: e.add("new", 65536)),
    Operation("add two", 0, _add_two),
    Operation("remove", 1, lambda e: e.remove("b00")),
    Operation("remove all", 1, lambda e: e.remove_all()),
    Operation("remove all, add", 1, _remove_all_and_more),
    Operation("clear", 1, lambda e: e.clear("b00")),
    Operation("disable", 1, lambda e: e.disable("b00")),
    Operation("invalidate", 1, lambda e: e.invalidate("b00")),
    Operation("invalidate two", 2, _invalidate_two),
    Operation("invalidate and more", 2, _change_and_invalidate),
    Operation("rename", 1, lambda e: e.rename("b00", RENAMED)),
    Operation("copy", 1, lambda e: e.copy("b00", "copy")),
    Operation("copy coarser", 1, lambda e: e.copy("b00", "copy", 65536)),
    Operation("set", 1, lambda e: e.set("b00", START, STOP - START)),
    Operation("reset", 1, lambda e: e.reset("b00", START, STOP - START)),
    Operation("invert", 1, lambda e: e.invert("b00")),
    Operation("enable", 2, lambda e: e.enable("b01")),
    Operation("merge", 2, lambda e: e.merge("b00", "b01")),
    Operation("merge xor", 2, lambda e: e.merge("b00", "b01", "xor")),
    Operation("merge and", 2, lambda e: e.merge("b00", "b01", "and")),
    Operation("subtract", 2, lambda e: e.merge("b00", "b01", "subtract")),
    Operation("merge into a coarser one", 3, lambda e: e.merge("b02", "b00")),
    Operation("several", 2, _several),
)
ODD_ONES = (
    Operation("remove one in_use", 1, lambda e: e.remove("crash")),
    Operation(
        "salvage one in_use",
        1,
        _salvage("crash"),
        _salvaged("crash", is_stale=False, is_all_dirty=True),
    ),
    Operation(
        "salvage one in_use as it is stored",
        1,
        _salvage("crash", trust_stored=True),
        _salvaged("crash", is_stale=False, is_all_dirty=False),
    ),
    Operation(
        "salvage a stale one",
        1,
        _salvage("b01"),
        _salvaged("b01", is_stale=True, is_all_dirty=True),
    ),
    Operation(
        "salvage a stale one as it is stored",
        1,
        _salvage("b01", trust_stored=True),
        _salvaged("b01", is_stale=True, is_all_dirty=False),
    ),
    Operation("fit a longer table", 1, _fit("b00"), _fitted(is_longer=True)),
    Operation("fit a shorter table", 1, _fit("b00"), _fitted(is_longer=False)),
)
"""The operations for bitmaps that are not valid."""


def operations(layout: Layout) -> list[Operation]:
    """The operations to be tried on an image of this layout."""
    wanted = layout.only or [operation.name for operation in OPERATIONS]
    return [o for o in (*OPERATIONS, *ODD_ONES) if o.name in wanted and o.needs <= layout.bitmaps]


def named(name: str) -> Operation:
    """The operation of that name."""
    (found,) = (operation for operation in OPERATIONS if operation.name == name)
    return found


def planned(data: bytes, operation: Operation) -> tuple[Judge, Plan]:
    """The judge and the plan of an operation on an image."""
    old = look(data)
    with qcow2bm.open(bytearray(data), "r+") as image:
        with image.edit(dry_run=True) as edit:
            operation.edit(edit)
            plan = edit.plan()
            assert plan.steps, "an operation that changes nothing shows nothing"
        new = operation.expected(old.bitmaps, image.virtual_size)
    return Judge(data, old, new), plan
