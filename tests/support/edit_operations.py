"""Every operation of an edit, and what it is to make of the bitmaps.

The second is said again in the plainest way: bits are one number each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from support.crash_judge import Judge, Recorded, look
from support.layouts import Layout, image

import qcow2bm
from qcow2bm.clusters.plan import Plan
from qcow2bm.format.directory import FLAG_AUTO, FLAG_IN_USE

Bitmaps = dict[str, Recorded]


class Disk(NamedTuple):
    """The bitmaps as an operation changes them, by name in the order of the directory."""

    bitmaps: Bitmaps
    size: int

    def put(self, name: str, dirty: int) -> None:
        """Gives a bitmap other bits."""
        known = self.bitmaps[name]
        mask = (1 << -(-self.size // known.granularity)) - 1
        self.bitmaps[name] = known._replace(dirty=dirty & mask)

    def add(self, name: str, granularity: int, flags: int = FLAG_AUTO, dirty: int = 0) -> None:
        """A new bitmap behind the others."""
        self.bitmaps[name] = Recorded(name, flags, granularity, dirty)

    def fill(self, name: str, start: int, stop: int, *, is_set: bool) -> None:
        """Bytes that begin and end with a granule."""
        granularity, dirty = self.bitmaps[name].granularity, self.bitmaps[name].dirty
        mask = (1 << stop // granularity) - (1 << start // granularity)
        self.put(name, dirty | mask if is_set else dirty & ~mask)

    def coarser(self, name: str, granularity: int) -> int:
        """The bits of a bitmap at a coarser granularity."""
        known = self.bitmaps[name]
        factor = granularity // known.granularity
        text = f"{known.dirty:b}"[::-1]
        groups = (text[place : place + factor] for place in range(0, len(text), factor))
        return int("".join("01"["1" in group] for group in groups)[::-1], 2)


class Operation(NamedTuple):
    """An edit, what it makes of the bitmaps, and how many of them it needs."""

    name: str
    needs: int
    edit: Callable[[qcow2bm.Edit], None]
    model: Callable[[Disk], None]

    def expected(self, old: tuple[Recorded, ...], size: int) -> tuple[Recorded, ...]:
        """The bitmaps after it."""
        disk = Disk({bitmap.name: bitmap for bitmap in old}, size)
        self.model(disk)
        return tuple(disk.bitmaps.values())


RENAMED = "renamed to something that is longer than it was " + "ö" * 60


def _rename(disk: Disk) -> None:
    entries = [b._replace(name=RENAMED) if b.name == "b00" else b for b in disk.bitmaps.values()]
    disk.bitmaps.clear()
    disk.bitmaps.update({entry.name: entry for entry in entries})


def _enable(name: str, *, enabled: bool) -> Callable[[Disk], None]:
    def model(disk: Disk) -> None:
        flags = disk.bitmaps[name].flags & ~FLAG_AUTO | FLAG_AUTO * enabled
        disk.bitmaps[name] = disk.bitmaps[name]._replace(flags=flags)

    return model


START, STOP = 1 << 16, 3 << 20
"""A range of bytes; b00 has some of it dirty and some not."""


def _fill(*, is_set: bool) -> Callable[[Disk], None]:
    return lambda disk: disk.fill("b00", START, STOP, is_set=is_set)


def _merge(op: str) -> Callable[[Disk], None]:
    def model(disk: Disk) -> None:
        a, b = disk.bitmaps["b00"].dirty, disk.bitmaps["b01"].dirty
        disk.put("b00", {"or": a | b, "and": a & b, "xor": a ^ b, "subtract": a & ~b}[op])

    return model


def _copy(disk: Disk, name: str, granularity: int | None = None) -> None:
    known = disk.bitmaps[name]
    dirty = disk.coarser(name, granularity) if granularity else known.dirty
    disk.add("copy", granularity or known.granularity, known.flags, dirty)


def _remove_all_and_more(edit: qcow2bm.Edit) -> None:
    edit.remove_all()
    edit.add("other", 65536)
    edit.set("other", 65536, 1 << 17)


def _remove_all_and_more_model(disk: Disk) -> None:
    disk.bitmaps.clear()
    disk.add("other", 65536, dirty=0b110)


def _several(edit: qcow2bm.Edit) -> None:
    edit.copy("b00", "copy")
    edit.clear("b00")
    edit.disable("b00")
    edit.rename("b00", RENAMED)
    edit.add("other", 65536)
    edit.invert("other")
    edit.remove("b01")


def _several_model(disk: Disk) -> None:
    _copy(disk, "b00")
    disk.put("b00", 0)
    _enable("b00", enabled=False)(disk)
    _rename(disk)
    disk.add("other", 65536)
    disk.put("other", ~0)
    del disk.bitmaps["b01"]


def _fit(*, is_longer: bool) -> Callable[[Disk], None]:
    def model(disk: Disk) -> None:
        known = disk.bitmaps["b00"]._replace(status="valid")
        disk.bitmaps["b00"] = known
        # Too short, it has but one cluster: where in that the disk ended is not known.
        disk.put("b00", known.dirty if is_longer else ~0)

    return model


def _add_two(edit: qcow2bm.Edit) -> None:
    edit.add("first", 512)
    edit.set("first", 0, 512)
    edit.add("second", 4096, enabled=False)
    edit.invert("second")


def _add_two_model(disk: Disk) -> None:
    disk.add("first", 512, dirty=1)
    disk.add("second", 4096, 0)
    disk.put("second", ~0)


def _salvage(name: str, *, is_stale: bool, is_all_dirty: bool) -> Callable[[Disk], None]:
    """The others of a stale extension are in_use afterwards."""

    def model(disk: Disk) -> None:
        if is_stale:
            for known in look(image(12, 3)).bitmaps:
                flags = known.flags | FLAG_IN_USE
                disk.bitmaps[known.name] = known._replace(flags=flags, status="inconsistent")
        known = disk.bitmaps[name]
        flags = known.flags & ~FLAG_IN_USE
        disk.bitmaps[name] = known._replace(flags=flags, status="valid")
        if is_all_dirty:
            disk.put(name, ~0)

    return model


OPERATIONS = (
    Operation("add", 0, lambda e: e.add("new", 65536), lambda d: d.add("new", 65536)),
    Operation("add two", 0, _add_two, _add_two_model),
    Operation("remove", 1, lambda e: e.remove("b00"), lambda d: d.bitmaps.__delitem__("b00")),
    Operation("remove all", 1, lambda e: e.remove_all(), lambda d: d.bitmaps.clear()),
    Operation("remove all, add", 1, _remove_all_and_more, _remove_all_and_more_model),
    Operation("clear", 1, lambda e: e.clear("b00"), lambda d: d.put("b00", 0)),
    Operation("disable", 1, lambda e: e.disable("b00"), _enable("b00", enabled=False)),
    Operation("rename", 1, lambda e: e.rename("b00", RENAMED), _rename),
    Operation("copy", 1, lambda e: e.copy("b00", "copy"), lambda d: _copy(d, "b00")),
    Operation(
        "copy coarser",
        1,
        lambda e: e.copy("b00", "copy", 65536),
        lambda d: _copy(d, "b00", 65536),
    ),
    Operation("set", 1, lambda e: e.set("b00", START, STOP - START), _fill(is_set=True)),
    Operation("reset", 1, lambda e: e.reset("b00", START, STOP - START), _fill(is_set=False)),
    Operation(
        "invert",
        1,
        lambda e: e.invert("b00"),
        lambda d: d.put("b00", ~d.bitmaps["b00"].dirty),
    ),
    Operation("enable", 2, lambda e: e.enable("b01"), _enable("b01", enabled=True)),
    Operation("merge", 2, lambda e: e.merge("b00", "b01"), _merge("or")),
    Operation("merge xor", 2, lambda e: e.merge("b00", "b01", "xor"), _merge("xor")),
    Operation("merge and", 2, lambda e: e.merge("b00", "b01", "and"), _merge("and")),
    Operation("subtract", 2, lambda e: e.merge("b00", "b01", "subtract"), _merge("subtract")),
    Operation(
        "merge into a coarser one",
        3,
        lambda e: e.merge("b02", "b00"),
        lambda d: d.put(
            "b02", d.bitmaps["b02"].dirty | d.coarser("b00", d.bitmaps["b02"].granularity)
        ),
    ),
    Operation("several", 2, _several, _several_model),
)
ODD_ONES = (
    Operation(
        "remove one in_use",
        1,
        lambda e: e.remove("crash"),
        lambda d: d.bitmaps.__delitem__("crash"),
    ),
    Operation(
        "salvage one in_use",
        1,
        lambda e: e.salvage("crash"),
        _salvage("crash", is_stale=False, is_all_dirty=True),
    ),
    Operation(
        "salvage one in_use as it is stored",
        1,
        lambda e: e.salvage("crash", trust_stored=True),
        _salvage("crash", is_stale=False, is_all_dirty=False),
    ),
    Operation(
        "salvage a stale one",
        1,
        lambda e: e.salvage("b01"),
        _salvage("b01", is_stale=True, is_all_dirty=True),
    ),
    Operation(
        "salvage a stale one as it is stored",
        1,
        lambda e: e.salvage("b01", trust_stored=True),
        _salvage("b01", is_stale=True, is_all_dirty=False),
    ),
    Operation("fit a longer table", 1, lambda e: e.fit("b00"), _fit(is_longer=True)),
    Operation("fit a shorter table", 1, lambda e: e.fit("b00"), _fit(is_longer=False)),
)


def operations(layout: Layout) -> list[Operation]:
    """Those to be tried on an image of this shape."""
    wanted = layout.only or [operation.name for operation in OPERATIONS]
    return [o for o in (*OPERATIONS, *ODD_ONES) if o.name in wanted and o.needs <= layout.bitmaps]


def named(name: str) -> Operation:
    """The operation of that name."""
    (found,) = (operation for operation in OPERATIONS if operation.name == name)
    return found


def planned(data: bytes, operation: Operation) -> tuple[Judge, Plan]:
    """An operation on an image, as a plan and its judge."""
    old = look(data)
    with qcow2bm.open(bytearray(data), "r+") as image:
        with image.edit(dry_run=True) as edit:
            operation.edit(edit)
            plan = edit.plan()
            assert plan.steps, "an operation that changes nothing shows nothing"
        new = operation.expected(old.bitmaps, image.virtual_size)
    return Judge(data, old, new), plan
