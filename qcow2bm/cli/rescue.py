"""The commands ``rescue start``, ``arm``, ``verdict`` and ``finish``.

*Spec*: spec/rescue.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from qcow2bm import rescue
from qcow2bm.cli import rescue_output
from qcow2bm.cli.arguments import (
    EditingArguments,
    OutputArguments,
    add_editing,
    add_image,
    add_nodes,
    add_output,
    add_qmp,
)
from qcow2bm.cli.images import open_to_edit
from qcow2bm.cli.messages import about
from qcow2bm.cli.output import PROBLEMS_FOUND, print_json
from qcow2bm.cli.parser import Arguments, Parser

_EPILOG = """\
exit status: 0 fine; 1 the command failed; 2 done, but a bitmap is lost, in doubt, or was left as it
was; 64 wrong usage
"""

_QMP_EPILOG = f"""\
SOCKET is the path of the VM's QMP socket, HOST:PORT, or libvirt:DOMAIN. No other program can be
connected to a socket, since QEMU serves one at a time.

{_EPILOG}"""


class QmpArguments(OutputArguments):
    """The values of arguments that all commands but ``rescue finish`` have."""

    qmp: str
    timeout: float
    nodes: list[str]


class StartArguments(QmpArguments):
    """The values of the arguments of ``rescue start``."""

    dry_run: bool


class ArmArguments(QmpArguments):
    """The values of the arguments of ``rescue arm``."""

    set: bool


class VerdictArguments(QmpArguments):
    """The values of the arguments of ``rescue verdict``."""

    remedy: rescue.Remedy | None


class FinishArguments(EditingArguments):
    """The values of the arguments of ``rescue finish``."""

    image: str


def define(parser: Parser) -> None:
    """Adds the commands with their second words."""
    summary = "after a migration that failed: let QEMU store its persistent bitmaps again"
    parser.add_command("start", summary, _define_start)
    summary = "before a migration: add a sentinel, which tells if another VM touches the disk"
    parser.add_command("arm", summary, _define_arm)
    summary = "after an armed migration that came back: say if another VM touched the disk"
    parser.add_command("verdict", summary, _define_verdict)
    summary = "after the VM is off: finish in the image what rescue start could not finish"
    parser.add_command("finish", summary, _define_finish)


def _define_start(parser: Parser) -> None:
    parser.namespace = StartArguments
    parser.examples = (
        "qcow2bm rescue start --qmp vm.sock --dry-run",
        "qcow2bm rescue start --qmp vm.sock --node disk",
    )
    _add_qmp(parser)
    parser.add_argument("--dry-run", action="store_true", help="only show what would be rescued")


def _define_arm(parser: Parser) -> None:
    parser.namespace = ArmArguments
    parser.examples = ("qcow2bm rescue arm --qmp vm.sock --set",)
    _add_qmp(parser)
    parser.add_argument("--set", action="store_true", help="set the block-bitmap-mapping, too")


def _define_verdict(parser: Parser) -> None:
    parser.namespace = VerdictArguments
    parser.examples = (
        "qcow2bm rescue verdict --qmp vm.sock",
        "qcow2bm rescue verdict --qmp vm.sock --all-dirty",
    )
    _add_qmp(parser)
    remedies = parser.add_mutually_exclusive_group()
    remedies.add_argument(
        "--remove",
        dest="remedy",
        action="store_const",
        const="remove",
        help="remove the bitmaps that may miss writes",
    )
    remedies.add_argument(
        "--all-dirty",
        dest="remedy",
        action="store_const",
        const="all-dirty",
        help="make all of the bitmaps dirty that may miss writes",
    )


def _define_finish(parser: Parser) -> None:
    parser.namespace = FinishArguments
    parser.examples = ("qcow2bm rescue finish vm.qcow2",)
    parser.epilog = _EPILOG
    add_image(parser, "the image that the VM ran on, when the VM is off")
    add_editing(parser, has_result=True)


def _add_qmp(parser: Parser) -> None:
    parser.epilog = _QMP_EPILOG
    add_qmp(parser)
    add_nodes(parser, "all that have to do with it")
    add_output(parser)


def run(arguments: Arguments) -> int:
    """Runs one of the commands; returns the exit status."""
    return _RUN[arguments.action](arguments)


def _start(arguments: StartArguments) -> int:
    with about(arguments.qmp, ValueError), _connect(arguments) as monitor:
        done = rescue.lift_vetoes(monitor, arguments.nodes, dry_run=arguments.dry_run)
    if arguments.output == "json":
        dry_run = arguments.dry_run
        print_json(rescue_output.start_as_json(arguments.qmp, done, dry_run=dry_run))
    else:
        rescue_output.print_start(done, dry_run=arguments.dry_run)
    return _status(not one.is_safe for one in done.bitmaps)


def _arm(arguments: ArmArguments) -> int:
    with about(arguments.qmp, ValueError), _connect(arguments) as monitor:
        done = rescue.arm(monitor, arguments.nodes, set_mapping=arguments.set)
    if arguments.output == "json":
        print_json(rescue_output.arm_as_json(arguments.qmp, done))
    else:
        rescue_output.print_arm(done)
    return _status([*done.obstacles, *([] if done.is_set else done.mapping)])


def _verdict(arguments: VerdictArguments) -> int:
    is_for_people = arguments.output == "human"
    done = []
    with about(arguments.qmp, ValueError), _connect(arguments) as monitor:
        found = rescue.judge(monitor, arguments.nodes)
        for verdict in found.nodes:
            if is_for_people:  # before the evidence is removed
                rescue_output.print_verdict(verdict)
            done.append(rescue.settle(monitor, verdict, arguments.remedy))
            if is_for_people:
                rescue_output.print_settlement(done[-1], found.migration)
    is_unguarded = not done and found.migration == "completed"
    if not is_for_people:
        print_json(rescue_output.verdicts_as_json(arguments.qmp, found.migration, done))
    elif not done:
        rescue_output.print_no_verdict(is_unguarded=is_unguarded)
    return _status([is_unguarded, *(not one.is_safe for one in done)])


def _connect(arguments: QmpArguments) -> rescue.QmpCommands:
    return rescue.connect(arguments.qmp, arguments.timeout)


def _finish(arguments: FinishArguments) -> int:
    with (
        about(arguments.image),
        open_to_edit(arguments.image, arguments) as image,
        image.edit(dry_run=arguments.dry_run) as edit,
    ):
        done = rescue.rename_copies(image, edit)
    if arguments.output == "json":
        dry_run = arguments.dry_run
        print_json(rescue_output.finish_as_json(arguments.image, done, dry_run=dry_run))
    else:
        rescue_output.print_finish(done, dry_run=arguments.dry_run)
    return _status(one.outcome == "left" for one in done)


def _status(faults: Iterable[object]) -> int:
    return PROBLEMS_FOUND if any(faults) else 0


_RUN: dict[str, Callable[[Any], int]] = {
    "start": _start,
    "arm": _arm,
    "verdict": _verdict,
    "finish": _finish,
}
