"""Images in all the shapes that an edit has to cope with.

Every image has as its first bitmaps, as far as it has so many: ``b00``, enabled, and ``b01``,
disabled, with the same granularity and tables of several clusters; and ``b02``, coarser.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import product
from typing import Any, NamedTuple

from support.images import ONES, ZEROES, Stored, build_image, extension

import qcow2bm
from qcow2bm.format.directory import FLAG_AUTO, FLAG_IN_USE
from qcow2bm.format.extensions import BACKING_FORMAT, DATA_FILE, FEATURE_NAMES, HeaderExtension
from qcow2bm.format.features import FeatureName, FeatureNames, build_feature_names
from qcow2bm.format.snapshots import SnapshotHeader, build_snapshot_table
from qcow2bm.units import ceil_div

FINE_BITS = 9  # the granularity of b00 and b01
COARSE_BITS = 11  # that of b02
UNKNOWN = 0x12345678
HEADER_LENGTH = 112
DATA_FILE_NAME = b"disk.raw"


HEADER_ONLY = ("add", "remove", "remove all", "remove all, add")
"""The operations that differ by what the header holds."""

REFCOUNTS_ONLY = ("add two", "remove", "set", "several")
"""The operations that differ most in how they allocate and free clusters."""

IN_USE_ONLY = (
    *("remove one in_use", "remove all", "set", "several", "invalidate"),
    *("salvage one in_use", "salvage one in_use as it is stored"),
)

STALE_ONLY = (
    *("remove all", "remove all, add"),
    *("salvage a stale one", "salvage a stale one as it is stored"),
)

MISFIT_ONLY = (
    *("add", "remove", "remove all", "remove all, add", "disable", "rename", "invalidate"),
)
"""The operations that do not need the bits of b00."""


class Layout(NamedTuple):
    """One shape: a family of them, a name, how many bitmaps it has, and its maker.

    ``only`` are the names of the operations to be tried, if not all but the odd ones.
    """

    family: str
    name: str
    bitmaps: int
    make: Callable[[], bytes]
    only: tuple[str, ...] = ()


def virtual_size(cluster_bits: int) -> int:
    """The size of a disk for which b00 takes two and a half clusters and ends inside a byte."""
    return (20 << cluster_bits << FINE_BITS) + 3 * 512


def stored(count: int, cluster_bits: int) -> list[Stored]:
    """The first so many bitmaps."""
    cluster = 1 << cluster_bits
    sparse = b"\x00\x18" * 4
    first = (bytes(20) + b"\x3c" * 8).ljust(cluster // 2, b"\0") + b"\xff" * (cluster // 2)
    fine = (
        Stored(b"b00", [first, ONES, sparse], FINE_BITS),
        Stored(
            b"b01",
            [bytes(20) + b"\x18" * 12, ZEROES, bytes(cluster // 4) + b"\x0f" * 9],
            FINE_BITS,
            0,
        ),
        Stored(b"b02", [b"\x81" * (cluster // 16)], COARSE_BITS),
    )
    more = (
        Stored(
            f"b{number:02}".encode(), [sparse] if number % 3 else None, flags=number % 2 * FLAG_AUTO
        )
        for number in range(3, count)
    )
    return [*fine, *more][:count]


def image(cluster_bits: int, count: int, **options: Any) -> bytearray:
    """An image with the first so many bitmaps; ``options`` are those of `build_image`."""
    bitmaps = stored(count, cluster_bits)
    size = virtual_size(cluster_bits)
    return build_image(*bitmaps, cluster_bits=cluster_bits, size=size, **options).data


def _plain(cluster_bits: int, count: int, order: int) -> bytes:
    return bytes(image(cluster_bits, count, refcount_order=order))


def _grid() -> Iterator[Layout]:
    for cluster_bits, count, order in product((9, 12, 16), (1, 3, 25), (0, 4, 6)):
        is_like_another = order != 4 or (cluster_bits, count) == (16, 25)
        yield Layout(
            f"clusters of {1 << cluster_bits}",
            f"{count} bitmaps, refcounts of {1 << order} bits",
            count,
            partial(_plain, cluster_bits, count, order),
            REFCOUNTS_ONLY if is_like_another else (),
        )


BACKING_NAME = b"base.img"
NAMES = {"short": BACKING_NAME, "long": b"./" * 150 + BACKING_NAME}
BEHIND = (extension(UNKNOWN, b"behind"), extension(UNKNOWN + 1, b"and odd"))


def before(head: int) -> list[HeaderExtension]:
    """Unknown extensions so long that the next one has its head there."""
    length = head - HEADER_LENGTH - 8
    return [extension(UNKNOWN - 1, (b"before " * length)[:length])] if length >= 0 else []


def header(count: int, head: int, backing: str, is_followed: bool, cluster_bits: int) -> Layout:
    """One where the bitmaps extension has, or will have, its head at ``head``."""
    options = {
        "extensions": before(head),
        "backing_name": NAMES.get(backing, b""),
        "extensions_behind": BEHIND if is_followed else (),
    }
    name = f"{count} bitmaps, {1 << cluster_bits}, head at {head}, backing {backing}"
    return Layout(
        "header with bitmaps" if count else "header without bitmaps",
        f"{name}{', more behind' * is_followed}",
        count,
        lambda: bytes(image(cluster_bits, count, **options)),
        HEADER_ONLY,
    )


def _headers() -> Iterator[Layout]:
    """Heads of the bitmaps extension around the borders of sectors.

    At 488 and 496 the payload has bytes 496 or 504 to 519 or 527: in two sectors.
    """
    for count in (0, 1, 3):
        for backing in ("none", "short", "long"):
            for head in (112, 440, 472, 480, 488, 496, 504, 512, 1000, 1008, 1016):
                yield header(count, head, backing, False, 12)
            if count:
                for head in (112, 464, 472, 488, 496, 504, 1000, 1008):
                    yield header(count, head, backing, True, 12)
        for backing in ("none", "short"):
            yield header(count, 112, backing, False, 9)
            yield header(count, 112, backing, bool(count), 9)
            yield header(count, 496, backing, bool(count), 16)


QEMUS_EXTENSIONS = (
    extension(BACKING_FORMAT, b"qcow2"),
    extension(
        FEATURE_NAMES, build_feature_names(FeatureNames((FeatureName(0, 0, b"x" * 46),) * 8))
    ),
)


def _cluster_size(data: bytearray) -> int:
    return 1 << data[23]


def set_refcount(data: bytearray, cluster: int, count: int) -> None:
    """Counts a cluster; a block that is missing takes that very cluster, so it must be free."""
    size, order = _cluster_size(data), data[99]
    index, entry = divmod(cluster, 8 * size >> order)
    (table,) = struct.unpack_from(">Q", data, 48)
    (block,) = struct.unpack_from(">Q", data, table + 8 * index)
    if not block:
        block = cluster * size
        struct.pack_into(">Q", data, table + 8 * index, block)
    bit = entry << order
    place, width = block + bit // 8, max(1, (1 << order) // 8)
    if order < 3:
        count = data[place] & ~((1 << (1 << order)) - 1 << bit % 8) | count << bit % 8
    data[place : place + width] = count.to_bytes(width, "big")


def append(data: bytearray, content: bytes, refcount: int = 1) -> int:
    """Puts a new structure behind all others; returns its host offset."""
    size, offset = _cluster_size(data), len(data)
    data.extend(content.ljust(ceil_div(len(content), size) * size, b"\0"))
    for cluster in range(offset // size, len(data) // size):
        set_refcount(data, cluster, refcount)
    return offset


def with_snapshots() -> bytes:
    """Two snapshots that share the disk's L2 table and data."""
    data = image(12, 3)
    (l1_size, l1_offset) = struct.unpack_from(">IQ", data, 36)
    content = append(data, b"guest data", 3)
    l2_table = append(data, struct.pack(">Q", content), 3)
    struct.pack_into(">Q", data, l1_offset, l2_table)
    l1_table = bytes(data[l1_offset : l1_offset + 8 * l1_size])
    extra = struct.pack(">QQQ", 0, virtual_size(12), 0)
    snapshots = tuple(
        SnapshotHeader(
            append(data, l1_table), l1_size, 0, 0, 0, 0, extra, b"%d" % n, b"s", bytes(6)
        )
        for n in range(2)
    )
    table = append(data, build_snapshot_table(snapshots))
    struct.pack_into(">IQ", data, 60, len(snapshots), table)
    return bytes(data)


def filled(cluster_bits: int, count: int, order: int, blocks: int) -> bytes:
    """An image in which each cluster that so many refcount blocks can count is leaked or used."""
    data = image(cluster_bits, count, refcount_order=order)
    size = _cluster_size(data)
    while len(data) // size < blocks * (8 * size >> order):
        append(data, bytes(size))
    return bytes(data)


FREE_CLUSTERS = 40


def with_garbage(cluster_bits: int, count: int) -> bytes:
    """Free clusters in the file with something in them, as deleted structures leave it."""
    return bytes(_garbage(cluster_bits, count)[0])


def _garbage(cluster_bits: int, count: int) -> tuple[bytearray, int]:
    """Returns the image of `with_garbage`, and the host offset of the first free cluster."""
    data = image(cluster_bits, count)
    last = append(data, b"in use, with free clusters before it")
    data[last:last] = b"\xa5" * (FREE_CLUSTERS * _cluster_size(data))
    set_refcount(data, last // _cluster_size(data), 0)
    set_refcount(data, len(data) // _cluster_size(data) - 1, 1)
    return data, last


def with_uncounted_guest_data(cluster_bits: int, count: int, *, copied: bool = True) -> bytes:
    """An L2 table leads to every second cluster with refcount 0, as some versions of QEMU leave it.

    Of the clusters behind them, the L2 table leads to none.
    """
    data, first = _garbage(cluster_bits, count)
    size = _cluster_size(data)
    flag = copied << 63
    places = range(first, first + FREE_CLUSTERS * size, 2 * size)
    l2_table = append(data, struct.pack(f">{len(places)}Q", *(flag | p for p in places)))
    (l1_offset,) = struct.unpack_from(">Q", data, 40)
    struct.pack_into(">Q", data, l1_offset, flag | l2_table)
    return bytes(data)


def in_use(count: int) -> bytes:
    """One bitmap more, which is in_use."""
    crash = Stored(b"crash", [b"\x42" * 9], flags=FLAG_AUTO | FLAG_IN_USE)
    bitmaps = [*stored(count, 12), crash]
    return bytes(build_image(*bitmaps, cluster_bits=12, size=virtual_size(12)).data)


def misfit(*, is_longer: bool) -> bytes:
    """The table of b00 is one entry too long or two too short, as after a resize."""
    first, *others = stored(3, 12)
    table = list(first.table or ())
    first = first._replace(table=[*table, b"\xff" * 4096] if is_longer else table[:1])
    return bytes(build_image(first, *others, cluster_bits=12, size=virtual_size(12)).data)


def _specials() -> Iterator[Layout]:
    def special(
        name: str, count: int, make: Callable[[], bytes | bytearray], only: tuple[str, ...] = ()
    ) -> Layout:
        family = "garbage" if "garbage" in name else "special"
        return Layout(family, name, count, lambda: bytes(make()), only)

    data_file = {
        "extensions": [extension(DATA_FILE, DATA_FILE_NAME)],
        "header": {"incompatible_features": 4, "autoclear_features": 3},
    }
    long_data_file = data_file | {
        "extensions": [extension(DATA_FILE, b"./" * 180 + DATA_FILE_NAME)]
    }
    unknown_bits = {"header": {"autoclear_features": 1 | 1 << 5 | 1 << 63}}
    unknown_bits_alone = {"header": {"autoclear_features": 1 << 63}}
    additional = {"additional_fields": b"additional fields of 32 bytes..."}
    qemu = {"extensions": QEMUS_EXTENSIONS, "backing_name": NAMES["short"]}
    qemu_first = {"extensions": QEMUS_EXTENSIONS[1:]}

    yield special("snapshots", 3, with_snapshots)
    yield special("data file", 3, lambda: image(12, 3, **data_file))
    yield special("long data file name", 3, lambda: image(12, 3, **long_data_file))
    yield special("unknown autoclear bits", 3, lambda: image(12, 3, **unknown_bits))
    yield special("unknown autoclear bit alone", 0, lambda: image(12, 0, **unknown_bits_alone))
    yield special("additional fields", 3, lambda: image(12, 3, **additional))
    yield special("overlay as of QEMU", 3, lambda: image(16, 3, **qemu), (*HEADER_ONLY, "set"))
    yield special(
        "overlay as of QEMU, one bitmap", 1, lambda: image(16, 1, **qemu), (*HEADER_ONLY, "set")
    )
    yield special("overlay as of QEMU, no bitmap", 0, lambda: image(16, 0, **qemu))
    yield special("as of QEMU, no bitmap", 0, lambda: image(12, 0, **qemu_first))
    yield special("file ends inside a cluster", 3, lambda: image(12, 3, whole_clusters=False))
    yield special(
        "ends inside a cluster, 64 KiB",
        3,
        lambda: image(16, 3, whole_clusters=False),
        (*HEADER_ONLY, "set"),
    )
    yield special("in_use", 3, lambda: in_use(3), IN_USE_ONLY)
    yield special("stale", 3, lambda: image(12, 3, autoclear=False), only=STALE_ONLY)
    straddling: dict[str, Any] = {"autoclear": False, "extensions": before(496)}
    yield special("stale in two sectors", 3, lambda: image(12, 3, **straddling), only=STALE_ONLY)
    yield special(
        "table too long",
        3,
        lambda: misfit(is_longer=True),
        only=("fit a longer table", *MISFIT_ONLY),
    )
    yield special(
        "table too short",
        3,
        lambda: misfit(is_longer=False),
        only=("fit a shorter table", *MISFIT_ONLY),
    )
    yield special("garbage in free clusters of 4096", 3, lambda: with_garbage(12, 3))
    yield special("garbage in free clusters of 512", 25, lambda: with_garbage(9, 25))
    for bits, bitmaps in ((12, 3), (9, 25)):
        make = partial(with_uncounted_guest_data, bits, bitmaps)
        yield special(f"guest clusters among garbage of {1 << bits}", bitmaps, make)


def _full() -> Iterator[Layout]:
    def full(name: str, count: int, make: Callable[[], bytes]) -> Layout:
        return Layout("full refcounts", name, count, make)

    yield full("block, 64 bits", 3, lambda: filled(9, 3, 6, 2))
    yield full("block, 16 bits", 25, lambda: filled(9, 25, 4, 1))
    yield full("block, 1 bit", 3, lambda: filled(9, 3, 0, 1))
    yield full("block, 4 KiB, no bitmap", 0, lambda: filled(12, 0, 6, 1))
    yield full("table, 64 bits", 3, lambda: filled(9, 3, 6, 64))
    yield full("table, no bitmap", 0, lambda: filled(9, 0, 6, 64))


LAYOUTS = {
    f"{layout.family}: {layout.name}": layout
    for layout in (*_grid(), *_headers(), *_specials(), *_full())
}
FAMILIES = tuple(dict.fromkeys(layout.family for layout in LAYOUTS.values()))


@cache
def build(name: str) -> bytes:
    """The image of a layout by its full name."""
    return LAYOUTS[name].make()


@cache
def trackable(family: str | None = None) -> list[str]:
    """The layouts of a family, or all of them, that have a bitmap to be tracked."""
    found = []
    for name, layout in LAYOUTS.items():
        if family in (None, layout.family) and layout.bitmaps:
            with qcow2bm.open(build(name)) as image:
                listed = [image.bitmap(number) for number in range(len(image.directory))]
                statuses = {(bitmap.status, bitmap.auto) for bitmap in listed}
            if ("valid", True) in statuses and not {("broken", True), ("broken", False)} & statuses:
                found.append(name)
    return found
