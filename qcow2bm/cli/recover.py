"""The command ``recover``: makes bitmaps valid that were tracked with intent when a host died.

*Spec*: spec/intent.md, "Recovery".
"""

from __future__ import annotations

from qcow2bm.cli import output
from qcow2bm.cli.arguments import NAME_NOTE, EditingArguments, add_editing, add_image
from qcow2bm.cli.images import find, open_to_edit
from qcow2bm.cli.messages import about
from qcow2bm.cli.output import json_text, quoted, size
from qcow2bm.cli.parser import Parser
from qcow2bm.cli.terminal import print_text

_EPILOG = """\
Without NAME, all bitmaps that can be recovered are. Each gets what the intent bitmap has, beside
what is stored of it: every write, and more in the regions that were written to shortly before the
crash. Then the intent bitmap is removed.

exit status: 0 done; 1 the command failed, and all is as before unless the message says otherwise;
64 wrong usage
"""


class Arguments(EditingArguments):
    """The values of the arguments of ``recover``."""

    image: str
    names: list[str]


def define(parser: Parser) -> None:
    """Adds the arguments."""
    parser.namespace = Arguments
    parser.examples = ("qcow2bm recover vm.qcow2", "qcow2bm recover vm.qcow2 daily")
    parser.notes = (NAME_NOTE,)
    parser.epilog = _EPILOG
    add_image(parser, "a qcow2 file or block device that no other process uses")
    parser.add_word("names", "NAME", "the bitmaps; by default all that can be recovered", "*")
    add_editing(parser, has_result=True)


def run(arguments: Arguments) -> int:
    """Recovers bitmaps; returns the exit status."""
    with about(arguments.image), open_to_edit(arguments.image, arguments) as image:
        names = [find(image, name).name for name in arguments.names] or None
        done = image.recover(names, dry_run=arguments.dry_run)
        dirty = {
            name: image.bitmaps[name].count() if done.plan is None else None for name in done.names
        }
    if arguments.output == "json":
        output.print_json(
            {
                **output.head(arguments.image),
                "dry-run": arguments.dry_run,
                "recovered": [
                    {"name": json_text(name), "dirty-bytes": count} for name, count in dirty.items()
                ],
                "plan": None if done.plan is None else output.plan_as_json(done.plan),
            }
        )
        return 0
    if done.plan is not None:
        output.print_plan(done.plan)
    for name, count in dirty.items():
        if count is not None:
            print_text(f"{quoted(name)} is valid, with every write: {size(count)} dirty")
    if not done.names:
        print("nothing to recover: no bitmap is in use for which the intent bitmap stands")
    return 0
