"""The commands ``repair`` and ``undo``.

*Spec*: spec/repair.md.
"""

from __future__ import annotations

from qcow2bm import (
    LostBitmap,
    Repair,
    StateError,
    UndoFile,
    parse_undo,
    plan_repair,
    plan_undo,
    repair,
    undo,
)
from qcow2bm.cli import files, output
from qcow2bm.cli.advice import advise_anew, spelled
from qcow2bm.cli.arguments import EditingArguments, add_editing, add_image
from qcow2bm.cli.messages import CommandError, about, say
from qcow2bm.cli.next_command import Advice, print_advice
from qcow2bm.cli.output import Document, count, json_text, json_text_or_null, quoted, size
from qcow2bm.cli.parser import Parser
from qcow2bm.cli.terminal import paint, print_text

_MOST_LISTED = 16

_REPAIR_EPILOG = """\
What can be proved right is repaired. A bitmap that cannot be proved right is dropped, and a line
says so: "lost: NAME (why)". Sound bitmaps stay as they are. FILE must not exist; it is on the disk
before anything else is written.

exit status: 0 repaired, or nothing to repair; 1 the command failed, and all is as before unless the
message says otherwise; 2 some problems are left, or in a dry run: there is something to repair; 64
wrong usage
"""

_UNDO_EPILOG = """\
If the image is not as the repair left it, nothing is changed. If the command is interrupted, repeat
it.

exit status: 0 all is as before the repair; 1 the command failed; 64 wrong usage
"""


class Arguments(EditingArguments):
    """The values of the arguments of ``repair``."""

    image: str
    undo: str | None
    no_undo: bool
    lossless: bool
    only: list[str]


class UndoArguments(EditingArguments):
    """The values of the arguments of ``undo``."""

    image: str
    file: str
    is_unchanged: bool


def define(parser: Parser) -> None:
    """Adds the arguments of one of the commands."""
    (_define_undo if parser.path == ("undo",) else _define_repair)(parser)


def _define_repair(parser: Parser) -> None:
    parser.namespace = Arguments
    parser.examples = (
        "qcow2bm repair vm.qcow2 --dry-run",
        "qcow2bm repair vm.qcow2 --undo vm.undo",
    )
    parser.epilog = _REPAIR_EPILOG
    add_image(parser, "a qcow2 file or block device that no other process uses")
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--undo", metavar="FILE", help="keep in FILE what undo needs")
    way.add_argument("--no-undo", action="store_true", help="keep nothing for undo")
    add_editing(parser, way.add_argument, has_result=True)
    parser.add_argument("--lossless", action="store_true", help="do only what drops no bitmap")
    parser.add_argument(
        "--only",
        metavar="ID",
        action="append",
        default=[],
        choices=("directory", "tails", "refcounts", "stale"),
        help="do only this repair, as check names it: directory, tails, refcounts or stale; can be "
        "repeated",
    )


def _define_undo(parser: Parser) -> None:
    parser.namespace = UndoArguments
    parser.examples = ("qcow2bm undo vm.qcow2 vm.undo",)
    parser.epilog = _UNDO_EPILOG
    add_image(parser, "the image that was repaired")
    parser.add_word("file", "FILE", "the file that the repair wrote, or - for standard input")
    parser.add_argument(
        "--assert-unchanged",
        dest="is_unchanged",
        action="store_true",
        help="undo the repair even if nothing proves that no program wrote to the image since: "
        "you know that none did",
    )
    add_editing(parser)


def run(arguments: Arguments | UndoArguments) -> int:
    """Runs one of the commands; returns the exit status."""
    with about(arguments.image):
        return _undo(arguments) if isinstance(arguments, UndoArguments) else _repair(arguments)


def _repair(arguments: Arguments) -> int:
    file = UndoFile(arguments.undo) if arguments.undo is not None else None
    if arguments.dry_run:
        done = plan_repair(
            arguments.image,
            lossless=arguments.lossless,
            only=arguments.only or None,
            lock_timeout=arguments.wait,
        )
    else:
        done = repair(
            arguments.image,
            file,
            lossless=arguments.lossless,
            only=arguments.only or None,
            lock_timeout=arguments.wait,
            locking=not arguments.no_lock,
        )
    if file and file.fault:
        say(f"warning: {file.fault}; the image is repaired, undo will need --assert-unchanged")
    advice = Advice() if arguments.dry_run else advise_anew(arguments.image)
    if arguments.output == "json":
        output.print_json(_document(arguments, done, advice))
    else:
        _print(arguments, done, advice)
        print_advice(advice)
    is_needed = arguments.dry_run and done.plan.steps
    return output.PROBLEMS_FOUND if done.left or is_needed else 0


def _document(arguments: Arguments, done: Repair, advice: Advice) -> Document:
    repaired, left = (
        [{"id": found.id, "message": json_text(found.message)} for found in problems]
        for problems in (done.repaired, done.left)
    )
    return {
        **output.head(arguments.image),
        "dry-run": arguments.dry_run,
        "lost": [
            {"name": json_text_or_null(name), "reason": json_text(reason)}
            for name, reason in done.lost
        ],
        "renamed": [
            {"name": json_text(old), "new-name": json_text(new)} for old, new in done.renamed
        ],
        "repaired": repaired,
        "left": left,
        "leaked-clusters": done.leaked_clusters,
        "freed-bytes": done.freed_bytes,
        "next": advice.as_json,
        "plan": output.plan_as_json(done.plan),
    }


def _print(arguments: Arguments, done: Repair, advice: Advice) -> None:
    is_done = bool(done.plan.steps) and not arguments.dry_run
    for lost in done.lost:
        print_text(f"{paint('lost', 'lost')}: {_name(lost)} ({lost.reason})")
    for old, new in done.renamed:
        print_text(f"renamed: {quoted(old)} to {quoted(new)}")
    what = "to repair" if arguments.dry_run else "repaired"
    for found in done.repaired[:_MOST_LISTED]:
        print_text(f"{what}: {found.message} ({found.id})")
    if len(done.repaired) > _MOST_LISTED:
        print(f"{what}: {count(len(done.repaired) - _MOST_LISTED, 'more problem')}")
    if done.freed_bytes:
        freed = "to free" if arguments.dry_run else "freed"
        print(f"{freed}: {size(done.freed_bytes)} in leaked clusters")
    for found in done.left:
        print_text(f"{paint('left', 'left')}: {found.message} ({found.id})")
        output.print_wrapped(found.meaning, indent="    ")
    if not done.plan.steps:
        print("nothing was changed" if done.left else "nothing to repair")
    elif arguments.dry_run:
        output.print_plan(done.plan)
    else:
        left = f", but {count(len(done.left), 'problem')} left" if done.left else ""
        print(f"repaired{left}")
    if is_done and arguments.undo is not None:
        line = output.command_line(
            ["qcow2bm", "undo", *map(spelled, (arguments.image, arguments.undo))]
        )
        print(f"to take it back: {paint(line, 'command')}")
    if is_done:
        _print_consequences(done, advice)


def _print_consequences(done: Repair, advice: Advice) -> None:
    """Prints whether a VM can be started now, and which backups must be full ones."""
    was_refused = any(found.severity == "refused" for found in done.problems)
    if was_refused and not advice.forbids_start:
        print("QEMU does not refuse the metadata any more, so the VM can be started")
    for lost in done.lost:
        print_text(f"a full backup is due instead of the next incremental one by {_name(lost)}")


def _name(lost: LostBitmap) -> str:
    return "bitmaps of unknown name" if lost.name is None else quoted(lost.name)


def _undo(arguments: UndoArguments) -> int:
    with about(files.name_of(arguments.file)):
        changes = parse_undo(files.read_pieces(arguments.file))
    try:
        if arguments.dry_run:
            plan = plan_undo(
                arguments.image,
                changes,
                is_asserted=arguments.is_unchanged,
                lock_timeout=arguments.wait,
            )
            output.print_dry_run(arguments, arguments.image, plan)
            return 0
        is_changed = undo(
            arguments.image,
            changes,
            is_asserted=arguments.is_unchanged,
            lock_timeout=arguments.wait,
            locking=not arguments.no_lock,
        )
    except StateError as error:
        cure = "" if arguments.is_unchanged else "; if you know better: --assert-unchanged"
        raise CommandError(arguments.image, f"{error}{cure}") from error
    print("all is as before the repair" if is_changed else "nothing to take back")
    return 0
