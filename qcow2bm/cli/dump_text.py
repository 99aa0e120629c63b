"""The dump for people: what is there, what it is good for, what is wrong."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence

from qcow2bm.api import Bitmap, Image
from qcow2bm.bitmaps.entries import GRANULARITY_BITS_LIMIT
from qcow2bm.bitmaps.status import BROKEN, INCONSISTENT, STALE, VALID
from qcow2bm.cli.dump import Options, totals
from qcow2bm.cli.facts import count, print_facts, size
from qcow2bm.format.directory import FLAG_NAMES, KNOWN_FLAGS, TYPE_DIRTY_TRACKING
from qcow2bm.format.extensions import DATA_FILE
from qcow2bm.format.features import KINDS
from qcow2bm.migration.sentinel import is_sentinel
from qcow2bm.problems import BITMAPS_EXTENSION, DIRECTORY, ENTRY, REFUSED, TABLE, Problem
from qcow2bm.units import escape, format_size

_REPAIRABLE = (BITMAPS_EXTENSION, DIRECTORY, ENTRY, TABLE)

_MEANING = {
    VALID: "valid",
    INCONSISTENT: "inconsistent (in use, or left so by a crash: writes may be missing from it)",
    STALE: "stale (a program without bitmap support modified the image)",
    BROKEN: "broken (see the problems below)",
}


def print_dump(
    image: Image, bitmaps: Sequence[Bitmap], problems: Sequence[Problem], options: Options
) -> None:
    """Writes the dump to standard output."""
    print_facts(_image_facts(image), indent="")
    for bitmap in bitmaps:
        name = bitmap.entry.name
        title = f'"{escape(name)}"' if name is not None else "(its name cannot be read)"
        print(f"\nbitmap {bitmap.index}: {title}")
        print_facts(_bitmap_facts(image, bitmap, options), indent="  ")
        if options.extents and bitmap.status == VALID:
            _print_extents(bitmap)
    print()
    shown = [bitmap.index for bitmap in bitmaps]
    _print_problems(image, [p for p in problems if p.bitmap_index in (None, *shown)])
    others = sum(p.bitmap_index not in (None, *shown) for p in problems)
    if others:
        print(f"{count(others, 'problem')} more in other bitmaps")
    _print_verdict(image, bitmaps, problems)


def _image_facts(image: Image) -> Iterator[tuple[str, str]]:
    yield "image", escape(image.name)
    width = image.refcount_bits
    yield (
        "format",
        f"qcow2 version {image.version}, clusters of {format_size(image.cluster_size)}, "
        f"refcounts of {'unknown width' if width is None else count(width, 'bit')}",
    )
    yield "virtual size", size(image.virtual_size)
    yield "file size", size(image.file_size)
    if image.backing_file is not None:
        yield "backing file", f'"{escape(image.backing_file)}" (not opened)'
    for _, found in image.extensions:
        if found.type == DATA_FILE:
            name = found.data.decode("utf-8", "surrogateescape")
            yield "data file", f'"{escape(name)}" (not opened)'
    for kind in KINDS:
        names = [f"{f.bit} ({escape(f.name or 'unknown')})" for f in image.features(kind)]
        if names:
            yield kind, f"bit {', '.join(names)}"
    extension = image.bitmaps_extension
    if not extension:
        yield "bitmaps", "none"
        return
    yield (
        "bitmap directory",
        f"{count(extension.nb_bitmaps, 'bitmap')} in "
        f"{count(extension.bitmap_directory_size, 'byte')} at "
        f"{extension.bitmap_directory_offset:#x}",
    )
    yield (
        "up to date",
        "yes (autoclear bit 0 is set)" if image.is_consistent else "NO (autoclear bit 0 is off)",
    )


def _bitmap_facts(image: Image, bitmap: Bitmap, options: Options) -> Iterator[tuple[str, str]]:
    entry, status = bitmap.entry, bitmap.status
    yield "status", _MEANING[status]
    if entry.granularity_bits < GRANULARITY_BITS_LIMIT:
        yield "granularity", size(bitmap.granularity)
    flags = [name for bit, name in FLAG_NAMES.items() if entry.flags & bit]
    unknown = entry.flags & ~KNOWN_FLAGS
    if unknown:
        flags.append(f"{unknown:#x}")
    yield "flags", ", ".join(flags) or "none (disabled)"
    if entry.type != TYPE_DIRTY_TRACKING:
        yield "type", f"{entry.type} (unknown)"
    counted = totals(bitmap, status, options)
    if counted:
        percent = 100 * counted.dirty_bytes / image.virtual_size if image.virtual_size else 0
        label = "dirty" if status == VALID else "dirty at least"
        yield (
            label,
            f"{size(counted.dirty_bytes)}, {percent:.1f} % of the disk, "
            f"in {count(counted.extents, 'extent')}",
        )
    if options.sha256 and status == VALID:
        yield "sha256", bitmap.sha256()
    yield (
        "table",
        f"{count(entry.bitmap_table_size, 'entry', 'entries')} at {entry.bitmap_table_offset:#x}",
    )
    clusters = bitmap.clusters
    if clusters:
        yield (
            "clusters",
            f"{clusters.allocated} allocated, {clusters.all_zeroes} all-zeroes, "
            f"{clusters.all_ones} all-ones",
        )
    if entry.extra_data:
        yield "extra data", f"{entry.extra_data_size} bytes"


def _print_extents(bitmap: Bitmap) -> None:
    print("  extents (start, length in bytes):")
    for extents in bitmap.extents():
        sys.stdout.write(
            "".join(f"{start:16d}  {length:14d}\n" for start, length in extents.tolist())
        )


def _print_problems(image: Image, problems: Sequence[Problem]) -> None:
    if not problems:
        print("no problems found (guest data and refcounts are not looked at)")
        return
    print(f"{count(len(problems), 'problem')}:")
    for found in problems:
        name = None
        if found.bitmap_index is not None:
            name = image.directory[found.bitmap_index].name
        label = "" if name is None else f'"{escape(name)}": '
        print(f"  {found.severity + ':':<10}{label}{found.message}")
        says = f', for which QEMU says "{found.qemu_message}"' if found.qemu_message else ""
        print(f"            ({found.id}{says})")


def _print_verdict(image: Image, bitmaps: Sequence[Bitmap], problems: Sequence[Problem]) -> None:
    """What it all means for backups, and for starting the VM."""
    sentinels = [bitmap for bitmap in bitmaps if is_sentinel(bitmap.entry.name)]
    if any(bitmap.status == INCONSISTENT for bitmap in sentinels):
        print("a sentinel is inconsistent: a machine has the disk, or did not end properly")
    bitmaps = [bitmap for bitmap in bitmaps if not is_sentinel(bitmap.entry.name)]
    statuses = Counter(bitmap.status for bitmap in bitmaps)
    if statuses[VALID] < len(bitmaps):
        lost = ", ".join(f"{n} {status}" for status, n in statuses.items() if status != VALID)
        usable = f"{statuses[VALID]} of {count(len(bitmaps), 'bitmap')}"
        print(f"usable for a backup: {usable} ({lost})")
    refused = [found for found in problems if found.severity == REFUSED]
    if not refused:
        if statuses[INCONSISTENT] or statuses[STALE]:
            print(
                "to make one valid again, with no VM running:\n"
                "  qcow2bm salvage IMAGE NAME --all-dirty"
            )
        return
    print("QEMU will not open this image")
    if all(found.kind.is_fittable for found in refused):
        print(
            "the bitmaps do not fit the disk, which was resized without them; to mend that:\n"
            "  qcow2bm fit IMAGE --all"
        )
    elif all(found.structure in _REPAIRABLE for found in refused):
        print(
            "to mend that, with no VM running; bitmaps that cannot be mended are dropped:\n"
            "  qcow2bm repair IMAGE --undo UNDO_FILE"
        )
