"""Which of the bitmaps that miss writes still have their clusters to themselves.

*Spec*: spec/repair.md, "Salvage".
"""

from __future__ import annotations

from qcow2bm.bitmaps.status import as_error
from qcow2bm.checking.check import undercounted_bitmaps
from qcow2bm.checking.view import View
from qcow2bm.clusters.file import ClusterFile
from qcow2bm.format.features import AUTOCLEAR_BITMAPS
from qcow2bm.format.header import FIELD_OFFSETS
from qcow2bm.problems import DIRECTORY, Problem
from qcow2bm.storage.dry_run import DryRunStorage
from qcow2bm.storage.interface import Storage


def intact_bitmaps(storage: Storage) -> frozenset[int]:
    """The bitmaps whose clusters are theirs alone, by the indexes of their entries.

    So it is found for stale bitmaps, too. The caller holds a lock.

    Raises:
        FormatError: the directory is not what it was, so no bitmap can be believed; or the disk, or
            refcounts, are damaged, so that nothing new can be put anywhere.
        StorageError: reading failed.
    """
    stored = View.of(storage)
    view = stored if stored.directory.is_consistent else _as_if_consistent(storage)
    serious = _serious(view)
    if view is not stored:
        of_all = view.directory.distrust or view.survey.distrust
        of_all = of_all or next((p for p in serious if _is_overlap(p)), None)
        for found in (of_all, *view.directory.problems):
            if found in serious and found and not found.kind.concerns_table_place:
                what = ", so that no bitmap can be salvaged"
                raise as_error(found, what, "remove-all")
    for found in _serious(stored):
        if found.bitmap_index is None:
            raise as_error(found, ": mend that first; check says how")
    broken = {p.bitmap_index for p in serious} | undercounted_bitmaps(view.file, view.directory)
    return frozenset(e.index for e in view.directory.entries if e.index not in broken)


def _as_if_consistent(storage: Storage) -> View:
    """The image as it would be if its bitmaps were not stale."""
    overlay = DryRunStorage(storage)
    header = ClusterFile(overlay, force_share=True).header
    autoclear = header.autoclear_features | AUTOCLEAR_BITMAPS
    overlay.write(FIELD_OFFSETS["autoclear_features"], (autoclear.to_bytes(8, "big"),))
    return View.of(overlay)


def _serious(view: View) -> list[Problem]:
    return [found for found in view.problems if found.is_fault]


def _is_overlap(found: Problem) -> bool:
    return found.kind.is_overlap and found.structure == DIRECTORY
