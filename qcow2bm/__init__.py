"""Persistent dirty bitmaps of qcow2 disk images.

>>> import qcow2bm
>>> with qcow2bm.open("vm.qcow2") as image:                      # doctest: +SKIP
...     for extents in image.bitmaps["daily"].extents():
...         print(extents)                                       # int64[n, 2]: start, length

The public names are those in ``__all__``. Nine of them are modules: `backup` takes backups of disks
whose machines are off, `compare` finds what differs between two disks, `live` makes the stops of
machines on QEMU short, `new_file` writes files whole or not at all, `problems` names the severities
of a `Problem`, `rescue` keeps bitmaps of running machines through migrations, `sidecar` and
`stream` carry bitmaps outside of images, `units` reads and prints sizes and names.

Each public name is loaded on first use: importing the package loads neither construct nor numpy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from qcow2bm import backup, compare, live, problems, units
    from qcow2bm.api import sidecar, stream
    from qcow2bm.api.attach import attach
    from qcow2bm.api.bitmap import Bitmap
    from qcow2bm.api.data_extents import DataTotals
    from qcow2bm.api.dirty_set import Combination, DirtySet, union
    from qcow2bm.api.edit import Edit
    from qcow2bm.api.image import Image, open
    from qcow2bm.api.prune import KeptReason, Pruning, choose_to_prune
    from qcow2bm.api.repair import check, plan_repair, plan_undo, repair, salvage, undo
    from qcow2bm.api.undo_file import UndoFile
    from qcow2bm.bitmaps.backup_verdict import BackupReason, BackupVerdict
    from qcow2bm.bitmaps.bit_reader import Totals
    from qcow2bm.bitmaps.growth import Addition, Growth
    from qcow2bm.bitmaps.space import BitmapSpace
    from qcow2bm.bitmaps.status import Status
    from qcow2bm.bitmaps.table_entries import EntryKind, TableRun
    from qcow2bm.bitmaps.tables import Clusters
    from qcow2bm.bits.coarser import GranularityTotals
    from qcow2bm.bits.operations import Op
    from qcow2bm.checking.check import Check
    from qcow2bm.checking.directory_repair import LostBitmap
    from qcow2bm.checking.repair import Repair
    from qcow2bm.clusters.empty_image import EmptyImage, build_empty_image
    from qcow2bm.clusters.layout import Snapshot
    from qcow2bm.clusters.plan import Barrier, Plan, Write
    from qcow2bm.clusters.space import FileSpace
    from qcow2bm.errors import (
        BitmapBrokenError,
        BitmapError,
        BitmapExistsError,
        BitmapInconsistentError,
        BitmapNotFoundError,
        BitmapStaleError,
        ChangedWhileReadingError,
        CommitError,
        CommitOutcome,
        ComparisonError,
        EvidenceError,
        FormatError,
        Hint,
        ImageLockedError,
        IntentError,
        LimitError,
        NoRoomError,
        Qcow2BmError,
        QmpError,
        QmpRefusedError,
        QmpTimeoutError,
        ReadOnlyImageError,
        ShortReadError,
        StateError,
        StorageError,
        TailError,
        UnsupportedError,
    )
    from qcow2bm.format.directory import DirectoryEntry
    from qcow2bm.format.extensions import BitmapsExtension, HeaderExtension
    from qcow2bm.format.features import Feature
    from qcow2bm.format.header import Header
    from qcow2bm.format.undo_file import UndoLog, UndoStep, build_seal, build_undo, parse_undo
    from qcow2bm.guest.kinds import DataKind
    from qcow2bm.migration.evidence import Fate, Policy
    from qcow2bm.migration.lifecycle import State
    from qcow2bm.problems import Problem, Severity
    from qcow2bm.qmp import rescue
    from qcow2bm.storage import new_file
    from qcow2bm.storage.file import FileStorage
    from qcow2bm.storage.interface import OtherUse, Storage, WritableStorage
    from qcow2bm.tracker.asyncio_tracker import AsyncioTracker
    from qcow2bm.tracker.edit import TrackerEdit
    from qcow2bm.tracker.group import TrackerGroup
    from qcow2bm.tracker.reports import (
        Activation,
        Convergence,
        FlushReport,
        IntentReport,
        Pending,
        Recovery,
        StopReport,
    )
    from qcow2bm.tracker.tracker import Tracker

__all__ = [
    "Activation",
    "Addition",
    "AsyncioTracker",
    "BackupReason",
    "BackupVerdict",
    "Barrier",
    "Bitmap",
    "BitmapBrokenError",
    "BitmapError",
    "BitmapExistsError",
    "BitmapInconsistentError",
    "BitmapNotFoundError",
    "BitmapSpace",
    "BitmapStaleError",
    "BitmapsExtension",
    "ChangedWhileReadingError",
    "Check",
    "Clusters",
    "Combination",
    "CommitError",
    "CommitOutcome",
    "ComparisonError",
    "Convergence",
    "DataKind",
    "DataTotals",
    "DirectoryEntry",
    "DirtySet",
    "Edit",
    "EmptyImage",
    "EntryKind",
    "EvidenceError",
    "Fate",
    "Feature",
    "FileSpace",
    "FileStorage",
    "FlushReport",
    "FormatError",
    "GranularityTotals",
    "Growth",
    "Header",
    "HeaderExtension",
    "Hint",
    "Image",
    "ImageLockedError",
    "IntentError",
    "IntentReport",
    "KeptReason",
    "LimitError",
    "LostBitmap",
    "NoRoomError",
    "Op",
    "OtherUse",
    "Pending",
    "Plan",
    "Policy",
    "Problem",
    "Pruning",
    "Qcow2BmError",
    "QmpError",
    "QmpRefusedError",
    "QmpTimeoutError",
    "ReadOnlyImageError",
    "Recovery",
    "Repair",
    "Severity",
    "ShortReadError",
    "Snapshot",
    "State",
    "StateError",
    "Status",
    "StopReport",
    "Storage",
    "StorageError",
    "TableRun",
    "TailError",
    "Totals",
    "Tracker",
    "TrackerEdit",
    "TrackerGroup",
    "UndoFile",
    "UndoLog",
    "UndoStep",
    "UnsupportedError",
    "WritableStorage",
    "Write",
    "__version__",
    "attach",
    "backup",
    "build_empty_image",
    "build_seal",
    "build_undo",
    "check",
    "choose_to_prune",
    "compare",
    "live",
    "new_file",
    "open",
    "parse_undo",
    "plan_repair",
    "plan_undo",
    "problems",
    "repair",
    "rescue",
    "salvage",
    "sidecar",
    "stream",
    "undo",
    "union",
    "units",
]

_NAMES_OF = {
    "qcow2bm.api.attach": ("attach",),
    "qcow2bm.api.bitmap": ("Bitmap",),
    "qcow2bm.api.data_extents": ("DataTotals",),
    "qcow2bm.api.dirty_set": ("Combination", "DirtySet", "union"),
    "qcow2bm.api.edit": ("Edit",),
    "qcow2bm.api.image": ("Image", "open"),
    "qcow2bm.api.prune": ("KeptReason", "Pruning", "choose_to_prune"),
    "qcow2bm.api.repair": ("check", "plan_repair", "plan_undo", "repair", "salvage", "undo"),
    "qcow2bm.api.undo_file": ("UndoFile",),
    "qcow2bm.bitmaps.backup_verdict": ("BackupReason", "BackupVerdict"),
    "qcow2bm.bitmaps.bit_reader": ("Totals",),
    "qcow2bm.bitmaps.growth": ("Addition", "Growth"),
    "qcow2bm.bitmaps.space": ("BitmapSpace",),
    "qcow2bm.bitmaps.status": ("Status",),
    "qcow2bm.bitmaps.table_entries": ("EntryKind", "TableRun"),
    "qcow2bm.bitmaps.tables": ("Clusters",),
    "qcow2bm.bits.coarser": ("GranularityTotals",),
    "qcow2bm.bits.operations": ("Op",),
    "qcow2bm.checking.check": ("Check",),
    "qcow2bm.checking.directory_repair": ("LostBitmap",),
    "qcow2bm.checking.repair": ("Repair",),
    "qcow2bm.clusters.empty_image": ("EmptyImage", "build_empty_image"),
    "qcow2bm.clusters.layout": ("Snapshot",),
    "qcow2bm.clusters.plan": ("Barrier", "Plan", "Write"),
    "qcow2bm.clusters.space": ("FileSpace",),
    "qcow2bm.errors": (
        "BitmapBrokenError",
        "BitmapError",
        "BitmapExistsError",
        "BitmapInconsistentError",
        "BitmapNotFoundError",
        "BitmapStaleError",
        "ChangedWhileReadingError",
        "CommitError",
        "CommitOutcome",
        "ComparisonError",
        "EvidenceError",
        "FormatError",
        "Hint",
        "ImageLockedError",
        "IntentError",
        "LimitError",
        "NoRoomError",
        "Qcow2BmError",
        "QmpError",
        "QmpRefusedError",
        "QmpTimeoutError",
        "ReadOnlyImageError",
        "ShortReadError",
        "StateError",
        "StorageError",
        "TailError",
        "UnsupportedError",
    ),
    "qcow2bm.format.directory": ("DirectoryEntry",),
    "qcow2bm.format.extensions": ("BitmapsExtension", "HeaderExtension"),
    "qcow2bm.format.features": ("Feature",),
    "qcow2bm.format.header": ("Header",),
    "qcow2bm.format.undo_file": ("UndoLog", "UndoStep", "build_seal", "build_undo", "parse_undo"),
    "qcow2bm.guest.kinds": ("DataKind",),
    "qcow2bm.migration.evidence": ("Fate", "Policy"),
    "qcow2bm.migration.lifecycle": ("State",),
    "qcow2bm.problems": ("Problem", "Severity"),
    "qcow2bm.storage.interface": ("OtherUse", "Storage", "WritableStorage"),
    "qcow2bm.storage.file": ("FileStorage",),
    "qcow2bm.tracker.asyncio_tracker": ("AsyncioTracker",),
    "qcow2bm.tracker.edit": ("TrackerEdit",),
    "qcow2bm.tracker.group": ("TrackerGroup",),
    "qcow2bm.tracker.reports": (
        "Activation",
        "Convergence",
        "FlushReport",
        "IntentReport",
        "Pending",
        "Recovery",
        "StopReport",
    ),
    "qcow2bm.tracker.tracker": ("Tracker",),
}
_HOME_OF = {name: module for module, names in _NAMES_OF.items() for name in names}
_MODULES = {
    "backup": "qcow2bm.backup",
    "compare": "qcow2bm.compare",
    "live": "qcow2bm.live",
    "new_file": "qcow2bm.storage.new_file",
    "problems": "qcow2bm.problems",
    "rescue": "qcow2bm.qmp.rescue",
    "sidecar": "qcow2bm.api.sidecar",
    "stream": "qcow2bm.api.stream",
    "units": "qcow2bm.units",
}


def __getattr__(name: str) -> object:
    value: object
    if name in _MODULES:
        value = import_module(_MODULES[name])
    elif name in _HOME_OF:
        value = getattr(import_module(_HOME_OF[name]), name)
    else:
        raise AttributeError(f"module 'qcow2bm' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
