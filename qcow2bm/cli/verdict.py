"""The command ``verdict``: whether the next incremental backup can use a bitmap.

*Spec*: spec/cli.md, "Verdict".
"""

from __future__ import annotations

import shlex

from qcow2bm import BackupReason, BackupVerdict, ImageLockedError, open
from qcow2bm.cli import output
from qcow2bm.cli.advice import advise_bitmap
from qcow2bm.cli.arguments import NAME_NOTE, OutputArguments, add_image, add_output
from qcow2bm.cli.images import judge
from qcow2bm.cli.messages import about
from qcow2bm.cli.next_command import Advice
from qcow2bm.cli.output import Document, json_text, quoted, size
from qcow2bm.cli.parser import Parser
from qcow2bm.units import escape

STATUSES: dict[BackupReason, int] = {
    "usable": 0,
    "disabled": 3,
    "inconsistent": 4,
    "stale": 5,
    "broken": 6,
    "missing": 7,
    "running": 8,
}
"""The exit status for each reason of a verdict."""

_EPILOG = """\
If the answer is no, the commands that help are named; each was tried in a dry run. If the image
does not say what is dirty, these commands make everything in the bitmap dirty, so that the next
incremental backup saves the whole disk.

exit status: 0 yes; 1 it could not be found out; 64 wrong usage; and for no: 3 the bitmap is
disabled; 4 it is inconsistent; 5 it is stale; 6 it is broken; 7 there is no such bitmap; 8 another
process is writing to the image: if that is a VM, ask the VM
"""


class Arguments(OutputArguments):
    """The values of the arguments of ``verdict``."""

    image: str
    name: str


def define(parser: Parser) -> None:
    """Adds the arguments."""
    parser.namespace = Arguments
    parser.examples = ("qcow2bm verdict vm.qcow2 daily", "qcow2bm verdict --json vm.qcow2 daily")
    parser.notes = (NAME_NOTE,)
    parser.epilog = _EPILOG
    add_image(parser)
    parser.add_word("name", "NAME", "the bitmap")
    add_output(parser)


def run(arguments: Arguments) -> int:
    """Prints the verdict; returns the exit status."""
    verdict, advice = _judge(arguments)
    if arguments.output == "json":
        output.print_json(_document(arguments, verdict, advice))
    else:
        _print(arguments, verdict, advice)
    return STATUSES[verdict.reason]


def _judge(arguments: Arguments) -> tuple[BackupVerdict, Advice]:
    """Returns the verdict, and what helps."""
    path, name = arguments.image, arguments.name
    try:
        with about(path), open(path) as image:
            verdict = judge(image, name)
            if verdict.usable:
                return verdict, Advice()
            return verdict, advise_bitmap(image, path, name, verdict.reason)
    except ImageLockedError as error:
        message = (
            f"bitmap {quoted(name)} may be outdated in the image, because another process "
            f"{error.held}: if that process is a VM, ask the VM with the QMP command query-block"
        )
        return BackupVerdict("running", message), Advice()


def _print(arguments: Arguments, verdict: BackupVerdict, advice: Advice) -> None:
    answer = "yes" if verdict.usable else "no"
    dirty = f"; {size(verdict.dirty_bytes)} dirty" if verdict.dirty_bytes is not None else ""
    # `check` succeeds with another status than 0 if there is something to repair.
    then = "; " if verdict.reason == "broken" else " && "
    costs = "; ".join(command.cost for command in advice.commands if command.cost)
    following = f"; cost: {costs}" if costs else ""
    if advice.commands:
        following += f"; next: {then.join(shlex.join(argv) for argv in advice.as_json)}"
    elif advice.why:
        following = f"; {advice.why}"
    print(f"{escape(arguments.image)}: {answer}: {verdict.message}{dirty}{following}")


def _document(arguments: Arguments, verdict: BackupVerdict, advice: Advice) -> Document:
    return {
        **output.head(arguments.image),
        "bitmap": json_text(arguments.name),
        "usable": verdict.usable,
        "reason": verdict.reason,
        "message": json_text(verdict.message),
        "dirty-bytes": verdict.dirty_bytes,
        "next": advice.as_json,
    }
