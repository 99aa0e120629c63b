"""Loading the bitmap directory: every entry, and everything that is wrong with it.

*Spec*: spec/bitmaps.md; the ids are in spec/problems.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

from qcow2bm.clusters.file import ClusterFile
from qcow2bm.clusters.problems import MAX_FILE_LENGTH
from qcow2bm.errors import ChangedWhileReadingError
from qcow2bm.format import features
from qcow2bm.format.directory import (
    FLAG_EXTRA_DATA_COMPATIBLE,
    KNOWN_FLAGS,
    TYPE_DIRTY_TRACKING,
    Directory,
    DirectoryEntry,
    parse_directory,
)
from qcow2bm.format.directory import (
    HEAD_LENGTH as ENTRY_LENGTH,
)
from qcow2bm.format.extensions import (
    BITMAPS,
    BITMAPS_LENGTH,
    HEAD_LENGTH,
    BitmapsExtension,
    parse_bitmaps_extension,
)
from qcow2bm.problems import NOTE, REFUSED, UNUSABLE, Problem, Severity, problem
from qcow2bm.units import ceil_div, escape

MAX_BITMAPS = 65535
MAX_DIRECTORY_SIZE = 1024 * MAX_BITMAPS
MAX_TABLE_SIZE = 0x8000000
MAX_BITMAP_BYTES = 512 << 20  # table size times cluster size
MIN_GRANULARITY_BITS, MAX_GRANULARITY_BITS = 9, 31  # of QEMU
GRANULARITY_BITS_LIMIT = 64  # of the specification
MAX_NAME_SIZE = 1023


class BitmapDirectory(NamedTuple):
    """The bitmap directory of an image.

    ``extension`` is None where the image has none, or one of the wrong length. ``is_consistent``
    is the autoclear bit: without it, everything the extension leads to is outdated.
    ``distrust`` is the problem for which no entry can be believed, None in most images.
    ``problems`` are those of extension, directory and entries. ``size`` is how many bytes of it
    the file has, and ``fingerprint`` tells them from others, within this process.
    """

    extension: BitmapsExtension | None
    is_consistent: bool
    entries: tuple[DirectoryEntry, ...]
    problems: tuple[Problem, ...]
    distrust: Problem | None
    size: int
    fingerprint: int


def load_directory(file: ClusterFile, header_problems: Iterable[Problem]) -> BitmapDirectory:
    """The bitmap directory, sound or not; ``header_problems`` are those of the header.

    Nothing larger than QEMU's limits or the file itself is read.

    Raises:
        StorageError: reading failed.
    """
    is_consistent = bool(file.header.autoclear_features & features.AUTOCLEAR_BITMAPS)
    found = file.find(BITMAPS)
    if not found or len(found.data) != BITMAPS_LENGTH:
        return BitmapDirectory(None, is_consistent, (), (), None, 0, hash(b""))
    place = _payload_offset(file)
    extension = parse_bitmaps_extension(found.data, place)
    problems = list(_place_problems(extension, place, file))
    distrust = _uninterpretable(header_problems) or next(iter(problems), None)
    data = _read(file, extension)
    directory = _parse(data, extension.bitmap_directory_offset, file)
    problems += _end_problems(extension, directory, place, file)
    problems += _count_problems(extension, directory, place)
    end = extension.bitmap_directory_offset + extension.bitmap_directory_size
    for entry in directory.entries:
        problems += entry_problems(entry, end, file)
    problems += _surplus(directory.entries, extension.nb_bitmaps)
    problems += _duplicates(directory.entries)
    if is_consistent:
        return BitmapDirectory(
            extension, True, directory.entries, tuple(problems), distrust, len(data), hash(data)
        )
    stale = problem(
        "bitmaps-extension.autoclear.off"
        if file.header.version > 2
        else "bitmaps-extension.version.too-old",
        place - HEAD_LENGTH,
        "is stale: a program without bitmap support modified the image, so all its bitmaps are "
        "outdated and their clusters leaked"
        if file.header.version > 2
        else "is stale: version 2 of qcow2 has no bitmaps, so those of an earlier version 3 are "
        "outdated and their clusters leaked",
    )
    # QEMU does not look at a stale directory; neither must its faults alarm anybody.
    remarks = (p._replace(severity=NOTE, qemu_message=None) for p in problems)
    return BitmapDirectory(
        extension, False, directory.entries, (stale, *remarks), distrust, len(data), hash(data)
    )


def verify_directory(file: ClusterFile, directory: BitmapDirectory) -> None:
    """Reads header area and directory again.

    Raises:
        ChangedWhileReadingError: they are no longer what they were.
        StorageError: reading failed.
    """
    file.verify()
    if directory.extension and hash(_read(file, directory.extension)) != directory.fingerprint:
        raise ChangedWhileReadingError(file.storage.name, "bitmap directory")
    file.verify_untouched()


def _read(file: ClusterFile, extension: BitmapsExtension) -> bytes:
    """The stored directory, as much of it as the limits and the file allow.

    The file may end before the padding of the last entry does.
    """
    start = extension.bitmap_directory_offset
    if not 0 < start < file.file_size:
        return b""
    wanted = min(extension.bitmap_directory_size, MAX_DIRECTORY_SIZE)
    size = min(wanted, file.file_size - start)
    return file.read(start, size) + bytes(min(wanted - size, -size % 8))


def _parse(data: bytes, offset: int, file: ClusterFile) -> Directory:
    directory = parse_directory(data, offset, MAX_BITMAPS)
    if directory.entries and directory.entries[-1].offset_of("padding") > file.file_size:
        cut = directory.entries[-1]._replace(extra_data=b"", name_bytes=None, padding=b"")
        return directory._replace(entries=(*directory.entries[:-1], cut))
    return directory


def _uninterpretable(header_problems: Iterable[Problem]) -> Problem | None:
    """The fault of the header, if any, for which nothing in the image can be believed."""
    ids = ("header.incompatible_features.unknown", "header.size.too-large")
    return next((p for p in header_problems if p.id in ids), None)


def _payload_offset(file: ClusterFile) -> int:
    places = zip(file.area.extensions, file.area.offsets(file.extensions_offset), strict=True)
    return [place for found, place in places if found.type == BITMAPS][-1] + HEAD_LENGTH


def _place_problems(
    extension: BitmapsExtension, place: int, file: ClusterFile
) -> Iterator[Problem]:
    """Faults that leave in doubt where the directory is: then no entry can be believed."""
    start, offset = extension.bitmap_directory_offset, place + 16
    if start % file.cluster_size:
        yield problem(
            "bitmaps-extension.bitmap_directory_offset.unaligned",
            offset,
            f"is {start:#x}, not at the start of a cluster",
        )
    elif start == 0:
        id = "bitmaps-extension.bitmap_directory_offset.zero"
        yield problem(id, offset, "is 0, where the header is")
    if start + extension.bitmap_directory_size > MAX_FILE_LENGTH:
        id = "bitmaps-extension.bitmap_directory_offset.unreadable"
        yield problem(id, offset, f"is {start:#x}, beyond any file QEMU reads")
    elif start >= file.file_size:
        id = "bitmaps-extension.bitmap_directory_offset.past-eof"
        yield problem(id, offset, f"is {start:#x}, but the file ends at {file.file_size:#x}")


def _end_problems(
    extension: BitmapsExtension, directory: Directory, place: int, file: ClusterFile
) -> Iterator[Problem]:
    """What stands, or is missing, between the last entry and where the directory should end."""
    start = extension.bitmap_directory_offset
    end = start + min(extension.bitmap_directory_size, MAX_DIRECTORY_SIZE)
    last = directory.entries[-1] if directory.entries else None
    rest = last.offset + last.size if last else start
    # The file may end before the padding of the last entry does, which is zero anyway.
    is_complete = rest == end and (not last or last.offset_of("padding") <= file.file_size)
    if not 0 < start < file.file_size or rest > end or is_complete:
        return
    if end > file.file_size:
        yield problem(
            "bitmaps-extension.bitmap_directory_size.past-eof",
            place + 8,
            f"is {extension.bitmap_directory_size}: the directory would end at {end:#x}, but the "
            f"file ends at {file.file_size:#x}",
            # QEMU reads zeros there, which it accepts only in the middle of the last name.
            severity=REFUSED if any(directory.rest) else None,
        )
    if rest == end:
        return
    if end - rest < ENTRY_LENGTH or any(directory.rest):
        id, what = "bitmap-directory.rest", "bytes that make no entry"
    elif len(directory.entries) < extension.nb_bitmaps:
        id, what = "bitmap-directory.zero-entries", "zero bytes in the place of entries"
    else:
        id, what = "bitmap-directory.zeroes", "zero bytes"
    yield problem(id, rest, f"ends with {end - rest} {what}")


def _count_problems(
    extension: BitmapsExtension, directory: Directory, place: int
) -> Iterator[Problem]:
    if extension.reserved:
        yield problem(
            "bitmaps-extension.reserved.nonzero",
            place + 4,
            f"is {extension.reserved:#x}, must be zero",
        )
    size = extension.bitmap_directory_size
    if size == 0:
        yield problem("bitmaps-extension.bitmap_directory_size.zero", place + 8, "is 0")
    elif size > MAX_DIRECTORY_SIZE:
        yield problem(
            "bitmaps-extension.bitmap_directory_size.too-large",
            place + 8,
            f"is {size}, at most {MAX_DIRECTORY_SIZE}",
        )
    count, actual = extension.nb_bitmaps, len(directory.entries)
    if count == 0:
        yield problem("bitmaps-extension.nb_bitmaps.zero", place, "is 0")
    elif count > MAX_BITMAPS:
        yield problem(
            "bitmaps-extension.nb_bitmaps.too-large", place, f"is {count}, at most {MAX_BITMAPS}"
        )
    if count < actual:
        yield problem(
            "bitmaps-extension.nb_bitmaps.less",
            place,
            f"is {count}, but the directory holds {actual}",
        )
    elif count > actual:
        yield problem(
            "bitmaps-extension.nb_bitmaps.more",
            place,
            f"is {count}, but the directory holds {actual}",
        )


def required_table_size(entry: DirectoryEntry, virtual_size: int, cluster_size: int) -> int:
    """How many table entries a bitmap of that granularity needs for the whole disk."""
    return ceil_div(virtual_size, 8 * cluster_size * entry.granularity)


class _Add(Protocol):
    def __call__(
        self, fault: str, field: str, reason: str, severity: Severity | None = None
    ) -> None: ...


def entry_problems(entry: DirectoryEntry, end: int, file: ClusterFile) -> list[Problem]:
    """Everything that is wrong with one entry by itself; the directory should reach to ``end``."""
    found: list[Problem] = []

    def add(fault: str, field: str, reason: str, severity: Severity | None = None) -> None:
        id = f"directory-entry.{fault}"
        found.append(problem(id, entry.offset_of(field), reason, entry.index, severity))

    if entry.bitmap_table_offset == 0:
        add("bitmap_table_offset.zero", "bitmap_table_offset", "is 0, must not be")
    elif entry.bitmap_table_offset % file.cluster_size:
        add(
            "bitmap_table_offset.unaligned",
            "bitmap_table_offset",
            f"is {entry.bitmap_table_offset:#x}, not at the start of a cluster",
        )
    _table_size_problems(entry, file, add)
    if entry.flags & ~KNOWN_FLAGS:
        add(
            "flags.reserved",
            "flags",
            f"is {entry.flags:#x}: reserved bits {entry.flags & ~KNOWN_FLAGS:#x} are set",
        )
    if entry.type != TYPE_DIRTY_TRACKING:
        add("type.unknown", "type", f"is {entry.type}, must be 1 (dirty tracking)")
    if entry.granularity_bits >= GRANULARITY_BITS_LIMIT:
        add(
            "granularity_bits.too-large",
            "granularity_bits",
            f"is {entry.granularity_bits}, must be 9 to 31",
        )
    elif not MIN_GRANULARITY_BITS <= entry.granularity_bits <= MAX_GRANULARITY_BITS:
        add(
            "granularity_bits.unsupported",
            "granularity_bits",
            f"is {entry.granularity_bits}; QEMU takes {MIN_GRANULARITY_BITS} to "
            f"{MAX_GRANULARITY_BITS}",
        )
    _extra_data_problems(entry, add)
    _name_problems(entry, add)
    if entry.offset + entry.size > end:
        add(
            "truncated",
            "name_size",
            f"needs {entry.size} bytes (name_size {entry.name_size}, extra_data_size "
            f"{entry.extra_data_size}), more than the directory has left",
        )
    elif entry.name_bytes is None:
        add("truncated", "name", "is cut off by the end of the file", UNUSABLE)
    if any(entry.padding):
        add("padding.nonzero", "padding", "is not zero")
    return found


def _table_size_problems(entry: DirectoryEntry, file: ClusterFile, add: _Add) -> None:
    size = entry.bitmap_table_size
    field = "bitmap_table_size"
    if size == 0:
        add("bitmap_table_size.zero", field, "is 0, must not be")
        return
    if size > MAX_TABLE_SIZE or size * file.cluster_size > MAX_BITMAP_BYTES:
        limit = min(MAX_TABLE_SIZE, MAX_BITMAP_BYTES // file.cluster_size)
        add("bitmap_table_size.too-large", field, f"is {size}, but may be at most {limit}")
        return
    start = entry.bitmap_table_offset
    if start + 8 * size > file.file_size:
        is_unreadable = start + 8 * size > MAX_FILE_LENGTH and not entry.in_use
        add(
            f"bitmap_table_offset.{'unreadable' if is_unreadable else 'past-eof'}",
            "bitmap_table_offset",
            f"is {start:#x}: {size} entries there reach past the end of the file",
        )
    if entry.granularity_bits >= GRANULARITY_BITS_LIMIT:
        return
    required = required_table_size(entry, file.virtual_size, file.cluster_size)
    if size != required and entry.in_use:
        add("bitmap_table_size.outdated", field, f"is {size}, but the disk now needs {required}")
    elif size != required:
        fault = "less" if size < required else "more"
        add(f"bitmap_table_size.{fault}", field, f"is {size}, but the disk needs {required}")


def _extra_data_problems(entry: DirectoryEntry, add: _Add) -> None:
    compatible = entry.flags & FLAG_EXTRA_DATA_COMPATIBLE
    if entry.extra_data_size and not compatible:
        add(
            "extra_data.incompatible",
            "extra_data_size",
            f"is {entry.extra_data_size}: extra data of unknown meaning, not marked as compatible",
        )
    elif entry.extra_data_size:
        add(
            "extra_data.compatible",
            "extra_data_size",
            f"is {entry.extra_data_size}: extra data, which the specification allows",
        )
    elif compatible:
        add("flags.extra-data-compatible", "flags", "has the extra_data_compatible bit set")


def _name_problems(entry: DirectoryEntry, add: _Add) -> None:
    if entry.name_bytes is None:
        return
    if entry.name_size == 0:
        add("name.empty", "name_size", "is 0: the name is empty")
    elif entry.name_size > MAX_NAME_SIZE:
        add("name_size.too-large", "name_size", f"is {entry.name_size}; QEMU takes {MAX_NAME_SIZE}")
    if b"\0" in entry.name_bytes:
        add("name.nul", "name", "contains a NUL byte, where QEMU takes the name to end")


def qemu_name(entry: DirectoryEntry) -> bytes | None:
    """The name as QEMU sees it: up to a NUL byte."""
    return None if entry.name_bytes is None else entry.name_bytes.partition(b"\0")[0]


def _surplus(entries: tuple[DirectoryEntry, ...], nb_bitmaps: int) -> Iterator[Problem]:
    """Entries nobody counts may be left over from an older directory."""
    for entry in entries[nb_bitmaps:]:
        reason = f"is one more than nb_bitmaps, which is {nb_bitmaps}"
        yield problem("directory-entry.surplus", entry.offset, reason, entry.index)


def _duplicates(entries: tuple[DirectoryEntry, ...]) -> Iterator[Problem]:
    names = Counter(map(qemu_name, entries))
    del names[None]
    if len(names) == sum(names.values()):
        return
    refused: set[bytes | None] = set()
    seen: set[bytes | None] = set()
    for entry in entries:
        name = qemu_name(entry)
        # QEMU does not take in what is in_use, and so does not see the name a second time.
        if name in seen and not entry.in_use:
            refused.add(name)
        seen.add(name)
    for entry in entries:
        name = qemu_name(entry)
        if names[name] > 1:
            yield problem(
                "directory-entry.name.duplicate",
                entry.offset_of("name"),
                f'"{escape(entry.name or "")}" is the name of several entries',
                entry.index,
                None if name in refused else UNUSABLE,
            )
