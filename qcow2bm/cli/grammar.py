"""The grammar all commands share, and each command's own arguments.

*Spec*: spec/cli.md.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

from qcow2bm import __version__
from qcow2bm.bits.runs import OPS
from qcow2bm.cli.console import say
from qcow2bm.units import escape, parse_size

USAGE = 64

_EPILOG = """\
NAME is the name of a bitmap. @3 means entry 3 of the bitmap directory, whatever its name;
a name that begins with @ is written with @@. Before names that begin with -, write --.

exit status: 0 fine; 1 could not do it; 2 done, but problems were found (of severity refused,
unusable or leak); 64 wrong usage
"""

_REMOVE_EPILOG = """
Stale bitmaps can only be removed with --all. Their clusters stay leaked: qemu-img check -r leaks.
"""

_EDIT_EPILOG = """\
NAME is the name of a bitmap. @3 means entry 3 of the bitmap directory, whatever its name;
a name that begins with @ is written with @@. Before names that begin with -, write --.
Sizes are in bytes, or with k, M, G, T, P, E; START: without a length is all from there on.

The change is atomic: after a failure or a loss of power at any time, all bitmaps are as before
or all are as after. Nobody else can use the image meanwhile.

exit status: 0 done; 1 could not do it, all is as before unless it says otherwise; 64 wrong usage
"""

_PLUGIN = "print where the nbdkit plugin is that serves a disk and tracks its bitmaps"

_PLUGIN_EPILOG = """\
It serves the raw data file of an image made with data_file_raw=on and preallocation=metadata:

  nbdkit python "$(qcow2bm nbdkit-plugin)" image=vm.qcow2 data=vm.raw

Further parameters: bitmaps=NAME,NAME...  bitmap=NAME  others=mark-in-use  flush-interval=SECONDS
"""

_STREAM = "look at bitmaps in QEMU's migration stream, or put them into one"

_STREAM_DUMP = "show the bitmaps in a migration stream"

_STREAM_DUMP_EPILOG = """\
FILE is what a VM sent that migrated with the capability dirty-bitmaps; - is standard input, which
may be a pipe:

  migrate "exec:qcow2bm stream dump --output=json - >bitmaps.json"

exit status: 0 all bitmaps came; 1 no stream, or it could not be read; 2 it breaks off or breaks
the rules, and only bitmaps that are complete are of use; 64 wrong usage
"""

_STREAM_WRITE = "write valid bitmaps of an image as a migration stream, which QEMU takes in"

_STREAM_WRITE_EPILOG = """\
Without NAME all valid bitmaps are written. A FILE that is there is not overwritten.

The stream has bitmaps and nothing else. A VM that takes it in (-incoming, with the same machine
type) gets neither memory nor device state: it boots cold, as after power on, with the bitmaps in
memory. If it was running, it must be shut down before. The image it boots from must have no
valid bitmap of the same name: QEMU would give up the disk.

exit status: 0 done; 1 could not do it; 2 done, but the image has problems; 64 wrong usage
"""

_STREAM_RESTORE = "put the bitmaps of a migration stream into an image"

_STREAM_RESTORE_EPILOG = """\
All complete bitmaps of the node are added in one edit. Bitmaps of the same names that are in use
are replaced; others must not be there.

That they are true of the disk is proved by a sentinel in the image that was not touched, such as
Tracker.begin_migration makes, or by you: --assert-unchanged. Otherwise they can be made all dirty.

exit status: 0 done; 1 could not do it, all is as before unless it says otherwise; 2 done, but the
stream has bitmaps that are not complete; 64 wrong usage
"""

_RESCUE = "keep the bitmaps of a running VM through a migration that fails"

_RESCUE_EPILOG = """\
SOCKET is the path of the VM's QMP socket, or HOST:PORT. It must be free: QEMU serves one at a time.

exit status: 0 fine; 1 could not do it; 2 done, but a bitmap is lost, in doubt, or was left as it
was; 64 wrong usage
"""

_RESCUES = {
    "start": "after a migration that failed: have QEMU store its persistent bitmaps again",
    "arm": "before a migration: add a sentinel that tells if another machine touches the disk",
    "verdict": "after an armed migration that came back: say if another machine touched the disk",
    "finish": "end in the image what rescue start could not end",
}

_DEMO = "show how short a stop gets by tracking, on an image made for it"

_DEMO_EPILOG = """\
The image lies in the folder for temporary files (TMPDIR) while the demo runs, and takes 33 MiB.

exit status: 0 done; 1 could not do it; 64 wrong usage
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
    if "names" in arguments and not any(text.startswith("-") for text in unknown):
        # argparse takes IMAGE and no names at all where an option stands between them.
        arguments.names, unknown = arguments.names + unknown, []
    for key, value in vars(arguments).items():
        if isinstance(value, str):
            setattr(arguments, key, value.removeprefix(_NAME))
        elif isinstance(value, list):
            setattr(arguments, key, [item.removeprefix(_NAME) for item in value])
    command = commands[arguments.command]
    if unknown:  # said by the command's own parser, whose --help lists what there is
        shown = " ".join(argument.removeprefix(_NAME) for argument in unknown)
        command.error(f"unrecognized arguments: {shown}")
    if "all" in arguments and arguments.all == bool(arguments.names):
        command.error("give names, or --all")
    if "ranges" in arguments:
        try:
            arguments.ranges = [_range(text) for text in arguments.ranges]
        except ValueError as error:
            command.error(str(error))
    return arguments


def _range(text: str) -> tuple[int, int | None]:
    start, colon, length = text.partition(":")
    if not colon:
        raise ValueError(f'"{escape(text)}" is no range: write START:LENGTH')
    return parse_size(start), parse_size(length) if length else None


# argparse does not take what follows -- as it stands: it drops a second --, for one. Marked with
# a character no argument can have, what follows is a name and nothing else.
_NAME = "\0"
_OPTION_DASHES = re.compile("--[a-z-]+=--")


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    """What may be options, and what comes behind --; a leading -- is behind the command."""
    if argv[:1] == ["--"]:
        words = 2 if argv[1:2] in (["stream"], ["rescue"]) else 1
        argv = [*argv[1 : 1 + words], *argv[:1], *argv[1 + words :]]
    place = argv.index("--") if "--" in argv else len(argv)
    options = [f"{a[:-2]}{_NAME}--" if _OPTION_DASHES.fullmatch(a) else a for a in argv[:place]]
    return options, argv[place + 1 :]


def _parser() -> tuple[_Parser, dict[str, argparse.ArgumentParser]]:
    parser = _Parser(
        prog="qcow2bm",
        description="Persistent dirty bitmaps of qcow2 disk images: read, inspect, edit.",
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
    edits = _edit_commands(commands)
    streams = _stream_commands(commands)
    rescues = _rescue_commands(commands)
    demo = _plain_command(commands, "demo", _DEMO, "demo", _DEMO_EPILOG)
    demo.add_argument(
        "--seconds", metavar="N", type=_seconds, default=10, help="how long writes are tracked"
    )
    plugin = _plain_command(commands, "nbdkit-plugin", _PLUGIN, "nbdkit_plugin", _PLUGIN_EPILOG)
    made = {"dump": dump, "map": map_, **edits, **streams, **rescues}
    return parser, {**made, "demo": demo, "nbdkit-plugin": plugin}


def _stream_commands(
    commands: argparse._SubParsersAction[_Parser],
) -> dict[str, argparse.ArgumentParser]:
    """The commands of the second word, by both words."""
    stream = _plain_command(commands, "stream", _STREAM, "stream", _EPILOG)
    actions = stream.add_subparsers(
        dest="action", required=True, metavar="COMMAND", parser_class=_Parser
    )

    dump = _plain_command(actions, "dump", _STREAM_DUMP, "stream", _STREAM_DUMP_EPILOG)
    dump.add_argument("image", metavar="FILE", help="a migration stream, or -")
    _add_output(dump)

    write = _plain_command(actions, "write", _STREAM_WRITE, "stream", _STREAM_WRITE_EPILOG)
    write.add_argument("image", metavar="IMAGE", help="a qcow2 file or block device")
    write.add_argument("names", metavar="NAME", nargs="*", help="the bitmaps; by default all valid")
    write.add_argument(
        "--node-alias",
        metavar="ALIAS",
        type=_stream_name,
        required=True,
        help="what the receiver calls the disk: its node name, or the alias mapped to it",
    )
    form = write.add_mutually_exclusive_group(required=True)
    form.add_argument(
        "--machine",
        metavar="TYPE",
        type=_stream_name,
        help="the receiver's machine type in full, such as pc-i440fx-7.2",
    )
    form.add_argument(
        "--section-only", action="store_true", help="only the sections of the bitmaps"
    )
    write.add_argument(
        "-o", dest="file", metavar="FILE", default="-", help="by default -, standard output"
    )
    _add_sharing(write)

    restore = _plain_command(actions, "restore", _STREAM_RESTORE, "stream", _STREAM_RESTORE_EPILOG)
    restore.add_argument("file", metavar="FILE", help="a migration stream, or -")
    restore.add_argument("image", metavar="IMAGE", help="a qcow2 file or block device")
    restore.add_argument("--node", metavar="ALIAS", type=_stream_name, help="whose bitmaps")
    restore.add_argument(
        "--map",
        metavar="BITMAP-ALIAS=NAME",
        type=_mapped_name,
        action="append",
        default=[],
        help="give a bitmap of the stream another name",
    )
    evidence = restore.add_mutually_exclusive_group()
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
    _add_editing(restore)
    made = {"stream dump": dump, "stream write": write, "stream restore": restore}
    for command, parser in made.items():
        parser.set_defaults(command=command)
    return made


def _rescue_commands(
    commands: argparse._SubParsersAction[_Parser],
) -> dict[str, argparse.ArgumentParser]:
    """The commands of the second word, by both words."""
    rescue = _plain_command(commands, "rescue", _RESCUE, "rescue", _RESCUE_EPILOG)
    actions = rescue.add_subparsers(
        dest="action", required=True, metavar="COMMAND", parser_class=_Parser
    )
    made = {
        action: _plain_command(actions, action, summary, "rescue", _RESCUE_EPILOG)
        for action, summary in _RESCUES.items()
    }
    for action, parser in made.items():
        parser.set_defaults(command=f"rescue {action}")
        if action == "finish":
            parser.add_argument("image", metavar="IMAGE", help="what the VM ran on, when it is off")
            _add_editing(parser)
            continue
        parser.add_argument(
            "--qmp", dest="image", metavar="SOCKET", required=True, help="where the VM listens"
        )
        parser.add_argument(
            "--node",
            dest="nodes",
            metavar="NODE",
            action="append",
            default=[],
            help="a node or device of the VM; may be repeated; by default all that are concerned",
        )
        _add_output(parser)
    made["start"].add_argument("--dry-run", action="store_true", help="only show what is there")
    made["arm"].add_argument(
        "--set", action="store_true", help="set the block-bitmap-mapping as well"
    )
    remedies = made["verdict"].add_mutually_exclusive_group()
    for remedy, text in (("remove", "remove"), ("all-dirty", "make dirty all over")):
        remedies.add_argument(
            f"--{remedy}",
            dest="remedy",
            action="store_const",
            const=remedy,
            help=f"{text} bitmaps that may miss writes",
        )
    return {f"rescue {action}": parser for action, parser in made.items()}


def _stream_name(text: str) -> str:
    if not 1 <= len(os.fsencode(text.removeprefix(_NAME))) <= 255:
        raise argparse.ArgumentTypeError("must have 1 to 255 bytes")
    return text


def _mapped_name(text: str) -> str:
    alias, equals, name = text.partition("=")
    if not alias or not equals or not name:
        raise argparse.ArgumentTypeError("write BITMAP-ALIAS=NAME")
    return text


def _edit_commands(
    commands: argparse._SubParsersAction[_Parser],
) -> dict[str, argparse.ArgumentParser]:
    made = {}
    for command, (summary, names) in _EDITS.items():
        made[command] = parser = _editing(commands, command, summary)
        for name, (metavar, nargs, text) in names.items():
            parser.add_argument(name, metavar=metavar, nargs=nargs, help=text)
    for command in ("add", "copy"):
        made[command].add_argument(
            "--disabled", action="store_true", help="the new bitmap is not to record writes"
        )
        made[command].add_argument(
            "-g",
            "--granularity",
            metavar="SIZE",
            type=_size,
            help="how many bytes a bit stands for",
        )
    for command, (_, names) in _EDITS.items():
        if names is _MANY:
            text = "all bitmaps" + ("" if command == "remove" else " that are not in use")
            made[command].add_argument("--all", action="store_true", help=text)
    made["merge"].add_argument(
        "--from", dest="other", metavar="OTHER_IMAGE", help="the image that has the sources"
    )
    made["merge"].add_argument("--op", choices=OPS, default="or", help="by default: or")
    return made


_Argument = tuple[str, str | None, str]
_NAMED: dict[str, _Argument] = {"name": ("NAME", None, "the bitmap")}
_MANY: dict[str, _Argument] = {"names": ("NAME", "*", "the bitmaps, or --all")}
_RANGES: dict[str, _Argument] = {"ranges": ("START:LENGTH", "+", "ranges of the disk")}

_EDITS: dict[str, tuple[str, dict[str, _Argument]]] = {
    "add": ("add a bitmap that records writes from now on", _NAMED),
    "remove": ("remove bitmaps", _MANY),
    "clear": ("make bitmaps clean", _MANY),
    "enable": ("make bitmaps record writes", _MANY),
    "disable": ("make bitmaps record no more writes", _MANY),
    "rename": ("give a bitmap another name", {**_NAMED, "new": ("NEW", None, "its new name")}),
    "copy": (
        "copy a bitmap, which goes on recording if the original does",
        {**_NAMED, "new": ("NEW", None, "the name of the copy")},
    ),
    "set": ("make ranges dirty, widened to whole granules", {**_NAMED, **_RANGES}),
    "reset": ("make ranges clean, narrowed to whole granules", {**_NAMED, **_RANGES}),
    "invert": ("make what is clean dirty, and what is dirty clean", _MANY),
    "fit": ("make bitmaps fit a disk that was resized without them", _MANY),
    "merge": (
        "combine bitmaps, of any granularity",
        {
            "name": ("TARGET", None, "the bitmap that changes"),
            "names": ("SOURCE", "+", "the bitmaps it is combined with, one after the other"),
        },
    ),
}


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1
    if not 0 <= seconds < 1e9:
        raise argparse.ArgumentTypeError(f'"{text}" is no number of seconds')
    return seconds


def _editing(
    commands: argparse._SubParsersAction[_Parser], name: str, summary: str
) -> argparse.ArgumentParser:
    """A command that changes bitmaps."""
    epilog = _EDIT_EPILOG + (_REMOVE_EPILOG if name == "remove" else "")
    parser = _command(commands, name, summary, "edit", epilog)
    _add_editing(parser)
    return parser


def _add_editing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="only show what would be written")
    parser.add_argument(
        "--output",
        choices=("human", "json"),
        default="human",
        help="of --dry-run: for people, or for programs",
    )
    parser.add_argument(
        "--wait",
        metavar="SECONDS",
        type=_seconds,
        default=0,
        help="wait so long while somebody else uses the image",
    )
    parser.add_argument(
        "--no-lock",
        action="store_true",
        help="write without locks, where there are none; if a VM uses the image, it is destroyed",
    )


def _plain_command(
    commands: argparse._SubParsersAction[_Parser], name: str, summary: str, module: str, epilog: str
) -> argparse.ArgumentParser:
    """A command, and the module of this folder that runs it; what it works on goes by its name."""
    parser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=epilog,
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    parser.set_defaults(module=module, image=name)
    return parser


def _command(
    commands: argparse._SubParsersAction[_Parser], name: str, summary: str, module: str, epilog: str
) -> argparse.ArgumentParser:
    """A command that is given an image."""
    parser = _plain_command(commands, name, summary, module, epilog)
    text = "a qcow2 file or block device" + (" that nobody uses" if module == "edit" else "")
    parser.add_argument("image", metavar="IMAGE", help=text)
    return parser


def _reading(
    commands: argparse._SubParsersAction[_Parser], name: str, summary: str
) -> argparse.ArgumentParser:
    """A command that reads an image."""
    parser = _command(commands, name, summary, name, _EPILOG)
    _add_output(parser)
    _add_sharing(parser)
    return parser


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", choices=("human", "json"), default="human", help="for people, or for programs"
    )


def _add_sharing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-U",
        "--force-share",
        action="store_true",
        help="read it even while a VM is running on it",
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="no warnings on standard error")
