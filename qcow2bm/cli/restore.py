"""Putting saved bitmaps into an image, wherever they were saved: what the commands share.

*Spec*: spec/sidecar.md, "Evidence".
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from qcow2bm.api import sidecar
from qcow2bm.cli.console import fail
from qcow2bm.cli.edit import open_to_edit, print_plan
from qcow2bm.clusters.plan import Plan
from qcow2bm.migration.sidecar import SavedBitmap

_DOUBT = "the disk may have been written to since the bitmaps were saved"
_CURES = "give --assert-unchanged if you know that it was not, or --as-dirty-ranges-unknown"


def restore(
    arguments: argparse.Namespace,
    bitmaps: Sequence[SavedBitmap],
    header: bytes = b"",
) -> int:
    """Puts bitmaps into an image in one edit, unless their truth is in doubt; the exit status.

    ``header`` is that of the image they are of, if it is known.
    """
    is_proof_needed = not (arguments.is_unchanged or arguments.is_all_dirty)
    try:
        with open_to_edit(arguments) as image:
            doubt = sidecar.reason_for_doubt(image, bitmaps, header) if is_proof_needed else ""
            if doubt:
                return fail(image.name, f"{_DOUBT}: {doubt}; {_CURES}")
            with image.edit(dry_run=arguments.dry_run) as edit:
                sidecar.restore(image, edit, bitmaps, is_all_dirty=arguments.is_all_dirty)
                plan = edit.plan() if arguments.dry_run else Plan()
    except ValueError as error:
        return fail(arguments.image, str(error))
    if arguments.dry_run:
        print_plan(arguments, plan)
    return 0
