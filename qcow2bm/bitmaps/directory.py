"""Loading the bitmap directory: every entry, and every problem of it.

*Spec*: spec/bitmaps.md; the ids are in spec/problems.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from qcow2bm.bitmaps.entries import duplicates, entry_problems, surplus
from qcow2bm.clusters.file import ClusterFile
from qcow2bm.clusters.problems import MAX_FILE_LENGTH
from qcow2bm.errors import ChangedWhileReadingError
from qcow2bm.format import features
from qcow2bm.format.directory import (
    HEAD_LENGTH as ENTRY_LENGTH,
)
from qcow2bm.format.directory import (
    Directory,
    DirectoryEntry,
    build_entry_head,
    parse_directory,
)
from qcow2bm.format.extensions import (
    BITMAPS,
    BITMAPS_LENGTH,
    HEAD_LENGTH,
    BitmapsExtension,
    parse_bitmaps_extension,
)
from qcow2bm.problem_kinds import problem
from qcow2bm.problems import NOTE, REFUSED, Problem

MAX_BITMAPS = 65535
MAX_DIRECTORY_SIZE = 1024 * MAX_BITMAPS


class BitmapDirectory(NamedTuple):
    """The bitmap directory of an image.

    Attributes:
        extension: the bitmaps extension; None if the image has none, or one of a wrong length.
        is_consistent: whether the autoclear bit is set. If not, the bitmaps are stale.
        entries: all entries that can be read.
        problems: the problems of extension, directory and entries.
        distrust: the problem because of which no entry can be believed; None in most images.
        size: how many bytes of the directory the file has.
        fingerprint: a number that tells these bytes from others, within this process.
    """

    extension: BitmapsExtension | None
    is_consistent: bool
    entries: tuple[DirectoryEntry, ...]
    problems: tuple[Problem, ...]
    distrust: Problem | None
    size: int
    fingerprint: int


def load_directory(file: ClusterFile, header_problems: Iterable[Problem]) -> BitmapDirectory:
    """Returns the bitmap directory, sound or not; ``header_problems`` are those of the header.

    No more is read than QEMU's limits allow, or the file has.

    Raises:
        StorageError: reading failed.
    """
    is_consistent = bool(file.header.autoclear_features & features.AUTOCLEAR_BITMAPS)
    found, place = file.find(BITMAPS), file.payload_offset(BITMAPS)
    if not found or place is None or len(found.data) != BITMAPS_LENGTH:
        return BitmapDirectory(None, is_consistent, (), (), None, 0, hash(b""))
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
    problems += surplus(directory.entries, extension.nb_bitmaps)
    problems += duplicates(directory.entries)
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
    # QEMU does not read a stale directory, so its faults are only remarks.
    remarks = (p._replace(severity=NOTE) for p in problems)
    return BitmapDirectory(
        extension, False, directory.entries, (stale, *remarks), distrust, len(data), hash(data)
    )


def verify_directory(file: ClusterFile, directory: BitmapDirectory) -> None:
    """Reads header area and directory again.

    Raises:
        ChangedWhileReadingError: they changed since they were read.
        StorageError: reading failed.
    """
    file.verify()
    if directory.extension and hash(_read(file, directory.extension)) != directory.fingerprint:
        raise ChangedWhileReadingError(file.storage.name, "bitmap directory")
    file.verify_untouched()


def verify_entry(file: ClusterFile, entry: DirectoryEntry) -> None:
    """Reads header area and one directory entry again, except extra data, which may be long.

    Raises:
        ChangedWhileReadingError: they changed since they were read.
        StorageError: reading failed.
    """
    file.verify()
    expected = build_entry_head(entry), entry.name_bytes
    head = file.read(entry.offset, ENTRY_LENGTH)
    if (head, file.read(entry.offset_of("name"), entry.name_size)) != expected:
        raise ChangedWhileReadingError(file.storage.name, "bitmap directory entry")


def _read(file: ClusterFile, extension: BitmapsExtension) -> bytes:
    """Returns the stored directory, as much of it as the limits and the file allow.

    If the file ends within the padding of the last entry, the padding is filled up.
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
    """Returns the fault of the header because of which no entry can be believed, if any."""
    return next((p for p in header_problems if p.kind.distrusts_all), None)


def _place_problems(
    extension: BitmapsExtension, place: int, file: ClusterFile
) -> Iterator[Problem]:
    """Yields faults of the directory's place, because of which no entry can be believed."""
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
    """Yields faults between the last entry and the place where the directory should end."""
    start = extension.bitmap_directory_offset
    end = start + min(extension.bitmap_directory_size, MAX_DIRECTORY_SIZE)
    last = directory.entries[-1] if directory.entries else None
    rest = last.offset + last.size if last else start
    # If the file ends within the padding of the last entry, nothing is missing.
    is_complete = rest == end and (not last or last.offset_of("padding") <= file.file_size)
    if not 0 < start < file.file_size or rest > end or is_complete:
        return
    if end > file.file_size:
        yield problem(
            "bitmaps-extension.bitmap_directory_size.past-eof",
            place + 8,
            f"is {extension.bitmap_directory_size}: the directory would end at {end:#x}, but the "
            f"file ends at {file.file_size:#x}",
            # QEMU reads zeros there, and accepts them only in the middle of the last name.
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
