"""The arguments that several commands have, and the types of their values.

*Spec*: spec/cli.md, "Options".
"""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Callable
from typing import Literal

from qcow2bm.cli.parser import Arguments, Parser
from qcow2bm.units import escape, parse_size

NAME_NOTE = """\
NAME is the name of a bitmap; @3 means entry 3 of the bitmap directory, whatever its name. A name
that begins with @ is written with @@. Before names that begin with -, write --.
"""

NEW_NAME_NOTE = """\
A name that begins with @ is written with @@. Before names that begin with -, write --.
"""

SIZE_NOTE = """\
SIZE is a number of bytes, or with k, M, G, T, P or E, such as 64k.
"""

RANGE_NOTE = """\
START and LENGTH are numbers of bytes, or with k, M, G, T, P or E. START: without a length is all
from there to the end of the disk.
"""


class OutputArguments(Arguments):
    """The values of the arguments that `add_output` adds."""

    output: Literal["human", "json"]


class ReadingArguments(Arguments):
    """The values of the arguments that `add_reading` adds."""

    force_share: bool
    quiet: bool


class EditingArguments(OutputArguments):
    """The values of the arguments that `add_editing` adds."""

    dry_run: bool
    wait: float
    no_lock: bool


class RestoringArguments(EditingArguments):
    """The values of the arguments that `add_restoring` adds."""

    file: str
    image: str
    is_unchanged: bool
    is_all_dirty: bool


def add_image(parser: Parser, text: str = "a qcow2 file or block device") -> None:
    """Adds the image that a command reads or changes."""
    parser.add_word("image", "IMAGE", text)


def add_output(parser: Parser, text: str = "print text for people, or JSON for programs") -> None:
    """Adds the options of a command that shows what it read."""
    parser.add_argument("--output", choices=("human", "json"), default="human", help=text)
    parser.add_argument(
        "--json", dest="output", action="store_const", const="json", help="short for --output=json"
    )


def add_reading(parser: Parser) -> None:
    """Adds the options of a command that reads an image."""
    parser.add_argument(
        "-U",
        "--force-share",
        action="store_true",
        help="read the image without locks, even while a VM is running on it",
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="print no warnings")


def add_editing(
    parser: Parser,
    add_dry_run: Callable[..., object] | None = None,
    *,
    has_result: bool = False,
) -> None:
    """Adds the options of a command that changes an image.

    Args:
        parser: the parser of the command.
        add_dry_run: ``add_argument`` of the group of options that --dry-run belongs to, if it
            belongs to one.
        has_result: whether the command prints something without --dry-run, too.
    """
    (add_dry_run or parser.add_argument)(
        "--dry-run", action="store_true", help="write nothing, only show what would be written"
    )
    text = "print text for people, or JSON for programs"
    add_output(parser, text if has_result else f"with --dry-run: {text}")
    add_wait(parser, "uses the image")
    parser.add_argument(
        "--no-lock",
        action="store_true",
        help="write without locks, on a file system that has none; if a VM uses the image "
        "meanwhile, the image is destroyed",
    )


def add_wait(parser: Parser, condition: str) -> None:
    """Adds --wait; ``condition`` says what another process does that is waited for."""
    parser.add_argument(
        "--wait",
        metavar="SECONDS",
        type=seconds,
        default=0,
        help=f"wait this many seconds if another process {condition}",
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


def add_timeout(parser: Parser, condition: str = "") -> None:
    """Adds --timeout, for a command that asks a running VM; ``condition`` says when it does."""
    from qcow2bm import rescue  # which commands about images do without

    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=some_seconds,
        default=rescue.DEFAULT_TIMEOUT,
        help=f"{condition}how many seconds QEMU may take to answer each QMP command",
    )


def add_qmp(parser: Parser, *, is_required: bool = True) -> None:
    """Adds the options of a command that asks a running VM."""
    parser.add_argument(
        "--qmp",
        metavar="SOCKET",
        required=is_required,
        help="the QMP socket on which the VM listens",
    )
    add_timeout(parser)


def add_nodes(parser: Parser, default: str) -> None:
    """Adds --node, which can be repeated; ``default`` says what is done without it."""
    parser.add_argument(
        "--node",
        dest="nodes",
        metavar="NODE",
        action="append",
        default=[],
        help=f"only this node or device of the VM; can be repeated; by default {default}",
    )


def size(text: str) -> int:
    """A size in bytes, such as 64k."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None


def byte_range(text: str) -> tuple[int, int | None]:
    """The two numbers of START:LENGTH; for START: the length is None, up to the end of the disk."""
    start, colon, length = text.partition(":")
    if not colon:
        raise ArgumentTypeError(f'"{escape(text)}" is no range: write START:LENGTH')
    return size(start), size(length) if length else None


def some_seconds(text: str) -> float:
    """A number of seconds that is not 0."""
    number = seconds(text)
    if not number:
        raise ArgumentTypeError(f'"{escape(text)}" is too few seconds')
    return number


def some_milliseconds(text: str) -> float:
    """A number of milliseconds that is not 0, in seconds."""
    try:
        number = float(text)
    except ValueError:
        number = 0
    if not 0 < number < 1e9:
        raise ArgumentTypeError(f'"{escape(text)}" is no number of milliseconds above 0')
    return number / 1000


def seconds(text: str) -> float:
    """A number of seconds to wait."""
    try:
        number = float(text)
    except ValueError:
        number = -1
    if not 0 <= number < 1e9:
        raise ArgumentTypeError(f'"{escape(text)}" is no number of seconds')
    return number
