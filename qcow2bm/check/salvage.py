"""Which bitmaps are left of those that a stale bitmaps extension names.

*Spec*: spec/repair.md, "Salvage".
"""

from __future__ import annotations

from qcow2bm.check.check import undercounted_bitmaps
from qcow2bm.check.view import View
from qcow2bm.clusters.file import ClusterFile
from qcow2bm.format.features import AUTOCLEAR_BITMAPS
from qcow2bm.format.header import FIELD_OFFSETS
from qcow2bm.problems import CLUSTER, REFUSED, UNUSABLE
from qcow2bm.storage.base import Storage
from qcow2bm.storage.overlay import OverlayStorage
from qcow2bm.store.status import as_error

_TABLE_FIELDS = "directory-entry.bitmap_table_"


def intact_bitmaps(storage: Storage) -> frozenset[int]:
    """The stale bitmaps whose clusters are still theirs, by the indexes of their entries.

    Those of the others were given to somebody else, or their tables do not fit the disk any more.

    Raises:
        FormatError: the directory is not what it was, so nothing in it can be taken up again.
        StorageError: reading failed.
    """
    overlay = OverlayStorage(storage)
    header = ClusterFile(overlay, force_share=True).header
    autoclear = header.autoclear_features | AUTOCLEAR_BITMAPS
    overlay.write(FIELD_OFFSETS["autoclear_features"], (autoclear.to_bytes(8, "big"),))
    view = View.of(overlay)
    serious = [p for p in view.problems if p.severity in (REFUSED, UNUSABLE)]
    of_all = view.directory.distrust or view.survey.distrust
    of_all = of_all or next((p for p in serious if p.id == "bitmap-directory.overlap"), None)
    for found in (of_all, *view.directory.problems):
        if found in serious and found and not found.id.startswith(_TABLE_FIELDS):
            raise as_error(found, ": stale bitmaps like that can only be removed (remove --all)")
    if any(p.bitmap_index is None and p.structure != CLUSTER for p in serious):
        return frozenset()  # so who uses what is not known
    broken = {p.bitmap_index for p in serious} | undercounted_bitmaps(view.file, view.directory)
    return frozenset(e.index for e in view.directory.entries if e.index not in broken)
