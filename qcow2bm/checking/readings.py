"""The ways in which a damaged bitmap directory can be read, and which of them to believe.

*Spec*: spec/repair.md.
"""

from __future__ import annotations

from collections.abc import Iterator

from qcow2bm.bitmaps.directory import MAX_BITMAPS, MAX_DIRECTORY_SIZE
from qcow2bm.bitmaps.entries import MAX_NAME_SIZE
from qcow2bm.bitmaps.metadata import Metadata
from qcow2bm.checking.findings import Findings
from qcow2bm.clusters.file import ClusterFile
from qcow2bm.clusters.plan import Barrier, Step, Write
from qcow2bm.format.directory import (
    FIELD_OFFSETS,
    TYPE_DIRTY_TRACKING,
    parse_directory,
)
from qcow2bm.format.directory import HEAD_LENGTH as ENTRY_LENGTH
from qcow2bm.format.extensions import BITMAPS, BITMAPS_LENGTH, build_bitmaps_extension
from qcow2bm.problem_kinds import EXTENSION_LENGTH
from qcow2bm.problems import REFUSED
from qcow2bm.storage.dry_run import DryRunStorage

_MAX_ENTRIES = 100  # of a directory whose lengths are tried: the time grows with the square
_MAX_ENTRY_LENGTH = ENTRY_LENGTH + MAX_NAME_SIZE + 1

_Patch = tuple[int, bytes]


def length_repair(metadata: Metadata) -> list[Step]:
    """Returns the steps that give the bitmaps extension its only possible length.

    Returns nothing unless the length is wrong, and QEMU takes the header with the right one.

    Raises:
        StorageError: reading failed.
    """
    faults = [found for found in metadata.header_problems if found.kind == EXTENSION_LENGTH]
    if len(faults) != 1:
        return []
    trial = DryRunStorage(metadata.file.storage)
    write = Write(faults[0].offset, (BITMAPS_LENGTH.to_bytes(4, "big"),), "length of the extension")
    trial.write(write.offset, write.parts)
    repaired = Metadata.load(trial, force_share=True)
    if any(found.severity == REFUSED for found in repaired.header_problems):
        return []
    return [write, Barrier(write.what)]


def believable_readings(stored: Findings) -> list[Findings]:
    """Returns the most believable ways to read the image; at least one.

    Three facts have to agree: the number of entries, the size of the directory, and the lengths
    of the entries. If they do not, each of them in turn is taken for wrong, and replaced by what
    follows from the others. The refcounts are a witness as well: what the entries lead to must
    be counted. The reading with the fewest faults is believed. If several have equally few, all
    of them are returned.

    Raises:
        StorageError: reading failed.
    """
    directory = stored.metadata.directory
    is_contradictory = any(
        found.kind.breaks_directory_end or (found.kind.concerns_table_place and found.is_serious)
        for found in directory.problems
    )
    if not directory.extension or directory.distrust or not is_contradictory:
        return [stored]
    best, fewest = [stored], _score(stored)
    for patches in (*_other_payloads(stored.metadata), *_other_lengths(stored.metadata)):
        trial = DryRunStorage(stored.metadata.file.storage)
        for offset, data in patches:
            trial.write(offset, (data,))
        other = Findings.load(trial)
        found = other.metadata.directory
        is_whole = not any(
            each.kind.breaks_directory_end or each.kind.suggests_misreading
            for each in found.problems
        )
        score = _score(other)
        if not is_whole or score > fewest or (score == fewest and best[0] is stored):
            continue
        if score < fewest:
            best, fewest = [], score
        if all(found.entries != known.metadata.directory.entries for known in best):
            best.append(other)
    return best


def _score(findings: Findings) -> tuple[int, int]:
    """Counts what speaks against a reading: faults of the directory, and refcounts that differ."""
    faults = sum(
        found.severity == REFUSED or found.kind.breaks_directory_end
        for found in findings.metadata.directory.problems
    )
    return faults, findings.nb_undercounts + findings.check.leaked_clusters


def _other_payloads(metadata: Metadata) -> Iterator[list[_Patch]]:
    """Yields the extension with another number of entries, and with another directory size."""
    file, extension = metadata.file, metadata.directory.extension
    place = file.payload_offset(BITMAPS)
    assert extension
    assert place is not None
    entries, count = metadata.directory.entries, extension.nb_bitmaps
    if entries and 0 < extension.bitmap_directory_size <= MAX_DIRECTORY_SIZE:
        other = extension._replace(nb_bitmaps=len(entries))
        yield [(place, build_bitmaps_extension(other))]
    if 0 < count <= MAX_BITMAPS:
        start = extension.bitmap_directory_offset
        length = min(MAX_DIRECTORY_SIZE, file.file_size - start)
        found = parse_directory(file.read(start, length), start, count).entries
        size = sum(entry.size for entry in found)
        if len(found) == count and size <= length:
            other = extension._replace(bitmap_directory_size=size)
            yield [(place, build_bitmaps_extension(other))]


def _other_lengths(metadata: Metadata) -> Iterator[list[_Patch]]:
    """Yields patches that give one entry another length, so that number and size are right.

    With that length, the entry ends with its name, which is followed by padding of zeros only,
    and it has no extra data. The entries that the number asks for follow, up to the very end of
    the directory.
    """
    file, extension = metadata.file, metadata.directory.extension
    assert extension
    start, count = extension.bitmap_directory_offset, extension.nb_bitmaps
    size = min(extension.bitmap_directory_size, MAX_DIRECTORY_SIZE, file.file_size - start)
    if not 0 < count <= _MAX_ENTRIES or size != extension.bitmap_directory_size:
        return
    data = file.read(start, size)
    begin = 0
    for index in range(count):
        left = count - index - 1
        ends = range(begin + ENTRY_LENGTH + 8, min(size, begin + _MAX_ENTRY_LENGTH) + 1, 8)
        known = parse_directory(data[begin:], start + begin, 1).entries
        stored = known[0].size if known and known[0].name_bytes is not None else 0
        for end in ends:
            if end - begin == stored:  # the length that the entry has is not another one
                continue
            if (end == size) == (left == 0) and _is_directory(data[end:], left, file):
                name = data[begin + ENTRY_LENGTH : end].rstrip(b"\0")
                if name and b"\0" not in name and end - begin - ENTRY_LENGTH - len(name) < 8:
                    place = start + begin
                    yield [
                        (place + FIELD_OFFSETS["name_size"], len(name).to_bytes(2, "big")),
                        (place + FIELD_OFFSETS["extra_data_size"], bytes(4)),
                    ]
        if not stored:
            return
        begin += stored


def _is_directory(data: bytes, count: int, file: ClusterFile) -> bool:
    """Whether the bytes are exactly ``count`` entries, each of which is possible."""
    entries, rest = parse_directory(data, 0, count + 1)
    return (
        len(entries) == count
        and not rest
        and all(
            entry.name_bytes
            and not any(entry.padding)
            and entry.type == TYPE_DIRTY_TRACKING
            and entry.bitmap_table_offset % (1 << 56) > 0
            and not entry.bitmap_table_offset % file.cluster_size
            for entry in entries
        )
    )
