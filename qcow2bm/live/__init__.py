"""Short stops of machines on unmodified QEMU: their bitmaps are taken out while the guest runs.

QEMU stores every persistent bitmap when the machine stops. `offload` copies the bitmaps into a
file and removes them from QEMU. One coarse bitmap for each disk, the tail, records what is written
from then on, and takes hardly any time to store. `restore` puts the bitmaps back into whichever
machine has the disks then, and adds to them what the tail recorded; `restore_offline` does the same
in an image.

========================  ======================  ======================
command                   function                returns
========================  ======================  ======================
``live offload``          `offload`               `OffloadReport`
``live restore --qmp``    `restore`               `RestoreReport`
``live restore``          `restore_offline`       `RestoreReport`
``live record``           `record`                `RecorderFacts`
``live collect``          `collect`               `RecorderFacts`
``live status``           `status`                `LiveStatus`
``live remove``           `remove`                `NodeBitmap`
========================  ======================  ======================

*Spec*: spec/live.md.
"""

from __future__ import annotations

from qcow2bm.format.offload_file import OffloadPlan, PlannedBitmap, PlannedNode
from qcow2bm.live.exact import RecorderFacts, collect, record
from qcow2bm.live.offload import OffloadReport, offload
from qcow2bm.live.remove import remove
from qcow2bm.live.restore import restore
from qcow2bm.live.restore_offline import restore_offline
from qcow2bm.live.restore_report import (
    BitmapReturn,
    RestoreOutcome,
    RestoreReport,
    WrittenFacts,
)
from qcow2bm.live.status import (
    BitmapPlace,
    BitmapStatus,
    LiveStatus,
    NodeStatus,
    OffloadedBitmap,
    OffloadStep,
    status,
)
from qcow2bm.live.stop_limit import Limited
from qcow2bm.live.tail import DEFAULT_GRANULARITY as DEFAULT_TAIL_GRANULARITY
from qcow2bm.qmp.answers import Answer
from qcow2bm.qmp.asyncio_monitor import AsyncioMonitor
from qcow2bm.qmp.bitmap_copies import Omission
from qcow2bm.qmp.client import Monitor
from qcow2bm.qmp.commands import DEFAULT_TIMEOUT, QmpCommands
from qcow2bm.qmp.connect import connect
from qcow2bm.qmp.libvirt import LibvirtMonitor
from qcow2bm.qmp.machine import NodeBitmap, NodeChoiceError

__all__ = [
    "DEFAULT_TAIL_GRANULARITY",
    "DEFAULT_TIMEOUT",
    "Answer",
    "AsyncioMonitor",
    "BitmapPlace",
    "BitmapReturn",
    "BitmapStatus",
    "LibvirtMonitor",
    "Limited",
    "LiveStatus",
    "Monitor",
    "NodeBitmap",
    "NodeChoiceError",
    "NodeStatus",
    "OffloadPlan",
    "OffloadReport",
    "OffloadStep",
    "OffloadedBitmap",
    "Omission",
    "PlannedBitmap",
    "PlannedNode",
    "QmpCommands",
    "RecorderFacts",
    "RestoreOutcome",
    "RestoreReport",
    "WrittenFacts",
    "collect",
    "connect",
    "offload",
    "record",
    "remove",
    "restore",
    "restore_offline",
    "status",
]
