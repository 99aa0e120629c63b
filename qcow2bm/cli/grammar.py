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

USAGE = 64

_EPILOG = """\
NAME is the name of a bitmap. @3 means entry 3 of the bitmap directory, whatever its name;
a name that begins with @ is written with @@. Before names that begin with -, write --.

exit status: 0 fine; 1 could not do it; 2 done, but problems were found (of severity refused,
unusable or leak); 64 wrong usage
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
    if unknown:  # said by the command's own parser, whose --help lists what there is
        shown = " ".join(argument.removeprefix(_NAME) for argument in unknown)
        commands[arguments.command].error(f"unrecognized arguments: {shown}")
    return arguments


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
        description="Persistent dirty bitmaps of qcow2 disk images, sound or broken.",
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
    return parser, {"dump": dump, "map": map_}


def _reading(
    commands: argparse._SubParsersAction[_Parser], name: str, summary: str
) -> argparse.ArgumentParser:
    """A command that reads an image."""
    parser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=_EPILOG,
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    parser.add_argument("image", metavar="IMAGE", help="a qcow2 file or block device")
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
