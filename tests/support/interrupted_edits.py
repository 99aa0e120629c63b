"""Edits to interrupt, one for each way through the commit, and what an image has before and after.

storage = FaultyStorage(EDITS["rename"].image(), Fault(17, errno.EIO))
with qcow2bm.open(storage, "r+") as image:
    EDITS["rename"].run(image)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache
from typing import NamedTuple

from support.audit import Audit
from support.faulty_storage import FaultyStorage
from support.images import ONES, ZEROES, Stored, build_image, extension

import qcow2bm
from qcow2bm.api import Edit
from qcow2bm.clusters.plan import Plan
from qcow2bm.format.directory import FLAG_AUTO, FLAG_IN_USE
from qcow2bm.format.extensions import BITMAPS, PADDING
from qcow2bm.format.features import AUTOCLEAR_BITMAPS

CLUSTER = 512
COVERED = 8 * CLUSTER << 9
"""Guest bytes that a cluster of a bitmap of granularity 512 covers."""
SIZE = 4 * COVERED
"""The size of the disks here: such a bitmap has four clusters."""
BACKING_NAME = b"base.qcow2"
"""The name of a backing file beside the overlays. Only QEMU looks for this file."""


class Bits(NamedTuple):
    """One bitmap, all of it."""

    name: str
    granularity: int
    auto: bool
    status: str
    packed: bytes


class State(NamedTuple):
    """All that an edit may change, and the rest of the header."""

    bitmaps: tuple[Bits, ...]
    backing_file: str | None
    extensions: tuple[tuple[int, bytes], ...]


def state_of(data: bytes | bytearray) -> State:
    """The state of an image; asserts that it opens, is sound, counts no used cluster as free."""
    with qcow2bm.open(data) as image:
        assert [found for found in image.problems if found.breaks_bitmap] == []
        bitmaps = tuple(
            Bits(b.name, b.granularity, b.auto, b.status, b.stale_bits().tobytes())
            for b in image.bitmaps.values()
            if image.is_consistent
        )
        kept = (e for _, e in image.extensions if e.type not in (BITMAPS, PADDING))
        state = State(bitmaps, image.backing_file, tuple((e.type, e.data) for e in kept))
    audit = Audit(data)
    assert audit.references - audit.refcounts == Counter()  # INV-REFCOUNT: leaks, nothing worse
    return state


class Interrupted(NamedTuple):
    """An edit, the image it is made in, and the extents it must lead to, by bitmap."""

    image: Callable[[], bytearray]
    change: Callable[[Edit], object]
    after: Mapping[str, list[list[int]]]

    def run(self, image: qcow2bm.Image) -> None:
        """Edits the image."""
        with image.edit() as edit:
            self.change(edit)


DAILY = Stored(b"daily", [b"\1", ZEROES, ONES, b"\2"], 9)
WEEKLY = Stored(b"weekly", [ZEROES, b"\3", ZEROES, b"\4" * CLUSTER], 9, 0)
CRASHED = Stored(b"crashed", [ONES, b"\5", ZEROES, ZEROES], 9, FLAG_AUTO | FLAG_IN_USE)
COARSE = Stored(b"coarse", [b"\1\1"], 16)

DAILY_EXTENTS = [[0, 512], [2 * COVERED, COVERED], [3 * COVERED + 512, 512]]
COARSE_EXTENTS = [[0, 65536], [8 * 65536, 65536]]


def _three() -> bytearray:
    return build_image(DAILY, CRASHED, COARSE, size=SIZE).data


def _with_garbage() -> bytearray:
    """Bitmaps were removed from it, and what they had still stands in the free clusters."""
    data = build_image(WEEKLY, DAILY, size=SIZE).data
    with qcow2bm.open(data, "r+") as image, image.edit() as edit:
        edit.remove("weekly")
    return data


def _nearly_full(length: int) -> bytearray:
    """A bitmap of so many clusters, and hardly any left that the refcount blocks can count."""
    rest = Stored(b"rest", [b"\1"] * length, 9)
    clean = Stored(b"daily", [ZEROES] * length, 9)
    return build_image(rest, clean, size=length * COVERED, refcount_order=6).data


def _rest(length: int) -> dict[str, list[list[int]]]:
    return {"rest": [[n * COVERED, 512] for n in range(length)], "daily": []}


def _overlay() -> bytearray:
    """The header extensions end at byte 480, so that one more reaches into the second sector."""
    listed = [extension(0x12345678, bytes(range(180)) * 2)]
    name = b"./" * 150 + BACKING_NAME
    return build_image(cluster_bits=12, size=SIZE, extensions=listed, backing_name=name).data


def _straddling(length: int) -> bytearray:
    """An overlay with ``length`` bytes of another extension before the bitmaps extension."""
    listed = [extension(0x12345678, bytes(length))]
    image = build_image(
        DAILY._replace(table=[b"\1"]),
        cluster_bits=12,
        size=SIZE,
        extensions=listed,
        backing_name=BACKING_NAME,
    )
    return image.data


def _unknown_autoclear() -> bytearray:
    bits = {"autoclear_features": AUTOCLEAR_BITMAPS | 1 << 40}
    return build_image(DAILY, size=SIZE, header=bits).data


def _stale() -> bytearray:
    """Bitmaps that a program without bitmap support left behind; their clusters are not reused."""
    return build_image(DAILY, WEEKLY, size=SIZE, autoclear=False).data


def _first(edit: Edit) -> None:
    edit.add("first", 512)
    edit.set("first", COVERED - 512, 1024)


def _several(edit: Edit) -> None:
    edit.remove("crashed")
    edit.copy("daily", "copy", 65536)
    edit.invert("daily")
    edit.clear("coarse")
    edit.disable("coarse")
    _first(edit)


EDITS = {
    "first": Interrupted(
        lambda: build_image(size=SIZE).data, _first, {"first": [[COVERED - 512, 1024]]}
    ),
    "set": Interrupted(
        _three,
        lambda edit: edit.set("daily", COVERED, 512),
        {"daily": sorted([*DAILY_EXTENTS, [COVERED, 512]]), "coarse": COARSE_EXTENTS},
    ),
    "merge": Interrupted(
        _three,
        lambda edit: edit.merge("daily", "coarse"),
        {
            "daily": [[0, 65536], [8 * 65536, 65536], *DAILY_EXTENTS[1:]],
            "coarse": COARSE_EXTENTS,
        },
    ),
    "rename": Interrupted(
        _three,
        lambda edit: edit.rename("daily", "a new name"),
        {"a new name": DAILY_EXTENTS, "coarse": COARSE_EXTENTS},
    ),
    "remove last": Interrupted(
        lambda: build_image(DAILY, size=SIZE).data, lambda edit: edit.remove("daily"), {}
    ),
    "several": Interrupted(
        _three,
        _several,
        {
            "daily": [
                [512, 2 * COVERED - 512],
                [3 * COVERED, 512],
                [3 * COVERED + 1024, COVERED - 1024],
            ],
            "coarse": [],
            "copy": [[0, 65536], [2 * COVERED, COVERED + 65536]],
            "first": [[COVERED - 512, 1024]],
        },
    ),
    "reuse": Interrupted(
        _with_garbage,
        _first,
        {"daily": DAILY_EXTENTS, "first": [[COVERED - 512, 1024]]},
    ),
    "overlay": Interrupted(_overlay, _first, {"first": [[COVERED - 512, 1024]]}),
    "straddling": Interrupted(
        lambda: _straddling(368),
        lambda edit: edit.set("daily", SIZE - 512, 512),
        {"daily": [[0, 512], [SIZE - 512, 512]]},
    ),
    "remove last from the second sector": Interrupted(
        lambda: _straddling(400), lambda edit: edit.remove("daily"), {}
    ),
    "unknown autoclear": Interrupted(
        _unknown_autoclear, lambda edit: edit.clear("daily"), {"daily": []}
    ),
    "salvage": Interrupted(
        _three,
        lambda edit: edit.salvage("crashed"),
        {"daily": DAILY_EXTENTS, "crashed": [[0, SIZE]], "coarse": COARSE_EXTENTS},
    ),
    "salvage a stale one": Interrupted(
        _stale,
        lambda edit: edit.salvage("daily", trust_stored=True),
        {"daily": DAILY_EXTENTS},
    ),
    "refcount block": Interrupted(
        lambda: _nearly_full(28), _first, _rest(28) | {"first": [[COVERED - 512, 1024]]}
    ),
    "refcount table": Interrupted(
        lambda: _nearly_full(1980), _first, _rest(1980) | {"first": [[COVERED - 512, 1024]]}
    ),
}
"""By name; each takes another way through the commit."""


@cache
def states(name: str) -> tuple[State, State]:
    """The states of an image before and after an edit."""
    data = EDITS[name].image()
    old = state_of(data)
    with qcow2bm.open(data, "r+") as image:
        EDITS[name].run(image)
        extents = {
            bitmap.name: [extent for part in bitmap.extents() for extent in part.tolist()]
            for bitmap in image.bitmaps.values()
            if not bitmap.in_use
        }
    assert extents == EDITS[name].after
    return old, state_of(data)


@cache
def calls(name: str, *, is_watched: bool = True) -> tuple[str, ...]:
    """The calls of an edit in which nothing fails, from opening the image to closing it."""
    storage = FaultyStorage(EDITS[name].image(), is_watched=is_watched)
    with qcow2bm.open(storage, "r+") as image:
        EDITS[name].run(image)
    return tuple(storage.calls)


@cache
def plan(name: str) -> Plan:
    """The writes and barriers of an edit."""
    with qcow2bm.open(EDITS[name].image()) as image, image.edit(dry_run=True) as edit:
        EDITS[name].change(edit)
        return edit.plan()
