"""Undoing a repair: what has to be kept for that, and the plan.

*Spec*: spec/repair.md, "Undo".
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

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
        _read(storage, place, SECTOR_SIZE) == contents[0]
        for place, contents in _sectors(storage, undo).items()
    )


def _require_unchanged(storage: Storage, undo: UndoLog) -> None:
    """Raises StateError if another program changed what the repair wrote, or other metadata.

    That program may need what an undo would take back.
    """
    for place, contents in _sectors(storage, undo).items():
        if _read(storage, place, SECTOR_SIZE) not in contents:
            raise _changed(f"at {place:#x} are bytes that neither the repair nor an undo wrote")
    trial = DryRunStorage(storage)
    for step in undo.steps:
        if not step.is_barrier:
            trial.write(step.offset, [step.new])
    if _state(trial) != undo.state:
        raise _changed("other metadata changed since the repair")


def _changed(reason: str) -> StateError:
    return StateError(f"another than the repair left ({reason})", "as the repair left it")


def _sectors(storage: Storage, undo: UndoLog) -> dict[int, list[bytes]]:
    """Returns the contents of each sector that the repair wrote: before, and after each step.

    The bytes of a sector that no step wrote are those that are stored now.
    """
    content: dict[int, bytearray] = {}
    for step in reversed(undo.steps):  # so that the first content wins
        for place, inside, part in _parts(step.offset, step.old):
            if place not in content:
                content[place] = bytearray(_read(storage, place, SECTOR_SIZE))
            content[place][inside : inside + len(part)] = part
    found = {place: [bytes(before)] for place, before in content.items()}
    for step in undo.steps:
        for place, inside, part in _parts(step.offset, step.new):
            content[place][inside : inside + len(part)] = part
            found[place].append(bytes(content[place]))
    return found


def _parts(offset: int, data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Yields the bytes by sectors: start of the sector, first byte within the sector, bytes."""
    done = 0
    while done < len(data):
        inside = (offset + done) % SECTOR_SIZE
        part = data[done : done + SECTOR_SIZE - inside]
        yield offset + done - inside, inside, part
        done += len(part)


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
