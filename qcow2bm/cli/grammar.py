"""The grammar all commands share, and each command's own arguments.

*Spec*: spec/cli.md.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from qcow2bm import __version__
from qcow2bm.cli.console import say
from qcow2bm.units import escape, parse_size

USAGE = 64

_EPILOG = """\
NAME is the name of a bitmap. @3 means entry 3 of the bitmap directory, whatever its name;
a name that begins with @ is written with @@. Before names that begin with -, write --.

exit status: 0 fine; 1 could not do it; 2 done, but problems were found (of severity refused,
unusable or leak); 64 wrong usage
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

_PLUGIN = "print where the nbdkit plugin is that serves a disk and tracks its bitmaps"

_PLUGIN_EPILOG = """\
It serves the raw data file of an image made with data_file_raw=on and preallocation=metadata:

  nbdkit python "$(qcow2bm nbdkit-plugin)" image=vm.qcow2 data=vm.raw

Further parameters: bitmaps=NAME,NAME...  bitmap=NAME  others=mark-in-use  flush-interval=SECONDS
"""

_DEMO = "show how short a stop gets by tracking, on an image made for it"

_DEMO_EPILOG = """\
The image lies in the folder for temporary files (TMPDIR) while the demo runs, and takes 33 MiB.

exit status: 0 done; 1 could not do it; 64 wrong usage
"""


class _Parser(argparse.ArgumentParser):
    """argparse exits with 2 on wrong usage, which here means that problems were found."""

    def error(self, message: str) -> NoReturn:
        message = message.replace(_NAME, "").replace(repr(_NAME)[1:-1], "")
        say(f"{message}; see {self.prog} --help")
        sys.exit(USAGE)


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Help as wide as the terminal.

    argparse makes a formatter for each argument it is told of, and its own way to find the
    terminal's width loads five modules.
    """

    def __init__(self, prog: str) -> None:
        try:
            columns = int(os.environ.get("COLUMNS") or os.get_terminal_size().columns)
        except (OSError, ValueError):
            columns = 80
        super().__init__(prog, width=columns - 2)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments of one command; ends the process on wrong usage, --help and --version."""
    parser, commands = _parser()
    options, names = _split(sys.argv[1:] if argv is None else list(argv))
    arguments, unknown = parser.parse_known_args(options + [_NAME + name for name in names])
    for key, value in vars(arguments).items():
        if isinstance(value, str):
            setattr(arguments, key, value.removeprefix(_NAME))
        elif isinstance(value, list):
            setattr(arguments, key, [item.removeprefix(_NAME) for item in value])
    command = commands[arguments.command]
    if unknown:  # said by the command's own parser, whose --help lists what there is
        shown = " ".join(argument.removeprefix(_NAME) for argument in unknown)
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


# argparse does not take what follows -- as it stands: it drops a second --, for one. Marked with
# a character no argument can have, what follows is a name and nothing else.
_NAME = "\0"


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    """What may be options, and what comes behind --; a leading -- is behind the command."""
    if argv[:1] == ["--"]:
        argv = [*argv[1:2], *argv[:1], *argv[2:]]
    place = argv.index("--") if "--" in argv else len(argv)
    options = [f"--bitmap={_NAME}--" if a == "--bitmap=--" else a for a in argv[:place]]
    return options, argv[place + 1 :]


def _parser() -> tuple[_Parser, dict[str, argparse.ArgumentParser]]:
    parser = _Parser(
        prog="qcow2bm",
        description="Persistent dirty bitmaps of qcow2 disk images: read, inspect, edit.",
        epilog=_EPILOG,
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"qcow2bm {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    dump = _reading(commands, "dump", "show everything about the bitmaps of an image")
    dump.add_argument(
        "--extents",
        action="store_true",
        help="list the dirty extents of every valid bitmap, and its digest",
    )
    dump.add_argument(
        "--sha256",
        action="store_true",
        help="the digest QEMU's x-debug-block-dirty-bitmap-sha256 gives",
    )
    dump.add_argument(
        "--no-count",
        dest="count",
        action="store_false",
        help="count no bits",
    )
    dump.add_argument(
        "--stale",
        action="store_true",
        help="count the bits of inconsistent and stale bitmaps too; they miss writes",
    )
    dump.add_argument("--bitmap", metavar="NAME", help="only this bitmap")

    map_ = _reading(commands, "map", "list the dirty and clean ranges of a bitmap, as nbdinfo does")
    map_.add_argument("name", metavar="NAME", help="the bitmap")
    map_.add_argument("--totals", action="store_true", help="only the sums")
    map_.add_argument("--dirty", action="store_true", help="only what is dirty")
    edits = _edit_commands(commands)
    demo = _plain_command(commands, "demo", _DEMO, "demo", _DEMO_EPILOG)
    demo.add_argument(
        "--seconds", metavar="N", type=_seconds, default=10, help="how long writes are tracked"
    )
    plugin = _plain_command(commands, "nbdkit-plugin", _PLUGIN, "nbdkit_plugin", _PLUGIN_EPILOG)
    return parser, {"dump": dump, "map": map_, **edits, "demo": demo, "nbdkit-plugin": plugin}


def _edit_commands(
    commands: argparse._SubParsersAction[_Parser],
) -> dict[str, argparse.ArgumentParser]:
    made = {}
    for command, (summary, names) in _EDITS.items():
        made[command] = parser = _editing(commands, command, summary)
        for name, (metavar, nargs, text) in names.items():
            parser.add_argument(name, metavar=metavar, nargs=nargs, help=text)
    for command in ("add", "copy"):
        made[command].add_argument(
            "--disabled", action="store_true", help="the new bitmap is not to record writes"
        )
        made[command].add_argument(
            "-g",
            "--granularity",
            metavar="SIZE",
            type=_size,
            help="how many bytes a bit stands for",
        )
    for command, (_, names) in _EDITS.items():
        if names is _MANY:
            text = "all bitmaps" + ("" if command == "remove" else " that are not in use")
            made[command].add_argument("--all", action="store_true", help=text)
    made["merge"].add_argument(
        "--from", dest="other", metavar="OTHER_IMAGE", help="the image that has the sources"
    )
    made["merge"].add_argument(
        "--op", choices=("or", "and", "xor", "subtract"), default="or", help="by default: or"
    )
    return made


_Argument = tuple[str, str | None, str]
_NAMED: dict[str, _Argument] = {"name": ("NAME", None, "the bitmap")}
_MANY: dict[str, _Argument] = {"names": ("NAME", "*", "the bitmaps, or --all")}
_RANGES: dict[str, _Argument] = {"ranges": ("START:LENGTH", "+", "ranges of the disk")}

_EDITS: dict[str, tuple[str, dict[str, _Argument]]] = {
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


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1
    if not 0 <= seconds < 1e9:
        raise argparse.ArgumentTypeError(f'"{text}" is no number of seconds')
    return seconds


def _editing(
    commands: argparse._SubParsersAction[_Parser], name: str, summary: str
) -> argparse.ArgumentParser:
    """A command that changes bitmaps."""
    epilog = _EDIT_EPILOG + (_REMOVE_EPILOG if name == "remove" else "")
    parser = _command(commands, name, summary, "edit", epilog)
    parser.add_argument("--dry-run", action="store_true", help="only show what would be written")
    parser.add_argument(
        "--output",
        choices=("human", "json"),
        default="human",
        help="of --dry-run: for people, or for programs",
    )
    parser.add_argument(
        "--wait",
        metavar="SECONDS",
        type=_seconds,
        default=0,
        help="wait so long while somebody else uses the image",
    )
    parser.add_argument(
        "--no-lock",
        action="store_true",
        help="write without locks, where there are none; if a VM uses the image, it is destroyed",
    )
    return parser


def _plain_command(
    commands: argparse._SubParsersAction[_Parser], name: str, summary: str, module: str, epilog: str
) -> argparse.ArgumentParser:
    """A command, and the module of this folder that runs it; what it works on goes by its name."""
    parser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=epilog,
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    parser.set_defaults(module=module, image=name)
    return parser


def _command(
    commands: argparse._SubParsersAction[_Parser], name: str, summary: str, module: str, epilog: str
) -> argparse.ArgumentParser:
    """A command that is given an image."""
    parser = _plain_command(commands, name, summary, module, epilog)
    text = "a qcow2 file or block device" + (" that nobody uses" if module == "edit" else "")
    parser.add_argument("image", metavar="IMAGE", help=text)
    return parser


def _reading(
    commands: argparse._SubParsersAction[_Parser], name: str, summary: str
) -> argparse.ArgumentParser:
    """A command that reads an image."""
    parser = _command(commands, name, summary, name, _EPILOG)
    parser.add_argument(
        "--output", choices=("human", "json"), default="human", help="for people, or for programs"
    )
    parser.add_argument(
        "-U",
        "--force-share",
        action="store_true",
        help="read it even while a VM is running on it",
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="no warnings on standard error")
    return parser
