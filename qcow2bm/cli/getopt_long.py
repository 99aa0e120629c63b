"""Reading arguments as ``getopt_long`` of the C library reads them, and so QEMU's programs.

Here `-g64k` has a value, an option takes the next argument as its value whatever that looks like,
and the name of a long option can be abbreviated.

*Spec*: spec/from-qemu-img.md, "The command bitmap".
"""

from __future__ import annotations

from argparse import SUPPRESS, Action, Namespace
from collections.abc import Collection, Sequence

from qcow2bm.cli.parser import Parser
from qcow2bm.units import escape


def read(
    parser: Parser, argv: Sequence[str], values: Namespace, whole: Collection[str] = ()
) -> list[str]:
    """Gives each option of a parser its value; returns the arguments that are no options.

    The options are read in their order, so the first that is wrong ends the process; so does
    --help.

    Args:
        parser: the parser that has the options.
        argv: the arguments of the command.
        values: gets the values.
        whole: the long options that cannot be abbreviated. They make no abbreviation of another
            option ambiguous.
    """
    for option in parser.options:
        if option.default is not SUPPRESS:
            setattr(values, option.dest, option.default)
    words: list[str] = []
    left = list(argv)
    while left:
        text = left.pop(0)
        if text == "--":
            return words + left
        if text == "-" or not text.startswith("-"):
            words.append(text)
            continue
        name, value = _split(text)
        found = _find(parser, name, whole)
        if found is None or (found.nargs == 0 and value is not None and text.startswith("--")):
            parser.error(f"unrecognized option '{escape(text)}'")
        if found.nargs == 0:
            if value is not None:  # the letters of more options
                left.insert(0, f"-{value}")
            found(parser, values, [], name)
            continue
        if value is None:
            if not left:
                parser.error(f"missing argument for option '{escape(text)}'")
            value = left.pop(0)
        found(parser, values, parser.convert(found, value), name)
    return words


def _split(text: str) -> tuple[str, str | None]:
    """Returns the option that an argument begins with, and the value that is joined to it."""
    if not text.startswith("--"):
        return text[:2], text[2:] or None
    name, equals, value = text.partition("=")
    return name, value if equals else None


def _find(parser: Parser, name: str, whole: Collection[str]) -> Action | None:
    """Returns the option that has a name, or that only can be meant by an abbreviation."""
    options = {known: option for option in parser.options for known in option.option_strings}
    if name in options or not name.startswith("--"):
        return options.get(name)
    meant = [known for known in options if known.startswith(name) and known not in whole]
    return options[meant[0]] if len(meant) == 1 else None
