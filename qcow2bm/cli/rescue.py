"""The commands ``rescue start``, ``arm``, ``verdict`` and ``finish``.

*Spec*: spec/rescue.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING

from qcow2bm.cli import report, rescue_json
from qcow2bm.cli.console import fail
from qcow2bm.cli.facts import count, size
from qcow2bm.qmp.rescue import Monitor
from qcow2bm.units import escape, format_size

if TYPE_CHECKING:
    from qcow2bm.qmp.rescue import Settlement

_OUTCOMES = {"rescued": "rescued", "copied": "rescued, by a copy", "planned": "would be rescued"}
_FATES = {"all-dirty": "dirty all over", "in-doubt": "may miss writes"}


def run(arguments: argparse.Namespace) -> int:
    """Does one of the commands; returns the exit status."""
    if arguments.action == "finish":
        return _finish(arguments)
    try:
        with Monitor(arguments.image) as monitor:
            return _OVER_QMP[arguments.action](arguments, monitor)
    except ValueError as error:
        return fail(arguments.image, str(error))


def _start(arguments: argparse.Namespace, monitor: Monitor) -> int:
    from qcow2bm.qmp.rescue import lift_vetoes

    done = lift_vetoes(monitor, arguments.nodes, dry_run=arguments.dry_run)
    if arguments.output == "json":
        _print(rescue_json.of_start(arguments.image, done, dry_run=arguments.dry_run))
    else:
        for one in done.bitmaps:
            bitmap, outcome = one.bitmap, _OUTCOMES.get(one.outcome, one.outcome)
            proof = f", {size(bitmap.dirty_bytes)} dirty, verified by {one.proof}"
            more = f": {one.reason}" if one.reason else proof if one.proof else ""
            print(f"{_place(bitmap.node, bitmap.name)} {outcome}{more}")
        safe = sum(one.is_safe for one in done.bitmaps)
        print(f"{safe} of {count(len(done.bitmaps), 'persistent bitmap')}", end=" ")
        print("would be rescued" if arguments.dry_run else "will be stored when the VM quits")
        if safe:
            print("(which of them QEMU would have dropped cannot be seen: all are treated alike)")
        if safe < len(done.bitmaps):
            print("of the others nothing is promised, not even that they are not stored")
        if done.migration in ("completed", "failed"):
            print(
                f"note: the last migration {done.migration}. If another machine ran on the disks, "
                "the bitmaps may miss what it wrote: only rescue verdict can tell, where armed"
            )
    return _status(not one.is_safe for one in done.bitmaps)


def _arm(arguments: argparse.Namespace, monitor: Monitor) -> int:
    from qcow2bm.qmp.rescue import arm

    done = arm(monitor, arguments.nodes, set_mapping=arguments.set)
    if arguments.output == "json":
        _print(rescue_json.of_arming(arguments.image, done))
    else:
        for node in done.nodes:
            state = "armed" if node.is_new else "was armed already"
            granularity = format_size(node.granularity)
            print(f'node "{escape(node.node)}" {state}: {escape(node.sentinel)}, {granularity}')
        for bitmap, reason in done.obstacles:
            place = _place(bitmap.node, bitmap.name)
            print(f"QEMU will refuse to migrate: {place} is {reason}")
        for bitmap in done.left_out:
            place = _place(bitmap.node, bitmap.name)
            print(f"note: the mapping leaves out {place}, which stays here")
        if not done.mapping and not done.nodes:
            print("nothing to arm: no node has persistent bitmaps")
        elif done.is_set:
            print("the block-bitmap-mapping is set; migrate with the capability dirty-bitmaps")
        else:
            command = {
                "execute": "migrate-set-parameters",
                "arguments": {"block-bitmap-mapping": done.mapping},
            }
            print("not armed yet: set this, and run it again; or let --set do it")
            print(json.dumps(command))
    return _status([*done.obstacles, *([] if done.is_set else done.mapping)])


def _verdict(arguments: argparse.Namespace, monitor: Monitor) -> int:
    from qcow2bm.qmp.rescue import judge, settle

    found = judge(monitor, arguments.nodes)
    done = []
    for verdict in found.nodes:
        if arguments.output == "human":  # before anything is done that takes the evidence away
            place = f'node "{escape(verdict.node.name)}"'
            print(f"{place} {verdict.word}: {verdict.reason}", flush=True)
        done.append(settle(monitor, verdict, arguments.remedy))
        if arguments.output == "human":
            _print_settled(done[-1], found.migration)
    is_in_the_dark = not done and found.migration == "completed"
    if arguments.output == "json":
        _print(rescue_json.of_verdicts(arguments.image, found.migration, done))
    elif not done:
        print("no node is armed" + (_DARK if is_in_the_dark else ""))
    return _status([is_in_the_dark, *(not one.is_safe for one in done)])


_DARK = """, though the last migration completed
go by what rescue verdict said before; if it said nothing, and another machine ran on the disks,
their bitmaps may miss what it wrote: remove them, and take full backups"""


def _print_settled(done: Settlement, migration: str) -> None:
    verdict = done.verdict
    if done.obstacle:
        print(f"  nothing was done: {done.obstacle}")
    for bitmap, fate, reason in done.bitmaps:
        more = f": {reason}" if reason else ""
        print(f'  "{escape(bitmap.name)}" {_FATES.get(fate, fate)}{more}')
    if verdict.is_bad and done.is_armed and not done.obstacle:
        print("  decide before it quits, or these are stored as valid: --remove or --all-dirty")
    if verdict.word == "touched":
        print("  what the guest remembers of the disk may be wrong: shut it down when you decided")
    if verdict.word == "untouched" and migration in ("cancelled", "failed") and not done.is_armed:
        print("  now run rescue start")


def _finish(arguments: argparse.Namespace) -> int:
    from qcow2bm.cli.edit import open_to_edit
    from qcow2bm.qmp.rescue import rename_copies

    with open_to_edit(arguments) as image, image.edit(dry_run=arguments.dry_run) as edit:
        done = rename_copies(image, edit)
    if arguments.output == "json":
        _print(rescue_json.of_finish(arguments.image, done, dry_run=arguments.dry_run))
    else:
        if not done:
            print("nothing to finish")
        for one in done:
            renamed = "would be renamed to" if arguments.dry_run else "renamed to"
            what = f'{renamed} "{escape(one.name)}"' if not one.reason else f"left: {one.reason}"
            print(f'"{escape(one.copy)}" {what}')
    return _status(one.outcome == "left" for one in done)


_OVER_QMP = {"start": _start, "arm": _arm, "verdict": _verdict}


def _status(faults: Iterable[object]) -> int:
    return report.PROBLEMS_FOUND if any(faults) else 0


def _place(node: str, name: str) -> str:
    return f'"{escape(name)}" of node "{escape(node)}"'


def _print(document: dict[str, object]) -> None:
    print(json.dumps(document, indent=1))
