"""Rescuing the bitmaps of a running virtual machine around a migration: the public functions.

`Monitor` connects to the machine. The other functions do what the commands ``rescue`` and
``sidecar save --qmp`` do:

========================  ================================  ======================
command                   function                          returns
========================  ================================  ======================
``rescue start``          `lift_vetoes`                     `RescueReport`
``rescue arm``            `arm`                             `ArmReport`
``rescue verdict``        `judge`, then `settle` each       `VerdictReport`, `Settlement`
``rescue finish``         `rename_copies`                   list of `CopyRename`
``sidecar save --qmp``    `save_sidecar`                    `MachineSidecar`
========================  ================================  ======================

*Spec*: spec/rescue.md; spec/sidecar.md, "A running machine".
"""

from __future__ import annotations

from qcow2bm.qmp.answers import Answer
from qcow2bm.qmp.arm import ArmedNode, ArmReport, Obstacle, arm
from qcow2bm.qmp.asyncio_monitor import AsyncioMonitor
from qcow2bm.qmp.bitmap_copies import Omission
from qcow2bm.qmp.client import Monitor
from qcow2bm.qmp.commands import DEFAULT_TIMEOUT, QmpCommands
from qcow2bm.qmp.connect import connect
from qcow2bm.qmp.copies import CopyRename, rename_copies
from qcow2bm.qmp.libvirt import LibvirtMonitor
from qcow2bm.qmp.machine import BitmapMapping, Node, NodeBitmap, NodeChoiceError
from qcow2bm.qmp.save import MachineSidecar, save_sidecar
from qcow2bm.qmp.settlement import (
    BitmapSettlement,
    Remedy,
    Settlement,
    SettlementOutcome,
    settle,
)
from qcow2bm.qmp.verdict import Verdict, VerdictReport, VerdictWord, judge
from qcow2bm.qmp.veto import BitmapRescue, Proof, RescueOutcome, RescueReport, lift_vetoes

__all__ = [
    "DEFAULT_TIMEOUT",
    "Answer",
    "ArmReport",
    "ArmedNode",
    "AsyncioMonitor",
    "BitmapMapping",
    "BitmapRescue",
    "BitmapSettlement",
    "CopyRename",
    "LibvirtMonitor",
    "MachineSidecar",
    "Monitor",
    "Node",
    "NodeBitmap",
    "NodeChoiceError",
    "Obstacle",
    "Omission",
    "Proof",
    "QmpCommands",
    "Remedy",
    "RescueOutcome",
    "RescueReport",
    "Settlement",
    "SettlementOutcome",
    "Verdict",
    "VerdictReport",
    "VerdictWord",
    "arm",
    "connect",
    "judge",
    "lift_vetoes",
    "rename_copies",
    "save_sidecar",
    "settle",
]
