"""The arguments of the commands ``stream``.

*Spec*: spec/cli.md, "Streams".
"""

from __future__ import annotations

import argparse
import os

from qcow2bm.cli.arguments import (
    MARK,
    Parser,
    add_command,
    add_commands,
    add_editing,
    add_evidence,
    add_image,
    add_output,
    add_sharing,
)

_STREAM_DUMP_EPILOG = """\
FILE is what a VM sent that migrated with the capability dirty-bitmaps; - is standard input, which
may be a pipe:

  migrate "exec:tee vm.stream | qcow2bm stream dump --output=json - >bitmaps.json"

It shows what came, and not the bits: keep the stream to restore bitmaps from it.

exit status: 0 all bitmaps came; 1 no stream, or it could not be read; 2 it breaks off or breaks
the rules, and only bitmaps that are complete are of use; 64 wrong usage
"""

_STREAM_WRITE_EPILOG = """\
Without NAME all valid bitmaps are written. A FILE that is there is not overwritten.

The stream has bitmaps and nothing else. A VM that takes it in (-incoming, with the same machine
type) gets neither memory nor device state: it boots cold, as after power on, with the bitmaps in
memory. If it was running, it must be shut down before. The image it boots from must have no
valid bitmap of the same name: QEMU would give up the disk.

exit status: 0 done; 1 could not do it; 2 done, but the image has problems; 64 wrong usage
"""

_STREAM_RESTORE_EPILOG = """\
All complete bitmaps of the node are added in one edit. Bitmaps of the same names that are in use
are replaced; others must not be there.

That they are true of the disk is proved by a sentinel in the image that was not touched, such as
Tracker.begin_migration makes, or by you: --assert-unchanged. Otherwise they can be made all dirty.

exit status: 0 done; 1 could not do it, all is as before unless it says otherwise; 2 done, but the
stream has bitmaps that are not complete; 64 wrong usage
"""


def define(parser: Parser) -> None:
    """Adds the commands of the second word."""
    commands = add_commands(parser, "action")
    summary = "show the bitmaps in a migration stream"
    add_command(commands, "dump", summary, "stream", _define_dump, _STREAM_DUMP_EPILOG)
    summary = "write valid bitmaps of an image as a migration stream, which QEMU takes in"
    add_command(commands, "write", summary, "stream", _define_write, _STREAM_WRITE_EPILOG)
    summary = "put the bitmaps of a migration stream into an image"
    add_command(commands, "restore", summary, "stream", _define_restore, _STREAM_RESTORE_EPILOG)


def _define_dump(parser: Parser) -> None:
    add_image(parser, "a migration stream, or -", "FILE")
    add_output(parser)


def _define_write(parser: Parser) -> None:
    add_image(parser)
    parser.add_argument(
        "names", metavar="NAME", nargs="*", help="the bitmaps; by default all valid"
    )
    parser.add_argument(
        "--node-alias",
        metavar="ALIAS",
        type=_name,
        required=True,
        help="what the receiver calls the disk: its node name, or the alias mapped to it",
    )
    form = parser.add_mutually_exclusive_group(required=True)
    form.add_argument(
        "--machine",
        metavar="TYPE",
        type=_name,
        help="the receiver's machine type in full, such as pc-i440fx-7.2",
    )
    form.add_argument(
        "--section-only", action="store_true", help="only the sections of the bitmaps"
    )
    parser.add_argument(
        "-o", dest="file", metavar="FILE", default="-", help="by default -, standard output"
    )
    add_sharing(parser)


def _define_restore(parser: Parser) -> None:
    parser.add_argument("file", metavar="FILE", help="a migration stream, or -")
    add_image(parser)
    parser.add_argument("--node", metavar="ALIAS", type=_name, help="whose bitmaps")
    parser.add_argument(
        "--map",
        metavar="BITMAP-ALIAS=NAME",
        type=_mapped_name,
        action="append",
        default=[],
        help="give a bitmap of the stream another name",
    )
    add_evidence(parser)
    add_editing(parser)


def _name(text: str) -> str:
    if not 1 <= len(os.fsencode(text.removeprefix(MARK))) <= 255:
        raise argparse.ArgumentTypeError("must have 1 to 255 bytes")
    return text


def _mapped_name(text: str) -> str:
    alias, equals, name = text.partition("=")
    if not alias or not equals or not name:
        raise argparse.ArgumentTypeError("write BITMAP-ALIAS=NAME")
    return text
