"""The command ``backup``: copies what is dirty, or the whole disk, into a new image.

*Spec*: spec/backup.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qcow2bm import CommitError, open
from qcow2bm.cli import output
from qcow2bm.cli.arguments import NAME_NOTE, EditingArguments, add_editing, add_image
from qcow2bm.cli.images import name_of, new_name, open_to_edit
from qcow2bm.cli.messages import about, progress, say
from qcow2bm.cli.output import Document, json_text, json_text_or_null, quoted, size
from qcow2bm.cli.parser import Parser, UsageError
from qcow2bm.cli.terminal import print_text
from qcow2bm.units import escape

if TYPE_CHECKING:
    from qcow2bm import backup

_EPILOG = """\
Without --verify, nothing checks that PREVIOUS is the right backup: if it is another one, TARGET is
wrong, and NAME is cleared all the same.

TARGET is an ordinary qcow2 image: with --base an overlay of PREVIOUS that has what is dirty in
NAME, with --full the whole disk. To restore: qemu-img convert -O raw TARGET DISK. The copying is
done by qemu-storage-daemon; IMAGE is locked meanwhile.

When TARGET is complete, --then says what becomes of NAME. clear: NAME becomes clean, so that the
next backup, with --base TARGET, has what is written from now on; with --full, NAME then records
even if it was inconsistent, stale, disabled or missing. rotate: NAME is disabled, and the new
bitmap NEW records. keep: NAME stays as it is, so that the next backup has everything again.

If the command fails, IMAGE is as before, and there is no TARGET. If the command is killed,
TARGET.incomplete may be left.

exit status: 0 done; 1 the command failed; 64 wrong usage
"""


_NO_BITMAP = "there is no such bitmap: the next backup must be a full one, too"


class Arguments(EditingArguments):
    """The values of the arguments of ``backup``."""

    image: str
    name: str
    target: str
    new: list[str]
    base: str | None
    full: bool
    then: backup.Then
    verify: bool


def define(parser: Parser) -> None:
    """Adds the arguments."""
    parser.namespace = Arguments
    parser.examples = (
        "qcow2bm backup vm.qcow2 daily sunday.qcow2 --full",
        "qcow2bm backup vm.qcow2 daily monday.qcow2 --base sunday.qcow2",
        "qcow2bm backup vm.qcow2 daily monday.qcow2 --base sunday.qcow2 --then rotate tuesday",
    )
    parser.notes = (NAME_NOTE,)
    parser.epilog = _EPILOG
    add_image(parser, "a qcow2 file or block device that no other process uses")
    parser.add_word("name", "NAME", "the bitmap that has what was written since PREVIOUS was taken")
    parser.add_word("target", "TARGET", "the qcow2 file to make; it must not exist")
    parser.add_word(
        "new", "NEW", "behind TARGET, with --then rotate: the bitmap that records from now on", "*"
    )
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument(
        "--base", metavar="PREVIOUS", help="the last backup, a qcow2 image, on which TARGET lies"
    )
    way.add_argument("--full", action="store_true", help="copy the whole disk")
    parser.add_argument(
        "--then",
        choices=("clear", "rotate", "keep"),
        default="clear",
        help="what becomes of NAME when TARGET is complete",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="compare the whole disk with what TARGET restores to, before NAME is changed",
    )
    add_editing(parser, has_result=True)


def run(arguments: Arguments) -> int:
    """Takes a backup; returns the exit status."""
    from qcow2bm import backup  # which needs numpy

    if len(arguments.new) != (arguments.then == "rotate"):
        raise UsageError("give NEW, a name for the new bitmap, with --then rotate, and only then")
    if arguments.base is not None:
        with about(arguments.base):
            open(arguments.base).close()  # says what the file is, if it is no qcow2 image
    with about(arguments.image, ValueError), open_to_edit(arguments.image, arguments) as image:
        planned = backup.plan_backup(
            image,
            name_of(image, arguments.name),
            arguments.target,
            base=arguments.base,
            then=arguments.then,
            new=new_name(arguments.new[0]) if arguments.new else None,
        )
        done = None if arguments.dry_run else _back_up(arguments, planned)
        if arguments.output == "json":
            output.print_json(_document(arguments, planned, done))
        elif done is None:
            output.print_plan(planned.edit)
        else:
            _print(arguments, planned, done)
    return 0


def _back_up(arguments: Arguments, planned: backup.PlannedBackup) -> backup.Backup:
    from qcow2bm import backup

    try:
        with progress(planned.total_bytes, "copied") as show:
            return backup.back_up(planned, verify=arguments.verify, progress=show)
    except CommitError:
        say(f"note: {escape(arguments.target)} is complete")
        raise


def _print(arguments: Arguments, planned: backup.PlannedBackup, done: backup.Backup) -> None:
    what = "the whole disk" if done.extents is None else output.count(done.extents, "dirty extent")
    print_text(
        f"{escape(arguments.target)} is complete: {what}, {size(done.copied_bytes)} copied in "
        f"{done.seconds:.1f} s{' and verified' if arguments.verify else ''}"
    )
    name = quoted(planned.name)
    fate = {
        "clear": f"{name} is clean, and records what is written from now on",
        "rotate": f"{name} is disabled, and {quoted(planned.new or '')} records from now on",
        "keep": f"{name} is as before" if planned.name in planned.image.bitmaps else _NO_BITMAP,
    }
    print_text(fate[planned.then])


def _document(
    arguments: Arguments, planned: backup.PlannedBackup, done: backup.Backup | None
) -> Document:
    return {
        **output.head(arguments.image),
        "dry-run": arguments.dry_run,
        "bitmap": json_text(planned.name),
        "target": json_text(arguments.target),
        "base": json_text_or_null(arguments.base),
        "total-bytes": planned.total_bytes,
        "copied-bytes": done.copied_bytes if done else None,
        "extents": done.extents if done else None,
        "seconds": round(done.seconds, 3) if done else None,
        "verified": arguments.verify and done is not None,
        "then": planned.then,
        "recording": json_text_or_null(done.recording) if done else None,
        "plan": None if done else output.plan_as_json(planned.edit),
    }
