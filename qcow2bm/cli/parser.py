"""The parser of one command.

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
from qcow2bm.units import escape

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


class Word(NamedTuple):
    """An argument that is no option.

    Attributes:
        dest: the attribute of `Arguments` that gets the value.
        metavar: what help and messages call it.
        help: what it is.
        nargs: None for exactly one, "*" for any number, "+" for one at least. Only the last word
            of a command can be repeated.
        convert: makes the value of the text; raises `ArgumentTypeError` if the text is wrong.
    """

    dest: str
    metavar: str
    help: str
    nargs: Literal["*", "+"] | None = None
    convert: Callable[[str], object] = str


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

    def add_word(
        self,
        dest: str,
        metavar: str,
        text: str,
        nargs: Literal["*", "+"] | None = None,
        convert: Callable[[str], object] = str,
    ) -> None:
        """Adds a `Word`, given by its fields."""
        self.words.append(Word(dest, metavar, text, nargs, convert))

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

        If `path` is not a whole command yet, everything else is wrong usage.

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
            shown = " ".join(map(escape, unknown))
            self.error(f"unrecognized arguments: {shown}")
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
            return word.convert(text)
        except ArgumentTypeError as error:
            self.error(f"argument {word.metavar}: {error}")

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:  # noqa: ANN401
        """Returns the value of an option; argparse drops that of ``--option=--`` in Python 3.11."""
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
        """Ends the process with status 64; argparse's 2 would mean that problems were found."""
        say(f"{message}; see {self.prog} --help")
        sys.exit(USAGE)


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """A formatter of help that is as wide as the terminal.

    argparse makes a formatter for each argument that is added, and its own way to find the
    terminal's width loads five modules.
    """

    def __init__(self, prog: str) -> None:
        try:
            columns = int(os.environ.get("COLUMNS") or os.get_terminal_size().columns)
        except (OSError, ValueError):
            columns = 80
        super().__init__(prog, width=columns - 2)
