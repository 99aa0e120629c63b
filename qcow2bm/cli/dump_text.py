"""The dump for people: what is there, what it is good for, what is wrong."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

from qcow2bm.api import BROKEN, INCONSISTENT, STALE, VALID, Bitmap, Image
from qcow2bm.cli.dump import Options, totals
from qcow2bm.format.directory import FLAG_NAMES, KNOWN_FLAGS, TYPE_DIRTY_TRACKING
from qcow2bm.format.extensions import DATA_FILE
from qcow2bm.format.features import KINDS
from qcow2bm.problems import LEAK, REFUSED, UNUSABLE, Problem
from qcow2bm.units import escape, format_size

_MEANING = {
    VALID: "valid",
    INCONSISTENT: "inconsistent (in use, or left so by a crash: writes may be missing from it)",
    STALE: "stale (a program without bitmap support modified the image)",
    BROKEN: "broken (see the problems below)",
}

_CONSEQUENCES = {
    REFUSED: "QEMU will not open the image; bitmaps that are valid above can be read from it here",
    UNUSABLE: "what is named there cannot be trusted, even where QEMU does not notice",
    LEAK: "clusters of the file are taken by nobody; qemu-img check -r leaks frees them",
}


def print_dump(
    image: Image, bitmaps: Sequence[Bitmap], problems: Sequence[Problem], options: Options
) -> None:
    """Writes the dump to standard output."""
    _print_facts(_image_facts(image), indent="")
    for bitmap in bitmaps:
        name = bitmap.entry.name
        title = f'"{escape(name)}"' if name is not None else "(its name cannot be read)"
        print(f"\nbitmap {bitmap.index}: {title}")
        _print_facts(_bitmap_facts(image, bitmap, options), indent="  ")
        if options.extents and bitmap.status == VALID:
            _print_extents(bitmap)
    print()
    _print_problems(image, problems)


def _print_facts(facts: Iterator[tuple[str, str]], indent: str) -> None:
    for label, value in facts:
        print(f"{indent}{label + ':':<{18 - len(indent)}}{value}")


def _size(size_bytes: int) -> str:
    spelled = format_size(size_bytes)
    return spelled if size_bytes < 1024 else f"{spelled} ({size_bytes} bytes)"


def _count(number: int, thing: str, things: str | None = None) -> str:
    return f"{number} {thing if number == 1 else things or thing + 's'}"


def _image_facts(image: Image) -> Iterator[tuple[str, str]]:
    yield "image", escape(image.name)
    width = image.refcount_bits
    yield (
        "format",
        f"qcow2 version {image.version}, clusters of {format_size(image.cluster_size)}, "
        f"refcounts of {'unknown width' if width is None else _count(width, 'bit')}",
    )
    yield "virtual size", _size(image.virtual_size)
    yield "file size", _size(image.file_size)
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
        f"{_count(extension.nb_bitmaps, 'bitmap')} in "
        f"{_count(extension.bitmap_directory_size, 'byte')} at "
        f"{extension.bitmap_directory_offset:#x}, "
        + ("consistent" if image.is_consistent else "NOT consistent (autoclear bit 0 is off)"),
    )


def _bitmap_facts(image: Image, bitmap: Bitmap, options: Options) -> Iterator[tuple[str, str]]:
    entry, status = bitmap.entry, bitmap.status
    yield "status", _MEANING[status]
    if entry.granularity_bits < 64:
        yield "granularity", _size(bitmap.granularity)
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
            f"{_size(counted.dirty_bytes)}, {percent:.1f} % of the disk, "
            f"in {_count(counted.extents, 'extent')}",
        )
    if options.sha256 and status == VALID:
        yield "sha256", bitmap.sha256()
    yield (
        "table",
        f"{_count(entry.bitmap_table_size, 'entry', 'entries')} at {entry.bitmap_table_offset:#x}",
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
        print("no problems found")
        return
    print(f"{_count(len(problems), 'problem')}:")
    for found in problems:
        name = ""
        if found.bitmap_index is not None:
            name = f'"{escape(image.directory[found.bitmap_index].name or "?")}": '
        print(f"  {found.severity + ':':<10}{name}{found.message}")
        if found.qemu_message:
            print(f'            QEMU says: "{found.qemu_message}"')
    for severity, consequence in _CONSEQUENCES.items():
        if any(found.severity == severity for found in problems):
            print(f"{severity}: {consequence}")
