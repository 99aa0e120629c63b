"""How the command line is read: the parser of one command, and the arguments of several.

argparse reads the options. The other arguments, here called words, are assigned here: argparse
loses words if an option stands between them, and does not take every word behind -- as it is.

*Spec*: spec/cli.md.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, NoReturn

from qcow2bm.cli.messages import say
from qcow2bm.units import escape, parse_size

USAGE = 64

EPILOG = """\
NAME is the name of a bitmap. @3 means entry 3 of the bitmap directory, whatever its name;
a name that begins with @ is written with @@. Before names that begin with -, write --.

exit status: 0 fine; 1 the command failed; 2 done, but the image has problems (of severity refused,
unusable or leak); 64 wrong usage
"""

_LIKE_OPTIONS_BUT_WORDS = re.compile(r"-|-\d*\.?\d+|.* .*", re.DOTALL)  # as argparse has it


class UsageError(Exception):
    """The arguments do not go together; the message says why."""


class Arguments(Namespace):
    """The values of a command's arguments; a command that has any makes a subclass.

    Nothing changes a value after it was parsed.

    Attributes:
        command: the first word of the command, such as "stream".
        action: its second word, such as "dump"; "" if there is none.
    """

    command: str
    action: str


class OutputArguments(Arguments):
    """What `add_output` adds."""

    output: Literal["human", "json"]


class ReadingArguments(Arguments):
    """What `add_reading` adds."""

    force_share: bool
    quiet: bool


class EditingArguments(OutputArguments):
    """What `add_editing` adds."""

    dry_run: bool
    wait: float
    no_lock: bool


class RestoringArguments(EditingArguments):
    """What `add_restoring` adds."""

    file: str
    image: str
    is_unchanged: bool
    is_all_dirty: bool


class Word(NamedTuple):
    """An argument that is no option.

    Attributes:
        dest: the attribute of `Arguments` that gets the value.
        metavar: what help and messages call it.
        help: what it is.
        nargs: None for exactly one, "*" for any number, "+" for one at least. Only the last word
            of a command can be repeated.
        type: makes the value of the text; raises `ArgumentTypeError` if the text is wrong.
    """

    dest: str
    metavar: str
    help: str
    nargs: Literal["*", "+"] | None = None
    type: Callable[[str], object] = str


class Command(NamedTuple):
    """A command that begins with the words of a `Parser`: its summary, and what defines it."""

    summary: str
    define: Callable[[Parser], None]


class Parser(argparse.ArgumentParser):
    """The parser of a command, or of the words with which several commands begin.

    Attributes:
        path: the words of the command: ("stream", "dump").
        words: its arguments that are no options, in order.
        commands: the commands that begin with `path`, by their next word.
        namespace: the class of the values.
    """

    def __init__(self, path: tuple[str, ...], description: str) -> None:
        """A parser without arguments; ``description`` is what the help begins with."""
        super().__init__(
            " ".join(("qcow2bm", *path)),
            description=description,
            epilog=EPILOG,
            formatter_class=_Formatter,
            allow_abbrev=False,
        )
        self.path = path
        self.words: list[Word] = []
        self.commands: dict[str, Command] = {}
        self.namespace: type[Arguments] = Arguments
        self._is_help_complete = False

    @property
    def options(self) -> list[argparse.Action]:
        """The options, for all that is made from them: completion, manual pages, tests."""
        return [action for action in self._actions if action.option_strings]

    def has_option(self, option: str) -> bool:
        """Whether the command has an option, such as "--wait"."""
        return any(option in action.option_strings for action in self._actions)

    def add_word(self, *fields: Any, **more_fields: Any) -> None:  # noqa: ANN401
        """Adds a `Word`, given by its fields."""
        self.words.append(Word(*fields, **more_fields))

    def add_command(self, word: str, summary: str, define: Callable[[Parser], None]) -> None:
        """Adds a command with one more word; ``define`` gives its parser the arguments."""
        self.commands[word] = Command(summary, define)

    def of(self, word: str) -> Parser:
        """The parser of the command with that next word, which is one of `commands`."""
        summary, define = self.commands[word]
        parser = Parser((*self.path, word), f"{summary[0].upper()}{summary[1:]}.")
        define(parser)
        return parser

    def parse(self, texts: Sequence[str], verbatim: Sequence[str]) -> Arguments:
        """Returns the values of all arguments. --help and wrong usage end the process.

        So does, with any arguments, a parser of which `commands` begin.

        Args:
            texts: options and words.
            verbatim: more words, whatever they look like: those behind --.
        """
        values = self.namespace(**dict(zip(("command", "action"), (*self.path, ""), strict=False)))
        _, rest = self.parse_known_args(texts, values)
        unknown = [
            text
            for text in rest
            if text.startswith("-") and not _LIKE_OPTIONS_BUT_WORDS.fullmatch(text)
        ]
        if not unknown and self.commands:
            self._refuse([*rest, *verbatim])
        if not unknown:
            unknown = self._assign([*rest, *verbatim], values)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(map(escape, unknown))}")
        return values

    def _refuse(self, texts: list[str]) -> NoReturn:
        if not texts:
            self.error("the following arguments are required: COMMAND")
        self.error(f'unknown command "{escape(texts[0])}": choose from {", ".join(self.commands)}')

    def _assign(self, texts: list[str], values: Arguments) -> list[str]:
        """Gives each word its value; returns the texts that are too many."""
        missing = [word.metavar for word in self.words[len(texts) :] if word.nargs != "*"]
        if missing:
            self.error(f"the following arguments are required: {', '.join(missing)}")
        for word in self.words:
            if word.nargs:
                setattr(values, word.dest, [self._value(word, text) for text in texts])
                return []
            setattr(values, word.dest, self._value(word, texts.pop(0)))
        return texts

    def _value(self, word: Word, text: str) -> object:
        try:
            return word.type(text)
        except ArgumentTypeError as error:
            self.error(f"argument {word.metavar}: {error}")

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:  # noqa: ANN401
        """As argparse's, which in Python 3.11 drops the value of ``--option=--``."""
        if action.nargs is None and arg_strings == ["--"]:
            value = self._get_value(action, "--")
            self._check_value(action, value)
            return value
        return super()._get_values(action, arg_strings)

    def format_help(self) -> str:
        """The text of --help. Only for this argparse is told of words and commands."""
        if not self._is_help_complete:
            self._is_help_complete = True
            for dest, metavar, text, nargs, _ in self.words:
                self.add_argument(dest, metavar=metavar, help=text, nargs=nargs)
            if self.commands:
                usage = self.format_usage().removeprefix("usage: ").rstrip()
                self.usage = f"{usage} COMMAND ..."
                group = self.add_argument_group("commands")
                for word, command in self.commands.items():
                    group.add_argument(word, help=command.summary)
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        """Ends the process with a line; not with argparse's status 2: problems were found."""
        say(f"{message}; see {self.prog} --help")
        sys.exit(USAGE)


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Help as wide as the terminal.

    argparse makes a formatter for each argument that is added, and its own way to find the
    terminal's width loads five modules.
    """

    def __init__(self, prog: str) -> None:
        try:
            columns = int(os.environ.get("COLUMNS") or os.get_terminal_size().columns)
        except (OSError, ValueError):
            columns = 80
        super().__init__(prog, width=columns - 2)


def add_image(parser: Parser, text: str = "a qcow2 file or block device") -> None:
    """Adds the image that a command reads or changes."""
    parser.add_word("image", "IMAGE", text)


def add_output(parser: Parser, text: str = "print text for people, or JSON for programs") -> None:
    """Adds the option of a command that shows what it read."""
    parser.add_argument("--output", choices=("human", "json"), default="human", help=text)


def add_reading(parser: Parser) -> None:
    """Adds the options of a command that reads an image."""
    parser.add_argument(
        "-U",
        "--force-share",
        action="store_true",
        help="read the image without locks, even while a VM is running on it",
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="print no warnings")


def add_editing(parser: Parser, add_dry_run: Callable[..., object] | None = None) -> None:
    """Adds the options of a command that changes an image.

    ``add_dry_run`` is ``add_argument`` of the group of options that --dry-run belongs to, if it
    belongs to one.
    """
    (add_dry_run or parser.add_argument)(
        "--dry-run", action="store_true", help="write nothing, only show what would be written"
    )
    add_output(parser, "with --dry-run: print text for people, or JSON for programs")
    parser.add_argument(
        "--wait",
        metavar="SECONDS",
        type=seconds,
        default=0,
        help="wait this many seconds if another process uses the image",
    )
    parser.add_argument(
        "--no-lock",
        action="store_true",
        help="write without locks, on a file system that has none; if a VM uses the image "
        "meanwhile, the image is destroyed",
    )


def add_restoring(parser: Parser, text: str) -> None:
    """Adds the arguments of a command that puts saved bitmaps into an image.

    ``text`` says what FILE is.
    """
    parser.add_word("file", "FILE", text)
    add_image(parser)
    evidence = parser.add_mutually_exclusive_group()
    evidence.add_argument(
        "--assert-unchanged",
        dest="is_unchanged",
        action="store_true",
        help="take the bitmaps as they are: you know that nothing wrote to the disk since they "
        "were saved",
    )
    evidence.add_argument(
        "--as-dirty-ranges-unknown",
        dest="is_all_dirty",
        action="store_true",
        help="make all of each bitmap dirty",
    )
    add_editing(parser)


def size(text: str) -> int:
    """A size in bytes, such as 64k."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None


def byte_range(text: str) -> tuple[int, int | None]:
    """START and LENGTH of START:LENGTH; the length is None for START:, up to the disk's end."""
    start, colon, length = text.partition(":")
    if not colon:
        raise ArgumentTypeError(f'"{escape(text)}" is no range: write START:LENGTH')
    return size(start), size(length) if length else None


def seconds(text: str) -> float:
    """A number of seconds to wait."""
    try:
        number = float(text)
    except ValueError:
        number = -1
    if not 0 <= number < 1e9:
        raise ArgumentTypeError(f'"{escape(text)}" is no number of seconds')
    return number
