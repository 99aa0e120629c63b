"""Choosing the bitmaps that a rule removes.

*Spec*: spec/edit.md, "Pruning".
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal, NamedTuple

from qcow2bm.bitmaps.rules import RESERVED_PREFIX
from qcow2bm.errors import BitmapStaleError
from qcow2bm.units import align_up, escape

if TYPE_CHECKING:
    from qcow2bm.api.bitmap import Bitmap
    from qcow2bm.api.image import Image

KeptReason = Literal["named", "pattern", "reserved", "recoverable", "not-selected"]
"""Why a bitmap is kept: see `Pruning`."""


class Pruning(NamedTuple):
    """The bitmaps that a rule removes, and those that it keeps, in the order of the directory.

    Attributes:
        removed: the names of the bitmaps to be removed.
        kept: the name of each other bitmap, and why it is kept. "named": it is to be kept by its
            name; "pattern": by a pattern; "reserved": this library added it for itself;
            "recoverable": `Image.recover` makes it valid without a loss; "not-selected": no rule
            selects it.
        freed_bytes: the clusters that are free in the image file afterwards, and were not before.
    """

    removed: tuple[str, ...]
    kept: tuple[tuple[str, KeptReason], ...]
    freed_bytes: int


def choose_to_prune(
    image: Image,
    *,
    keep: Iterable[str] = (),
    keep_patterns: Iterable[str] = (),
    inconsistent: bool = False,
    disabled: bool = False,
) -> Pruning:
    """Returns which bitmaps of an image the rules remove; nothing is written.

    An edit then removes them, all or none: ``for name in chosen.removed: edit.remove(name)``.

    Bitmaps that match ``inconsistent`` or ``disabled`` are selected; if neither is given, all are.
    Of these, the bitmaps are removed that nothing keeps.

    Args:
        image: an image that is sound enough to be edited.
        keep: names of bitmaps to keep.
        keep_patterns: patterns of names to keep, as `fnmatch.fnmatchcase` takes them.
        inconsistent: select bitmaps that are in_use.
        disabled: select bitmaps that do not record.

    Raises:
        BitmapNotFoundError: there is no bitmap of a name in ``keep``.
        BitmapStaleError: the bitmaps of the image are stale; `Edit.remove_all` removes them.
        ChangedWhileReadingError, ImageLockedError, StorageError: reading failed.
        ValueError: no rule is given; or only rules that keep, and they keep no bitmap.
    """
    names, patterns = frozenset(keep), tuple(keep_patterns)
    if not (names or patterns or inconsistent or disabled):
        raise ValueError("give a rule: which bitmaps to keep, or inconsistent, or disabled")
    bitmaps = image.bitmaps
    for name in sorted(names - bitmaps.keys()):
        bitmaps[name]  # raises
    if bitmaps and not image.is_consistent:
        reason = "is stale, and stale bitmaps can only be removed all together"
        raise BitmapStaleError(next(iter(bitmaps)), reason, "salvage-or-remove-all")
    is_any_in_use = any(bitmap.in_use for bitmap in bitmaps.values())
    recoverable = frozenset(image.recoverable if is_any_in_use else ())
    selects = inconsistent or disabled

    def reason_to_keep(name: str, bitmap: Bitmap) -> KeptReason | None:
        if name in names:
            return "named"
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            return "pattern"
        if name.startswith(RESERVED_PREFIX):
            return "reserved"
        if selects and not (inconsistent and bitmap.in_use) and not (disabled and not bitmap.auto):
            return "not-selected"
        return "recoverable" if name in recoverable else None

    judged = [(name, reason_to_keep(name, bitmap)) for name, bitmap in bitmaps.items()]
    removed = tuple(name for name, reason in judged if reason is None)
    kept = tuple((name, reason) for name, reason in judged if reason is not None)
    if bitmaps and not selects and not {"named", "pattern"} & {reason for _, reason in kept}:
        shown = ", ".join(f'"{escape(pattern)}"' for pattern in patterns)
        raise ValueError(f"no name of a bitmap matches {shown}, so all bitmaps would be removed")
    return Pruning(removed, kept, _freed(image, removed))


def _freed(image: Image, removed: Iterable[str]) -> int:
    """Returns the bytes of the clusters that only these bitmaps need."""
    bitmaps = [image.bitmaps[name] for name in removed]
    spaces = [space for bitmap in bitmaps if (space := bitmap.space)]
    size = sum(entry.size for entry in image.directory)
    left = size - sum(bitmap.entry.size for bitmap in bitmaps)
    cluster_size = image.cluster_size
    directory = align_up(size, cluster_size) - align_up(left, cluster_size)
    return directory + sum(space.tables + space.data for space in spaces)
