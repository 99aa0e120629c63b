"""A user who runs what a command advises, and then what is advised after that, until no more is."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from support.console import Result, run

import qcow2bm

Run = Callable[[Sequence[str]], Result]
"""Runs a program that does not belong to this library."""

_NEXT = re.compile(r"^  next: (.*)(?:\n        cost: (.*(?:\n {14}.*)*))?$", re.MULTILINE)
_MOST_ROUNDS = 10


class Followed(NamedTuple):
    """The end of the advice.

    Attributes:
        commands: what was advised and run.
        costs: the costs that were named beforehand, as one text.
        last: the last output, which advises nothing more.
    """

    commands: list[str]
    costs: str
    last: Result


def names_in(path: Path) -> set[str]:
    """The names of all bitmaps in the directory of an image."""
    with qcow2bm.open(path) as image:
        return {entry.name for entry in image.directory if entry.name}


def advised(output: str) -> list[tuple[str, str]]:
    """The commands that an output advises, each with its cost."""
    return _NEXT.findall(output)


def follow(
    folder: Path, other_program: Run | None = None, first: Sequence[str] = ("check", "vm.qcow2")
) -> Followed:
    """Runs a command, and all that is advised; raises AssertionError if a command fails.

    Without ``other_program``, the advice ends where another program is advised.
    """
    commands: list[str] = []
    costs: list[str] = []
    for _ in range(_MOST_ROUNDS):
        last = run(first, folder)
        found = advised(last.out)
        if not found:
            return Followed(commands, " ".join(costs), last)
        for command, cost in found:
            words = shlex.split(command)
            if words[0] == "qcow2bm":
                done = run(words[1:], folder)
            elif other_program:
                done = other_program(words)
            else:
                return Followed(commands, " ".join(costs), last)
            commands.append(command)
            costs.append(cost)
            is_partial = words[1] == "repair" and "will be left" in cost
            assert done.status in ((0, 2) if is_partial else (0,)), (commands, done)
    raise AssertionError(f"the advice goes round in a circle: {commands}")
