"""The commands ``stream dump``, ``stream write`` and ``stream restore``: QEMU's migration stream.

*Spec*: spec/cli.md, "Streams".
"""

from __future__ import annotations

import argparse
import os
import sys

from qcow2bm.cli import addressing, files, report
from qcow2bm.cli.console import fail, say
from qcow2bm.cli.stream_dump import print_dump
from qcow2bm.errors import Qcow2BmError
from qcow2bm.migration.stream_bitmaps import StreamBitmaps, read_stream
from qcow2bm.migration.stream_writer import OutgoingBitmap, write_stream
from qcow2bm.storage.new_file import write_new
from qcow2bm.units import decode_name, escape


def run(arguments: argparse.Namespace) -> int:
    """Does one of the commands; returns the exit status."""
    return _ACTIONS[arguments.action](arguments)


def _dump(arguments: argparse.Namespace) -> int:
    path = arguments.image
    arguments.image = files.name_of(path)  # as messages have it
    bitmaps = _read(path)
    print_dump(arguments.image, bitmaps, arguments.output)
    return report.PROBLEMS_FOUND if bitmaps.fault else 0


def _restore(arguments: argparse.Namespace) -> int:
    from qcow2bm.cli import stream_restore

    path, arguments.file = arguments.file, files.name_of(arguments.file)
    with files.named(arguments, path):
        bitmaps = _read(path)
    return stream_restore.run(arguments, bitmaps)


def _read(path: str) -> StreamBitmaps:
    """The bitmaps of a stream. What writes into a pipe is let finish, whatever it writes."""
    pieces = files.pieces(path)
    try:
        bitmaps = read_stream(pieces)
    except Qcow2BmError:
        files.drain(path, pieces)
        raise
    files.drain(path, pieces)
    return bitmaps


def _write(arguments: argparse.Namespace) -> int:
    path = arguments.file
    if path == files.STANDARD and sys.stdout.isatty():
        return fail("standard output", "is a terminal, and a stream is no text: give -o FILE")
    with report.open_image(arguments) as image:
        problems = image.problems
        bitmaps, warnings = report.valid_bitmaps(image)
        if arguments.names:
            bitmaps, warnings = [addressing.find(image, name) for name in arguments.names], []
        if not bitmaps:
            return fail(image.name, "no bitmap is valid")
        alias = decode_name(os.fsencode(arguments.node_alias))
        size = image.virtual_size
        outgoing = [
            OutgoingBitmap(alias, b.name, b.granularity, b.auto, True, b.packed().data, size)
            for b in bitmaps
        ]
    pieces = write_stream(outgoing, None if arguments.section_only else arguments.machine)
    if path == files.STANDARD:
        sys.stdout.flush()
        sys.stdout.buffer.writelines(pieces)
    else:
        write_new(path, pieces)
    if not arguments.quiet:
        for warning in warnings:
            say(f"warning: {escape(image.name)}: {warning}")
        report.warn(image.name, problems)
    return report.status(problems)


_ACTIONS = {"dump": _dump, "write": _write, "restore": _restore}
