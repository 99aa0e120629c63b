"""Putting saved bitmaps into an image, wherever they were saved.

*Spec*: spec/sidecar.md, "Evidence".
"""

from __future__ import annotations

from collections.abc import Sequence

from qcow2bm import sidecar
from qcow2bm.cli.arguments import RestoringArguments
from qcow2bm.cli.images import open_to_edit
from qcow2bm.cli.messages import CommandError, about
from qcow2bm.cli.output import print_dry_run

_DOUBT = "the disk may have been written to since the bitmaps were saved"
_CURES = "give --assert-unchanged if you know that it was not, or --as-dirty-ranges-unknown"


def restore(
    arguments: RestoringArguments, bitmaps: Sequence[sidecar.SavedBitmap], header: bytes = b""
) -> None:
    """Puts bitmaps into an image in one edit, unless the disk may have changed meanwhile.

    Args:
        arguments: those of the command.
        bitmaps: the bitmaps, and a sentinel among them as evidence.
        header: the header of the image that the bitmaps were saved from, if it is known.

    Raises:
        CommandError: the disk may have changed, or the bitmaps do not fit the image.
        StorageError, CommitError: as an edit does.
    """
    is_evidence_needed = not (arguments.is_unchanged or arguments.is_all_dirty)
    plan = None
    with (
        about(arguments.image, ValueError),
        open_to_edit(arguments.image, arguments) as image,
    ):
        doubt = sidecar.reason_for_doubt(image, bitmaps, header) if is_evidence_needed else ""
        if doubt:
            raise CommandError(image.name, f"{_DOUBT}: {doubt}; {_CURES}")
        with image.edit(dry_run=arguments.dry_run) as edit:
            sidecar.restore(image, edit, bitmaps, is_all_dirty=arguments.is_all_dirty)
            if arguments.dry_run:
                plan = edit.plan()
    if plan is not None:
        print_dry_run(arguments, arguments.image, plan)
