"""The commands ``stream dump``, ``stream write`` and ``stream restore``: QEMU's migration stream.

*Spec*: spec/cli.md, "Streams".
"""

from __future__ import annotations

import argparse
import os
import stat
import sys
from collections.abc import Iterable, Iterator

from qcow2bm.api import Bitmap, Image
from qcow2bm.cli import addressing, report
from qcow2bm.cli.console import fail, say
from qcow2bm.cli.stream_dump import print_dump
from qcow2bm.errors import StorageError
from qcow2bm.migration.stream_bitmaps import StreamBitmaps, read_stream
from qcow2bm.migration.stream_writer import Outgoing, write_stream
from qcow2bm.store.status import VALID
from qcow2bm.units import escape

STANDARD = "-"

_PIECE_BYTES = 1 << 17


def run(arguments: argparse.Namespace) -> int:
    """Does one of the commands; returns the exit status."""
    return _ACTIONS[arguments.action](arguments)


def _dump(arguments: argparse.Namespace) -> int:
    name, bitmaps = _read(arguments.image)
    arguments.image = name  # as messages have it
    print_dump(name, bitmaps, arguments.output)
    return report.PROBLEMS_FOUND if bitmaps.fault else 0


def _restore(arguments: argparse.Namespace) -> int:
    from qcow2bm.cli.stream_restore import restore

    arguments.file, bitmaps = _read(arguments.file)
    return restore(arguments, bitmaps)


def _read(path: str) -> tuple[str, StreamBitmaps]:
    """What messages call a file, and the bitmaps in it."""
    if path != STANDARD:
        return path, read_stream(_pieces(path))
    name = "standard input"
    return name, read_stream(_standard_input(name))


def _pieces(path: str) -> Iterator[bytes]:
    """The content of a file or pipe, as it comes."""
    try:
        with open(path, "rb", buffering=0) as file:
            while piece := file.read(_PIECE_BYTES):
                yield piece
    except OSError as error:
        raise StorageError.from_os(error, path, 0, 0) from error


def _standard_input(name: str) -> Iterator[bytes]:
    if sys.stdin is None:
        raise StorageError(name, 0, 0, "is closed")
    try:
        with open(sys.stdin.fileno(), "rb", buffering=0, closefd=False) as file:
            while piece := file.read(_PIECE_BYTES):
                yield piece
    except OSError as error:
        raise StorageError.from_os(error, name, 0, 0) from error


def _write(arguments: argparse.Namespace) -> int:
    path = arguments.file
    if path == STANDARD and sys.stdout.isatty():
        return fail("standard output", "is a terminal, and a stream is no text: give -o FILE")
    with report.open_image(arguments) as image:
        problems = image.problems
        bitmaps, others = _chosen(image, arguments.names)
        if not bitmaps:
            return fail(image.name, "no bitmap is valid")
        alias = os.fsencode(arguments.node_alias).decode("utf-8", "surrogateescape")
        size = image.virtual_size
        outgoing = [
            Outgoing(alias, b.name, b.granularity, b.auto, True, b.packed().data, size)
            for b in bitmaps
        ]
        warnings = [f"{_label(b)} is {b.status}, and left out" for b in others]
    pieces = write_stream(outgoing, None if arguments.section_only else arguments.machine)
    if path == STANDARD:
        sys.stdout.flush()
        sys.stdout.buffer.writelines(pieces)
    else:
        _write_file(path, pieces)
    if not arguments.quiet:
        for warning in warnings:
            say(f"warning: {escape(image.name)}: {warning}")
        report.warn(image.name, problems)
    return report.status(problems)


def _label(bitmap: Bitmap) -> str:
    name = bitmap.entry.name
    return f"bitmap @{bitmap.index}" if name is None else f'bitmap "{escape(name)}"'


def _chosen(image: Image, names: list[str]) -> tuple[list[Bitmap], list[Bitmap]]:
    """The bitmaps that are named, or all that are valid; and those that are left out."""
    if names:
        return [addressing.find(image, name) for name in names], []
    bitmaps = [image.bitmap(entry.index) for entry in image.directory]
    valid = [bitmap for bitmap in bitmaps if bitmap.status == VALID]
    return valid, [bitmap for bitmap in bitmaps if bitmap.status != VALID]


def _write_file(path: str, pieces: Iterable[bytes]) -> None:
    """Writes a file that was not there before, or into a pipe; what fails leaves no file."""
    try:
        descriptor, is_new = _open_output(path)
        try:
            with open(descriptor, "wb") as file:
                file.writelines(pieces)
        except BaseException:
            if is_new:
                os.unlink(path)
            raise
    except OSError as error:
        raise StorageError.from_os(error, path, 0, 0, "writing") from error


def _open_output(path: str) -> tuple[int, bool]:
    """A descriptor to write to, and whether the file was made for it."""
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), True
    except FileExistsError:
        mode = os.stat(path).st_mode
        if not (stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)):
            raise StorageError(path, 0, 0, "is there already, and not overwritten") from None
    descriptor = os.open(path, os.O_WRONLY)
    if os.isatty(descriptor):
        os.close(descriptor)
        raise StorageError(path, 0, 0, "is a terminal, and a stream is no text")
    return descriptor, False


_ACTIONS = {"dump": _dump, "write": _write, "restore": _restore}
