"""What the arguments of several commands have in common.

*Spec*: spec/cli.md.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from qcow2bm.cli.console import say
from qcow2bm.units import parse_size

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction["Parser"]
    Define = Callable[["Parser"], None]

USAGE = 64

EPILOG = """\
NAME is the name of a bitmap. @3 means entry 3 of the bitmap directory, whatever its name;
a name that begins with @ is written with @@. Before names that begin with -, write --.

exit status: 0 fine; 1 could not do it; 2 done, but problems were found (of severity refused,
unusable or leak); 64 wrong usage
"""

# argparse does not take what follows -- as it stands: it drops a second --, for one. Marked with
# a character no argument can have, what follows is a name and nothing else.
MARK = "\0"


class Parser(argparse.ArgumentParser):
    """A parser that gets its arguments when it is about to use them.

    There are many commands, and a process has use for one.
    """

    def __init__(self, *, define: Define, **options: Any) -> None:  # noqa: ANN401
        """``define`` adds the arguments; ``options`` are argparse's."""
        super().__init__(formatter_class=_Formatter, allow_abbrev=False, **options)
        self._define: Define | None = define

    def complete(self) -> None:
        """Adds the arguments, if that was not done."""
        define, self._define = self._define, None
        if define:
            define(self)

    def parse_known_args(  # type: ignore[override]
        self,
        args: Any = None,  # noqa: ANN401
        namespace: Any = None,  # noqa: ANN401
    ) -> tuple[argparse.Namespace, list[str]]:
        """What argparse's does, which parses for a command of the second word as well."""
        self.complete()
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Ends the process; argparse's status 2 means here that problems were found."""
        message = message.replace(MARK, "").replace(repr(MARK)[1:-1], "")
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


def add_commands(parser: Parser, dest: str) -> Commands:
    """What commands are added to; ``dest`` is where the word that is chosen goes."""
    return parser.add_subparsers(dest=dest, required=True, metavar="COMMAND")


def add_command(
    commands: Commands,
    name: str,
    summary: str,
    module: str,
    define: Define,
    epilog: str = EPILOG,
) -> None:
    """A command, and the module of this folder that runs it.

    In messages the command stands for what it works on, unless it is given an image.
    """
    parser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=epilog,
        define=define,
    )
    parser.set_defaults(module=module, image=name, parser=parser)


def add_image(
    parser: Parser, text: str = "a qcow2 file or block device", metavar: str = "IMAGE"
) -> None:
    """What a command is about."""
    parser.add_argument("image", metavar=metavar, help=text)


def add_output(parser: Parser) -> None:
    """In which form a command prints."""
    parser.add_argument(
        "--output", choices=("human", "json"), default="human", help="for people, or for programs"
    )


def add_sharing(parser: Parser) -> None:
    """The options of a command that reads an image."""
    parser.add_argument(
        "-U",
        "--force-share",
        action="store_true",
        help="read it even while a VM is running on it",
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="no warnings on standard error")


def add_editing(parser: Parser, ways: argparse._ActionsContainer | None = None) -> None:
    """The options of a command that changes an image; ``ways`` is what a dry run excludes."""
    dry_run = ways or parser
    dry_run.add_argument("--dry-run", action="store_true", help="only show what would be written")
    parser.add_argument(
        "--output",
        choices=("human", "json"),
        default="human",
        help="of --dry-run: for people, or for programs",
    )
    parser.add_argument(
        "--wait",
        metavar="SECONDS",
        type=seconds,
        default=0,
        help="wait so long while somebody else uses the image",
    )
    parser.add_argument(
        "--no-lock",
        action="store_true",
        help="write without locks, where there are none; if a VM uses the image, it is destroyed",
    )


def add_evidence(parser: Parser) -> None:
    """What stands in for a proof that saved bitmaps are still true of the disk."""
    evidence = parser.add_mutually_exclusive_group()
    evidence.add_argument(
        "--assert-unchanged",
        dest="is_unchanged",
        action="store_true",
        help="you know that the disk was not written to since",
    )
    evidence.add_argument(
        "--as-dirty-ranges-unknown",
        dest="is_all_dirty",
        action="store_true",
        help="make the bitmaps all dirty",
    )


def size(text: str) -> int:
    """A size in bytes, such as 64k."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def seconds(text: str) -> float:
    """A number of seconds that somebody may wait."""
    try:
        number = float(text)
    except ValueError:
        number = -1
    if not 0 <= number < 1e9:
        raise argparse.ArgumentTypeError(f'"{text}" is no number of seconds')
    return number
