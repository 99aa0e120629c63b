"""The grammar that all commands share, and the arguments of those of one word.

*Spec*: spec/cli.md.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING

from qcow2bm import __version__
from qcow2bm.bits.operations import OPS
from qcow2bm.cli.arguments import (
    EPILOG,
    MARK,
    Parser,
    add_command,
    add_commands,
    add_editing,
    add_image,
    add_output,
    add_sharing,
    seconds,
    size,
)
from qcow2bm.units import escape, parse_size

if TYPE_CHECKING:
    from qcow2bm.cli.arguments import Commands

_CHECK_EPILOG = """\
All references to clusters are followed and compared with refcounts, as qemu-img check does, also
in an image that QEMU refuses to open. Nothing is changed.

exit status: 0 all is well; 1 it could not be checked; 2 there are errors; 3 there are leaked
clusters, and nothing else; 64 wrong usage
"""

_REPAIR_EPILOG = """\
What can be proved is mended; a bitmap of which that is not so is dropped, and named: "lost: NAME
(why)". Sound bitmaps stay as they are. FILE must not be there; it is on the disk before anything
else is written.

exit status: 0 mended, or nothing to do; 1 could not do it, and all is as before unless it says
otherwise; 2 not everything is mended, or in a dry run: there is something to mend; 64 wrong usage
"""

_UNDO_EPILOG = """\
Nothing is changed if the image is not as the repair left it. If it is interrupted, do it again.

exit status: 0 all is as before the repair; 1 could not do it; 64 wrong usage
"""

_SALVAGE_EPILOG = """\
With --compare the bitmap gets exactly what differs between OLD and NEW. OLD must be what the last
backup restores to: the full backup with all increments. NEW is what the disk holds now: IMAGE
itself, or its data file. Both are raw files or block devices, or qcow2 images, which qemu-nbd
reads. IMAGE is locked meanwhile. With --trust-stale every
write since the bitmap was stored last is missing from it: only for who knows that there was none.
There is no undo.

The change is atomic, as that of every edit. Other stale bitmaps become inconsistent: salvage them
next, or remove them.

exit status: 0 done; 1 could not do it, all is as before unless it says otherwise; 64 wrong usage
"""

_REMOVE_EPILOG = """
Stale bitmaps can only be removed with --all. Their clusters stay leaked: qemu-img check -r leaks.
"""

_EDIT_EPILOG = """\
NAME is the name of a bitmap. @3 means entry 3 of the bitmap directory, whatever its name;
a name that begins with @ is written with @@. Before names that begin with -, write --.
Sizes are in bytes, or with k, M, G, T, P, E; START: without a length is all from there on.

The change is atomic: after a failure or a loss of power at any time, all bitmaps are as before
or all are as after. Nobody else can use the image meanwhile.

exit status: 0 done; 1 could not do it, all is as before unless it says otherwise; 64 wrong usage
"""

_PLUGIN_EPILOG = """\
It serves the raw data file of an image made with data_file_raw=on and preallocation=metadata:

  nbdkit python "$(qcow2bm nbdkit-plugin)" image=vm.qcow2 data=vm.raw

Further parameters: bitmaps=NAME,NAME...  bitmap=NAME  others=mark-in-use  flush-interval=SECONDS
"""

_DEMO_EPILOG = """\
The image lies in the folder for temporary files (TMPDIR) while the demo runs, and takes 33 MiB.

exit status: 0 done; 1 could not do it; 64 wrong usage
"""

# Commands of two words. Each module defines what follows the first.
_GROUPS = {
    "stream": "look at bitmaps in QEMU's migration stream, or put them into one",
    "sidecar": "carry the bitmaps of a disk in a file of their own",
    "rescue": "keep the bitmaps of a running VM through a migration that fails",
}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments of one command; ends the process on wrong usage, --help and --version."""
    parser = root()
    options, names = _split(sys.argv[1:] if argv is None else list(argv))
    arguments, unknown = parser.parse_known_args(options + [MARK + name for name in names])
    if "names" in arguments and not any(text.startswith("-") for text in unknown):
        # argparse takes IMAGE and no names at all where an option stands between them.
        arguments.names, unknown = arguments.names + unknown, []
    for key, value in vars(arguments).items():
        if isinstance(value, str):
            setattr(arguments, key, value.removeprefix(MARK))
        elif isinstance(value, list):
            setattr(arguments, key, [item.removeprefix(MARK) for item in value])
    command: Parser = arguments.parser
    if unknown:  # said by the command's own parser, whose --help lists what there is
        shown = " ".join(argument.removeprefix(MARK) for argument in unknown)
        command.error(f"unrecognized arguments: {shown}")
    if "all" in arguments and arguments.all == bool(arguments.names):
        command.error("give names, or --all")
    if "ranges" in arguments:
        try:
            arguments.ranges = [_range(text) for text in arguments.ranges]
        except ValueError as error:
            command.error(str(error))
    return arguments


def _range(text: str) -> tuple[int, int | None]:
    start, colon, length = text.partition(":")
    if not colon:
        raise ValueError(f'"{escape(text)}" is no range: write START:LENGTH')
    return parse_size(start), parse_size(length) if length else None


_OPTION_DASHES = re.compile("--[a-z-]+=--")


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    """What may be options, and what comes behind --; a leading -- is behind the command."""
    if argv[:1] == ["--"]:
        words = 2 if argv[1:2] and argv[1] in _GROUPS else 1
        argv = [*argv[1 : 1 + words], *argv[:1], *argv[1 + words :]]
    place = argv.index("--") if "--" in argv else len(argv)
    options = [f"{a[:-2]}{MARK}--" if _OPTION_DASHES.fullmatch(a) else a for a in argv[:place]]
    return options, argv[place + 1 :]


def root() -> Parser:
    """The parser of all commands."""
    return Parser(
        define=_define,
        prog="qcow2bm",
        description="Persistent dirty bitmaps of qcow2 disk images: read, inspect, edit.",
        epilog=EPILOG,
    )


def _define(parser: Parser) -> None:
    parser.add_argument("--version", action="version", version=f"qcow2bm {__version__}")
    commands = add_commands(parser, "command")
    add_command(
        commands, "dump", "show everything about the bitmaps of an image", "dump", _define_dump
    )
    summary = "list the dirty and clean ranges of a bitmap, as nbdinfo does"
    add_command(commands, "map", summary, "map", _define_map)
    summary = "find everything that is wrong with an image, and say what it means"
    add_command(commands, "check", summary, "check", _define_check, _CHECK_EPILOG)
    summary = "mend the metadata of bitmaps, so that QEMU opens the image"
    add_command(commands, "repair", summary, "repair", _define_repair, _REPAIR_EPILOG)
    summary = "take back a repair"
    add_command(commands, "undo", summary, "repair", _define_undo, _UNDO_EPILOG)
    summary = "make a bitmap valid that is inconsistent or stale"
    add_command(commands, "salvage", summary, "salvage", _define_salvage, _SALVAGE_EPILOG)
    for command in EDITS:
        _add_edit(commands, command)
    for group, summary in _GROUPS.items():
        _add_group(commands, group, summary)
    summary = "show how short a stop gets by tracking, on an image made for it"
    add_command(commands, "demo", summary, "demo", _define_demo, _DEMO_EPILOG)
    summary = "print where the nbdkit plugin is that serves a disk and tracks its bitmaps"
    add_command(
        commands, "nbdkit-plugin", summary, "nbdkit_plugin", lambda parser: None, _PLUGIN_EPILOG
    )


def _add_group(commands: Commands, group: str, summary: str) -> None:
    module = f"qcow2bm.cli.{group}_arguments"
    add_command(
        commands, group, summary, group, lambda parser: import_module(module).define(parser)
    )


def _define_dump(parser: Parser) -> None:
    add_image(parser)
    add_output(parser)
    add_sharing(parser)
    parser.add_argument(
        "--extents",
        action="store_true",
        help="list the dirty extents of every valid bitmap, and its digest",
    )
    parser.add_argument(
        "--sha256",
        action="store_true",
        help="the digest QEMU's x-debug-block-dirty-bitmap-sha256 gives",
    )
    parser.add_argument(
        "--no-count",
        dest="count",
        action="store_false",
        help="count no bits",
    )
    parser.add_argument(
        "--stale",
        action="store_true",
        help="count the bits of inconsistent and stale bitmaps too; they miss writes",
    )
    parser.add_argument("--bitmap", metavar="NAME", help="only this bitmap")


def _define_map(parser: Parser) -> None:
    add_image(parser)
    add_output(parser)
    add_sharing(parser)
    parser.add_argument("name", metavar="NAME", help="the bitmap")
    parser.add_argument("--totals", action="store_true", help="only the sums")
    parser.add_argument("--dirty", action="store_true", help="only what is dirty")


def _define_check(parser: Parser) -> None:
    add_image(parser)
    add_output(parser)
    add_sharing(parser)


def _define_repair(parser: Parser) -> None:
    add_image(parser, "a qcow2 file or block device that nobody uses")
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--undo", metavar="FILE", help="where the way back is kept, for undo")
    way.add_argument("--no-undo", action="store_true", help="keep no way back")
    add_editing(parser, way)
    parser.add_argument("--lossless", action="store_true", help="do only what loses no bitmap")
    parser.add_argument(
        "--only",
        metavar="ID",
        action="append",
        default=[],
        choices=("directory", "tails", "refcounts", "stale"),
        help="only this repair, as check names it; may be repeated",
    )


def _define_undo(parser: Parser) -> None:
    add_image(parser, "the image that was repaired")
    parser.add_argument("file", metavar="FILE", help="what the repair left")
    parser.add_argument(
        "--assert-unchanged",
        dest="is_unchanged",
        action="store_true",
        help="you know that nobody wrote to the disk since",
    )
    add_editing(parser)


def _define_salvage(parser: Parser) -> None:
    add_image(parser, "a qcow2 file or block device that nobody uses")
    parser.add_argument("name", metavar="NAME", help="the bitmap")
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--all-dirty", action="store_true", help="the next backup saves all")
    way.add_argument(
        "--compare",
        metavar=("OLD", "NEW"),
        nargs=2,
        help="the next backup saves what differs between the last one and the disk",
    )
    way.add_argument(
        "--trust-stale", action="store_true", help="as it is stored, though writes are missing"
    )
    for which, metavar in (("old", "OLD"), ("new", "NEW")):
        parser.add_argument(
            f"--{which}-format",
            choices=("raw", "qcow2"),
            help=f"what {metavar} is, if it begins like a qcow2 image",
        )
    parser.add_argument(
        "--assert-current",
        dest="is_current",
        action="store_true",
        help="you know that NEW is what the disk holds now",
    )
    add_editing(parser)


def _define_demo(parser: Parser) -> None:
    parser.add_argument(
        "--seconds", metavar="N", type=seconds, default=10, help="how long writes are tracked"
    )


_Argument = tuple[str, str | None, str]
_NAMED: dict[str, _Argument] = {"name": ("NAME", None, "the bitmap")}
_MANY: dict[str, _Argument] = {"names": ("NAME", "*", "the bitmaps, or --all")}
_RANGES: dict[str, _Argument] = {"ranges": ("START:LENGTH", "+", "ranges of the disk")}

EDITS: dict[str, tuple[str, dict[str, _Argument]]] = {
    "add": ("add a bitmap that records writes from now on", _NAMED),
    "remove": ("remove bitmaps", _MANY),
    "clear": ("make bitmaps clean", _MANY),
    "enable": ("make bitmaps record writes", _MANY),
    "disable": ("make bitmaps record no more writes", _MANY),
    "rename": ("give a bitmap another name", {**_NAMED, "new": ("NEW", None, "its new name")}),
    "copy": (
        "copy a bitmap, which goes on recording if the original does",
        {**_NAMED, "new": ("NEW", None, "the name of the copy")},
    ),
    "set": ("make ranges dirty, widened to whole granules", {**_NAMED, **_RANGES}),
    "reset": ("make ranges clean, narrowed to whole granules", {**_NAMED, **_RANGES}),
    "invert": ("make what is clean dirty, and what is dirty clean", _MANY),
    "fit": ("make bitmaps fit a disk that was resized without them", _MANY),
    "merge": (
        "combine bitmaps, of any granularity",
        {
            "name": ("TARGET", None, "the bitmap that changes"),
            "names": ("SOURCE", "+", "the bitmaps it is combined with, one after the other"),
        },
    ),
}


def _add_edit(commands: Commands, command: str) -> None:
    epilog = _EDIT_EPILOG + (_REMOVE_EPILOG if command == "remove" else "")
    define = partial(_define_edit, command)
    add_command(commands, command, EDITS[command][0], "edit", define, epilog)


def _define_edit(command: str, parser: Parser) -> None:
    names = EDITS[command][1]
    add_image(parser, "a qcow2 file or block device that nobody uses")
    add_editing(parser)
    for name, (metavar, nargs, text) in names.items():
        parser.add_argument(name, metavar=metavar, nargs=nargs, help=text)
    if command in ("add", "copy"):
        parser.add_argument(
            "--disabled", action="store_true", help="the new bitmap is not to record writes"
        )
        parser.add_argument(
            "-g",
            "--granularity",
            metavar="SIZE",
            type=size,
            help="how many bytes a bit stands for",
        )
    if names is _MANY:
        text = "all bitmaps" + ("" if command == "remove" else " that are not in use")
        parser.add_argument("--all", action="store_true", help=text)
    if command == "merge":
        parser.add_argument(
            "--from", dest="other", metavar="OTHER_IMAGE", help="the image that has the sources"
        )
        parser.add_argument("--op", choices=OPS, default="or", help="by default: or")
