"""The command ``check``: everything that is wrong with an image, and what it means.

*Spec*: spec/check.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from textwrap import wrap

from qcow2bm.api import Image
from qcow2bm.cli import report
from qcow2bm.cli.dump_json import problem
from qcow2bm.cli.facts import count, json_text
from qcow2bm.problems import LEAK, REFUSED, UNUSABLE, Problem
from qcow2bm.units import escape, format_size

SCHEMA = 1
ERRORS, LEAKS = 2, 3

_WIDTH = 100


def run(arguments: argparse.Namespace) -> int:
    """Checks an image; returns the exit status."""
    with report.open_image(arguments) as image:
        checked = image.check()
        problems = (*image.problems, *checked.problems)
        if arguments.output == "json":
            print(json.dumps(_document(image, problems, checked.leaked_clusters), indent=1))
        else:
            _print(image, problems, checked.leaked_clusters)
    return _status(problems)


def _status(problems: Iterable[Problem]) -> int:
    severities = {found.severity for found in problems}
    if severities & {REFUSED, UNUSABLE}:
        return ERRORS
    return LEAKS if LEAK in severities else 0


def _document(image: Image, problems: Sequence[Problem], leaked_clusters: int) -> dict[str, object]:
    return {
        "schema": SCHEMA,
        "filename": json_text(image.name),
        "problems": [
            {
                **problem(image, found),
                "meaning": found.meaning,
                "qemu-message": found.qemu_message,
                "repairs": [found.repair] if found.repair else [],
            }
            for found in problems
        ],
        "leaked-clusters": leaked_clusters,
    }


def _print(image: Image, problems: Sequence[Problem], leaked_clusters: int) -> None:
    for found in problems:
        index = found.bitmap_index
        name = None if index is None else image.directory[index].name
        label = "" if name is None else f'bitmap "{escape(name)}": '
        print(f"{found.severity}: {label}{found.message}")
        if found.qemu_message:
            print(f'    QEMU says "{found.qemu_message}"')
        for line in wrap(found.meaning, _WIDTH - 4):
            print(f"    {line}")
        repair = f"; repair --only {found.repair}" if found.repair else ""
        print(f"    ({found.id}{repair})")
    if problems:
        print()
    if leaked_clusters:
        size = format_size(leaked_clusters * image.cluster_size)
        print(f"{count(leaked_clusters, 'cluster')} leaked: {size}")
    errors = sum(found.severity in (REFUSED, UNUSABLE) for found in problems)
    if any(found.severity == REFUSED for found in problems):
        print("QEMU will not open this image")
    print(count(errors, "error") if errors else "no errors")
