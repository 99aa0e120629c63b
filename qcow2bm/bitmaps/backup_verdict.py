"""The one place that decides whether the next incremental backup can use a bitmap.

*Spec*: spec/bitmaps.md, "Use for a backup".
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Literal, NamedTuple

from qcow2bm.bitmaps.status import BROKEN, VALID, Status
from qcow2bm.format.directory import DirectoryEntry
from qcow2bm.problems import Problem

BackupReason = Literal[
    "usable", "disabled", "inconsistent", "stale", "broken", "missing", "running"
]
USABLE: Final = "usable"
DISABLED: Final = "disabled"
MISSING: Final = "missing"


class BackupVerdict(NamedTuple):
    """Whether the next incremental backup can use a bitmap, and why.

    `Image.verdict` and `Bitmap.verdict` return it.

    Attributes:
        reason: "usable" if the backup can use the bitmap. Otherwise the reason why not:
            "disabled", "inconsistent", "stale", "broken", or "missing" if there is no such bitmap.
            The command line also says "running" if another process is writing to the image.
        message: one line for people, which names the bitmap and says what can be done.
        dirty_bytes: how many guest bytes are dirty, if the status of the bitmap is "valid".
    """

    reason: BackupReason
    message: str
    dirty_bytes: int | None = None

    @property
    def usable(self) -> bool:
        """Whether the next incremental backup can use the bitmap."""
        return self.reason == USABLE


def backup_reason(
    entry: DirectoryEntry, status: Status, reason: str, problems: Iterable[Problem]
) -> tuple[BackupReason, str]:
    """Returns the reason of the verdict on a bitmap, and for a broken bitmap the first problem.

    ``status`` and ``reason`` are what `qcow2bm.bitmaps.status.judge` returned, and ``problems``
    are the problems of the bitmap and of the header that a reader knows. If `repair` would drop the
    bitmap because of one of them, or if a problem of the header keeps QEMU from opening the image,
    no backup can use the bitmap, even if its status is "valid".
    """
    if status != VALID:
        return status, reason
    for found in problems:
        if found.costs_bitmap:
            return BROKEN, found.message
    return (USABLE if entry.auto else DISABLED), ""
