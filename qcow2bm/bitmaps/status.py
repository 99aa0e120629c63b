"""The one place that decides the status of a bitmap.

*Spec*: spec/bitmaps.md, "Status".
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Literal

from qcow2bm.bitmaps.directory import BitmapDirectory
from qcow2bm.format.directory import DirectoryEntry
from qcow2bm.problems import Problem

Status = Literal["valid", "inconsistent", "stale", "broken"]
VALID: Final = "valid"
INCONSISTENT: Final = "inconsistent"
STALE: Final = "stale"
BROKEN: Final = "broken"


def judge(
    entry: DirectoryEntry,
    directory: BitmapDirectory,
    distrust: Problem | None,
    problems: Iterable[Problem],
) -> tuple[Status, str]:
    """Returns the status of a bitmap with these problems, and for a broken one the reason.

    ``distrust`` is the problem of the directory as a whole that the survey of tables found.

    "stale" if the autoclear bit is off, else "broken" if its metadata cannot be trusted, else
    "inconsistent" if it is in_use, else "valid".
    """
    if not directory.is_consistent:
        return STALE, ""
    distrust = directory.distrust or distrust
    if distrust:
        return BROKEN, distrust.message
    for found in problems:
        if found.breaks_bitmap:
            return BROKEN, found.message
    return (INCONSISTENT, "") if entry.in_use else (VALID, "")
