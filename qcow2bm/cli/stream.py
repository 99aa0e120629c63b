"""The commands ``stream dump``, ``stream write`` and ``stream restore``: QEMU's migration stream.

*Spec*: spec/cli.md, "Streams".
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any

from qcow2bm import Qcow2BmError, new_file, open, stream
from qcow2bm.cli import files, output, stream_output
from qcow2bm.cli.arguments import (
    NAME_NOTE,
    OutputArguments,
    ReadingArguments,
    RestoringArguments,
    add_image,
    add_output,
    add_reading,
    add_restoring,
)
from qcow2bm.cli.images import find, valid_bitmaps
from qcow2bm.cli.messages import CommandError, about, say
from qcow2bm.cli.output import quoted
from qcow2bm.cli.parser import Arguments, Parser
from qcow2bm.cli.restoring import restore
from qcow2bm.units import decode_name, escape

_DUMP_EPILOG = """\
FILE is what a VM sent that migrated with the capability dirty-bitmaps; - is standard input, which
can be a pipe:

  migrate "exec:tee vm.stream | qcow2bm stream dump --output=json - >bitmaps.json"

The command shows which bitmaps came, and not their bits: to restore bitmaps, keep the stream.

exit status: 0 all bitmaps came; 1 the file is no stream, or reading it failed; 2 the stream ends
early or breaks a rule, and only the complete bitmaps are of use; 64 wrong usage
"""

_WRITE_EPILOG = """\
Without NAME all valid bitmaps are written. A FILE that exists is not overwritten.

The stream has bitmaps and nothing else. A VM that takes in the stream (-incoming, with the same
machine type) gets neither memory nor device state: it boots cold, as after power on, with the
bitmaps in memory. If the VM was running, shut it down before. The image that it boots from must
have no valid bitmap of the same name: QEMU would refuse the disk.

exit status: 0 done; 1 the command failed; 2 done, but a bitmap is left out, or the image has
problems; 64 wrong usage
"""

_RESTORE_EPILOG = """\
All complete bitmaps of one node are added in one edit. A bitmap of the image that has the same name
is replaced if it is in use; otherwise the command fails.

A sentinel in the image, such as Tracker.begin_migration makes, proves that the disk was not written
to since, if it recorded no write. Without that proof, --assert-unchanged or
--as-dirty-ranges-unknown is needed.

exit status: 0 done; 1 the command failed, and all is as before unless the message says otherwise;
2 done, but the stream has bitmaps that are not complete; 64 wrong usage
"""


class DumpArguments(OutputArguments):
    """The values of the arguments of ``stream dump``."""

    file: str


class WriteArguments(ReadingArguments):
    """The values of the arguments of ``stream write``."""

    image: str
    names: list[str]
    node_alias: str
    machine: str | None
    section_only: bool
    file: str


class RestoreArguments(RestoringArguments):
    """The values of the arguments of ``stream restore``."""

    node: str | None
    map: list[tuple[str, str]]


def define(parser: Parser) -> None:
    """Adds the commands with their second words."""
    parser.add_command("dump", "show the bitmaps in a migration stream", _define_dump)
    summary = "write valid bitmaps of an image as a migration stream, which QEMU takes in"
    parser.add_command("write", summary, _define_write)
    summary = "put the bitmaps of a migration stream into an image"
    parser.add_command("restore", summary, _define_restore)


def _define_dump(parser: Parser) -> None:
    parser.namespace = DumpArguments
    parser.examples = ("qcow2bm stream dump vm.stream",)
    parser.epilog = _DUMP_EPILOG
    parser.add_word("file", "FILE", "a migration stream, or - for standard input")
    add_output(parser)


def _define_write(parser: Parser) -> None:
    parser.namespace = WriteArguments
    parser.examples = (
        "qcow2bm stream write vm.qcow2 --node-alias disk --machine pc-q35-7.2 -o vm.stream",
    )
    parser.notes = (NAME_NOTE,)
    parser.epilog = _WRITE_EPILOG
    add_image(parser)
    parser.add_word("names", "NAME", "the bitmaps; by default all that are valid", "*")
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
        help="the machine type of the receiver in full, such as pc-i440fx-7.2",
    )
    form.add_argument(
        "--section-only", action="store_true", help="write only the sections of the bitmaps"
    )
    parser.add_argument(
        "-o", dest="file", metavar="FILE", default="-", help="write to FILE, not to standard output"
    )
    add_reading(parser)


def _define_restore(parser: Parser) -> None:
    parser.namespace = RestoreArguments
    parser.examples = (
        "qcow2bm stream restore vm.stream vm.qcow2",
        "qcow2bm stream restore vm.stream vm.qcow2 --node disk --map daily=monday",
    )
    parser.epilog = _RESTORE_EPILOG
    add_restoring(parser, "a migration stream, or - for standard input")
    parser.add_argument(
        "--node",
        metavar="ALIAS",
        type=_name,
        help="restore the bitmaps of this node; needed if the stream has several",
    )
    parser.add_argument(
        "--map",
        metavar="BITMAP-ALIAS=NAME",
        type=_mapped_name,
        action="append",
        default=[],
        help="give a bitmap of the stream another name; can be repeated",
    )


def _name(text: str) -> str:
    if not 1 <= len(os.fsencode(text)) <= 255:
        raise argparse.ArgumentTypeError("must have 1 to 255 bytes")
    return text


def _mapped_name(text: str) -> tuple[str, str]:
    alias, equals, name = text.partition("=")
    if not alias or not equals or not name:
        raise argparse.ArgumentTypeError("write BITMAP-ALIAS=NAME")
    return alias, name


def run(arguments: Arguments) -> int:
    """Runs one of the commands; returns the exit status."""
    return _RUN[arguments.action](arguments)


def _read(path: str) -> stream.StreamBitmaps:
    """The bitmaps of a stream. A pipe is read to its end, even if what comes is no stream."""
    pieces = files.read_pieces(path)
    with about(files.name_of(path)):
        try:
            bitmaps = stream.read(pieces)
        except Qcow2BmError:
            files.drain(path, pieces)
            raise
        files.drain(path, pieces)
        return bitmaps


# Writing


def _write(arguments: WriteArguments) -> int:
    path = arguments.file
    if path == files.STANDARD and sys.stdout.isatty():
        raise CommandError(
            "standard output", "is a terminal, and a stream is no text: give -o FILE"
        )
    with (
        about(arguments.image),
        open(arguments.image, force_share=arguments.force_share) as image,
    ):
        problems = image.problems
        bitmaps, warnings = valid_bitmaps(image)
        if arguments.names:
            bitmaps, warnings = [find(image, name) for name in arguments.names], []
        if not bitmaps:
            raise CommandError(image.name, "no bitmap is valid")
        alias = decode_name(os.fsencode(arguments.node_alias))
        outgoing = [stream.outgoing(bitmap, alias) for bitmap in bitmaps]
    with about(arguments.image):
        pieces = stream.write(outgoing, None if arguments.section_only else arguments.machine)
        if path == files.STANDARD:
            sys.stdout.flush()
            sys.stdout.buffer.writelines(pieces)
        else:
            new_file.write_new(path, pieces)
    if not arguments.quiet:
        for warning in warnings:
            say(f"warning: {escape(arguments.image)}: {warning}")
        output.warn_of(arguments.image, problems)
    return output.PROBLEMS_FOUND if warnings else output.status_of(problems)


# Restoring


def _restore(arguments: RestoreArguments) -> int:
    bitmaps = _read(arguments.file)
    name = files.name_of(arguments.file)
    with about(name, ValueError):
        chosen = _by_name(arguments, bitmaps)
    restore(arguments, [stream.saved(bitmap, new) for new, bitmap in chosen.items()])
    lost = [bitmap for bitmap in bitmaps.all if not bitmap.is_complete]
    for bitmap in lost:
        label = f"bitmap {quoted(bitmap.bitmap_alias)}"
        say(f"warning: {escape(name)}: {label} is not complete, and left out")
    return output.PROBLEMS_FOUND if lost or bitmaps.fault else 0


def _by_name(
    arguments: RestoreArguments, bitmaps: stream.StreamBitmaps
) -> dict[str, stream.StreamBitmap]:
    """The complete bitmaps of the node that is meant, by the names that they get.

    Raises:
        ValueError: no node or several nodes can be meant, or the names do not fit the bitmaps.
    """
    nodes = dict.fromkeys(bitmap.node_alias for bitmap in bitmaps.all)
    listed = ", ".join(map(quoted, nodes))
    node = arguments.node if arguments.node is not None or len(nodes) != 1 else next(iter(nodes))
    if not nodes:
        raise ValueError("has no bitmaps")
    if node is None:
        raise ValueError(f"has bitmaps of several nodes: choose one with --node ({listed})")
    if node not in nodes:
        raise ValueError(f"has no bitmaps of the node {quoted(node)}, but of {listed}")
    found = {b.bitmap_alias: b for b in bitmaps.complete if b.node_alias == node}
    names = dict(arguments.map)
    if len(names) < len(arguments.map):
        raise ValueError("is given two names for one bitmap by --map")
    for alias in names:
        if alias not in found:
            raise ValueError(f"has no complete bitmap {quoted(alias)} of that node")
    if not found:
        raise ValueError("has no complete bitmap of that node")
    named = {names.get(alias, alias): bitmap for alias, bitmap in found.items()}
    if len(named) < len(found):
        raise ValueError("is given two bitmaps of one name by --map")
    return named


# Showing


def _dump(arguments: DumpArguments) -> int:
    bitmaps = _read(arguments.file)
    if arguments.output == "json":
        output.print_json(stream_output.stream_as_json(bitmaps))
    else:
        stream_output.print_stream(files.name_of(arguments.file), bitmaps)
    return output.PROBLEMS_FOUND if bitmaps.fault else 0


_RUN: dict[str, Callable[[Any], int]] = {"dump": _dump, "write": _write, "restore": _restore}
