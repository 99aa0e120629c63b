"""Gives the copies in an image the names of their originals, where a rescue was interrupted.

*Spec*: spec/rescue.md, "Finish".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

from qcow2bm.bitmaps.status import INCONSISTENT, VALID
from qcow2bm.log import logger
from qcow2bm.qmp.names import original_of
from qcow2bm.units import escape

if TYPE_CHECKING:
    from qcow2bm.api import Edit, Image


class CopyRename(NamedTuple):
    """The result for one copy: the copy has the name of its original, or is left, and why."""

    copy: str
    name: str
    outcome: Literal["renamed", "left"]
    reason: str = ""


def rename_copies(image: Image, edit: Edit) -> list[CopyRename]:
    """Puts the copies in the place of their originals, in an edit; ``rescue finish``.

    Raises as `Edit.remove` and `Edit.rename` do.
    """
    found = []
    for name in edit.names:
        original = original_of(name)
        if not original:
            continue
        reason = _why_left(image, name, original)
        if not reason:
            if original in image.bitmaps:  # inconsistent: QEMU had a veto on storing it
                edit.remove(original)
            edit.rename(name, original)
        done = CopyRename(name, original, "left" if reason else "renamed", reason)
        more = f": {reason}" if reason else ""
        logger.info('rescue finish: "%s" %s%s', escape(name), done.outcome, more)
        found.append(done)
    return found


def _why_left(image: Image, copy: str, original: str) -> str:
    if original in image.bitmaps and image.bitmaps[original].status != INCONSISTENT:
        return "the original is there as well: remove one of them"
    status = image.bitmaps[copy].status
    if status != VALID:
        return f"it is {status}: remove it, and take a full backup"
    return ""
