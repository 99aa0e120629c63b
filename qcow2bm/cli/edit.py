"""The commands that change bitmaps: ``add``, ``remove``, ``clear`` and so on, one edit each.

*Spec*: spec/cli.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

from qcow2bm.api import Edit, Image, open
from qcow2bm.cli import addressing
from qcow2bm.cli.console import fail
from qcow2bm.clusters.plan import Barrier, Plan, Write
from qcow2bm.errors import Qcow2BmError, StorageError

SCHEMA = 1


def run(arguments: argparse.Namespace) -> int:
    """Does one command; returns the exit status."""
    work = _WORK[arguments.command]
    try:
        with _open(arguments) as image, image.edit(dry_run=arguments.dry_run) as edit:
            work(arguments, image, edit)
            plan = edit.plan() if arguments.dry_run else Plan()
    except ValueError as error:
        return fail(arguments.image, str(error))
    except _OtherImageError as error:
        return fail(arguments.other, str(error))
    if arguments.dry_run and arguments.output == "json":
        _print_json(arguments.image, plan)
    elif arguments.dry_run:
        _print_text(plan)
    return 0


class _OtherImageError(Exception):
    """What is wrong with the image the sources of a merge are in."""


def _open(arguments: argparse.Namespace) -> Image:
    if arguments.dry_run:
        return open(arguments.image)
    wait, locking = arguments.wait, not arguments.no_lock
    return open(arguments.image, "r+", lock_timeout=wait, locking=locking)


def _add(arguments: argparse.Namespace, image: Image, edit: Edit) -> None:
    name = addressing.new_name(arguments.name)
    edit.add(name, arguments.granularity, enabled=not arguments.disabled)


def _remove(arguments: argparse.Namespace, image: Image, edit: Edit) -> None:
    if arguments.all:
        edit.remove_all()
    _each(Edit.remove)(arguments, image, edit)


def _rename(arguments: argparse.Namespace, image: Image, edit: Edit) -> None:
    name = addressing.find(image, arguments.name).name
    edit.rename(name, addressing.new_name(arguments.new))


def _copy(arguments: argparse.Namespace, image: Image, edit: Edit) -> None:
    name = addressing.find(image, arguments.name).name
    edit.copy(name, addressing.new_name(arguments.new), arguments.granularity)


def _set(arguments: argparse.Namespace, image: Image, edit: Edit) -> None:
    edit.set_many(addressing.find(image, arguments.name).name, arguments.ranges)


def _reset(arguments: argparse.Namespace, image: Image, edit: Edit) -> None:
    edit.reset_many(addressing.find(image, arguments.name).name, arguments.ranges)


def _merge(arguments: argparse.Namespace, image: Image, edit: Edit) -> None:
    target = addressing.find(image, arguments.name).name
    if arguments.other is None:
        for name in arguments.names:
            edit.merge(target, addressing.find(image, name).name, arguments.op)
        return
    try:
        with open(arguments.other) as other:
            for name in arguments.names:
                edit.merge(target, addressing.find(other, name), arguments.op)
    except StorageError:
        raise
    except Qcow2BmError as error:
        raise _OtherImageError(str(error)) from error


def _each(operation: Callable[[Edit, str], None]) -> Callable[..., None]:
    """The same operation on each of several bitmaps."""

    def work(arguments: argparse.Namespace, image: Image, edit: Edit) -> None:
        # All are looked up first: a number means an entry of the image as it was.
        for name in [addressing.find(image, name).name for name in arguments.names]:
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
    barriers = f"{plan.barriers} barrier{'s' if plan.barriers > 1 else ''}"
    print(f"{plan.length} bytes in {len(plan.writes)} writes, {barriers}; nothing was written")
    print(f"{'offset':>14}  {'bytes':>10}")
    for number, step in enumerate(plan.steps):
        if isinstance(step, Barrier):
            print(f"{'':>14}  {'barrier':>10}  {step.what}")
        else:
            mark = "  <- commit" if number == plan.commit_point else ""
            print(f"{step.offset:#14x}  {step.length:>10}  {step.what}{mark}")


def _print_json(name: str, plan: Plan) -> None:
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
    document = {
        "schema": SCHEMA,
        "filename": name.encode("utf-8", "surrogateescape").decode("utf-8", "replace"),
        "bytes": plan.length,
        "barriers": plan.barriers,
        "steps": steps,
    }
    print(json.dumps(document, indent=1))
