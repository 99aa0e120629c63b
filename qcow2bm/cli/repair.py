"""The commands ``repair`` and ``undo``.

*Spec*: spec/repair.md.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from qcow2bm.api import repair as api
from qcow2bm.cli import files, report
from qcow2bm.cli.console import fail, say
from qcow2bm.cli.edit import plan_as_json, print_plan
from qcow2bm.cli.facts import count, json_text
from qcow2bm.errors import ImageLockedError, StateError, StorageError
from qcow2bm.format.undo_file import UndoLog, build_seal, build_undo, parse_undo
from qcow2bm.storage.new_file import append, require_new, write_new
from qcow2bm.units import escape

if TYPE_CHECKING:
    from qcow2bm.checking.repair import Lost, Repair

SCHEMA = 1

_MOST_LISTED = 16


def run(arguments: argparse.Namespace) -> int:
    """Does one of the commands; returns the exit status."""
    return _undo(arguments) if arguments.command == "undo" else _repair(arguments)


def _repair(arguments: argparse.Namespace) -> int:
    wait, lossless, only = arguments.wait, arguments.lossless, arguments.only or None
    if arguments.dry_run:
        try:
            done = api.plan_repair(arguments.image, lossless=lossless, only=only, lock_timeout=wait)
        except ImageLockedError as error:  # of reading, which is not what is wanted
            raise ImageLockedError(error.path, error.held, "writing") from error
    else:
        keep = None
        if arguments.undo is not None:
            require_new(arguments.undo)
            keep = _keeper(arguments.undo)
        locking = not arguments.no_lock
        done = api.repair(
            arguments.image,
            keep,
            lossless=lossless,
            only=only,
            lock_timeout=wait,
            locking=locking,
        )
    if arguments.output == "json":
        print(json.dumps(_document(arguments, done), indent=1))
    else:
        _print(arguments, done)
    return report.PROBLEMS_FOUND if done.left or (arguments.dry_run and done.plan.steps) else 0


def _keeper(path: str) -> Callable[[UndoLog], Callable[[int], None]]:
    def keep(undo: UndoLog) -> Callable[[int], None]:
        write_new(path, build_undo(undo))
        return lambda mtime_ns: _seal(path, mtime_ns)

    return keep


def _seal(path: str, mtime_ns: int) -> None:
    """Notes the time of the last write; without it the way back needs somebody's word."""
    if os.path.isfile(path):
        try:
            append(path, build_seal(mtime_ns))
        except StorageError as error:
            say(f"warning: {error}; the image is repaired, undo will need --assert-unchanged")


def _document(arguments: argparse.Namespace, done: Repair) -> dict[str, object]:
    return {
        "schema": SCHEMA,
        "filename": json_text(arguments.image),
        "dry-run": arguments.dry_run,
        "lost": [
            {"name": None if name is None else json_text(name), "reason": json_text(reason)}
            for name, reason in done.lost
        ],
        "renamed": [{"name": json_text(a), "new-name": json_text(b)} for a, b in done.renamed],
        "mended": [{"id": found.id, "message": json_text(found.message)} for found in done.mended],
        "left": [{"id": found.id, "message": json_text(found.message)} for found in done.left],
        "leaked-clusters": done.leaked_clusters,
        "plan": plan_as_json(done.plan),
    }


def _print(arguments: argparse.Namespace, done: Repair) -> None:
    for lost in done.lost:
        print(f"lost: {_name(lost)} ({lost.reason})")
    for old, new in done.renamed:
        print(f'renamed: "{escape(old)}" to "{escape(new)}"')
    what = "to mend" if arguments.dry_run else "mended"
    for found in done.mended[:_MOST_LISTED]:
        print(f"{what}: {found.message} ({found.id})")
    if len(done.mended) > _MOST_LISTED:
        print(f"{what}: {count(len(done.mended) - _MOST_LISTED, 'more problem')}")
    for found in done.left:
        print(f"left: {found.message} ({found.id})")
    if arguments.dry_run and done.plan.steps:
        print_plan(arguments, done.plan)
    elif not done.plan.steps:
        print("nothing was changed" if done.left else "nothing to mend")
    else:
        print("mended" if not done.left else f"mended but for {count(len(done.left), 'problem')}")
        if arguments.undo is not None:
            print(
                f"to take it back: qcow2bm undo {escape(arguments.image)} {escape(arguments.undo)}"
            )


def _name(lost: Lost) -> str:
    return "bitmaps of unknown name" if lost.name is None else f'"{escape(lost.name)}"'


def _undo(arguments: argparse.Namespace) -> int:
    image = arguments.image
    with files.named(arguments, arguments.file):
        undo = parse_undo(b"".join(files.pieces(arguments.file)))
    try:
        if arguments.dry_run:
            wait, word = arguments.wait, arguments.is_unchanged
            print_plan(arguments, api.plan_undo(image, undo, is_asserted=word, lock_timeout=wait))
            return 0
        is_done = api.undo(
            image,
            undo,
            is_asserted=arguments.is_unchanged,
            lock_timeout=arguments.wait,
            locking=not arguments.no_lock,
        )
    except StateError as error:
        cure = "" if arguments.is_unchanged else "; if you know better: --assert-unchanged"
        return fail(image, f"{error}{cure}")
    except ImageLockedError as error:
        raise ImageLockedError(error.path, error.held, "writing") from error
    print("all is as before the repair" if is_done else "nothing to take back")
    return 0
