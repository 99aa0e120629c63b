"""Persistent dirty bitmaps of qcow2 disk images.

>>> import qcow2bm
>>> with qcow2bm.open("vm.qcow2") as image:                      # doctest: +SKIP
...     for extents in image.bitmaps["daily"].extents():
...         print(extents)                                       # int64[n, 2]: start, length

The public names are loaded on first use: importing the package loads neither construct nor
numpy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from qcow2bm.api.bitmap import Bitmap
    from qcow2bm.api.edit import Edit
    from qcow2bm.api.image import Image, open
    from qcow2bm.bitmaps.bit_reader import Totals
    from qcow2bm.clusters.plan import Barrier, Plan, Write
    from qcow2bm.errors import (
        BitmapBrokenError,
        BitmapError,
        BitmapExistsError,
        BitmapInconsistentError,
        BitmapNotFoundError,
        BitmapStaleError,
        ChangedWhileReadingError,
        CommitError,
        FormatError,
        ImageLockedError,
        LimitError,
        Qcow2BmError,
        QmpError,
        QmpRefusedError,
        ReadOnlyImageError,
        ShortReadError,
        StateError,
        StorageError,
        UnsupportedError,
    )
    from qcow2bm.migration.evidence import Fate
    from qcow2bm.problems import Problem
    from qcow2bm.storage.interface import Storage, WritableStorage
    from qcow2bm.tracker.group import TrackerGroup
    from qcow2bm.tracker.handover import Activation
    from qcow2bm.tracker.reports import Convergence, FlushReport, Pending, StopReport
    from qcow2bm.tracker.tracker import Tracker

__all__ = [
    "Activation",
    "Barrier",
    "Bitmap",
    "BitmapBrokenError",
    "BitmapError",
    "BitmapExistsError",
    "BitmapInconsistentError",
    "BitmapNotFoundError",
    "BitmapStaleError",
    "ChangedWhileReadingError",
    "CommitError",
    "Convergence",
    "Edit",
    "Fate",
    "FlushReport",
    "FormatError",
    "Image",
    "ImageLockedError",
    "LimitError",
    "Pending",
    "Plan",
    "Problem",
    "Qcow2BmError",
    "QmpError",
    "QmpRefusedError",
    "ReadOnlyImageError",
    "ShortReadError",
    "StateError",
    "StopReport",
    "Storage",
    "StorageError",
    "Totals",
    "Tracker",
    "TrackerGroup",
    "UnsupportedError",
    "WritableStorage",
    "Write",
    "__version__",
    "open",
]

_HOMES = {
    "Activation": "qcow2bm.tracker.handover",
    "Fate": "qcow2bm.migration.evidence",
    "Convergence": "qcow2bm.tracker.reports",
    "FlushReport": "qcow2bm.tracker.reports",
    "Pending": "qcow2bm.tracker.reports",
    "StopReport": "qcow2bm.tracker.reports",
    "Tracker": "qcow2bm.tracker.tracker",
    "TrackerGroup": "qcow2bm.tracker.group",
    "Barrier": "qcow2bm.clusters.plan",
    "Bitmap": "qcow2bm.api.bitmap",
    "Edit": "qcow2bm.api.edit",
    "Image": "qcow2bm.api.image",
    "Plan": "qcow2bm.clusters.plan",
    "open": "qcow2bm.api.image",
    "Problem": "qcow2bm.problems",
    "Storage": "qcow2bm.storage.interface",
    "Totals": "qcow2bm.bitmaps.bit_reader",
    "WritableStorage": "qcow2bm.storage.interface",
    "Write": "qcow2bm.clusters.plan",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'qcow2bm' has no attribute {name!r}")
    value: object = getattr(import_module(_HOMES.get(name, "qcow2bm.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
