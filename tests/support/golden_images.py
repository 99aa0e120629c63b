"""The images of the golden files, one for each situation that a user meets."""

from __future__ import annotations

from support.images import ONES, ZEROES, Built, Stored, build_image, extension
from support.mapped_images import COMPRESSED, COPIED, ZERO, mapped_image

from qcow2bm.format.directory import FLAG_AUTO, FLAG_EXTRA_DATA_COMPATIBLE, FLAG_IN_USE
from qcow2bm.format.extensions import BACKING_FORMAT, DATA_FILE
from qcow2bm.format.features import INCOMPATIBLE_DIRTY

SIZE = 40 << 20  # with clusters of 512 bytes and 4 KiB granularity: three table entries
_TABLE = (ONES, ZEROES, bytes([0b00000110]) + bytes(20) + b"\x01")


def sound() -> Built:
    """Several bitmaps, nothing wrong."""
    return build_image(
        Stored(b"daily", _TABLE, granularity_bits=12),
        Stored(b"weekly", flags=0),
        Stored("größe".encode(), (b"\xff" * 80,), granularity_bits=16),
        size=SIZE,
        backing_name=b"base.qcow2",
        extensions=[extension(BACKING_FORMAT, b"qcow2"), extension(0x1234, b"unknown")],
    )


def mapped() -> Built:
    """Data of each kind, of which some is dirty."""
    some = {0: COPIED | 512, 1: COPIED | 512, 2: ZERO, 3: COMPRESSED | 700}
    tables = {0: {**some, 5: ZERO}, 2: some}
    return mapped_image(tables, Stored(b"daily", (b"\x05",), granularity_bits=10), size=70_144)


def mapped_with_fault() -> Built:
    """An L2 table entry leads past the end of the file; the bitmap is sound."""
    bitmap = Stored(b"daily", (b"\x05",), granularity_bits=10)
    return mapped_image({1: {4: 1 << 40}}, bitmap, size=70_144)


def empty() -> Built:
    """No bitmaps at all."""
    return build_image(size=SIZE)


def crashed() -> Built:
    """One bitmap was in use when the machine died."""
    return build_image(
        Stored(b"daily", _TABLE, granularity_bits=12, flags=FLAG_IN_USE | FLAG_AUTO),
        Stored(b"base", _TABLE, granularity_bits=12, flags=0),
        size=SIZE,
    )


def stale() -> Built:
    """A program without bitmap support wrote to it."""
    return build_image(Stored(b"daily", _TABLE, granularity_bits=12), size=SIZE, autoclear=False)


def broken() -> Built:
    """A sound bitmap among several that QEMU refuses to open, each for its own fault."""
    image = build_image(
        Stored(b"sound", _TABLE, granularity_bits=12),
        Stored(b"bit flip", _TABLE, granularity_bits=12),
        Stored(b"twice"),
        Stored(b"twice"),
        Stored(b"shared", (b"\x01", ZEROES, ZEROES), granularity_bits=12),
        Stored(b"extra", extra_data=b"tool", flags=FLAG_EXTRA_DATA_COMPATIBLE),
        size=SIZE,
    )
    image.plant(1 << 60, "bitmap-table", 1, 1)
    image.plant(image.offset("bitmap-table", 1), "bitmap-table", 4, 0)
    return image


def names() -> Built:
    """Names that a terminal, JSON or a command line would stumble over."""
    return build_image(
        Stored(b"", (b"\x01",)),
        Stored(b"a\x1b[31mred\nb", (b"\x02",)),
        Stored(b"\xff\xfe", (b"\x03",)),
        Stored(b"@1", (b"\x04",)),
        Stored(b"-rf", (b"\x05",)),
        Stored(b'say "no"', (b"\x06",)),
        size=SIZE,
    )


def data_file() -> Built:
    """The guest's data are in another file, which must not be opened for being named here."""
    return build_image(
        Stored(b"daily", (b"\x01",)),
        size=SIZE,
        header={"incompatible_features": 4, "autoclear_features": 3},
        extensions=[extension(DATA_FILE, b"/etc/passwd")],
    )


def cut_off() -> Built:
    """The copy of the image ended too early."""
    image = sound()
    del image.data[image.offset("bitmap-directory") + 40 :]
    return image


def version_2() -> Built:
    """An image of the old format, which has no bitmaps."""
    return build_image(size=SIZE, version=2)


def dirty() -> Built:
    """QEMU died while refcounts were put off."""
    return build_image(size=SIZE, header={"incompatible_features": INCOMPATIBLE_DIRTY})


def full_header() -> Built:
    """Clusters of 512 bytes, and a name that leaves no room for another extension."""
    return build_image(size=SIZE, backing_name=b"b" * 380)
