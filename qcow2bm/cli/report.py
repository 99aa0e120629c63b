"""What all reading commands share in opening an image and reporting on it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import TYPE_CHECKING

from qcow2bm.api import Bitmap, Image, open
from qcow2bm.bitmaps.status import VALID
from qcow2bm.cli.console import say
from qcow2bm.problems import Problem
from qcow2bm.units import escape

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from qcow2bm.cli.rows import RowPrinter

    Rows = Iterator[tuple[NDArray[np.int64], NDArray[np.int64], int]]

PROBLEMS_FOUND = 2


def open_image(arguments: argparse.Namespace) -> Image:
    """The image a reading command names; raises as `qcow2bm.open` does."""
    return open(arguments.image, force_share=arguments.force_share)


def valid_bitmaps(image: Image) -> tuple[list[Bitmap], list[str]]:
    """The bitmaps that are valid, and of each other one that it is left out, and why."""
    bitmaps = [image.bitmap(entry.index) for entry in image.directory]
    left_out = [f"{_label(b)} is {b.status}, and left out" for b in bitmaps if b.status != VALID]
    return [bitmap for bitmap in bitmaps if bitmap.status == VALID], left_out


def _label(bitmap: Bitmap) -> str:
    name = bitmap.entry.name
    return f"bitmap @{bitmap.index}" if name is None else f'bitmap "{escape(name)}"'


def status(problems: Iterable[Problem]) -> int:
    """The exit status of a command that did its work but found these problems."""
    return PROBLEMS_FOUND if any(problem.is_serious for problem in problems) else 0


def warn(name: str, problems: Iterable[Problem]) -> None:
    """One line on standard error for each problem that makes the exit status 2."""
    for problem in problems:
        if problem.is_serious:
            say(f"warning: {escape(name)}: {problem.severity}: {problem.message}")


def write_rows(opening: bytes, printer: RowPrinter, rows: Rows, closing: bytes) -> None:
    """Writes rows that each begin with a comma between two pieces of JSON."""
    from qcow2bm.cli.rows import BLOCK_ROWS

    # Nothing is written before the first rows are there: most failures come before them.
    beginning = list(islice(rows, 1))
    sys.stdout.flush()
    out = sys.stdout.buffer
    out.write(opening)
    comma = 1  # which the first row must not have
    for firsts, seconds, phase in chain(beginning, rows):
        for start in range(0, len(firsts), BLOCK_ROWS):
            part = slice(start, start + BLOCK_ROWS)
            out.write(printer.print(firsts[part], seconds[part], phase)[comma:])
            comma = 0
    out.write(closing)
