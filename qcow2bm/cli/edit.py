"""The commands that change bitmaps: ``add``, ``remove``, ``clear`` and so on, one edit each.

*Spec*: spec/cli.md.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, get_args

from qcow2bm import Edit, Image, Op, open
from qcow2bm.cli.arguments import (
    NAME_NOTE,
    NEW_NAME_NOTE,
    RANGE_NOTE,
    SIZE_NOTE,
    add_editing,
    add_image,
    size,
)
from qcow2bm.cli.comparing import (
    COMPARE_NOTE,
    ComparingArguments,
    add_compare,
    differences,
    require_compare,
)
from qcow2bm.cli.images import find, new_name, not_in_use, open_to_edit
from qcow2bm.cli.messages import about, say
from qcow2bm.cli.output import listed, print_dry_run
from qcow2bm.cli.parser import Parser, UsageError
from qcow2bm.cli.range_input import Range, RangeInput, inputs_read, range_or_input, ranges_of
from qcow2bm.units import escape

_MOST_LISTED = 5

_EPILOG = """\
The change is atomic: after a failure or a loss of power at any time, all bitmaps are as before, or
all are as after. Meanwhile no other process can use the image.

exit status: 0 done; 1 the command failed, and all is as before unless the message says otherwise;
64 wrong usage
"""

_REMOVE_EPILOG = """
Stale bitmaps can only be removed with --all. Their clusters stay leaked: qemu-img check -r leaks
frees them.
"""


_INVALIDATE_EPILOG = """
This is for an image that was restored from an older copy, or whose header was: its bitmaps may look
valid and miss writes. Bitmaps that were marked are inconsistent: salvage them, or remove them and
take a full backup.
"""

_ADD_EPILOG = f"""
With --compare the new bitmap is not clean: exactly what differs between OLD and NEW is dirty. That
makes a bitmap anew that was lost. {COMPARE_NOTE}"""

_EPILOGS = {"add": _ADD_EPILOG, "remove": _REMOVE_EPILOG, "invalidate": _INVALIDATE_EPILOG}

_EXAMPLES = {
    "add": (
        "qcow2bm add vm.qcow2 daily",
        "qcow2bm add vm.qcow2 fine -g 4k --disabled",
        "qcow2bm add vm.qcow2 daily --compare last-backup.raw vm.qcow2",
    ),
    "remove": ("qcow2bm remove vm.qcow2 daily weekly", "qcow2bm remove vm.qcow2 --all"),
    "clear": ("qcow2bm clear vm.qcow2 daily",),
    "enable": ("qcow2bm enable vm.qcow2 daily weekly",),
    "disable": ("qcow2bm disable vm.qcow2 --all",),
    "invalidate": ("qcow2bm invalidate vm.qcow2 --all", "qcow2bm invalidate vm.qcow2 daily"),
    "rename": ("qcow2bm rename vm.qcow2 daily monday", "qcow2bm rename vm.qcow2 @0 monday"),
    "copy": ("qcow2bm copy vm.qcow2 daily monday", "qcow2bm copy vm.qcow2 daily coarse -g 1M"),
    "set": (
        "qcow2bm set vm.qcow2 daily 1M:64k 8M:",
        "qcow2bm set --dry-run vm.qcow2 daily 0:1G",
        "qcow2bm map --json --dirty old.qcow2 daily | qcow2bm set vm.qcow2 daily -",
    ),
    "reset": ("qcow2bm reset vm.qcow2 daily 1M:64k",),
    "invert": ("qcow2bm invert vm.qcow2 daily",),
    "fit": ("qcow2bm fit vm.qcow2 --all",),
    "merge": (
        "qcow2bm merge vm.qcow2 weekly monday tuesday",
        "qcow2bm merge vm.qcow2 weekly daily --from old.qcow2 --op subtract",
    ),
}


class Arguments(ComparingArguments):
    """The values of the arguments of all these commands; each has some of them."""

    image: str
    name: str
    names: list[str]
    new: str
    ranges: list[Range | RangeInput]
    granularity: int | None
    disabled: bool
    all: bool
    other: str | None
    op: Op


# Arguments


def define(parser: Parser) -> None:
    """Adds the arguments of one of the commands."""
    (command,) = parser.path
    parser.namespace = Arguments
    parser.examples = _EXAMPLES[command]
    parser.notes = (NAME_NOTE,)
    parser.epilog = _EPILOG + _EPILOGS.get(command, "")
    add_image(parser, "a qcow2 file or block device that no other process uses")
    _DEFINITIONS[command](parser)
    add_editing(parser)


def _define_add(parser: Parser) -> None:
    parser.add_word("name", "NAME", "the name of the new bitmap")
    parser.notes = (NEW_NAME_NOTE,)
    _add_form(parser, "the cluster size, but 4k to 64k")
    add_compare(parser, parser.add_argument)


def _define_copy(parser: Parser) -> None:
    parser.add_word("name", "NAME", "the bitmap")
    parser.add_word("new", "NEW", "the name of the copy")
    _add_form(parser, "that of NAME")


def _add_form(parser: Parser, default_granularity: str) -> None:
    parser.add_argument(
        "--disabled", action="store_true", help="let the new bitmap record no writes"
    )
    parser.add_argument(
        "-g",
        "--granularity",
        metavar="SIZE",
        type=size,
        help="how many bytes of the disk one bit of the new bitmap stands for "
        f"(default: {default_granularity})",
    )
    parser.notes += (SIZE_NOTE,)


def _define_rename(parser: Parser) -> None:
    parser.add_word("name", "NAME", "the bitmap")
    parser.add_word("new", "NEW", "its new name")


def _define_ranges(parser: Parser) -> None:
    parser.add_word("name", "NAME", "the bitmap")
    text = "ranges of the disk; - means the dirty ranges on standard input, as map prints them"
    parser.add_word("ranges", "START:LENGTH", text, "+", range_or_input)
    parser.notes += (RANGE_NOTE,)


def _define_merge(parser: Parser) -> None:
    parser.add_word("name", "TARGET", "the bitmap that changes")
    text = "the bitmaps that TARGET is combined with, one after the other"
    parser.add_word("names", "SOURCE", text, "+")
    parser.add_argument(
        "--from", dest="other", metavar="OTHER_IMAGE", help="take the sources from this image"
    )
    parser.add_argument("--op", choices=get_args(Op), default="or", help="how to combine them")


def _define_remove(parser: Parser) -> None:
    _add_names(parser, "remove all bitmaps")


def _define_each(parser: Parser) -> None:
    _add_names(parser, "change all bitmaps that are not in use")


def _add_names(parser: Parser, text_of_all: str) -> None:
    parser.add_word("names", "NAME", "the bitmaps; none with --all", "*")
    parser.add_argument("--all", action="store_true", help=text_of_all)


_DEFINITIONS: dict[str, Callable[[Parser], None]] = {
    "add": _define_add,
    "remove": _define_remove,
    "clear": _define_each,
    "enable": _define_each,
    "disable": _define_each,
    "invalidate": _define_each,
    "rename": _define_rename,
    "copy": _define_copy,
    "set": _define_ranges,
    "reset": _define_ranges,
    "invert": _define_each,
    "fit": _define_each,
    "merge": _define_merge,
}


# Running

Operation = Callable[[Arguments, Image, Edit], str | None]
"""Does a command to an edit; returns a note that the user gets if the command succeeds."""


def run(arguments: Arguments) -> int:
    """Runs one of the commands; returns the exit status."""
    if "all" in arguments and arguments.all == bool(arguments.names):
        raise UsageError(
            "give names or --all, not both" if arguments.all else "give names, or --all"
        )
    if "compared" in arguments:
        require_compare(arguments)
    plan, note = None, None
    with (
        inputs_read(arguments.ranges if "ranges" in arguments else ()),
        about(arguments.image, ValueError),
        open_to_edit(arguments.image, arguments) as image,
        image.edit(dry_run=arguments.dry_run) as edit,
    ):
        note = _OPERATIONS[arguments.command](arguments, image, edit)
        if arguments.dry_run:
            plan = edit.plan()
    if plan is not None:
        print_dry_run(arguments, arguments.image, plan)
    if note:
        say(f"note: {escape(arguments.image)}: {note}")
    return 0


def _add(arguments: Arguments, image: Image, edit: Edit) -> None:
    name = new_name(arguments.name)
    enabled = not arguments.disabled
    edit.add(name, arguments.granularity, enabled)  # if that is refused, nothing is compared
    if arguments.compared:
        granularity = arguments.granularity or image.default_granularity
        changed = differences(arguments, image, [granularity])
        edit.remove(name)
        edit.load(name, granularity, changed[granularity], enabled)


def _remove(arguments: Arguments, image: Image, edit: Edit) -> None:
    if arguments.all:
        edit.remove_all()
    else:
        _each(Edit.remove)(arguments, image, edit)


def _rename(arguments: Arguments, image: Image, edit: Edit) -> None:
    edit.rename(find(image, arguments.name).name, new_name(arguments.new))


def _copy(arguments: Arguments, image: Image, edit: Edit) -> None:
    name = find(image, arguments.name).name
    enabled = False if arguments.disabled else None
    edit.copy(name, new_name(arguments.new), arguments.granularity, enabled)


def _fill(operation: Callable[[Edit, str, Any], None]) -> Operation:
    """The same operation on all ranges."""

    def operate(arguments: Arguments, image: Image, edit: Edit) -> None:
        name = find(image, arguments.name).name
        for ranges in ranges_of(arguments.ranges, image.virtual_size):
            operation(edit, name, ranges)

    return operate


def _merge(arguments: Arguments, image: Image, edit: Edit) -> None:
    target = find(image, arguments.name).name
    if arguments.other is None or _is_same(arguments.other, arguments.image):
        for name in arguments.names:
            edit.merge(target, find(image, name).name, arguments.op)
        return
    with about(arguments.other), open(arguments.other, lock_timeout=arguments.wait) as other:
        for name in arguments.names:
            edit.merge(target, find(other, name), arguments.op)


def _is_same(path: str, other: str) -> bool:
    return os.path.exists(path) and os.path.exists(other) and os.path.samefile(path, other)


def _each(operation: Callable[[Edit, str], None]) -> Operation:
    """The same operation on each of several bitmaps."""

    def operate(arguments: Arguments, image: Image, edit: Edit) -> None:
        for name in _chosen(arguments, image, edit):
            operation(edit, name)

    return operate


def _chosen(arguments: Arguments, image: Image, edit: Edit) -> list[str]:
    """The names of the bitmaps that are meant: with --all, those that are not in use."""
    if arguments.all:
        return not_in_use(image, edit.names)
    # All are looked up first: a number means an entry of the image as it was.
    return [find(image, name).name for name in arguments.names]


def _enable(arguments: Arguments, image: Image, edit: Edit) -> str | None:
    chosen = _chosen(arguments, image, edit)
    disabled = [name for name in chosen if not image.bitmaps[name].auto]
    for name in chosen:
        edit.enable(name)
    if not disabled:
        return None
    was, it = ("was", "it") if len(disabled) == 1 else ("were", "them")
    names = listed(disabled, _MOST_LISTED)
    return f"{names} {was} disabled: all that was written meanwhile is missing from {it}"


def _invalidate(arguments: Arguments, image: Image, edit: Edit) -> str | None:
    chosen = _chosen(arguments, image, edit)
    trusted = [name for name in chosen if image.is_consistent and not image.bitmaps[name].in_use]
    for name in chosen:
        edit.invalidate(name)
    if trusted:
        return None
    what = "any bitmap of the image" if arguments.all else listed(chosen, _MOST_LISTED)
    return f"nothing to do: no program trusts {what}"


_OPERATIONS: dict[str, Operation] = {
    "add": _add,
    "remove": _remove,
    "clear": _each(Edit.clear),
    "enable": _enable,
    "disable": _each(Edit.disable),
    "invalidate": _invalidate,
    "rename": _rename,
    "copy": _copy,
    "set": _fill(Edit.set_many),
    "reset": _fill(Edit.reset_many),
    "invert": _each(Edit.invert),
    "fit": _each(Edit.fit),
    "merge": _merge,
}
