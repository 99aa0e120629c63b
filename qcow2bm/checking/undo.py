"""Undoing a repair: what it needs, and how it goes.

*Spec*: spec/repair.md, "Undo".
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from qcow2bm.bitmaps.directory import load_directory
from qcow2bm.bitmaps.tables import has_readable_table
from qcow2bm.clusters.file import ClusterFile
from qcow2bm.clusters.layout import fixed_parts
from qcow2bm.clusters.plan import SECTOR_SIZE, Barrier, Plan, Step, Write
from qcow2bm.clusters.problems import header_problems
from qcow2bm.errors import StateError
from qcow2bm.format.bitmap_table import ENTRY_LENGTH
from qcow2bm.format.features import INCOMPATIBLE_DATA_FILE
from qcow2bm.format.undo_file import BARRIER_STEP, UndoLog, UndoStep
from qcow2bm.storage.dry_run import DryRunStorage
from qcow2bm.storage.interface import Storage


def undo_of(storage: Storage, plan: Plan) -> UndoLog:
    """What it takes to undo a plan that was made for this storage, and is not done yet.

    Raises:
        StorageError: reading failed.
    """
    overlay = DryRunStorage(storage)
    steps = []
    for step in plan.steps:
        if isinstance(step, Barrier):
            steps.append(BARRIER_STEP)
            continue
        new = b"".join(step.parts)
        steps.append(UndoStep(step.offset, _read(overlay, step.offset, len(new)), new))
        overlay.write(step.offset, [new])
    return UndoLog(storage.size(), _state(overlay), tuple(steps))


def plan_undo(storage: Storage, undo: UndoLog, *, is_asserted: bool = False) -> Plan:
    """The way back, interval by interval; afterwards the storage is cut to its old length.

    *Guarantees*: an undoing that was interrupted can be done again, if it is asserted.

    Args:
        storage: the image.
        undo: what the repair left.
        is_asserted: somebody says that nobody wrote to the disk since. A guest that writes to
            clusters it has leaves no trace in metadata, only in the time of the last write, which
            block devices have not, and which an undoing that was interrupted changed.

    Raises:
        StateError: the image is not as the repair left it, or as undoing leaves it on the way.
        StorageError: reading failed.
    """
    if _is_undone(storage, undo):
        return Plan()
    _require_unchanged(storage, undo)
    if not is_asserted:
        header = ClusterFile(storage, force_share=True).header
        if header.incompatible_features & INCOMPATIBLE_DATA_FILE:
            raise _changed("its guest data are in another file, which may have been written to")
        token = storage.change_token()
        if not isinstance(token, tuple) or undo.mtime_ns != token[0]:
            raise _changed("its time of the last write does not prove that nobody wrote since")
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
    """Whether everything is as it was before the repair."""
    return storage.size() == undo.file_size and all(
        _read(storage, place, SECTOR_SIZE) == contents[0]
        for place, contents in _sectors(storage, undo).items()
    )


def _require_unchanged(storage: Storage, undo: UndoLog) -> None:
    """Whoever wrote to the image since may need what would be taken back."""
    for place, contents in _sectors(storage, undo).items():
        if _read(storage, place, SECTOR_SIZE) not in contents:
            raise _changed(f"at {place:#x} stands what neither the repair nor undoing it wrote")
    overlay = DryRunStorage(storage)
    for step in undo.steps:
        if not step.is_barrier:
            overlay.write(step.offset, [step.new])
    if _state(overlay) != undo.state:
        raise _changed("other metadata changed since the repair")


def _changed(reason: str) -> StateError:
    return StateError(f"another than the repair left ({reason})", "as the repair left it")


def _sectors(storage: Storage, undo: UndoLog) -> dict[int, list[bytes]]:
    """All that each sector held that the repair wrote to: before, and after each step.

    Where no step wrote, in the same sector, it is what stands there now.
    """
    content: dict[int, bytearray] = {}
    for step in reversed(undo.steps):  # so that what was there first counts
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
    """The bytes by sectors: where the sector begins, and from which byte of it on they stand."""
    done = 0
    while done < len(data):
        inside = (offset + done) % SECTOR_SIZE
        part = data[done : done + SECTOR_SIZE - inside]
        yield offset + done - inside, inside, part
        done += len(part)


def _read(storage: Storage, offset: int, length: int) -> bytes:
    """So many bytes; behind the end of the file stand zeros."""
    buffer = bytearray(length)
    if offset < storage.size():
        storage.read_into(offset, memoryview(buffer))
    return bytes(buffer)


def _state(storage: Storage) -> bytes:
    """A digest of all metadata of an image: whoever allocates or frees a cluster changes it."""
    digest = hashlib.sha256(storage.size().to_bytes(8, "big"))
    file = ClusterFile(storage, force_share=True)
    header = header_problems(file)
    directory = load_directory(file, header)
    places = [(part.offset, part.length) for part in fixed_parts(file, header)]
    if directory.extension and directory.is_consistent:
        places.append((directory.extension.bitmap_directory_offset, directory.size))
        places += [
            (entry.bitmap_table_offset, ENTRY_LENGTH * entry.bitmap_table_size)
            for entry in directory.entries
            if has_readable_table(entry, file)
        ]
    for offset, length in places:
        digest.update(offset.to_bytes(8, "big") + length.to_bytes(8, "big"))
        digest.update(_read(storage, offset, length))
    return digest.digest()
