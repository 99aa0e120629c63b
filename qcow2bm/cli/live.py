"""The commands ``live``: offload, restore, record, collect, status and remove.

*Spec*: spec/live.md; spec/cli.md, "Short stops".
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from qcow2bm import BitmapError, QmpError, StateError, live
from qcow2bm.cli import live_output
from qcow2bm.cli.arguments import (
    EditingArguments,
    OutputArguments,
    add_editing,
    add_nodes,
    add_output,
    add_qmp,
    size,
    some_milliseconds,
)
from qcow2bm.cli.images import open_to_edit
from qcow2bm.cli.messages import CommandError, about, say
from qcow2bm.cli.output import PROBLEMS_FOUND, print_dry_run, print_json, several_nodes
from qcow2bm.cli.parser import Arguments, Parser, UsageError
from qcow2bm.units import escape

_SOCKET_NOTE = """\
SOCKET is the path of the VM's QMP socket, HOST:PORT, or libvirt:DOMAIN. No other program can be
connected to a socket, since QEMU serves one at a time.

"""

_OFFLOAD_EPILOG = f"""\
{_SOCKET_NOTE}FILE is made if there is none. If the command was interrupted, the same command goes
on; live restore takes everything back. Until live restore, other programs do not see the bitmaps,
and no backup can go by them.

exit status: 0 done; 1 the command failed; 2 done, but a persistent bitmap stays in the VM, or a
stop takes longer than --max-downtime; 64 wrong usage
"""

_RESTORE_EPILOG = f"""\
{_SOCKET_NOTE}The bitmaps are put back into the VM that runs on the disks now, whichever it is; or
into the image, when no VM runs on it. Each bitmap that records gets what was written meanwhile:
exactly, if the offload was exact and the recorders are there, or else as coarse as the tail.

exit status: 0 done; 1 the command failed; 2 done, but a bitmap is lost or was left as it was; 64
wrong usage
"""

_RECORD_EPILOG = f"""\
{_SOCKET_NOTE}Run it after live offload --exact, while the migration is under way: the destination
receives, and the source still has the disks. The source's capability pause-before-switchover gives
time for that. It takes about a millisecond of each VM. If it is left out, live restore takes the
tail.

exit status: 0 done; 1 the command failed; 64 wrong usage
"""

_COLLECT_EPILOG = f"""\
{_SOCKET_NOTE}Run it at the source after the migration, and before the source is ended; the
destination runs meanwhile. If it is left out, live restore takes the tail.

exit status: 0 done; 1 the command failed; 64 wrong usage
"""

_STATUS_EPILOG = f"""\
{_SOCKET_NOTE}exit status: 0 fine; 1 the command failed; 2 a bitmap is lost or in doubt; 64 wrong
usage
"""

_REMOVE_EPILOG = f"""\
{_SOCKET_NOTE}exit status: 0 removed; 1 the command failed, and removed nothing; 64 wrong usage
"""


class OffloadArguments(OutputArguments):
    """The values of the arguments of ``live offload``."""

    qmp: str
    timeout: float
    nodes: list[str]
    file: str
    tail_granularity: int | None
    is_exact: bool
    max_downtime: float | None
    dry_run: bool


class RestoreArguments(EditingArguments):
    """The values of the arguments of ``live restore``."""

    qmp: str | None
    timeout: float
    is_alone: bool
    names: list[str]


class StatusArguments(OutputArguments):
    """The values of the arguments of ``live status``."""

    qmp: str
    timeout: float
    names: list[str]


class RecordArguments(OutputArguments):
    """The values of the arguments of ``live record``."""

    qmp: str
    source: str
    timeout: float
    file: str


class CollectArguments(OutputArguments):
    """The values of the arguments of ``live collect``."""

    qmp: str
    timeout: float
    file: str


class RemoveArguments(OutputArguments):
    """The values of the arguments of ``live remove``."""

    qmp: str
    timeout: float
    node: str | None
    is_lost: bool
    names: list[str]


def define(parser: Parser) -> None:
    """Adds the commands with their second words."""
    summary = "take the bitmaps out of a running VM into a file, so that its stop is short"
    parser.add_command("offload", summary, _define_offload)
    summary = "put the bitmaps of live offload back, with what was written meanwhile"
    parser.add_command("restore", summary, _define_restore)
    summary = "give the destination of a migration a bitmap that records exactly"
    parser.add_command("record", summary, _define_record)
    summary = "fetch what was recorded exactly from the source of a migration"
    parser.add_command("collect", summary, _define_collect)
    summary = "show the bitmaps of a running VM, and how far an offload is"
    parser.add_command("status", summary, _define_status)
    parser.add_command("remove", "remove bitmaps from a running VM", _define_remove)


def _define_offload(parser: Parser) -> None:
    parser.namespace = OffloadArguments
    parser.examples = (
        "qcow2bm live offload --qmp vm.sock vm.bitmaps --dry-run",
        "qcow2bm live offload --qmp vm.sock vm.bitmaps",
    )
    parser.epilog = _OFFLOAD_EPILOG
    parser.add_word("file", "FILE", "the file that gets the bitmaps")
    add_qmp(parser)
    add_nodes(parser, "all")
    parser.add_argument(
        "--tail-granularity",
        metavar="SIZE",
        type=size,
        help="how many bytes of the disk count as written for each write meanwhile (default: 4M)",
    )
    parser.add_argument(
        "--exact",
        dest="is_exact",
        action="store_true",
        help="add another bitmap that records the writes exactly; a stop does not store it",
    )
    parser.add_argument(
        "--max-downtime",
        metavar="MS",
        type=some_milliseconds,
        help="begin new tails until a stop stores the bits in so many milliseconds",
    )
    parser.add_argument("--dry-run", action="store_true", help="only show what would be taken out")
    add_output(parser)


def _define_restore(parser: Parser) -> None:
    parser.namespace = RestoreArguments
    parser.examples = (
        "qcow2bm live restore --qmp vm.sock vm.bitmaps",
        "qcow2bm live restore vm.bitmaps vm.qcow2",
    )
    parser.epilog = _RESTORE_EPILOG
    parser.usage = (
        "%(prog)s --qmp SOCKET [--timeout SECONDS] [--assert-alone] [--output {human,json}] FILE\n"
        "       %(prog)s [--dry-run] [--output {human,json}] FILE IMAGE"
    )
    parser.add_word("names", "FILE IMAGE", "the file with the bitmaps, and the image", "*")
    add_qmp(parser, is_required=False)
    parser.add_argument(
        "--assert-alone",
        dest="is_alone",
        action="store_true",
        help="with --qmp: you know that no other VM wrote to the disks, if the VM goes on after it "
        "migrated",
    )
    add_editing(parser, has_result=True)


def _define_record(parser: Parser) -> None:
    parser.namespace = RecordArguments
    parser.examples = ("qcow2bm live record --qmp destination.sock --source vm.sock vm.bitmaps",)
    parser.epilog = _RECORD_EPILOG
    parser.add_word("file", "FILE", "the file of an exact offload")
    add_qmp(parser)
    parser.add_argument(
        "--source",
        metavar="SOCKET",
        required=True,
        help="the QMP socket of the VM that has the disks",
    )
    add_output(parser)


def _define_collect(parser: Parser) -> None:
    parser.namespace = CollectArguments
    parser.examples = ("qcow2bm live collect --qmp vm.sock vm.bitmaps",)
    parser.epilog = _COLLECT_EPILOG
    parser.add_word("file", "FILE", "the file of an exact offload")
    add_qmp(parser)
    add_output(parser)


def _define_status(parser: Parser) -> None:
    parser.namespace = StatusArguments
    parser.examples = (
        "qcow2bm live status --qmp vm.sock",
        "qcow2bm live status --qmp vm.sock vm.bitmaps",
    )
    parser.epilog = _STATUS_EPILOG
    parser.usage = "%(prog)s --qmp SOCKET [--timeout SECONDS] [--output {human,json}] [FILE]"
    parser.add_word("names", "FILE", "the file of an offload", "*")
    add_qmp(parser)
    add_output(parser)


def _define_remove(parser: Parser) -> None:
    parser.namespace = RemoveArguments
    parser.examples = ("qcow2bm live remove --qmp vm.sock daily",)
    parser.epilog = _REMOVE_EPILOG
    parser.add_word("names", "NAME", "the name of a bitmap", "+")
    add_qmp(parser)
    parser.add_argument("--node", metavar="NODE", help="the node or device that has the bitmaps")
    parser.add_argument(
        "--assert-lost",
        dest="is_lost",
        action="store_true",
        help="you know that the bitmaps of an offload need not be put back, if one of these is its "
        "tail",
    )
    add_output(parser)


def run(arguments: Arguments) -> int:
    """Runs one of the commands; returns the exit status."""
    return _RUN[arguments.action](arguments)


def _offload(arguments: OffloadArguments) -> int:
    is_for_people = arguments.output == "human"
    with (
        _going_on(arguments.file),
        about(arguments.qmp, ValueError),
        live.connect(arguments.qmp, arguments.timeout) as monitor,
    ):
        done = live.offload(
            monitor,
            arguments.file,
            arguments.nodes,
            tail_granularity=arguments.tail_granularity,
            exact=arguments.is_exact,
            max_stop_seconds=arguments.max_downtime,
            dry_run=arguments.dry_run,
            on_progress=live_output.print_taken_out if is_for_people else _ignore,
        )
    if is_for_people:
        live_output.print_offload(arguments.qmp, arguments.file, done, dry_run=arguments.dry_run)
    else:
        dry_run = arguments.dry_run
        print_json(
            live_output.offload_as_json(arguments.qmp, arguments.file, done, dry_run=dry_run)
        )
    is_long = done.limited is not None and not done.limited.fits
    return PROBLEMS_FOUND if done.left or is_long else 0


_GOING_ON = "run the same command again to go on, or live restore to go back"


@contextmanager
def _going_on(file: str) -> Iterator[None]:
    """Adds what to do if an offload fails that has begun, unless the message says it already."""
    try:
        yield
    except KeyboardInterrupt:
        if os.path.exists(file):
            say(f"{escape(file)}: interrupted; {_GOING_ON}")
        raise
    except CommandError as error:
        cause = error.__cause__
        is_of_machine = isinstance(cause, QmpError | BitmapError | StateError) and not cause.hint
        if not is_of_machine or not os.path.exists(file):
            raise
        raise CommandError(error.subject, f"{error.reason}; {_GOING_ON}") from cause


def _ignore(*_: object) -> None:
    pass


def _restore(arguments: RestoreArguments) -> int:
    given = arguments.names
    if len(given) != (2 if arguments.qmp is None else 1):
        raise UsageError("give FILE and IMAGE, or --qmp and FILE")
    if arguments.qmp is None:
        return _restore_offline(arguments, *given)
    if arguments.dry_run or arguments.no_lock or arguments.wait:
        raise UsageError("--dry-run, --no-lock and --wait are for an IMAGE, not for --qmp")
    with about(arguments.qmp), live.connect(arguments.qmp, arguments.timeout) as monitor:
        done = live.restore(monitor, given[0], is_alone=arguments.is_alone)
    return _print_restore(arguments, arguments.qmp, "qmp", given[0], done)


def _restore_offline(arguments: RestoreArguments, file: str, path: str) -> int:
    with about(path), open_to_edit(path, arguments) as image:
        done = live.restore_offline(file, image, dry_run=arguments.dry_run)
    if done.plan is not None:
        print_dry_run(arguments, path, done.plan)
        return 0
    return _print_restore(arguments, path, "image", file, done)


def _print_restore(
    arguments: RestoreArguments, subject: str, kind: str, file: str, done: live.RestoreReport
) -> int:
    if arguments.output == "human":
        live_output.print_restore(done)
    else:
        print_json(live_output.restore_as_json(subject, kind, file, done))
    return 0 if all(one.is_safe for one in done.bitmaps) else PROBLEMS_FOUND


def _record(arguments: RecordArguments) -> int:
    if arguments.qmp == arguments.source:
        raise UsageError("--qmp is the destination and --source the source: they are two VMs")
    with (
        about(arguments.source),
        live.connect(arguments.source, arguments.timeout) as source,
        about(arguments.qmp, ValueError),
        live.connect(arguments.qmp, arguments.timeout) as destination,
    ):
        recorders = live.record(destination, source, arguments.file)
    _print_recorders(arguments, arguments.qmp, arguments.file, recorders)
    return 0


def _collect(arguments: CollectArguments) -> int:
    with about(arguments.qmp), live.connect(arguments.qmp, arguments.timeout) as monitor:
        recorders = live.collect(monitor, arguments.file)
    _print_recorders(arguments, arguments.qmp, arguments.file, recorders)
    return 0


def _print_recorders(
    arguments: OutputArguments, qmp: str, file: str, recorders: tuple[live.RecorderFacts, ...]
) -> None:
    if arguments.output == "human":
        live_output.print_recorders(recorders)
    else:
        print_json(live_output.recorders_as_json(qmp, file, recorders))


def _status(arguments: StatusArguments) -> int:
    if len(arguments.names) > 1:
        raise UsageError("give one FILE at most")
    file = arguments.names[0] if arguments.names else None
    with about(arguments.qmp), live.connect(arguments.qmp, arguments.timeout) as monitor:
        found = live.status(monitor, file)
    if arguments.output == "human":
        live_output.print_status(arguments.qmp, file, found)
    else:
        print_json(live_output.status_as_json(arguments.qmp, file, found))
    return PROBLEMS_FOUND if live_output.is_bad(found) else 0


def _remove(arguments: RemoveArguments) -> int:
    with (
        about(arguments.qmp, ValueError),
        live.connect(arguments.qmp, arguments.timeout) as monitor,
    ):
        try:
            removed = live.remove(
                monitor, arguments.names, arguments.node, is_lost=arguments.is_lost
            )
        except live.NodeChoiceError as error:
            raise CommandError(arguments.qmp, several_nodes(error.nodes)) from error
    if arguments.output == "json":
        print_json(live_output.removed_as_json(arguments.qmp, removed))
    return 0


_RUN: dict[str, Callable[[Any], int]] = {
    "offload": _offload,
    "restore": _restore,
    "record": _record,
    "collect": _collect,
    "status": _status,
    "remove": _remove,
}
