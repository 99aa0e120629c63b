"""Printing in the width and the colors that standard output can show.

On a terminal, lines are wrapped between words, and a few words have a color. Everywhere else a
command prints the same words without colors, and each line as a whole.

*Spec*: spec/cli.md, "On a terminal".
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

COLOR_CHOICES = ("auto", "always", "never")

_RED, _GREEN, _YELLOW, _BOLD = "31", "32", "33", "1"

_COLORS = {
    "valid": _GREEN,
    "inconsistent": _YELLOW,
    "stale": _YELLOW,
    "broken": _RED,
    "refused": _RED,
    "unusable": _RED,
    "lost": _RED,
    "leak": _YELLOW,
    "left": _YELLOW,
    "command": _BOLD,
}
"""The colors of statuses, severities, and commands that are to be typed next."""

_LEAST_COLUMNS = 40  # below that, wrapped text is harder to read than what the terminal makes of it
_ESCAPE = re.compile(r"\x1b\[\d*m")

_has_colors = ContextVar("has_colors", default=False)


@contextmanager
def colors(choice: str) -> Iterator[None]:
    """Lets `paint` color texts in the block, or not.

    Args:
        choice: "always" or "never"; with "auto" the environment decides, or else whether standard
            output is a terminal.
    """
    before = _has_colors.set(_are_wanted() if choice == "auto" else choice == "always")
    try:
        yield
    finally:
        _has_colors.reset(before)


def _are_wanted() -> bool:
    if os.environ.get("NO_COLOR"):  # see no-color.org
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def paint(text: str, meaning: str) -> str:
    """A text in the color of a meaning, which is a status, a severity, or "command"."""
    color = _COLORS.get(meaning)
    return f"\x1b[{color}m{text}\x1b[0m" if color and _has_colors.get() else text


def columns() -> int:
    """The width of the terminal; 80 if there is none."""
    try:
        found = int(os.environ.get("COLUMNS") or os.get_terminal_size().columns)
    except (OSError, ValueError):
        found = 0
    return max(found, _LEAST_COLUMNS) if found > 0 else 80


def print_text(text: str, hanging: int | None = None, width_elsewhere: int | None = None) -> None:
    """Prints a text, on a terminal in lines that fit.

    Args:
        text: one line.
        hanging: how far all lines but the first are indented; by default two more than the first.
        width_elsewhere: the width of the lines where there is no terminal; None for one line.
    """
    if hanging is None:
        hanging = len(text) - len(text.lstrip(" ")) + 2
    width = columns() if sys.stdout.isatty() else width_elsewhere
    for line in wrap(text, width, hanging) if width else (text,):
        print(line)


def wrap(text: str, width: int, hanging: int = 0) -> Iterator[str]:
    """Yields the lines of a text. No word is split, even if it is longer than a line."""
    line, length = "", 0
    for word in re.findall(r"\s*\S+", text):
        bare = word.lstrip()
        visible = len(_ESCAPE.sub("", bare))
        start = length + len(word) - len(bare)
        if line.strip() and start + visible > width and start > hanging:
            yield line
            word = " " * hanging + bare
            line, start = "", hanging
        line += word
        length = start + visible
    yield line
