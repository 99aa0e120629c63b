"""The command ``dump``: everything about the bitmaps of an image."""

from __future__ import annotations

import argparse
from typing import NamedTuple

from qcow2bm.api import Bitmap
from qcow2bm.bitmaps.bit_reader import Totals
from qcow2bm.bitmaps.status import INCONSISTENT, STALE, VALID
from qcow2bm.cli import addressing, report


class Options(NamedTuple):
    """Which of a bitmap's bits to read, and for what."""

    totals: bool
    stale: bool
    extents: bool
    sha256: bool


def run(arguments: argparse.Namespace) -> int:
    """Prints the dump; returns the exit status."""
    sha256 = arguments.sha256 or arguments.extents
    options = Options(arguments.count, arguments.stale, arguments.extents, sha256)
    with report.open_image(arguments) as image:
        problems = image.problems
        bitmaps = [image.bitmap(entry.index) for entry in image.directory]
        if arguments.bitmap is not None:
            bitmaps = [addressing.find(image, arguments.bitmap)]
        if arguments.output == "json":
            from qcow2bm.cli.dump_json import print_dump
        else:
            from qcow2bm.cli.dump_text import print_dump
        print_dump(image, bitmaps, problems, options)
    return report.status(problems)


def totals(bitmap: Bitmap, status: str, options: Options) -> Totals | None:
    """Dirty bytes and extents, if they are wanted and can be had."""
    if status == VALID and options.totals:
        return bitmap.totals()
    if status in (INCONSISTENT, STALE) and options.stale and bitmap.has_stale_bits:
        return bitmap.stale_totals()
    return None
