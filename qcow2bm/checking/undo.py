"""Undoing a repair: what has to be kept for that, and the plan.

*Spec*: spec/repair.md, "Undo".
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

from qcow2bm.bitmaps.metadata import Metadata
from qcow2bm.bitmaps.tables import has_readable_table
from qcow2bm.clusters.layout import fixed_parts
from qcow2bm.clusters.plan import SECTOR_SIZE, Barrier, Plan, Step, Write
from qcow2bm.errors import StateError
from qcow2bm.format.bitmap_table import ENTRY_LENGTH
from qcow2bm.format.features import INCOMPATIBLE_DATA_FILE
from qcow2bm.format.undo_file import BARRIER_STEP, UndoLog, UndoStep
from qcow2bm.storage.dry_run import DryRunStorage
from qcow2bm.storage.interface import Storage


def undo_of(storage: Storage, plan: Plan) -> UndoLog:
    """Returns what has to be kept to undo a plan later; the plan is not done yet.

    Raises:
        StorageError: reading failed.
    """
    trial = DryRunStorage(storage)
    steps = []
    for step in plan.steps:
        if isinstance(step, Barrier):
            steps.append(BARRIER_STEP)
            continue
        new = b"".join(step.parts)
        steps.append(UndoStep(step.offset, _read(trial, step.offset, len(new)), new))
        trial.write(step.offset, [new])
    return UndoLog(storage.size(), _state(trial), tuple(steps))


def plan_undo(storage: Storage, undo: UndoLog, *, is_asserted: bool = False) -> Plan:
    """Returns the steps that undo a repair, in the opposite order of its steps.

    When the steps are done, the caller cuts the storage to its old length.

    *Guarantees*: an interrupted undo can be done again, with ``is_asserted``.

    Args:
        storage: the image.
        undo: what was kept of the repair.
        is_asserted: the caller asserts that no program wrote to the disk since the repair. A
            guest that writes to clusters that it already has changes no metadata, but only the
            time of the last write. Block devices have no such time, and an interrupted undo has
            changed it.

    Raises:
        StateError: the image is neither as the repair left it, nor as an interrupted undo left it.
        StorageError: reading failed.
    """
    if _is_undone(storage, undo):
        return Plan()
    _require_unchanged(storage, undo)
    if not is_asserted:
        header = Metadata.load(storage, force_share=True).file.header
        if header.incompatible_features & INCOMPATIBLE_DATA_FILE:
            raise _changed("its guest data are in another file, which may have been written to")
        token = storage.change_token()
        if not isinstance(token, tuple) or undo.mtime_ns != token[0]:
            raise _changed("the time of the last write does not prove that no program wrote since")
    steps: list[Step] = []
    for step in reversed(undo.steps):
        if step.is_barrier:
            if steps:
                steps.append(Barrier("what was there before"))
        else:
            inside = step.old[: max(0, undo.file_size - step.offset)]
            if inside:
                steps.append(Write(step.offset, (inside,), "what was there before"))
    steps.append(Barrier("what was there before"))
    return Plan(tuple(steps))


def _is_undone(storage: Storage, undo: UndoLog) -> bool:
    """Whether every sector that the repair wrote is as it was before."""
    return storage.size() == undo.file_size and all(
        stored == next(contents) for _, stored, contents in _sectors(storage, undo)
    )


def _require_unchanged(storage: Storage, undo: UndoLog) -> None:
    """Raises StateError if another program changed what the repair wrote, or other metadata.

    That program may need what an undo would take back.
    """
    if storage.size() < undo.file_size:  # a repair makes no file shorter
        raise _changed("the file is shorter than it was before the repair")
    for place, stored, contents in _sectors(storage, undo):
        if stored not in contents:
            raise _changed(f"at {place:#x} are bytes that neither the repair nor an undo wrote")
    trial = DryRunStorage(storage)
    for step in undo.steps:
        if not step.is_barrier:
            trial.write(step.offset, [step.new])
    if _state(trial) != undo.state:
        raise _changed("other metadata changed since the repair")


def _changed(reason: str) -> StateError:
    return StateError(f"another than the repair left ({reason})", "as the repair left it")


def _sectors(storage: Storage, undo: UndoLog) -> Iterator[tuple[int, bytes, Iterator[bytes]]]:
    """Yields each sector that the repair wrote: its offset, what is stored, and `_contents`."""
    writers: dict[int, list[UndoStep]] = {}
    for step in undo.steps:
        first = step.offset - step.offset % SECTOR_SIZE
        for place in range(first, step.offset + len(step.new), SECTOR_SIZE):
            writers.setdefault(place, []).append(step)
    for place, steps in writers.items():
        stored = _read(storage, place, SECTOR_SIZE)
        yield place, stored, _contents(place, stored, steps)


def _contents(place: int, stored: bytes, steps: Sequence[UndoStep]) -> Iterator[bytes]:
    """Yields the contents that a sector had: before the repair, and after each of the steps.

    The bytes of the sector that no step wrote are those that are stored now.
    """
    content = bytearray(stored)
    for step in reversed(steps):  # so that the first content wins
        _overlay(content, place, step.offset, step.old)
    yield bytes(content)
    for step in steps:
        _overlay(content, place, step.offset, step.new)
        yield bytes(content)


def _overlay(content: bytearray, place: int, offset: int, data: bytes) -> None:
    """Writes into ``content``, which is at ``place``, the part of ``data`` that is there."""
    start, stop = max(place, offset), min(place + len(content), offset + len(data))
    content[start - place : stop - place] = data[start - offset : stop - offset]


def _read(storage: Storage, offset: int, length: int) -> bytes:
    """Returns ``length`` bytes; bytes behind the end of the file are zeros."""
    buffer = bytearray(length)
    if offset < storage.size():
        storage.read_into(offset, memoryview(buffer))
    return bytes(buffer)


def _state(storage: Storage) -> bytes:
    """Returns a digest of all metadata: a program that allocates or frees a cluster changes it."""
    digest = hashlib.sha256(storage.size().to_bytes(8, "big"))
    metadata = Metadata.load(storage, force_share=True)
    file, directory = metadata.file, metadata.directory
    places = [(part.offset, part.length) for part in fixed_parts(file, metadata.header_problems)]
    if directory.extension and directory.is_consistent:
        places.append((directory.extension.bitmap_directory_offset, directory.size))
        places += [
            (entry.bitmap_table_offset, ENTRY_LENGTH * entry.bitmap_table_size)
            for entry in directory.entries
            if has_readable_table(entry, file)
        ]
    for offset, length in places:
        digest.update(offset.to_bytes(8, "big") + length.to_bytes(8, "big"))
        # A structure of zeros may be a hole, and a sparse file can have any number of them.
        is_stored = file.next_data(offset) < offset + length
        content = _read(storage, offset, length) if is_stored else b""
        digest.update(content if content.strip(b"\0") else b"")
    return digest.digest()
