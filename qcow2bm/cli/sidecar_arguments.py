"""The arguments of the commands ``sidecar``.

*Spec*: spec/cli.md, "Sidecars".
"""

from __future__ import annotations

from qcow2bm.cli.arguments import (
    Parser,
    add_command,
    add_commands,
    add_editing,
    add_evidence,
    add_image,
    add_output,
    add_sharing,
)

_SAVE_EPILOG = """\
FILE must not be there. Bitmaps that are not valid are left out, with a warning. With --qmp they are
those that the VM has in memory, all of one moment unless its disk has an iothread.

What the disk is written to afterwards is missing from FILE. With --sentinel, sidecar load can find
out whether there is any such thing.

exit status: 0 done; 1 could not do it; 64 wrong usage
"""

_LOAD_EPILOG = """\
All bitmaps are added in one edit. Bitmaps of the same names that are in use are replaced; others
must not be there.

That they are true of the disk is proved by a sentinel that was saved with them and was not touched
since, or by you: --assert-unchanged. Otherwise they can be made all dirty.

exit status: 0 done; 1 could not do it, all is as before unless it says otherwise; 64 wrong usage
"""

_DUMP_EPILOG = """\
exit status: 0 all is sound; 1 it is no sidecar, damaged, or cut off; 64 wrong usage
"""


def define(parser: Parser) -> None:
    """Adds the commands of the second word."""
    commands = add_commands(parser, "action")
    summary = "write the valid bitmaps of an image, or of a running VM, to a file"
    add_command(commands, "save", summary, "sidecar", _define_save, _SAVE_EPILOG)
    summary = "put the bitmaps of such a file into an image"
    add_command(commands, "load", summary, "sidecar", _define_load, _LOAD_EPILOG)
    summary = "show what is in such a file"
    add_command(commands, "dump", summary, "sidecar", _define_dump, _DUMP_EPILOG)


def _define_save(parser: Parser) -> None:
    parser.usage = "%(prog)s [-U] [--sentinel] [-q] (IMAGE | --qmp SOCKET [--node NODE]) FILE"
    parser.add_argument(
        "names", metavar="IMAGE FILE", nargs="*", help="what is saved, and to where"
    )
    parser.add_argument(
        "--sentinel",
        action="store_true",
        help="leave a sentinel in the image, which nobody may use meanwhile",
    )
    parser.add_argument(
        "--qmp", metavar="SOCKET", help="where a VM listens whose bitmaps are saved"
    )
    parser.add_argument("--node", metavar="NODE", help="the node or device of that VM")
    add_sharing(parser)


def _define_load(parser: Parser) -> None:
    parser.add_argument("file", metavar="FILE", help="a sidecar, or -")
    add_image(parser)
    add_evidence(parser)
    add_editing(parser)


def _define_dump(parser: Parser) -> None:
    add_image(parser, "a sidecar, or -", "FILE")
    add_output(parser)
