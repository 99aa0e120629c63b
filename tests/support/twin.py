"""What edits are to do, said again with one bool for each granule; and images to do them on.

A `Twin` is an image together with what must be in it: the bitmaps, as `Expected`, and what the
guest reads, as a raw file. Whoever changes the image, this library or QEMU, changes the twin alike.
"""

from __future__ import annotations

import fcntl
import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from support.qemu import Disk, StorageDaemon, run, run_ok

import qcow2bm
from qcow2bm.storage.interface import WritableStorage

KiB, MiB, GiB = 1 << 10, 1 << 20, 1 << 30
SECTOR = 512

Bools = NDArray[np.bool_]
Step = tuple[str, tuple[Any, ...]]
"""An operation of `qcow2bm.Edit`, which `Bitmaps` has too, and its arguments."""

OPERATIONS: dict[str, Callable[[Bools, Bools], Bools]] = {
    "or": np.logical_or,
    "and": np.logical_and,
    "xor": np.logical_xor,
    "subtract": lambda mine, theirs: mine & ~theirs,
}


class Expected:
    """One bitmap as it must be."""

    def __init__(self, size: int, granularity: int, *, auto: bool = True) -> None:
        self.size, self.granularity, self.auto = size, granularity, auto
        self.dirty: Bools = np.zeros(-(-size // granularity), np.bool_)

    def at(self, granularity: int) -> Bools:
        """The bits at another granularity: dirty is what touches anything dirty."""
        count = -(-self.size // granularity)
        if granularity <= self.granularity:
            return np.repeat(self.dirty, self.granularity // granularity)[:count]
        factor = granularity // self.granularity
        whole = np.zeros(count * factor, np.bool_)
        whole[: len(self.dirty)] = self.dirty
        coarser: Bools = whole.reshape(count, factor).max(axis=1)
        return coarser

    def merge(self, source: Expected, op: str) -> None:
        """Combines at the finer granularity of the two."""
        finest = Expected(self.size, min(self.granularity, source.granularity))
        mine, theirs = self.at(finest.granularity), source.at(finest.granularity)
        finest.dirty = OPERATIONS[op](mine, theirs)
        self.dirty = finest.at(self.granularity)

    def set(self, start: int, length: int) -> None:
        """Dirties every granule the range touches."""
        if length:
            self.dirty[start // self.granularity : -(-(start + length) // self.granularity)] = True

    def reset(self, start: int, length: int) -> None:
        """Cleans every granule that lies in the range, as far as it lies on the disk."""
        end = start + length
        stop = len(self.dirty) if end == self.size else end // self.granularity
        self.dirty[-(-start // self.granularity) : max(stop, 0)] &= not length

    def resize(self, size: int) -> None:
        """As QEMU resizes: what is new is clean."""
        old, self.size = self.dirty, size
        self.dirty = np.zeros(-(-size // self.granularity), np.bool_)
        common = min(len(old), len(self.dirty))
        self.dirty[:common] = old[:common]

    @property
    def sha256(self) -> str:
        """The hash of the bits as QEMU keeps them: in 64-bit words, at least one."""
        packed = np.packbits(self.dirty, bitorder="little").tobytes()
        words = max(1, -(-len(self.dirty) // 64))
        return sha256(packed.ljust(8 * words, b"\0")).hexdigest()

    @property
    def extents(self) -> list[tuple[int, int]]:
        """The dirty (start, length) in guest bytes, cut at the disk's end."""
        edges = np.flatnonzero(np.diff(self.dirty, prepend=False, append=False))
        ends = np.minimum(edges * self.granularity, self.size).reshape(-1, 2).tolist()
        return [(start, stop - start) for start, stop in ends]


class Bitmaps:
    """The bitmaps of an image as they must be, with the operations of `qcow2bm.Edit`."""

    def __init__(self, size: int, default_granularity: int) -> None:
        self.size = size
        self._default = default_granularity
        self.by_name: dict[str, Expected] = {}

    def __getitem__(self, name: str) -> Expected:
        return self.by_name[name]

    def add(self, name: str, granularity: int | None = None, enabled: bool = True) -> None:
        assert name not in self.by_name
        self.by_name[name] = Expected(self.size, granularity or self._default, auto=enabled)

    def remove(self, name: str) -> None:
        del self.by_name[name]

    def remove_all(self) -> None:
        self.by_name.clear()

    def clear(self, name: str) -> None:
        self[name].dirty[:] = False

    def enable(self, name: str) -> None:
        self[name].auto = True

    def disable(self, name: str) -> None:
        self[name].auto = False

    def rename(self, name: str, new_name: str) -> None:
        self.by_name = {new_name if n == name else n: b for n, b in self.by_name.items()}

    def copy(self, name: str, new_name: str, granularity: int | None = None) -> None:
        source = self[name]
        self.add(new_name, granularity or source.granularity, source.auto)
        self[new_name].merge(source, "or")

    def set(self, name: str, start: int, length: int) -> None:
        self[name].set(start, length)

    def reset(self, name: str, start: int, length: int) -> None:
        self[name].reset(start, length)

    def set_many(self, name: str, ranges: list[tuple[int, int]]) -> None:
        for start, length in ranges:
            self.set(name, start, length)

    def reset_many(self, name: str, ranges: list[tuple[int, int]]) -> None:
        for start, length in ranges:
            self.reset(name, start, length)

    def invert(self, name: str) -> None:
        self[name].dirty ^= True

    def merge(self, target: str, source: str, op: str = "or") -> None:
        self[target].merge(self[source], op)

    def guest_writes(self, start: int, length: int) -> None:
        """What a write of the guest does to all that record."""
        for bitmap in self.by_name.values():
            if bitmap.auto:
                bitmap.set(start, length)

    def resize(self, size: int) -> None:
        """What QEMU does to all of them when the disk is resized."""
        self.size = size
        for bitmap in self.by_name.values():
            bitmap.resize(size)

    @property
    def listed(self) -> list[dict[str, object]]:
        """What qemu-img info is to list, in the order of the directory."""
        return [
            {"flags": ["auto"] * b.auto, "name": name, "granularity": b.granularity}
            for name, b in self.by_name.items()
        ]


def do(target: Disk | WritableStorage, *steps: Step) -> None:
    """One edit of this library, with some operations."""
    source = target.path if isinstance(target, Disk) else target
    with qcow2bm.open(source, "r+") as image, image.edit() as edit:
        for name, arguments in steps:
            getattr(edit, name)(*arguments)


def hashes(disk: Disk, daemon: StorageDaemon) -> dict[str, str]:
    """The hashes of the bits of all bitmaps, as QEMU reads them."""
    daemon.open(disk)
    try:
        return {name: daemon.sha256(name) for name in daemon.bitmaps()}
    finally:
        daemon.close()


class Kind(NamedTuple):
    """A kind of image: the size of its disk, and how QEMU is told to create it."""

    size: int
    options: dict[str, object]
    has_backing: bool = False
    has_snapshot: bool = False


def make_kind(size: int = 40 * MiB + SECTOR, /, **options: object) -> Kind:
    """A kind with clusters of 4 KiB, unless told otherwise."""
    return Kind(size, {"cluster_size": 4 * KiB, **options})


# Bits of the finest granularity take several clusters each, of which the last is not full.
_SMALL = 10 * MiB + SECTOR

KINDS = {
    "cluster-512": make_kind(_SMALL, cluster_size=512),
    "cluster-4k": make_kind(),
    "cluster-64k": make_kind(600 * MiB + SECTOR, cluster_size="64k"),
    "cluster-2M": make_kind(9 * GiB + SECTOR, cluster_size="2M"),
    "refcount-1": make_kind(refcount_bits=1),
    "refcount-2": make_kind(refcount_bits=2),
    "refcount-8": make_kind(refcount_bits=8),
    "refcount-64": make_kind(_SMALL, refcount_bits=64, cluster_size=512),
    "overlay": make_kind()._replace(has_backing=True),
    "overlay-512": make_kind(_SMALL, cluster_size=512)._replace(has_backing=True),
    "data-file": make_kind(data_file="{folder}/data"),
    "data-file-raw": make_kind(data_file="{folder}/data", data_file_raw="on"),
    "luks": Kind(40 * MiB + SECTOR, {"cluster_size": 4 * KiB, "encrypt.format": "luks"}),
    "extended-l2": make_kind(extended_l2="on", cluster_size="16k"),
    "snapshot": make_kind()._replace(has_snapshot=True),
    "lazy-refcounts": make_kind(lazy_refcounts="on"),
    "preallocated": make_kind(preallocation="metadata"),
    "zstd": make_kind(compression_type="zstd"),
}


@dataclass
class Twin:
    """An image, and what must be in it."""

    disk: Disk
    guest: Path
    bitmaps: Bitmaps
    _writes: int = field(default=0)

    @classmethod
    def create(cls, kind: Kind, folder: Path) -> Twin:
        """An image of a kind, with some guest data and no bitmap yet."""
        options = {
            key: value.replace("{folder}", str(folder)) if isinstance(value, str) else value
            for key, value in kind.options.items()
        }
        arguments: tuple[str, ...] = ()
        if kind.has_backing:
            base = Disk.create(folder / "base", kind.size)
            base.io("write -P 77 0 192k", f"write -P 78 {kind.size // 4 // SECTOR * SECTOR} 64k")
            arguments = "-b", str(base.path), "-F", "qcow2"
        disk = Disk.create(folder / "disk", kind.size, *arguments, **options)
        disk.io("write -P 1 100k 100k", f"write -P 2 {kind.size - SECTOR} 512")
        if "compression_type" in options:
            disk.io("write -c -P 4 1M 64k")
        if kind.has_snapshot:
            run_ok("qemu-img", "snapshot", "-c", "before", disk.path)
            disk.io("write -P 3 150k 100k")
        guest = folder / "guest"
        run_ok("qemu-img", "convert", *disk.arguments, "-O", "raw", guest)
        cluster_size = disk.info()["cluster-size"]
        default = max(4 * KiB, min(cluster_size, 64 * KiB))
        return cls(disk, guest, Bitmaps(kind.size, default))

    @property
    def size(self) -> int:
        return self.bitmaps.size

    def edit(self, *steps: Step) -> None:
        """One edit of this library, with some operations; done again on the twin."""
        do(self.disk, *steps)
        for name, arguments in steps:
            getattr(self.bitmaps, name)(*arguments)

    def write(self, *ranges: tuple[int, int]) -> None:
        """The guest writes; each time something else."""
        commands = []
        with self.guest.open("r+b") as guest:
            for start, length in ranges:
                self._writes += 1
                pattern = self._writes % 255 + 1
                commands.append(f"write -P {pattern} {start} {length}")
                guest.seek(start)
                guest.write(bytes([pattern]) * length)
                self.bitmaps.guest_writes(start, length)
        self.disk.io(*commands)

    def qemu_add(self, name: str, granularity: int, *, enabled: bool = True) -> None:
        """QEMU adds a bitmap."""
        self.disk.bitmap(name, "--add", "-g", str(granularity), *([] if enabled else ["--disable"]))
        self.bitmaps.add(name, granularity, enabled)

    def qemu(self, action: str, name: str, *arguments: str) -> None:
        """qemu-img bitmap with one of: remove, clear, enable, disable, merge."""
        self.disk.bitmap(name, f"--{action}", *arguments)
        getattr(self.bitmaps, action)(name, *arguments)

    def qemu_resize(self, size: int) -> None:
        """QEMU resizes the disk."""
        shrink = ["--shrink"] if size < self.size else []
        run_ok("qemu-img", "resize", "-q", *shrink, *self.disk.arguments, str(size))
        os.truncate(self.guest, size)
        self.bitmaps.resize(size)

    def verify(self, daemon: StorageDaemon) -> None:
        """Asserts that QEMU and this library find exactly what must be there, and no fault."""
        check = self.disk.check()
        assert check.returncode == 0, check
        assert self.disk.listed() == self.bitmaps.listed
        expected = {name: bitmap.sha256 for name, bitmap in self.bitmaps.by_name.items()}
        assert hashes(self.disk, daemon) == expected
        with qcow2bm.open(self.disk.path) as image:
            assert image.problems == ()
            assert {name: b.sha256() for name, b in image.bitmaps.items()} == expected
        self.verify_guest()

    def verify_guest(self) -> None:
        """Asserts that the guest reads what it wrote."""
        raw = f"driver=raw,file.driver=file,file.filename={self.guest}"
        compared = run("qemu-img", "compare", *self.disk.arguments, raw)
        assert compared.returncode == 0, compared

    def map(self) -> list[tuple[int, int, int]]:
        """Where QEMU finds the guest's data: (start, length, host offset).

        Not which parts of them it reports as zeros: that also depends on where the file ends.
        """
        found: list[tuple[int, int, int]] = []
        for part in json.loads(run_ok("qemu-img", "map", "--output", "json", *self.disk.arguments)):
            if "offset" not in part:
                continue
            start, length, offset = part["start"], part["length"], part["offset"]
            if found and (start, offset) == (found[-1][0] + found[-1][1], sum(found[-1][1:])):
                start, length, offset = found[-1][0], found[-1][1] + length, found.pop()[2]
            found.append((start, length, offset))
        return found


_FLOCK = struct.Struct("@hhqqi0q")


def held_lock_bytes(path: Path) -> set[int]:
    """The bytes of QEMU's two lock areas that somebody holds."""
    held = set()
    with path.open("r+b") as file:
        for byte in (*range(100, 108), *range(200, 208)):
            request = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
            answer = fcntl.fcntl(file.fileno(), fcntl.F_OFD_GETLK, request)
            if _FLOCK.unpack(answer)[0] != fcntl.F_UNLCK:
                held.add(byte)
    return held
