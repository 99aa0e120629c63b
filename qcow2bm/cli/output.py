"""Printing results: facts in two columns, sizes, problems, plans, and JSON.

*Spec*: spec/json.md.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from qcow2bm import Barrier, Image, Plan, Problem, Write
from qcow2bm.cli.arguments import OutputArguments
from qcow2bm.cli.messages import say
from qcow2bm.cli.terminal import paint, print_text
from qcow2bm.units import escape, format_size

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from qcow2bm.cli.rows import RowPrinter

    Ends = int | NDArray[np.int64]
    Rows = Iterator[tuple[NDArray[np.int64], NDArray[np.int64], Ends]]

Document = dict[str, Any]

SCHEMA = 1
"""The version of most documents; spec/json.md describes them."""

PROBLEMS_FOUND = 2
"""The exit status of a command that did its work, but found problems."""

WIDTH = 100
_FACTS_COLUMN = 18


# Text


def print_facts(facts: Iterable[tuple[str, str]], indent: str = "") -> None:
    """Prints labels and values, one pair on a line, all values in one column."""
    for label, value in facts:
        print_text(f"{indent}{label + ':':<{_FACTS_COLUMN - len(indent)}}{value}", _FACTS_COLUMN)


def print_wrapped(text: str, indent: str) -> None:
    """Prints a text in lines of the terminal's width, or of `WIDTH`."""
    print_text(f"{indent}{text}", len(indent), WIDTH)


def command_line(argv: Sequence[str]) -> str:
    """Returns a command as it can be pasted into a shell, if all of it can be printed."""
    line = shlex.join(argv)
    return line if line.isprintable() else escape(line)


def size(size_bytes: int) -> str:
    """A size such as ``64 KiB (65536 bytes)``; below 1 KiB only the bytes."""
    spelled = format_size(size_bytes)
    return spelled if size_bytes < 1024 else f"{spelled} ({size_bytes} bytes)"


def count(number: int, thing: str, things: str | None = None) -> str:
    """A number and what is counted, in the singular or the plural: ``2 bitmaps``."""
    return f"{number} {thing if number == 1 else things or thing + 's'}"


def percent(part: int, whole: int) -> float:
    """The percentage that a part is of ``whole``; 0 if ``whole`` is 0."""
    return 100 * part / whole if whole else 0.0


def several_nodes(nodes: Sequence[str]) -> str:
    """Says that one of these nodes must be chosen."""
    listed = ", ".join(map(quoted, nodes))
    return f"several nodes have such bitmaps: choose one with --node ({listed})"


def quoted(name: str) -> str:
    """A name from an image or an argument, in quotes and safe to print."""
    return f'"{escape(name)}"'


def listed(names: Iterable[str], most: int | None = None) -> str:
    """Names in one line, in quotes; if there are more than ``most``, only so many, and how many."""
    known = list(names)
    more = f" and {len(known) - most} more" if most is not None and len(known) > most else ""
    return ", ".join(map(quoted, known[:most])) + more


def print_plan(plan: Plan) -> None:
    """Prints what a dry run would write."""
    if not plan.steps:
        print("nothing to write: the bitmaps are like that already")
        return
    writes, barriers = count(len(plan.writes), "write"), count(plan.barriers, "barrier")
    print(f"{plan.length} bytes in {writes}, {barriers}; nothing was written")
    print(f"{'offset':>14}  {'bytes':>10}")
    for number, step in enumerate(plan.steps):
        if isinstance(step, Barrier):
            print_text(f"{'':>14}  {'barrier':>10}  {step.what}", 28)
        else:
            mark = "  <- commit" if number == plan.commit_point else ""
            print_text(f"{step.offset:#14x}  {step.length:>10}  {step.what}{mark}", 28)


def print_dry_run(arguments: OutputArguments, path: str, plan: Plan) -> None:
    """Prints what a dry run would write to an image, as ``--output`` says."""
    if arguments.output == "json":
        print_json({**head(path), **plan_as_json(plan)})
    else:
        print_plan(plan)


# Problems


def owner_of(image: Image, problem: Problem) -> str | None:
    """The name of the bitmap that a problem concerns, if it concerns one that has a name."""
    index = problem.bitmap_index
    return None if index is None else image.directory[index].name


def print_refusal(problems: Iterable[Problem]) -> None:
    """Prints a line if QEMU refuses an image with these problems."""
    if any(problem.severity == "refused" for problem in problems):
        print(paint("QEMU will not open this image", "refused"))


def status_of(problems: Iterable[Problem]) -> int:
    """The exit status of a command that did its work, but found these problems."""
    return PROBLEMS_FOUND if any(problem.is_serious for problem in problems) else 0


def warn_of(name: str, problems: Iterable[Problem]) -> None:
    """Prints a line on standard error for each problem that makes the exit status 2."""
    for problem in problems:
        if problem.is_serious:
            say(f"warning: {escape(name)}: {problem.severity}: {problem.message}")


# JSON


def head(subject: str, key: str = "filename") -> Document:
    """The first keys of every document: the schema, and the file or VM as it was given."""
    return {"schema": SCHEMA, key: json_text(subject)}


def print_json(document: Document) -> None:
    """Prints a document."""
    print(as_json(document, indent=1))


def as_json(value: object, indent: int | None = None) -> str:
    """A value as JSON."""
    import json  # most uses of a command are for people

    return json.dumps(value, indent=indent)


def json_text(text: str) -> str:
    """A text with U+FFFD for all that is not Unicode, as JSON can hold it."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def json_text_or_null(text: str | None) -> str | None:
    """The result of `json_text`, or None for None."""
    return None if text is None else json_text(text)


def problem_as_json(image: Image, problem: Problem) -> Document:
    """A problem of an image, as "Problem" in spec/json.md."""
    return {
        "id": problem.id,
        "severity": problem.severity,
        "structure": problem.structure,
        "field": problem.field or None,
        "offset": problem.offset,
        "message": json_text(problem.message),
        "bitmap": json_text_or_null(owner_of(image, problem)),
        "bitmap-index": problem.bitmap_index,
    }


def plan_as_json(plan: Plan) -> Document:
    """A plan, as "Plan" in spec/json.md."""
    steps = [
        {
            "type": "barrier" if plan.is_barrier(number) else "write",
            "what": step.what,
            "offset": step.offset if isinstance(step, Write) else None,
            "length": step.length if isinstance(step, Write) else None,
            "commit": number == plan.commit_point,
        }
        for number, step in enumerate(plan.steps)
    ]
    return {"bytes": plan.length, "barriers": plan.barriers, "steps": steps}


def write_rows(opening: bytes, printer: RowPrinter, rows: Rows, closing: bytes) -> None:
    """Writes rows, each of which begins with a comma, between two pieces of JSON.

    Nothing is written before the first rows are there, since most failures come before them.
    """
    from qcow2bm.cli.rows import BLOCK_ROWS

    beginning = list(islice(rows, 1))
    sys.stdout.flush()
    out = sys.stdout.buffer
    out.write(opening)
    comma = 1  # which the first row must not have
    for firsts, seconds, ends in chain(beginning, rows):
        for start in range(0, len(firsts), BLOCK_ROWS):
            part = slice(start, start + BLOCK_ROWS)
            here = ends if isinstance(ends, int) else ends[part]
            out.write(printer.print(firsts[part], seconds[part], here)[comma:])
            comma = 0
    out.write(closing)
