"""The parser of one command.

argparse reads the options. The other arguments, here called words, are assigned here: argparse
loses words if an option stands between them, and does not take every word behind -- as it is.

*Spec*: spec/cli.md.
"""

from __future__ import annotations

import argparse
import re
import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple, NoReturn

from qcow2bm.cli.messages import say
from qcow2bm.cli.terminal import COLOR_CHOICES, columns, wrap
from qcow2bm.units import escape

USAGE = 64

EPILOG = """\
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
        color: when the output has colors: "auto", "always" or "never".
    """

    command: str
    action: str
    color: str


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
    """A command that begins with the words of a `Parser`.

    Attributes:
        summary: what the command does, in one line.
        define: gives the parser of the command its arguments.
        group: the heading in the help under which the command stands.
    """

    summary: str
    define: Callable[[Parser], None]
    group: str


class Parser(argparse.ArgumentParser):
    """The parser of a command, or of the words with which several commands begin.

    Attributes:
        path: the words of the command: ("stream", "dump").
        words: its arguments that are no options, in order.
        commands: the commands that begin with `path`, by their next word.
        namespace: the class of the values.
        examples: command lines that the help shows, each of which can be used as it is.
        notes: paragraphs of the help about the arguments.
        reader: reads all arguments into the values, for a command whose arguments are not in the
            manner of this program; None for any other command.
        usage_status: the exit status of wrong usage.
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
        self.color = False  # or Python 3.14 colors the help, whatever --color says
        self.path = path
        self.examples: tuple[str, ...] = ()
        self.notes: tuple[str, ...] = ()
        self.words: list[Word] = []
        self.commands: dict[str, Command] = {}
        self.namespace: type[Arguments] = Arguments
        self.reader: Callable[[Parser, Sequence[str], Any], None] | None = None
        self.usage_status = USAGE
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

    def add_command(
        self, word: str, summary: str, define: Callable[[Parser], None], group: str = "commands"
    ) -> None:
        """Adds a `Command` with one more word, given by its fields."""
        self.commands[word] = Command(summary, define, group)

    def of(self, word: str) -> Parser:
        """The parser of the command with that next word, which is one of `commands`."""
        summary, define, _ = self.commands[word]
        parser = Parser((*self.path, word), f"{summary[0].upper()}{summary[1:]}.")
        define(parser)
        if not parser.commands:
            parser.add_argument(
                "--color",
                metavar="WHEN",
                choices=COLOR_CHOICES,
                default="auto",
                help="color the output: auto, always or never; auto means on a terminal",
            )
        return parser

    def parse(self, argv: Sequence[str]) -> Arguments:
        """Returns the values of all arguments. --help and wrong usage end the process.

        If `path` is not a whole command yet, everything else is wrong usage.

        Args:
            argv: options and words; -- ends the options.
        """
        values = self.namespace(**dict(zip(("command", "action"), (*self.path, ""), strict=False)))
        if self.reader:
            self.reader(self, argv, values)
            return values
        place = argv.index("--") if "--" in argv else len(argv)
        texts, verbatim = argv[:place], argv[place + 1 :]
        self._check_options(texts)
        _, rest = self.parse_known_args(texts, values)
        for text in rest:
            if _is_like_option(text):
                self._refuse_option(text)
        if self.commands:
            self._refuse_command([*rest, *verbatim])
        surplus = self._assign([*rest, *verbatim], values)
        if surplus:
            self.error(f"too many arguments: {' '.join(map(escape, surplus))}")
        return values

    def _check_options(self, texts: Sequence[str]) -> None:
        """Refuses what argparse refuses as well, but after less important errors or without help.

        These are options that do not exist, and values of options that begin with -.
        """
        nargs = {name: action.nargs for action in self.options for name in action.option_strings}
        for before, text in pairwise(("", *texts)):
            if not _is_like_option(text):
                continue
            if before in nargs and nargs[before] is None:
                self.error(
                    f'{before} needs a value; if "{escape(text)}" is the value, '
                    f"write {before}={escape(text)}"
                )
            if text.startswith("--") and text.partition("=")[0] not in nargs:
                self._refuse_option(text)

    def _refuse_option(self, text: str) -> NoReturn:
        option = text.partition("=")[0]
        names = [name for action in self.options for name in action.option_strings]
        near = _near(option, names)
        if near:
            hint = f'did you mean "{near}"?'
        elif self.commands:
            hint = f"options stand after COMMAND; see {self.prog} --help"
        elif self.words:
            hint = f"before a name that begins with -, write --; see {self.prog} --help"
        else:
            hint = f"see {self.prog} --help"
        self._fail(f'no option "{escape(option)}"; {hint}')

    def _refuse_command(self, texts: list[str]) -> NoReturn:
        """Shows which commands there are, if none is given; else says what may be meant."""
        if not texts:
            self.print_help()
            self.exit()
        near = _near(texts[0], self.commands)
        hint = f'did you mean "{near}"?' if near else f"see {self.prog} --help"
        command = escape(" ".join((*self.path, texts[0])))
        self._fail(f'no command "{command}"; {hint}')

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

    def convert(self, option: argparse.Action, text: str) -> Any:  # noqa: ANN401
        """Returns the value that a text stands for; a text that an option does not take is wrong.

        This is for a `reader`.
        """
        try:
            value = self._get_value(option, text)
            self._check_value(option, value)
        except argparse.ArgumentError as error:
            self.error(error.message)
        return value

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

    def help_of(self, option: argparse.Action) -> str:
        """Returns what the help says of an option, with its default."""
        return _Formatter(self.prog).help_of(option)

    def format_usage_of_all(self) -> str:
        """Returns the usage with all words, as --help has it."""
        self._complete_help()
        return self.format_usage()

    def format_help(self) -> str:
        """Returns the text of --help."""
        self._complete_help()
        own = self.epilog
        self.epilog = "\n\n".join((*self._shown_examples(), *self.notes, own or ""))
        try:
            return super().format_help()
        finally:
            self.epilog = own

    def _complete_help(self) -> None:
        """Tells argparse of words and commands, which it needs only to describe them."""
        if self._is_help_complete:
            return
        self._is_help_complete = True
        for dest, metavar, text, nargs, _ in self.words:
            self.add_argument(dest, metavar=metavar, help=text, nargs=nargs)
        if self.commands:
            usage = self.format_usage().removeprefix("usage: ").rstrip()
            self.usage = f"{usage} COMMAND ..."
            self.notes = (f"{self.prog} COMMAND --help explains a command, with examples.",)
        groups: dict[str, Any] = {}
        for word, command in self.commands.items():
            if command.group not in groups:
                groups[command.group] = self.add_argument_group(command.group)
            groups[command.group].add_argument(word, help=command.summary)

    def _shown_examples(self) -> Iterable[str]:
        if self.examples:
            title = "example" if len(self.examples) == 1 else "examples"
            yield "\n  ".join((f"{title}:", *self.examples))

    def error(self, message: str) -> NoReturn:
        """Ends the process with `usage_status`, since argparse's 2 would mean "problems found"."""
        self._fail(f"{message}; see {self.prog} --help")

    def _fail(self, message: str) -> NoReturn:
        say(f"error: {message}")
        sys.exit(self.usage_status)


def _is_like_option(text: str) -> bool:
    return text.startswith("-") and not _LIKE_OPTIONS_BUT_WORDS.fullmatch(text)


def _near(text: str, known: Iterable[str]) -> str | None:
    """The known word that looks most like a misspelt one; dashes in front make none alike."""
    from difflib import get_close_matches  # which only wrong usage needs

    by_letters = {word.lstrip("-"): word for word in known if len(word.lstrip("-")) > 1}
    found = get_close_matches(text.lstrip("-").lower(), by_letters, 1)
    return by_letters[found[0]] if found else None


class _Formatter(argparse.HelpFormatter):
    """A formatter of help that is as wide as the terminal.

    argparse makes a formatter for each argument that is added, and its own way to find the
    terminal's width loads five modules.
    """

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=columns() - 2)

    def help_of(self, option: argparse.Action) -> str:
        """Returns the help of an option, with its default and all else filled in."""
        return " ".join(self._expand_help(option).split())

    def _get_help_string(self, action: argparse.Action) -> str | None:
        """Adds the default to what the help says of an option that takes a value."""
        if action.nargs == 0 or action.default in (None, [], argparse.SUPPRESS) or not action.help:
            return action.help
        return f"{action.help} (default: %(default)s)"

    def _split_lines(self, text: str, width: int) -> list[str]:
        return list(wrap(" ".join(text.split()), width))

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Wraps paragraphs; one with a line that is indented stays as it is written."""
        return "\n\n".join(
            part
            if re.search("^ ", part, re.MULTILINE)
            else "\n".join(wrap(" ".join(part.split()), width))
            for part in re.split(r"\n{2,}", text.rstrip())
        )
