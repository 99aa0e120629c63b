"""Interrupts (Ctrl-C) at chosen lines of this library."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


def can_be_interrupted(frame: FrameType) -> bool:
    """Whether Python may look for signals there.

    It does so when functions begin and calls return, but not at a `try:`, before the end of a
    `with` is called, or before an assignment that a `finally` begins with. What is raised there
    would leave a lock held, and no code could prevent that.
    """
    code, number, instruction = frame.f_code, frame.f_lineno, frame.f_lasti
    # Each line is asked for as often as it runs. A code object takes long to be hashed.
    place = code.co_filename, code.co_qualname, number, instruction
    if place not in _KNOWN:
        line = linecache.getline(code.co_filename, number).strip()
        first = min(start for start, _, found in code.co_lines() if found == number)
        is_end_of_with = line.startswith("with ") and instruction > first
        above = linecache.getline(code.co_filename, number - 1).strip()
        _KNOWN[place] = line != "try:" and not is_end_of_with and above != "finally:"
    return _KNOWN[place]


_KNOWN: dict[tuple[str, str, int, int], bool] = {}


class Interrupter:
    """Raises KeyboardInterrupt at one of the lines that run in the files of a folder.

    Attributes:
        was_hit: whether so many lines ran.
    """

    def __init__(self, at: int, folder: str) -> None:
        """``at`` is the number of the line, counted from 0 as the lines run."""
        self.was_hit = False
        self._left, self._folder = at, folder

    @contextmanager
    def active(self) -> Iterator[None]:
        """Counts lines, and interrupts one, in the block."""
        before = sys.gettrace()
        sys.settrace(self._enter)
        try:
            yield
        finally:
            sys.settrace(before)

    def _enter(self, frame: FrameType, event: str, argument: object) -> Any:
        return self._step if frame.f_code.co_filename.startswith(self._folder) else None

    def _step(self, frame: FrameType, event: str, argument: object) -> Any:
        if event == "line" and not self.was_hit and can_be_interrupted(frame):
            self._left -= 1
            if self._left < 0:
                self.was_hit = True
                raise KeyboardInterrupt
        return self._step
