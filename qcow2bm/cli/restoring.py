"""Putting saved bitmaps into an image, wherever they were saved.

*Spec*: spec/sidecar.md, "Evidence".
"""

from __future__ import annotations

from collections.abc import Sequence

from qcow2bm import sidecar
from qcow2bm.cli.arguments import RestoringArguments
from qcow2bm.cli.images import open_to_edit
from qcow2bm.cli.messages import about
from qcow2bm.cli.output import print_dry_run


def restore(
    arguments: RestoringArguments, bitmaps: Sequence[sidecar.SavedBitmap], header: bytes = b""
) -> None:
    """Puts bitmaps into an image in one edit.

    Args:
        arguments: those of the command.
        bitmaps: the bitmaps, and a sentinel among them as evidence.
        header: the header of the image that the bitmaps were saved from, if it is known.

    Raises:
        CommandError: the disk may have changed, or the bitmaps do not fit the image.
        StorageError, CommitError: as an edit does.
    """
    with about(arguments.image, ValueError), open_to_edit(arguments.image, arguments) as image:
        plan = sidecar.restore(
            image,
            bitmaps,
            header,
            is_asserted=arguments.is_unchanged,
            is_all_dirty=arguments.is_all_dirty,
            dry_run=arguments.dry_run,
        )
    if plan is not None:
        print_dry_run(arguments, arguments.image, plan)
