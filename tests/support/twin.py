"""Images that QEMU made, each together with what must be in it.

A `Twin` has an image, a model of the image's bitmaps, and a raw file with what the guest reads.
Each change of the image, by this library or by QEMU, is made to the model and the raw file as well.
"""

from __future__ import annotations

import fcntl
import json
import os
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from support.model import Bitmaps
from support.qemu import Disk, StorageDaemon, run, run_ok
from support.qemu_facts import fact

import qcow2bm
from qcow2bm.storage.interface import WritableStorage

KiB, MiB, GiB = 1 << 10, 1 << 20, 1 << 30
SECTOR = 512

Step = tuple[str, tuple[Any, ...]]
"""An operation of `qcow2bm.Edit`, which `Bitmaps` has too, and its arguments."""


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
        if options.get("compression_type") == "zstd" and fact("zstd") == "no":
            options["compression_type"] = "zlib"
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
        """Returns the places where QEMU finds the guest's data: (start, length, host offset).

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
    """The bytes of QEMU's two lock areas that any process holds."""
    held = set()
    with path.open("r+b") as file:
        for byte in (*range(100, 108), *range(200, 208)):
            request = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
            answer = fcntl.fcntl(file.fileno(), fcntl.F_OFD_GETLK, request)
            if _FLOCK.unpack(answer)[0] != fcntl.F_UNLCK:
                held.add(byte)
    return held
