"""The commands that change bitmaps: ``add``, ``remove``, ``clear`` and so on, one edit each.

*Spec*: spec/cli.md.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable

from qcow2bm.api import Edit, Image, open
from qcow2bm.cli import addressing
from qcow2bm.cli.console import fail
from qcow2bm.cli.facts import json_text
from qcow2bm.cli.hints import explain
from qcow2bm.clusters.plan import Barrier, Plan, Write
from qcow2bm.errors import ImageLockedError, Qcow2BmError, StorageError

SCHEMA = 1


def run(arguments: argparse.Namespace) -> int:
    """Does one command; returns the exit status."""
    work = _WORK[arguments.command]
    try:
        with open_to_edit(arguments) as image, image.edit(dry_run=arguments.dry_run) as edit:
            work(arguments, image, edit)
            plan = edit.plan() if arguments.dry_run else Plan()
    except ValueError as error:
        return fail(arguments.image, str(error))
    except ImageLockedError as error:  # of reading, in a dry run or of another image
        raise ImageLockedError(error.path, error.held, "writing") from error
    except _OtherImageError as error:
        return fail(arguments.other, str(error))
    if arguments.dry_run:
        print_plan(arguments, plan)
    return 0


def print_plan(arguments: argparse.Namespace, plan: Plan) -> None:
    """What a dry run shows."""
    if arguments.output == "json":
        _print_json(arguments.image, plan)
    else:
        _print_text(plan)


class _OtherImageError(Exception):
    """What is wrong with the image the sources of a merge are in."""


def open_to_edit(arguments: argparse.Namespace) -> Image:
    """The image a command edits, open for reading if it is a dry run; raises as `open` does."""
    if arguments.dry_run:
        return open(arguments.image, lock_timeout=arguments.wait)
    wait, locking = arguments.wait, not arguments.no_lock
    return open(arguments.image, "r+", lock_timeout=wait, locking=locking)


def _add(arguments: argparse.Namespace, image: Image, edit: Edit) -> None:
    name = addressing.new_name(arguments.name)
    edit.add(name, arguments.granularity, enabled=not arguments.disabled)


def _remove(arguments: argparse.Namespace, image: Image, edit: Edit) -> None:
    if arguments.all:
        edit.remove_all()
    else:
        _each(Edit.remove)(arguments, image, edit)


def _rename(arguments: argparse.Namespace, image: Image, edit: Edit) -> None:
    name = addressing.find(image, arguments.name).name
    edit.rename(name, addressing.new_name(arguments.new))


def _copy(arguments: argparse.Namespace, image: Image, edit: Edit) -> None:
    name = addressing.find(image, arguments.name).name
    enabled = False if arguments.disabled else None
    edit.copy(name, addressing.new_name(arguments.new), arguments.granularity, enabled)


def _set(arguments: argparse.Namespace, image: Image, edit: Edit) -> None:
    edit.set_many(addressing.find(image, arguments.name).name, _ranges(arguments, image))


def _reset(arguments: argparse.Namespace, image: Image, edit: Edit) -> None:
    edit.reset_many(addressing.find(image, arguments.name).name, _ranges(arguments, image))


def _ranges(arguments: argparse.Namespace, image: Image) -> list[tuple[int, int]]:
    """The ranges given, those without a length up to the end of the disk."""
    return [
        (start, max(0, image.virtual_size - start) if length is None else length)
        for start, length in arguments.ranges
    ]


def _merge(arguments: argparse.Namespace, image: Image, edit: Edit) -> None:
    target = addressing.find(image, arguments.name).name
    if arguments.other is None or _is_same(arguments.other, arguments.image):
        for name in arguments.names:
            edit.merge(target, addressing.find(image, name).name, arguments.op)
        return
    try:
        with open(arguments.other, lock_timeout=arguments.wait) as other:
            for name in arguments.names:
                edit.merge(target, addressing.find(other, name), arguments.op)
    except StorageError:
        raise
    except Qcow2BmError as error:
        raise _OtherImageError(explain(error)) from error


def _is_same(path: str, other: str) -> bool:
    return os.path.exists(path) and os.path.exists(other) and os.path.samefile(path, other)


def _each(operation: Callable[[Edit, str], None]) -> Callable[..., None]:
    """The same operation on each of several bitmaps."""

    def work(arguments: argparse.Namespace, image: Image, edit: Edit) -> None:
        # All are looked up first: a number means an entry of the image as it was.
        names = [addressing.find(image, name).name for name in arguments.names]
        usable = (name for name in edit.names if not image.bitmaps[name].in_use)
        for name in usable if arguments.all else names:
            operation(edit, name)

    return work


_WORK: dict[str, Callable[[argparse.Namespace, Image, Edit], None]] = {
    "add": _add,
    "remove": _remove,
    "clear": _each(Edit.clear),
    "enable": _each(Edit.enable),
    "disable": _each(Edit.disable),
    "rename": _rename,
    "copy": _copy,
    "set": _set,
    "reset": _reset,
    "invert": _each(Edit.invert),
    "fit": _each(Edit.fit),
    "merge": _merge,
}


def _print_text(plan: Plan) -> None:
    if not plan.steps:
        print("nothing to write: the bitmaps are like that already")
        return
    print(
        f"{plan.length} bytes in {len(plan.writes)} write{'s' * (len(plan.writes) != 1)}, "
        f"{plan.barriers} barrier{'s' * (plan.barriers != 1)}; nothing was written"
    )
    print(f"{'offset':>14}  {'bytes':>10}")
    for number, step in enumerate(plan.steps):
        if isinstance(step, Barrier):
            print(f"{'':>14}  {'barrier':>10}  {step.what}")
        else:
            mark = "  <- commit" if number == plan.commit_point else ""
            print(f"{step.offset:#14x}  {step.length:>10}  {step.what}{mark}")


def _print_json(name: str, plan: Plan) -> None:
    document = {"schema": SCHEMA, "filename": json_text(name), **plan_as_json(plan)}
    print(json.dumps(document, indent=1))


def plan_as_json(plan: Plan) -> dict[str, object]:
    """A plan, for programs."""
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
