"""Backups of the disk of a machine that is off: the public functions and types.

`plan_backup` finds out whether a backup is possible and what it will do; `back_up` does it.

*Spec*: spec/backup.md.
"""

from __future__ import annotations

from qcow2bm.backup.copying import Backup, Progress, back_up
from qcow2bm.backup.planning import PlannedBackup, Then, plan_backup

__all__ = ["Backup", "PlannedBackup", "Progress", "Then", "back_up", "plan_backup"]
