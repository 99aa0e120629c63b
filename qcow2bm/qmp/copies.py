"""``rescue finish``: what ``rescue start`` could not end is ended in the image.

*Spec*: spec/rescue.md, "Finish".
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from qcow2bm.api import Edit, Image
from qcow2bm.bitmaps.status import INCONSISTENT, VALID
from qcow2bm.qmp.names import original_of


class CopyRename(NamedTuple):
    """What became of one copy: it has its original's name now, or is left, and why."""

    copy: str
    name: str
    outcome: Literal["renamed", "left"]
    reason: str = ""


def rename_copies(image: Image, edit: Edit) -> list[CopyRename]:
    """Puts in an edit the copies that were made of bitmaps in the place of what they are copies of.

    Raises as `Edit.remove` and `Edit.rename` do.
    """
    done = []
    for name in edit.names:
        original = original_of(name)
        if not original:
            continue
        reason = _why_left(image, name, original)
        if not reason:
            if original in image.bitmaps:  # which QEMU left there: it had a veto, too
                edit.remove(original)
            edit.rename(name, original)
        done.append(CopyRename(name, original, "left" if reason else "renamed", reason))
    return done


def _why_left(image: Image, copy: str, original: str) -> str:
    if original in image.bitmaps and image.bitmaps[original].status != INCONSISTENT:
        return "the original is there as well: remove one of them"
    status = image.bitmaps[copy].status
    if status != VALID:
        return f"it is {status}: the machine died; remove it, and take a full backup"
    return ""
