"""The problems of bitmap directory entries, each by itself and compared with the others.

*Spec*: spec/bitmaps.md, "Bitmap directory"; the ids are in spec/problems.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Protocol

from qcow2bm.clusters.file import ClusterFile
from qcow2bm.clusters.problems import MAX_FILE_LENGTH
from qcow2bm.format.directory import (
    FLAG_EXTRA_DATA_COMPATIBLE,
    KNOWN_FLAGS,
    TYPE_DIRTY_TRACKING,
    DirectoryEntry,
)
from qcow2bm.problem_kinds import KINDS, problem
from qcow2bm.problems import UNUSABLE, Problem, Severity
from qcow2bm.units import ceil_div, escape

MAX_TABLE_SIZE = 0x8000000
MAX_BITMAP_BYTES = 512 << 20  # table size times cluster size
MIN_GRANULARITY_BITS, MAX_GRANULARITY_BITS = 9, 31  # of QEMU
GRANULARITY_BITS_LIMIT = 64  # of the specification
MAX_NAME_SIZE = 1023


def required_table_size(granularity: int, virtual_size: int, cluster_size: int) -> int:
    """Returns how many table entries a bitmap of this granularity needs for the whole disk."""
    return ceil_div(virtual_size, 8 * cluster_size * granularity)


class _Add(Protocol):
    def __call__(
        self, id: str, reason: str, *, field: str = "", severity: Severity | None = None
    ) -> None: ...


def entry_problems(entry: DirectoryEntry, end: int, file: ClusterFile) -> list[Problem]:
    """Returns the problems of one entry by itself; the directory should end at ``end``."""
    found: list[Problem] = []

    def add(id: str, reason: str, *, field: str = "", severity: Severity | None = None) -> None:
        place = entry.offset_of(field or KINDS[id].field)
        found.append(problem(id, place, reason, entry.index, severity))

    if entry.bitmap_table_offset == 0:
        add("directory-entry.bitmap_table_offset.zero", "is 0, must not be")
    elif entry.bitmap_table_offset % file.cluster_size:
        add(
            "directory-entry.bitmap_table_offset.unaligned",
            f"is {entry.bitmap_table_offset:#x}, not at the start of a cluster",
        )
    _table_size_problems(entry, file, add)
    if entry.flags & ~KNOWN_FLAGS:
        add(
            "directory-entry.flags.reserved",
            f"is {entry.flags:#x}: reserved bits {entry.flags & ~KNOWN_FLAGS:#x} are set",
        )
    if entry.type != TYPE_DIRTY_TRACKING:
        add("directory-entry.type.unknown", f"is {entry.type}, must be 1 (dirty tracking)")
    if entry.granularity_bits >= GRANULARITY_BITS_LIMIT:
        add(
            "directory-entry.granularity_bits.too-large",
            f"is {entry.granularity_bits}, must be 9 to 31",
        )
    elif not MIN_GRANULARITY_BITS <= entry.granularity_bits <= MAX_GRANULARITY_BITS:
        add(
            "directory-entry.granularity_bits.unsupported",
            f"is {entry.granularity_bits}; QEMU takes {MIN_GRANULARITY_BITS} to "
            f"{MAX_GRANULARITY_BITS}",
        )
    _extra_data_problems(entry, add)
    _name_problems(entry, add)
    if entry.offset + entry.size > end:
        add(
            "directory-entry.truncated",
            f"needs {entry.size} bytes (name_size {entry.name_size}, extra_data_size "
            f"{entry.extra_data_size}), more than the directory has left",
            field="name_size",
        )
    elif entry.name_bytes is None:
        add(
            "directory-entry.truncated",
            "is cut off by the end of the file",
            field="name",
            severity=UNUSABLE,
        )
    if any(entry.padding):
        add("directory-entry.padding.nonzero", "is not zero")
    return found


def _table_size_problems(entry: DirectoryEntry, file: ClusterFile, add: _Add) -> None:
    size = entry.bitmap_table_size
    if size == 0:
        add("directory-entry.bitmap_table_size.zero", "is 0, must not be")
        return
    if size > MAX_TABLE_SIZE or size * file.cluster_size > MAX_BITMAP_BYTES:
        limit = min(MAX_TABLE_SIZE, MAX_BITMAP_BYTES // file.cluster_size)
        add("directory-entry.bitmap_table_size.too-large", f"is {size}, but may be at most {limit}")
        return
    start = entry.bitmap_table_offset
    if start + 8 * size > file.file_size:
        is_unreadable = start + 8 * size > MAX_FILE_LENGTH and not entry.in_use
        add(
            "directory-entry.bitmap_table_offset.unreadable"
            if is_unreadable
            else "directory-entry.bitmap_table_offset.past-eof",
            f"is {start:#x}: {size} entries there reach past the end of the file",
        )
    if entry.granularity_bits >= GRANULARITY_BITS_LIMIT:
        return
    required = required_table_size(entry.granularity, file.virtual_size, file.cluster_size)
    if size != required and entry.in_use:
        add(
            "directory-entry.bitmap_table_size.outdated",
            f"is {size}, but the disk now needs {required}",
        )
    elif size != required:
        id = (
            "directory-entry.bitmap_table_size.less"
            if size < required
            else "directory-entry.bitmap_table_size.more"
        )
        add(id, f"is {size}, but the disk needs {required}")


def _extra_data_problems(entry: DirectoryEntry, add: _Add) -> None:
    compatible = entry.flags & FLAG_EXTRA_DATA_COMPATIBLE
    if entry.extra_data_size and not compatible:
        add(
            "directory-entry.extra_data.incompatible",
            f"is {entry.extra_data_size}: extra data of unknown meaning, not marked as compatible",
        )
    elif entry.extra_data_size:
        add(
            "directory-entry.extra_data.compatible",
            f"is {entry.extra_data_size}: extra data, which the specification allows",
        )
    elif compatible:
        add("directory-entry.flags.extra-data-compatible", "has the extra_data_compatible bit set")


def _name_problems(entry: DirectoryEntry, add: _Add) -> None:
    if entry.name_bytes is None:
        return
    if entry.name_size == 0:
        add("directory-entry.name.empty", "is 0: the name is empty")
    elif entry.name_size > MAX_NAME_SIZE:
        add(
            "directory-entry.name_size.too-large",
            f"is {entry.name_size}; QEMU takes {MAX_NAME_SIZE}",
        )
    if b"\0" in entry.name_bytes:
        add("directory-entry.name.nul", "contains a NUL byte, where QEMU takes the name to end")


def qemu_name(entry: DirectoryEntry) -> bytes | None:
    """Returns the name as QEMU sees it: up to a NUL byte."""
    return None if entry.name_bytes is None else entry.name_bytes.partition(b"\0")[0]


def surplus(entries: tuple[DirectoryEntry, ...], nb_bitmaps: int) -> Iterator[Problem]:
    """Yields a problem for each entry beyond ``nb_bitmaps``: an older directory may have had it."""
    for entry in entries[nb_bitmaps:]:
        reason = f"is one more than nb_bitmaps, which is {nb_bitmaps}"
        yield problem("directory-entry.surplus", entry.offset, reason, entry.index)


def duplicates(entries: tuple[DirectoryEntry, ...]) -> Iterator[Problem]:
    """Yields a problem for each entry whose name another entry has, as QEMU compares names."""
    names = Counter(map(qemu_name, entries))
    del names[None]
    if len(names) == sum(names.values()):
        return
    refused: set[bytes | None] = set()
    seen: set[bytes | None] = set()
    for entry in entries:
        name = qemu_name(entry)
        # QEMU does not load a bitmap that is in_use, and so does not see its name.
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


def why_not_found(names: Iterable[str]) -> str:
    """Returns the reason for an error about a name that is not among ``names``."""
    shown = list(islice(names, 6))
    known = ", ".join(f'"{escape(name)}"' for name in shown[:5])
    more = ", ..." if len(shown) > 5 else ""
    return f"not found; the image has {known}{more}" if known else "not found: it has none"
