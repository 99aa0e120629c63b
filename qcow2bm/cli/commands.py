"""The table of all commands, which says which module has which command.

A module has two functions. ``define(parser)`` adds the arguments, and the epilog of the help. If
the command has a second word, it adds the commands with their second words instead, each with a
function that does the same. ``run(arguments)`` runs the command and returns the exit status.

A module is only imported if one of its commands is used, since importing takes most of the time
of a short command. So what the help needs of each command is in the table.

*Spec*: spec/cli.md, "Commands".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

from qcow2bm import __version__
from qcow2bm.cli.parser import Arguments, Parser


class Row(NamedTuple):
    """A row of the table: the module that has a command, and what the command does."""

    module: str
    summary: str


COMMANDS_BY_GROUP = {
    "look at bitmaps": {
        "dump": Row("dump", "show everything about the bitmaps of an image"),
        "map": Row("map", "list the dirty and clean ranges of bitmaps, as nbdinfo does"),
        "check": Row("check", "find everything that is wrong with an image, and explain it"),
        "measure": Row("measure", "measure the room that bitmaps take, and would take"),
        "verdict": Row("verdict", "say whether the next incremental backup can use a bitmap"),
        "verify": Row("verify", "prove that a backup and a bitmap together make up the disk"),
    },
    "edit bitmaps": {
        "add": Row("edit", "add a bitmap that records writes from now on"),
        "remove": Row("edit", "remove bitmaps"),
        "prune": Row("prune", "remove bitmaps by rule"),
        "clear": Row("edit", "make bitmaps clean"),
        "enable": Row("edit", "make bitmaps record writes"),
        "disable": Row("edit", "stop bitmaps from recording writes"),
        "invalidate": Row("edit", "mark bitmaps as inconsistent, so that no program trusts them"),
        "rename": Row("edit", "give a bitmap another name"),
        "copy": Row("edit", "copy a bitmap; the copy records writes if the original does"),
        "set": Row("edit", "make ranges dirty, widened to whole granules"),
        "reset": Row("edit", "make ranges clean, narrowed to whole granules"),
        "invert": Row("edit", "make clean ranges dirty, and dirty ranges clean"),
        "fit": Row("edit", "fit bitmaps to a disk that another program resized without them"),
        "merge": Row("edit", "combine bitmaps, of any granularity"),
        "bitmap": Row("bitmap", "edit bitmaps with the arguments of qemu-img bitmap"),
    },
    "take backups": {
        "backup": Row("backup", "copy what is dirty, or the whole disk, into a new image"),
    },
    "repair what is broken, outdated or in use": {
        "repair": Row("repair", "repair the metadata of bitmaps, so that QEMU opens the image"),
        "undo": Row("repair", "take back a repair"),
        "recover": Row("recover", "make bitmaps valid that a crash left in use, without a loss"),
        "salvage": Row("salvage", "make an inconsistent or stale bitmap valid again"),
    },
    "carry bitmaps outside of an image": {
        "stream": Row("stream", "read or write the bitmaps of a migration stream of QEMU"),
        "sidecar": Row("sidecar", "carry the bitmaps of a disk in a separate file"),
    },
    "track writes": {
        "attach": Row("attach", "make the image that keeps the bitmaps of an existing raw disk"),
        "demo": Row("demo", "show on a temporary image how short tracking makes a stop"),
        "nbdkit-plugin": Row(
            "nbdkit_plugin",
            "print the path of the nbdkit plugin that serves a disk and tracks writes",
        ),
    },
    "keep the bitmaps of a running VM": {
        "live": Row("live", "make the stop of a running VM short, whatever bitmaps it has"),
        "rescue": Row("rescue", "keep the bitmaps of a running VM through a migration that fails"),
    },
    "use this program": {
        "completion": Row("completion", "print a script that lets a shell complete commands"),
    },
}
"""The commands in the order of the help, under headings that say what one wants."""

COMMANDS = {word: row for rows in COMMANDS_BY_GROUP.values() for word, row in rows.items()}


def root() -> Parser:
    """The parser of the words with which commands begin."""
    parser = Parser((), "Persistent dirty bitmaps of qcow2 disk images: read, inspect, edit.")
    parser.add_argument("--version", action="version", version=f"qcow2bm {__version__}")
    for group, rows in COMMANDS_BY_GROUP.items():
        for word, row in rows.items():
            parser.add_command(word, row.summary, partial(_define, row.module), group)
    return parser


def _define(module: str, parser: Parser) -> None:
    _imported(module).define(parser)


def _imported(module: str) -> Any:  # noqa: ANN401
    return import_module(f"qcow2bm.cli.{module}")


def all_parsers() -> Iterator[Parser]:
    """The parsers of all commands and of the words with which commands begin, as in the help."""
    waiting = [root()]
    while waiting:
        parser = waiting.pop(0)
        waiting[:0] = map(parser.of, parser.commands)
        yield parser


def parsers() -> Iterator[Parser]:
    """The parsers of all commands, in the order of the help."""
    return (parser for parser in all_parsers() if not parser.commands)


class Call(NamedTuple):
    """A command as it was called.

    Attributes:
        parser: the parser of the command.
        arguments: the values of its arguments.
        run: runs it with these arguments; returns the exit status.
    """

    parser: Parser
    arguments: Arguments
    run: Callable[[Any], int]


def parse(argv: Sequence[str]) -> Call:
    """Finds the command and reads its arguments; -- ends the options, even before the command.

    Wrong usage, --help and --version end the process.
    """
    texts = list(argv)
    parser = root()
    while parser.commands:
        place = 1 if texts[:1] == ["--"] else 0
        if not texts[place:] or texts[place] not in parser.commands:
            parser.parse(texts)  # ends the process: this is wrong, or an option
        parser = parser.of(texts.pop(place))
    arguments = parser.parse(texts)
    return Call(parser, arguments, _imported(COMMANDS[arguments.command].module).run)
