"""The commands ``rescue start``, ``arm``, ``verdict`` and ``finish``.

*Spec*: spec/rescue.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable

from qcow2bm.cli import report, rescue_json
from qcow2bm.cli.console import fail
from qcow2bm.cli.facts import count, size
from qcow2bm.qmp.client import Monitor
from qcow2bm.units import escape, format_size

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
    from qcow2bm.qmp.start import start

    done = start(monitor, arguments.nodes, dry_run=arguments.dry_run)
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
        if done.bitmaps:
            print("(which of them QEMU would have dropped cannot be seen: all are treated alike)")
        if done.migration == "completed":
            print(
                "note: the last migration completed. If another machine ran on the disks since, "
                "the bitmaps miss what it wrote, whatever was done here"
            )
    return _status(not one.is_safe for one in done.bitmaps)


def _arm(arguments: argparse.Namespace, monitor: Monitor) -> int:
    from qcow2bm.qmp.arm import arm

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
        if done.is_set:
            print("the block-bitmap-mapping is set; migrate with the capability dirty-bitmaps")
        else:
            command = {
                "execute": "migrate-set-parameters",
                "arguments": {"block-bitmap-mapping": done.mapping},
            }
            print("before you migrate, set this, or the sentinel tells nothing:")
            print(json.dumps(command))
    return _status(done.obstacles)


def _verdict(arguments: argparse.Namespace, monitor: Monitor) -> int:
    from qcow2bm.qmp.verdict import verdict

    found = verdict(monitor, arguments.nodes, arguments.remedy)
    if arguments.output == "json":
        _print(rescue_json.of_verdicts(arguments.image, found))
    else:
        if not found:
            print("no node is armed")
        for node in found:
            print(f'node "{escape(node.node)}" {node.word}: {node.reason}')
            for bitmap, fate, reason in node.bitmaps:
                more = f": {reason}" if reason else ""
                print(f'  "{escape(bitmap.name)}" {_FATES.get(fate, fate)}{more}')
            if node.is_safe and node.word == "untouched":
                print("  now run rescue start, if the migration did not complete")
            elif node.is_armed and not node.is_waiting:
                print("  still armed: run it again with --remove or --all-dirty")
            if node.word == "touched":
                print("  the guest goes on with a disk that may not be what it remembers: stop it")
    return _status(not node.is_safe for node in found)


def _finish(arguments: argparse.Namespace) -> int:
    from qcow2bm.cli.edit import open_to_edit
    from qcow2bm.qmp.finish import finish

    with open_to_edit(arguments) as image, image.edit(dry_run=arguments.dry_run) as edit:
        done = finish(image, edit)
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
