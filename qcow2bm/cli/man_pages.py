"""The manual pages, made from the parsers: one for the program and one for each command.

The build of a wheel calls `man_pages`; no command does. The pages are in the language of the macro
package ``man``.

*Spec*: spec/cli.md, "Manual pages".
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Iterator

from qcow2bm import __version__
from qcow2bm.cli.commands import all_parsers
from qcow2bm.cli.parser import Parser

_STATUS = "exit status: "


def man_pages() -> Iterator[tuple[str, str]]:
    """Yields the name of each page, such as ``qcow2bm-stream-dump.1``, and its text."""
    parsers = list(all_parsers())
    for parser in parsers:
        yield f"{_title(parser)}.1", "\n".join(_page(parser, _related(parser, parsers))) + "\n"


def _related(parser: Parser, parsers: Iterable[Parser]) -> list[str]:
    """Returns the titles of the pages above a page and directly below it."""
    path = parser.path
    return [
        _title(other)
        for other in parsers
        if (other.path == path[: len(other.path)] or other.path[:-1] == path) and other != parser
    ]


def _title(parser: Parser) -> str:
    return "-".join(("qcow2bm", *parser.path))


def _page(parser: Parser, related: Iterable[str]) -> Iterator[str]:
    description = parser.description or ""
    summary = description[:1].lower() + description[1:].rstrip(".")
    yield f'.TH "{_title(parser).upper()}" "1" "" "qcow2bm {__version__}" "User Commands"'
    yield ".SH NAME"
    yield f"{_text(_title(parser))} \\- {_text(summary)}"
    yield ".SH SYNOPSIS"
    for line in _synopsis(parser):
        yield f".PP\n.B {_text(line)}"
    if parser.words:
        yield ".SH ARGUMENTS"
        for word in parser.words:
            yield from _item(_bold(word.metavar), word.help)
    groups = _groups(parser)
    if groups:
        yield ".SH COMMANDS"
    for group, commands in groups.items():
        if len(groups) > 1:
            yield f".SS {_text(group)}"
        for command, text in commands:
            yield from _item(_bold(command), text)
    yield ".SH OPTIONS"
    for option in parser.options:
        yield from _item(_names(option), parser.help_of(option))
    if parser.examples:
        yield ".SH EXAMPLES"
        yield from _verbatim(parser.examples)
    notes = [part for each in (*parser.notes, parser.epilog or "") for part in _paragraphs(each)]
    if others := [part for part in notes if not part.startswith(_STATUS)]:
        yield ".SH NOTES"
        for part in others:
            yield from _paragraph(part)
    for part in notes:
        if part.startswith(_STATUS):
            yield ".SH EXIT STATUS"
            yield from _paragraph(part.removeprefix(_STATUS))
    yield ".SH SEE ALSO"
    yield ", ".join(f"{_bold(title)}(1)" for title in (*related, "qemu-img"))


def _synopsis(parser: Parser) -> list[str]:
    """Returns the lines of the usage: a command that is used in several ways has several."""
    usage = " ".join(parser.format_usage_of_all().removeprefix("usage:").split())
    ways = usage.split(f" {parser.prog} ")
    return [ways[0], *(f"{parser.prog} {way}" for way in ways[1:])]


def _groups(parser: Parser) -> dict[str, list[tuple[str, str]]]:
    groups: dict[str, list[tuple[str, str]]] = {}
    for word, command in parser.commands.items():
        groups.setdefault(command.group, []).append((word, command.summary))
    return groups


def _names(option: argparse.Action) -> str:
    value = ""
    if option.nargs != 0:
        choices = "{" + ",".join(map(str, option.choices or ())) + "}"
        value = f" {_italic(str(option.metavar or choices))}"
    return ", ".join(_bold(name) + value for name in option.option_strings)


def _paragraphs(text: str) -> list[str]:
    return [part.strip("\n") for part in re.split(r"\n{2,}", text) if part.strip()]


def _paragraph(text: str) -> Iterator[str]:
    """Yields a paragraph; one with a line that is indented stays as it is written."""
    if re.search("^ ", text, re.MULTILINE):
        yield from _verbatim(line.removeprefix("  ") for line in text.splitlines())
    else:
        yield f".PP\n{_text(' '.join(text.split()))}"


def _verbatim(lines: Iterable[str]) -> Iterator[str]:
    yield ".PP\n.RS 4\n.nf"
    yield from map(_text, lines)
    yield ".fi\n.RE"


def _item(head: str, text: str) -> Iterator[str]:
    yield f".TP\n{head}\n{_text(text)}"


def _bold(text: str) -> str:
    return f"\\fB{_text(text)}\\fR"


def _italic(text: str) -> str:
    return f"\\fI{_text(text)}\\fR"


def _text(text: str) -> str:
    """Returns a line of text with what troff would take for its own language escaped."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("^", "\\(ha").replace("~", "\\(ti")
    text = text.replace("'", "\\(aq").replace("`", "\\(ga")
    return f"\\&{text}" if text.startswith(".") else text
