"""The command ``bitmap``: the edits of ``qemu-img bitmap``, with the same arguments.

Its failures begin with the words of qemu-img, because scripts may look for them.

*Spec*: spec/from-qemu-img.md.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Literal, NamedTuple

from qcow2bm import (
    BitmapExistsError,
    BitmapInconsistentError,
    BitmapNotFoundError,
    Edit,
    Image,
    ImageLockedError,
    LimitError,
    StorageError,
    UnsupportedError,
    open,
)
from qcow2bm.cli import getopt_long
from qcow2bm.cli.messages import FAILED, about
from qcow2bm.cli.parser import Arguments as ParserArguments
from qcow2bm.cli.parser import Parser
from qcow2bm.cli.qemu_values import granularity, plain_path
from qcow2bm.units import decode_name, escape

_USAGE = """\
qcow2bm bitmap (--merge SOURCE | --add | --remove | --clear | --enable |
                      --disable)... [-b SOURCE_FILE [-F SOURCE_FMT]]
                      [-g GRANULARITY] [--image-opts | -f FMT] FILENAME BITMAP
       qcow2bm bitmap --remove-all [--image-opts | -f FMT] FILENAME"""

_NOTES = (
    """\
The bitmap that changes is the last argument: --merge SOURCE FILENAME BITMAP changes BITMAP. In
merge IMAGE TARGET SOURCE, the bitmap that changes is the first.
""",
    """\
The actions are done in the order given. If one of them fails, none is done; qemu-img would leave
those before it done. Names mean what they say: @1 is the bitmap called "@1". Options can be
abbreviated, and joined with their values.
""",
)

_EPILOG = """\
The change is atomic: after a failure or a loss of power at any time, all bitmaps are as before, or
all are as after. Meanwhile no other process can use the image.

exit status, as of qemu-img: 0 done; 1 the command failed or the usage was wrong, and all is as
before unless the message says otherwise
"""

_ACTIONS = "--add, --remove, --clear, --enable, --disable, or --merge"

_WHOLE = "--remove-all", "--format", "--color"
"""The options that QEMU 7.2 does not have: every abbreviation means what it means there."""


Operation = Literal["add", "remove", "remove-all", "clear", "enable", "disable", "merge"]


class Action(NamedTuple):
    """One of the changes that a call asks for; ``source`` is the SOURCE of --merge."""

    operation: Operation
    source: str = ""


class Arguments(ParserArguments):
    """The values of the arguments of ``bitmap``."""

    actions: list[Action]
    granularity: int | None
    source_file: str | None
    source_format: str | None
    format: str | None
    image_opts: bool
    objects: list[str]
    filename: str
    name: str


# Arguments


def define(parser: Parser) -> None:
    """Adds the arguments."""
    parser.namespace = Arguments
    parser.reader = _read
    parser.usage_status = FAILED
    parser.usage = _USAGE
    parser.examples = (
        "qcow2bm bitmap --add vm.qcow2 daily",
        "qcow2bm bitmap --add --disable -g 4k vm.qcow2 fine",
        "qcow2bm bitmap --merge monday --merge tuesday vm.qcow2 weekly",
        "qcow2bm bitmap --merge daily -b old.qcow2 -F qcow2 vm.qcow2 weekly",
    )
    parser.notes = _NOTES
    parser.epilog = _EPILOG
    parser.add_word(
        "filename",
        "FILENAME",
        "a path, file:PATH, json:OBJECT, or with --image-opts driver=qcow2,file.filename=PATH",
    )
    parser.add_word("name", "BITMAP", "the bitmap that changes; none with --remove-all")
    _add_action(parser, "add", "add BITMAP, which records writes from now on")
    _add_action(parser, "remove", "remove BITMAP")
    _add_action(parser, "clear", "make BITMAP clean")
    _add_action(parser, "enable", "make BITMAP record writes")
    _add_action(parser, "disable", "stop BITMAP from recording writes")
    parser.add_argument(
        "--merge",
        dest="actions",
        metavar="SOURCE",
        action="append",
        type=lambda text: Action("merge", _name(text)),
        help="make dirty in BITMAP what is dirty in SOURCE",
    )
    _add_action(parser, "remove-all", "remove all bitmaps; only newer versions of qemu-img have it")
    parser.add_argument(
        "-g",
        "--granularity",
        metavar="GRANULARITY",
        type=granularity,
        help="how many bytes of the disk one bit of an added bitmap stands for; the number can "
        "have k, M, G, T, P or E behind it (default: the cluster size, but 4k to 64k)",
    )
    parser.add_argument(
        "-b", "--source-file", metavar="SOURCE_FILE", help="the image that has each SOURCE"
    )
    parser.add_argument(
        "-F", "--source-format", metavar="SOURCE_FMT", help="the format of SOURCE_FILE: qcow2"
    )
    parser.add_argument("-f", "--format", metavar="FMT", help="the format of FILENAME: qcow2")
    parser.add_argument(
        "--image-opts", action="store_true", help="FILENAME is KEY=VALUE,... as in QEMU"
    )
    parser.add_argument(
        "--object",
        dest="objects",
        metavar="OBJECTDEF",
        action="append",
        default=[],
        help="not supported: no secret is needed to edit the bitmaps of an encrypted image",
    )


def _add_action(parser: Parser, operation: Operation, text: str) -> None:
    parser.add_argument(
        f"--{operation}",
        dest="actions",
        action="append_const",
        const=Action(operation),
        default=[],
        help=text,
    )


def _name(text: str) -> str:
    # Arguments come decoded by the locale; names in images are UTF-8 where they are text.
    return decode_name(os.fsencode(text))


def _read(parser: Parser, argv: Sequence[str], values: Arguments) -> None:
    """Reads all arguments; refuses what does not go together, in the order of qemu-img."""
    words = getopt_long.read(parser, argv, values, _WHOLE)
    operations = {action.operation for action in values.actions}
    if not operations:
        parser.error(f"Need at least one of {_ACTIONS}")
    if "remove-all" in operations:
        if operations != {"remove-all"} or len(words) != 1:
            parser.error("--remove-all stands alone with a filename")
        words.append("")
    if values.granularity and "add" not in operations:
        parser.error("granularity only supported with --add")
    if values.source_format is not None and values.source_file is None:
        parser.error("-F only supported with -b")
    if values.source_file is not None and "merge" not in operations:
        parser.error("Merge bitmap source file only supported with --merge")
    if len(words) != 2:
        parser.error("Expecting filename and bitmap name")
    values.filename, values.name = words[0], _name(words[1])
    if values.objects:
        parser.error(
            "--object is not supported: no secret is needed to edit the bitmaps of an encrypted "
            "image; leave out --object and what refers to it"
        )
    if values.image_opts and values.format is not None:
        parser.error("--image-opts and --format are mutually exclusive")


# Running


def run(arguments: Arguments) -> int:
    """Does all actions in one edit; returns the exit status."""
    with about(arguments.filename), ExitStack() as stack:
        image = _open(arguments.filename, arguments.format, "r+", is_options=arguments.image_opts)
        stack.enter_context(image)
        other = None
        if arguments.source_file is not None:
            other = _open(arguments.source_file, arguments.source_format, "r")
            stack.enter_context(other)
        with about(_cannot_open(arguments.filename)):  # an image with a fault is not edited
            edit = image.edit()
        stack.enter_context(edit)
        for action in arguments.actions:
            subject = f"Operation {action.operation} on bitmap {arguments.name} failed"
            with about(subject, ValueError), _in_the_words_of_qemu():
                _do(action, arguments, image, other, edit)
    return 0


def _open(filename: str, image_format: str | None, mode: str, *, is_options: bool = False) -> Image:
    """Opens the image that an argument names.

    Raises:
        CommandError: it cannot be opened.
    """
    with about(_cannot_open(filename), ValueError):
        path = plain_path(filename, image_format, is_options=is_options)
        try:
            return open(path, mode)
        except ImageLockedError as error:
            lock = '"write"' if mode == "r+" else 'shared "write"'
            raise ValueError(f"Failed to get {lock} lock: {error.reason}") from error
        except StorageError as error:
            raise ValueError(error.reason) from error


def _cannot_open(filename: str) -> str:
    return f"Could not open '{filename}'"


@contextmanager
def _in_the_words_of_qemu() -> Iterator[None]:
    """Raises errors about bitmaps as `ValueError` with the words that qemu-img has for them."""
    try:
        yield
    except BitmapExistsError as error:
        raise ValueError(f"Bitmap already exists: {escape(error.name)}") from error
    except BitmapNotFoundError as error:  # the reason is "not found" and what there is
        raise ValueError(f"Dirty bitmap '{escape(error.name)}' {error.reason}") from error
    except BitmapInconsistentError as error:
        raise ValueError(
            f"Bitmap '{escape(error.name)}' is inconsistent and cannot be used; remove it, or "
            "make it valid with salvage"
        ) from error


def _do(
    action: Action, arguments: Arguments, image: Image, other: Image | None, edit: Edit
) -> None:
    """Does one action; raises `ValueError` with the words of qemu-img, or as the library does."""
    if action.operation == "add":
        _add(edit, arguments.name, arguments.granularity or None)
    elif action.operation == "merge":
        _merge(edit, arguments.name, action.source, image, other)
    elif action.operation == "remove-all":
        edit.remove_all()
    else:
        _OPERATIONS[action.operation](edit, arguments.name)


_OPERATIONS: dict[Operation, Callable[[Edit, str], None]] = {
    "remove": Edit.remove,
    "clear": Edit.clear,
    "enable": Edit.enable,
    "disable": Edit.disable,
}


def _add(edit: Edit, name: str, granularity: int | None) -> None:
    if not name:
        raise ValueError("Bitmap name cannot be empty")
    if granularity and (granularity & (granularity - 1) or not 512 <= granularity < 1 << 32):
        raise ValueError("Granularity must be power of 2 and at least 512")
    try:
        edit.add(name, granularity)
    except (LimitError, UnsupportedError, ValueError) as error:
        raise ValueError(f"Can't make bitmap '{escape(name)}' persistent: {error}") from error


def _merge(edit: Edit, target: str, source: str, image: Image, other: Image | None) -> None:
    if other is None:
        edit.merge(target, source)
        return
    bitmap = other.bitmaps[source]
    own_size, size = image.virtual_size, other.virtual_size
    if own_size != size:
        raise ValueError(
            f"Bitmaps are of different sizes (destination size is {own_size}, source size is "
            f"{size}) and can't be merged"
        )
    edit.merge(target, bitmap)
