"""The command ``prune``: removes bitmaps by rule.

*Spec*: spec/edit.md, "Pruning".
"""

from __future__ import annotations

from collections.abc import Iterator

from qcow2bm import KeptReason, Plan, Pruning, choose_to_prune
from qcow2bm.cli import output
from qcow2bm.cli.arguments import NAME_NOTE, EditingArguments, add_editing, add_image
from qcow2bm.cli.images import find, open_to_edit
from qcow2bm.cli.messages import about
from qcow2bm.cli.output import json_text, listed, size
from qcow2bm.cli.parser import Parser, UsageError
from qcow2bm.cli.terminal import print_text

_EPILOG = """\
--inconsistent and --disabled select bitmaps that match one of them; without both, all bitmaps are
selected. Of these, all are removed but those that --keep or --keep-pattern keeps, those that
recover can make valid without a loss, and those that qcow2bm added for itself: these are removed
only by name, with remove.

To remove a bitmap costs the incremental backups that would go by it: the next one needs a full
backup first. The image does not say how old a bitmap is: put the date into the names, and give
--keep-pattern.

The change is atomic: after a failure or a loss of power at any time, all bitmaps are as before, or
all are as after. Meanwhile no other process can use the image.

exit status: 0 done; 1 the command failed, and all is as before unless the message says otherwise;
64 wrong usage
"""

_WHY_KEPT: dict[KeptReason, str] = {
    "reserved": "qcow2bm added it for itself",
    "recoverable": "recover can make it valid without a loss",
}
"""The reasons that a user has not given."""


class Arguments(EditingArguments):
    """The values of the arguments of ``prune``."""

    image: str
    keep: list[str]
    keep_patterns: list[str]
    inconsistent: bool
    disabled: bool


def define(parser: Parser) -> None:
    """Adds the arguments."""
    parser.namespace = Arguments
    parser.examples = (
        "qcow2bm prune vm.qcow2 --keep daily --keep weekly",
        "qcow2bm prune vm.qcow2 --keep-pattern '2026-12-*' --dry-run",
        "qcow2bm prune vm.qcow2 --inconsistent",
    )
    parser.notes = (NAME_NOTE,)
    parser.epilog = _EPILOG
    add_image(parser, "a qcow2 file or block device that no other process uses")
    parser.add_argument(
        "--keep",
        metavar="NAME",
        action="append",
        default=[],
        help="keep this bitmap; can be repeated",
    )
    parser.add_argument(
        "--keep-pattern",
        dest="keep_patterns",
        metavar="GLOB",
        action="append",
        default=[],
        help="keep bitmaps whose names match: * is any text, ? any character, [ab] one of these; "
        "can be repeated",
    )
    parser.add_argument(
        "--inconsistent", action="store_true", help="remove bitmaps that are inconsistent"
    )
    parser.add_argument("--disabled", action="store_true", help="remove bitmaps that do not record")
    add_editing(parser, has_result=True)


def run(arguments: Arguments) -> int:
    """Removes the bitmaps; returns the exit status."""
    is_selecting = arguments.inconsistent or arguments.disabled
    if not (is_selecting or arguments.keep or arguments.keep_patterns):
        raise UsageError("give --keep, --keep-pattern, --inconsistent or --disabled")
    plan = None
    with (
        about(arguments.image, ValueError),
        open_to_edit(arguments.image, arguments) as image,
        image.edit(dry_run=arguments.dry_run) as edit,
    ):
        chosen = choose_to_prune(
            image,
            keep=[find(image, name).name for name in arguments.keep],
            keep_patterns=arguments.keep_patterns,
            inconsistent=arguments.inconsistent,
            disabled=arguments.disabled,
        )
        for name in chosen.removed:
            edit.remove(name)
        if arguments.dry_run:
            plan = edit.plan()
    if arguments.output == "json":
        _print_json(arguments, chosen, plan)
    else:
        _print(chosen, plan)
    return 0


def _print(chosen: Pruning, plan: Plan | None) -> None:
    if plan is not None:
        output.print_plan(plan)
    for line in _lines(chosen, is_dry_run=plan is not None):
        print_text(line)


def _lines(chosen: Pruning, *, is_dry_run: bool) -> Iterator[str]:
    if chosen.removed:
        yield f"{'would remove' if is_dry_run else 'removed'} {listed(chosen.removed)}"
        free = "would be free" if is_dry_run else "are free now"
        yield f"{size(chosen.freed_bytes)} {free} in the image file"
    else:
        yield "no bitmap to remove"
    for name, reason in chosen.kept:
        why = _WHY_KEPT.get(reason)
        yield f"kept {output.quoted(name)}{f': {why}' if why else ''}"


def _print_json(arguments: Arguments, chosen: Pruning, plan: Plan | None) -> None:
    output.print_json(
        {
            **output.head(arguments.image),
            "dry-run": arguments.dry_run,
            "removed": [json_text(name) for name in chosen.removed],
            "kept": [{"name": json_text(name), "reason": reason} for name, reason in chosen.kept],
            "freed-bytes": chosen.freed_bytes,
            "plan": None if plan is None else output.plan_as_json(plan),
        }
    )
