"""Deciding whether an image is sound enough to be edited.

*Spec*: spec/edit.md, "What can be edited".
"""

from __future__ import annotations

from qcow2bm.bitmaps.metadata import Metadata
from qcow2bm.errors import FormatError, UnsupportedError
from qcow2bm.format.features import INCOMPATIBLE_CORRUPT, INCOMPATIBLE_DIRTY
from qcow2bm.format.header import FIELD_OFFSETS
from qcow2bm.problem_errors import as_error


def require_editable(metadata: Metadata) -> None:
    """Returns if the image is so sound that a change cannot make anything worse.

    Raises:
        FormatError: the image is marked dirty or corrupt, or has a fault that forbids an edit.
        UnsupportedError: the image is of version 2.
        ImageLockedError, ChangedWhileReadingError, StorageError: reading the tables failed.
    """
    file = metadata.file
    if file.header.version < 3:
        raise UnsupportedError(
            "bitmaps in qcow2 version 2; upgrade the image with qemu-img amend -o compat=1.1"
        )
    bits, offset = file.header.incompatible_features, FIELD_OFFSETS["incompatible_features"]
    for bit, reason in (
        (INCOMPATIBLE_CORRUPT, "has the corrupt bit"),
        (INCOMPATIBLE_DIRTY, "has the dirty bit, so refcounts may be outdated"),
    ):
        if bits & bit:
            reason += ": repair the image first (qemu-img check -r all)"
            raise FormatError("header", "incompatible_features", offset, reason)
    for found in metadata.problems:
        if (found.is_fault or found.kind.forbids_edit) and not found.kind.is_fittable:
            raise as_error(found, "; an image with such a fault is not edited")
    shared = metadata.survey.first_shared
    if shared is not None:
        reason = "is used twice, by structures of the image; such an image is not edited"
        raise FormatError("image", "cluster", shared, reason)
