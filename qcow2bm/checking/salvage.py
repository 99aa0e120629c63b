"""Finding the bitmaps that can be salvaged: those whose clusters nothing else uses.

*Spec*: spec/repair.md, "Salvage".
"""

from __future__ import annotations

from qcow2bm.checking.findings import Findings
from qcow2bm.checking.refcount_repair import undercounted_bitmaps
from qcow2bm.format.features import AUTOCLEAR_BITMAPS
from qcow2bm.format.header import FIELD_OFFSETS
from qcow2bm.problem_errors import as_error
from qcow2bm.problems import DIRECTORY
from qcow2bm.storage.dry_run import DryRunStorage
from qcow2bm.storage.interface import Storage


def intact_bitmaps(storage: Storage) -> frozenset[int]:
    """Returns the indexes of the bitmaps whose clusters nothing else uses, also of stale ones.

    The caller holds the locks.

    Raises:
        FormatError: no stale bitmap can be believed, since the directory is damaged; or nothing
            can be written, since the disk or the refcounts are damaged.
        StorageError: reading failed.
    """
    stored = Findings.load(storage)
    findings = stored
    if not stored.metadata.directory.is_consistent:
        findings = _as_if_consistent(stored)
        _require_believable(findings)
    for found in stored.faults:
        if found.bitmap_index is None:
            raise as_error(found, ": repair that first; check says how")
    broken = {found.bitmap_index for found in findings.faults}
    broken |= undercounted_bitmaps(findings.metadata)
    entries = findings.metadata.directory.entries
    return frozenset(entry.index for entry in entries if entry.index not in broken)


def _as_if_consistent(stored: Findings) -> Findings:
    """Returns what would be found in the image if its bitmaps were not stale."""
    trial = DryRunStorage(stored.metadata.file.storage)
    autoclear = stored.metadata.file.header.autoclear_features | AUTOCLEAR_BITMAPS
    trial.write(FIELD_OFFSETS["autoclear_features"], (autoclear.to_bytes(8, "big"),))
    return Findings.load(trial)


def _require_believable(findings: Findings) -> None:
    """Raises FormatError if the directory or an entry of it cannot be believed.

    A fault of the place or size of a bitmap table is no reason: the bitmap gets a new table.
    """
    metadata, faults = findings.metadata, findings.faults
    overlaps = (each for each in faults if each.kind.is_overlap and each.structure == DIRECTORY)
    distrust = metadata.distrust or next(overlaps, None)
    for found in (distrust, *metadata.directory.problems):
        if found in faults and found and not found.kind.concerns_table_place:
            raise as_error(found, ", so that no bitmap can be salvaged", "remove-all")
