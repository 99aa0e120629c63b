"""Edits to interrupt, and a storage that interrupts them as real ones do.

    storage = FaultyStorage(EDITS["rename"].image(), Fault(17, errno.EIO))
    with qcow2bm.open(storage, "r+") as image, image.edit() as edit:
        EDITS["rename"].change(edit)

Half a write is half of its sectors: one sector is written whole or not at all.
"""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from support.audit import Audit
from support.images import ONES, ZEROES, Stored, build_image, extension

import qcow2bm
from qcow2bm.api import Edit
from qcow2bm.clusters.plan import Plan
from qcow2bm.errors import StorageError
from qcow2bm.format.directory import FLAG_AUTO, FLAG_IN_USE
from qcow2bm.format.extensions import BITMAPS, PADDING
from qcow2bm.format.features import AUTOCLEAR_BITMAPS
from qcow2bm.storage.memory import MemoryStorage
from qcow2bm.units import ceil_div

if TYPE_CHECKING:
    from typing_extensions import Buffer

SECTOR = 512
CLUSTER = 512
COVERED = 8 * CLUSTER << 9
"""What a cluster of a bitmap of granularity 512 covers, in guest bytes."""
SIZE = 4 * COVERED
"""Of the disks here, so that such a bitmap has four clusters."""
BACKING_NAME = b"base.qcow2"
"""Of a backing file beside the overlays, which only QEMU looks for."""


# --- storages -----------------------------------------------------------------------------------


class Fault(NamedTuple):
    """What goes wrong: call ``number``, and with ``is_sticky`` every call of that name after it.

    A write that fails has written ``share`` of its sectors all the same.
    """

    number: int
    error: int | BaseException = errno.EIO
    is_sticky: bool = False
    share: float = 0

    def strike(self) -> None:
        """Raises what the storage raises."""
        if isinstance(self.error, BaseException):
            raise self.error
        raise StorageError("<faulty>", 0, 0, os.strerror(self.error), self.error)


_WRITE_FAULTS = [
    Fault(0, errno.EIO),
    Fault(0, errno.EIO, is_sticky=True),
    Fault(0, errno.ENOSPC, share=0.5),
    Fault(0, errno.ENOSPC, is_sticky=True, share=0.5),
    Fault(0, errno.EIO, share=1),
]
_OTHER_FAULTS = [Fault(0, errno.EIO), Fault(0, errno.EIO, is_sticky=True)]


def faults_at(calls: Sequence[str]) -> Iterator[Fault]:
    """Each kind of fault at each of the calls."""
    for number, call in enumerate(calls):
        for fault in _WRITE_FAULTS if call == "write" else _OTHER_FAULTS:
            yield fault._replace(number=number)


class FaultyStorage:
    """An image in memory that lists every call, and fails where its fault says.

    When a barrier fails, ``keeps`` says of the number of every sector written since the last good
    one whether it reached the disk. The others are as they were, also for whoever reads them now,
    and later barriers succeed: so Linux may do after a failed fdatasync.
    """

    name = "<faulty>"
    excludes_other_hosts = True

    def __init__(
        self,
        data: bytearray,
        fault: Fault | None = None,
        *,
        is_watched: bool = True,
        keeps: Callable[[int], bool] = lambda sector: True,
    ) -> None:
        self.data = data
        self.fault = fault
        self.calls: list[str] = []
        self._memory = MemoryStorage(data, self.name)
        self._durable = bytes(data)
        self._is_watched = is_watched
        self._keeps = keeps

    @property
    def effects(self) -> list[str]:
        """The calls that change something, or claim to have made it last."""
        return [call for call in self.calls if call in ("write", "barrier", "truncate")]

    @property
    def was_hit(self) -> bool:
        """Whether the fault has happened."""
        return self.fault is not None and self.fault.number < len(self.calls)

    def _is_struck(self, call: str) -> bool:
        number = len(self.calls)
        self.calls.append(call)
        fault = self.fault
        if fault is None or number < fault.number:
            return False
        return number == fault.number or (fault.is_sticky and call == self.calls[fault.number])

    def _enter(self, call: str) -> None:
        if self._is_struck(call):
            assert self.fault
            self.fault.strike()

    def size(self) -> int:
        self._enter("size")
        return self._memory.size()

    def read_into(self, offset: int, buffer: memoryview) -> int:
        self._enter("read_into")
        return self._memory.read_into(offset, buffer)

    def change_token(self) -> object:
        self._enter("change_token")
        return self.calls.count("write") if self._is_watched else None

    @contextmanager
    def read_lock(self) -> Iterator[None]:
        self._enter("read_lock")
        yield

    def close(self) -> None:
        self._memory.close()

    def write(self, offset: int, parts: Sequence[Buffer]) -> None:
        if not self._is_struck("write"):
            self._memory.write(offset, parts)
            return
        assert self.fault
        data = b"".join(parts)
        stop = sectors_of(offset, len(data), self.fault.share)
        self._memory.write(offset, [data[:stop]])
        self.fault.strike()

    def barrier(self) -> None:
        if not self._is_struck("barrier"):
            self._durable = bytes(self.data)
            return
        assert self.fault
        self._drop_sectors()
        self.fault.strike()

    def _drop_sectors(self) -> None:
        old = self._durable.ljust(len(self.data), b"\0")
        end = len(self._durable)
        for start in range(0, len(old), SECTOR):
            sector = slice(start, start + SECTOR)
            if self.data[sector] == old[sector]:
                continue
            if self._keeps(start // SECTOR):
                end = max(end, min(start + SECTOR, len(old)))
            else:
                self.data[sector] = old[sector]
        del self.data[end:]

    def truncate(self, size: int) -> None:
        self._enter("truncate")
        self._memory.truncate(size)

    def capacity(self) -> int | None:
        self._enter("capacity")
        return None

    def refresh(self) -> None:
        self._enter("refresh")

    @contextmanager
    def write_lock(self, timeout: float) -> Iterator[None]:
        self._enter("write_lock")
        yield


def sectors_of(offset: int, length: int, share: float) -> int:
    """How many bytes from ``offset`` on are a share of the sectors that a write touches."""
    first, last = offset // SECTOR, ceil_div(offset + length, SECTOR)
    stop = (first + int((last - first) * share)) * SECTOR
    return max(0, min(stop - offset, length))


# --- what an image has --------------------------------------------------------------------------


class Bits(NamedTuple):
    """One bitmap, all of it."""

    name: str
    granularity: int
    auto: bool
    status: str
    packed: bytes


class State(NamedTuple):
    """All that an edit may change, and what else the header says."""

    bitmaps: tuple[Bits, ...]
    backing_file: str | None
    extensions: tuple[tuple[int, bytes], ...]


def state_of(data: bytes | bytearray) -> State:
    """What an image has. It must open, be sound, and no cluster in use may be counted as free."""
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


# --- edits --------------------------------------------------------------------------------------


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
    """Bitmaps that a program without bitmap support left behind; nobody else has their clusters."""
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
    """What an image has before and after an edit."""
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
