"""Breaks images that QEMU made, and asks QEMU and this library what they think of them."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from support.qemu import Disk, StorageDaemon, run

import qcow2bm

CLUSTER = 4096
MiB = 1 << 20

HEADER = {
    "header.version": (4, "I"),
    "header.backing_file_offset": (8, "Q"),
    "header.backing_file_size": (16, "I"),
    "header.cluster_bits": (20, "I"),
    "header.size": (24, "Q"),
    "header.crypt_method": (32, "I"),
    "header.l1_size": (36, "I"),
    "header.l1_table_offset": (40, "Q"),
    "header.refcount_table_offset": (48, "Q"),
    "header.refcount_table_clusters": (56, "I"),
    "header.nb_snapshots": (60, "I"),
    "header.snapshots_offset": (64, "Q"),
    "header.incompatible_features": (72, "Q"),
    "header.compatible_features": (80, "Q"),
    "header.autoclear_features": (88, "Q"),
    "header.refcount_order": (96, "I"),
    "header.header_length": (100, "I"),
    "header.compression_type": (104, "B"),
    "header.padding": (105, "B"),
}
EXTENSION = {
    "extension.type": (0, "I"),
    "extension.length": (4, "I"),
}
BITMAPS = {
    "extension.nb_bitmaps": (8, "I"),
    "extension.reserved": (12, "I"),
    "extension.bitmap_directory_size": (16, "Q"),
    "extension.bitmap_directory_offset": (24, "Q"),
}
CRYPTO = {
    "extension.offset": (8, "Q"),
    "extension.length_of_header": (16, "Q"),
}
ENTRY = {
    "bitmap_table_offset": (0, "Q"),
    "bitmap_table_size": (8, "I"),
    "flags": (12, "I"),
    "type": (16, "B"),
    "granularity_bits": (17, "B"),
    "name_size": (18, "H"),
    "extra_data_size": (20, "I"),
    "name": (24, "B"),
    "padding": (29, "B"),
}
CRASH, DAILY, WEEKS = "entry0.", "entry1.", "entry2."
ENTRIES = {n + name: place for n in (CRASH, DAILY, WEEKS) for name, place in ENTRY.items()}
TABLES = {
    "table0.0": (0, "Q"),
    "table1.0": (0, "Q"),
    **{f"table2.{index}": (8 * index, "Q") for index in range(4)},
}
FIELDS = HEADER | EXTENSION | BITMAPS | CRYPTO | ENTRIES | TABLES

Change = int | bytes | Callable[[int], int]
"""The new value of a field: a number, raw bytes, or a function of the old number."""


class Base(NamedTuple):
    """A kind of image to break: how QEMU is told to create it, and what to break in it."""

    options: Mapping[str, object]
    fields: Mapping[str, tuple[int, str]]
    extension: int = 0x23852875
    """The type of the header extension that "extension." means."""


def _only(*names: str) -> dict[str, tuple[int, str]]:
    return {f"header.{name}": HEADER[f"header.{name}"] for name in names}


BASES = {
    "plain": Base({"cluster_size": CLUSTER}, HEADER | EXTENSION | BITMAPS | ENTRIES | TABLES),
    "overlay": Base(
        {"cluster_size": CLUSTER, "backing_file": "{folder}/base", "backing_fmt": "qcow2"},
        _only("backing_file_offset", "backing_file_size", "header_length") | EXTENSION,
        0xE2792ACA,
    ),
    "feature-names": Base({}, _only("header_length") | EXTENSION, 0x6803F857),
    "zstd": Base(
        {"compression_type": "zstd"}, _only("incompatible_features", "compression_type", "padding")
    ),
    "extended-l2": Base(
        {"extended_l2": "on"}, _only("incompatible_features", "cluster_bits", "size", "l1_size")
    ),
    "data-file": Base(
        {"cluster_size": CLUSTER, "data_file": "{folder}/data", "data_file_raw": "on"},
        _only("incompatible_features", "autoclear_features") | EXTENSION,
        0x44415441,
    ),
    "luks": Base(
        {"cluster_size": CLUSTER, "encrypt.format": "luks"},
        _only("crypt_method") | EXTENSION | CRYPTO,
        0x0537BE77,
    ),
}

NOT_READ = {
    "Volume is not in LUKS format": "the encryption header: bitmaps are stored in clear",
    "Request for data outside of extension header": "the encryption header",
    "Could not read encryption header": "the encryption header",
    "'data-file' is required for this image": "QEMU may be told its name instead",
    "/data-file/dat'": "the data file, of which QEMU finds none so named (INV-NOPATH)",
    "Could not open backing file": "the backing file (INV-NOPATH)",
}
"""The messages of QEMU about things that this library does not read, on purpose."""

SPECIFICATION_ALLOWS = {
    "directory-entry.flags.extra-data-compatible",
    "directory-entry.extra_data.compatible",
    "directory-entry.granularity_bits.unsupported",
    "directory-entry.name_size.too-large",
}
"""Problems for which QEMU refuses the image, and the bitmap is valid all the same."""


class Disagreement(Enum):
    """A difference between QEMU and this library; the value is its description."""

    NONE = "nothing"
    MISSED = "QEMU refuses it, and no problem says so"
    STRICTER = "QEMU opens it, and a problem says it does not"
    REASON = "QEMU refuses it for a reason of its own"
    VALID = "QEMU refuses it because of a bitmap that is called valid"
    BITS = "a bitmap has other bits"


class Finding(NamedTuple):
    """A `Disagreement` and its particulars."""

    kind: Disagreement
    details: str = ""


AGREED = Finding(Disagreement.NONE)


class Image(NamedTuple):
    """An image QEMU made, as bytes, and where its structures begin."""

    data: bytes
    starts: dict[str, int]
    encryption: str

    @classmethod
    def make(cls, folder: Path, base: Base) -> Image:
        """An image with three bitmaps: in_use, enabled, disabled."""
        Disk.create(folder / "base", 64 * MiB)
        options = {k: str(v).replace("{folder}", str(folder)) for k, v in base.options.items()}
        disk = Disk.create(folder / "image", 64 * MiB, **options)
        disk.io("write 0 64k")
        run("qemu-img", "snapshot", "-c", "monday", disk.path)
        disk.add("crash", 65536)
        disk.crash("write 1M 512")
        disk.add("daily", 65536)
        disk.add("weeks", 512)  # in clusters of 4 KiB each of its four covers 16 MiB
        disk.io(*(f"write {start}M 512" for start in (1, 20, 21, 50)))
        disk.bitmap("weeks", "--disable")
        return cls._load(disk, base.extension)

    @classmethod
    def _load(cls, disk: Disk, extension: int) -> Image:
        data = disk.path.read_bytes()
        extensions, place = {}, 112
        while (head := struct.unpack_from(">II", data, place))[0]:
            extensions[head[0]] = place
            place += 8 + (head[1] + 7) // 8 * 8
        starts = {"header": 0, "extension": extensions[extension], "end": place}
        count, _, _, place = struct.unpack_from(">IIQQ", data, extensions[0x23852875] + 8)
        for number in range(count):
            starts[f"entry{number}"] = place
            head = struct.unpack_from(">QIIBBHI", data, place)
            starts[f"table{number}"] = head[0]
            place += (24 + head[5] + head[6] + 7) // 8 * 8
        return cls(data, starts, disk.encryption)

    def metadata(self) -> list[int]:
        """The host offset of each byte of header, extensions, directory and tables."""
        parts = [(0, self.starts["end"] + 8), (self.starts["entry0"], 96)]
        parts += [(self.starts["table0"], 8), (self.starts["table1"], 8)]
        parts += [(self.starts["table2"], 32)]
        return [offset for start, length in parts for offset in range(start, start + length)]

    def patched(self, changes: Mapping[str, Change]) -> bytes:
        """A copy with other values in some fields."""
        data = bytearray(self.data)
        for field, change in changes.items():
            place, width = FIELDS[field]
            offset = self.starts[field.partition(".")[0]] + place
            if not isinstance(change, bytes):
                length = struct.calcsize(">" + width)
                old = int.from_bytes(data[offset : offset + length], "big")
                value = change(old) if callable(change) else change
                change = (value % (1 << 8 * length)).to_bytes(length, "big")
            data[offset : offset + len(change)] = change
        return bytes(data)


class Lab:
    """Asks both sides; keeps the sound images."""

    def __init__(self, folder: Path, daemon: StorageDaemon) -> None:
        self._folder = folder
        self._daemon = daemon
        self._images: dict[str, Image] = {}

    def image(self, base: str) -> Image:
        """The sound image of a kind."""
        if base not in self._images:
            folder = self._folder / base
            folder.mkdir()
            self._images[base] = Image.make(folder, BASES[base])
        return self._images[base]

    def judge(self, base: str, data: bytes, at_fault: int | None = None) -> Finding:
        """Returns the difference between QEMU and this library about a broken image of a kind.

        ``at_fault`` is a bitmap that cannot be valid if QEMU refuses the image; nor can one be
        that QEMU mentions.
        """
        path = self._folder / base / "broken"
        path.write_bytes(data)
        # The header's crypt_method says what kind of key the tools must be given.
        disk = Disk(path, {1: "aes", 2: "luks"}.get(data[35], self.image(base).encryption))
        info, check = run("qemu-img", "info", *disk.arguments), disk.check()
        # A segmentation fault (of 7.2, where the LUKS extension is missing) is no opening.
        qemu_refuses = info.returncode != 0 or "Could not open" in check.stderr
        said = (info.stderr + check.stderr).replace(str(disk.arguments[-1]), "image")
        try:
            with qcow2bm.open(path) as image:
                if qemu_refuses:
                    return _compare_refusal(image, said, at_fault)
                return self._compare_opened(image, disk)
        except (qcow2bm.FormatError, qcow2bm.UnsupportedError) as error:
            return AGREED if qemu_refuses else Finding(Disagreement.STRICTER, str(error))

    def _compare_opened(self, image: qcow2bm.Image, disk: Disk) -> Finding:
        refused = [p for p in image.problems if p.severity == "refused"]
        if refused:
            return Finding(Disagreement.STRICTER, refused[0].message)
        valid = [b for b in map(image.bitmap, range(len(image.directory))) if b.status == "valid"]
        self._daemon.open(disk)
        try:
            in_memory = self._daemon.bitmaps()
            known = [name for name in in_memory if "\ufffd" not in name]
            hashes = {name: self._daemon.sha256(name) for name in known}
        finally:
            self._daemon.close()
        for bitmap in valid:
            name = bitmap.name.partition("\0")[0]
            if hashes.get(name) == bitmap.sha256():
                continue
            # Not known to QMP, for it is not UTF-8; or QEMU hashes bits past the disk as well.
            extents = [tuple(row) for part in bitmap.extents() for row in part.tolist()]
            if extents != disk.extents(name):
                return Finding(Disagreement.BITS, name)
        return AGREED


def _compare_refusal(image: qcow2bm.Image, said: str, at_fault: int | None) -> Finding:
    refused = [p for p in image.problems if p.severity == "refused"]
    if not refused:
        is_read = not any(message in said for message in NOT_READ)
        return Finding(Disagreement.MISSED, said) if is_read else AGREED
    for bitmap in map(image.bitmap, range(len(image.directory))):
        excuses = {p.id for p in refused if p.bitmap_index == bitmap.index}
        blamed = bitmap.index == at_fault or f"'{bitmap.name}'" in said
        if blamed and bitmap.status == "valid" and not excuses & SPECIFICATION_ALLOWS:
            return Finding(Disagreement.VALID, f"{bitmap.name!r}: {said}")
    if any(p.qemu_message and p.qemu_message in said for p in refused):
        return AGREED
    return Finding(Disagreement.REASON, f"{said} instead of {[p.qemu_message for p in refused]}")
