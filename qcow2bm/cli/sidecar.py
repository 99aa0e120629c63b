"""The commands ``sidecar save``, ``sidecar load`` and ``sidecar dump``.

*Spec*: spec/cli.md, "Sidecars".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from qcow2bm import Image, new_file, open, sidecar
from qcow2bm.cli import files, output
from qcow2bm.cli.arguments import (
    OutputArguments,
    ReadingArguments,
    RestoringArguments,
    add_output,
    add_reading,
    add_restoring,
    add_timeout,
)
from qcow2bm.cli.images import valid_bitmaps
from qcow2bm.cli.messages import CommandError, about, say
from qcow2bm.cli.output import Document, count, json_text, percent, quoted, several_nodes, size
from qcow2bm.cli.parser import Arguments, Parser, UsageError
from qcow2bm.cli.restoring import restore
from qcow2bm.units import escape

_SAVE_EPILOG = """\
FILE must not exist. Bitmaps that are not valid are left out, with a warning. With --qmp the bitmaps
are those that the VM has in memory, all of one moment unless its disk has an iothread.

Writes to the disk after that are missing from FILE. With --sentinel, sidecar load can find out
whether there was any.

exit status: 0 done; 1 the command failed; 2 done, but a bitmap is left out; 64 wrong usage
"""

_LOAD_EPILOG = """\
All bitmaps are added in one edit. A bitmap of the image that has the same name is replaced if it is
in use; otherwise the command fails.

A sentinel that was saved with the bitmaps, and has recorded no write since, proves that the disk
was not written to. Without that proof, --assert-unchanged or --as-dirty-ranges-unknown is needed.

exit status: 0 done; 1 the command failed, and all is as before unless the message says otherwise;
64 wrong usage
"""

_DUMP_EPILOG = """\
exit status: 0 the file is sound; 1 it is no sidecar, damaged, or cut off; 64 wrong usage
"""


class SaveArguments(ReadingArguments):
    """The values of the arguments of ``sidecar save``."""

    names: list[str]
    sentinel: bool
    qmp: str | None
    timeout: float
    node: str | None


class DumpArguments(OutputArguments):
    """The values of the arguments of ``sidecar dump``."""

    file: str


def define(parser: Parser) -> None:
    """Adds the commands with their second words."""
    summary = "write the valid bitmaps of an image, or of a running VM, to a file"
    parser.add_command("save", summary, _define_save)
    parser.add_command("load", "put the bitmaps of such a file into an image", _define_load)
    parser.add_command("dump", "show the bitmaps in such a file", _define_dump)


def _define_save(parser: Parser) -> None:
    parser.namespace = SaveArguments
    parser.examples = (
        "qcow2bm sidecar save --sentinel vm.qcow2 vm.bitmaps",
        "qcow2bm sidecar save --qmp vm.sock --node disk vm.bitmaps",
    )
    parser.epilog = _SAVE_EPILOG
    parser.usage = (
        "%(prog)s [-U] [--sentinel] [-q] IMAGE FILE\n"
        "       %(prog)s --qmp SOCKET [--node NODE] [--timeout SECONDS] [-q] FILE"
    )
    parser.add_word("names", "IMAGE FILE", "the image to save from, and the new file", "*")
    parser.add_argument(
        "--sentinel",
        action="store_true",
        help="leave a sentinel in the image, which no other process can use meanwhile",
    )
    parser.add_argument(
        "--qmp",
        metavar="SOCKET",
        help="save from the VM that listens on this QMP socket, instead of IMAGE",
    )
    parser.add_argument("--node", metavar="NODE", help="with --qmp: the node or device of the VM")
    add_timeout(parser, "with --qmp: ")
    add_reading(parser)


def _define_load(parser: Parser) -> None:
    parser.namespace = RestoringArguments
    parser.examples = ("qcow2bm sidecar load vm.bitmaps vm.qcow2",)
    parser.epilog = _LOAD_EPILOG
    add_restoring(parser, "a sidecar, or - for standard input")


def _define_dump(parser: Parser) -> None:
    parser.namespace = DumpArguments
    parser.examples = ("qcow2bm sidecar dump vm.bitmaps",)
    parser.epilog = _DUMP_EPILOG
    parser.add_word("file", "FILE", "a sidecar, or - for standard input")
    add_output(parser)


def run(arguments: Arguments) -> int:
    """Runs one of the commands; returns the exit status."""
    return _RUN[arguments.action](arguments)


# Saving


def _save(arguments: SaveArguments) -> int:
    given, is_live = arguments.names, arguments.qmp is not None
    if len(given) != 2 - is_live:
        raise UsageError("give FILE" if is_live else "give IMAGE and FILE, or --qmp and FILE")
    if is_live and (arguments.sentinel or arguments.force_share):
        raise UsageError("--sentinel and -U are for an IMAGE, not for --qmp")
    if arguments.sentinel and arguments.force_share:
        raise UsageError("--sentinel changes the image, which -U does not allow")
    if given[-1] == files.STANDARD:
        raise UsageError("FILE cannot be standard output")
    if arguments.node is not None and not is_live:
        raise UsageError("--node needs --qmp")
    subject = given[0] if arguments.qmp is None else arguments.qmp
    new_file.require_new(given[-1])
    with about(subject, ValueError):
        saved, left_out = (_from_vm if is_live else _from_image)(subject, arguments)
    if not any(not sidecar.is_sentinel(bitmap.name) for bitmap in saved.bitmaps):
        raise CommandError(subject, "no bitmap is valid")
    with about(subject):
        new_file.write_new(given[-1], sidecar.write(saved))
    for what in left_out if not arguments.quiet else ():
        say(f"warning: {escape(subject)}: {what}")
    return output.PROBLEMS_FOUND if left_out else 0


def _from_image(path: str, arguments: SaveArguments) -> tuple[sidecar.Sidecar, list[str]]:
    if arguments.sentinel:
        with open(path, "r+") as image:
            if image.data_file is not None:
                raise CommandError(
                    path,
                    "a sentinel would prove nothing here: the disk is a data file, which can be "
                    "written to without the image; leave out --sentinel",
                )
            if _collected(image)[0].bitmaps:
                sidecar.add_sentinel(image)
            return _collected(image)
    with open(path, force_share=arguments.force_share) as image:
        return _collected(image)


def _collected(image: Image) -> tuple[sidecar.Sidecar, list[str]]:
    valid, left_out = valid_bitmaps(image)
    nameless = [f"bitmap @{b.index} has no name, and is left out" for b in valid if not b.name]
    named = [bitmap for bitmap in valid if bitmap.name]
    return sidecar.collect(image, named), left_out + nameless


def _from_vm(address: str, arguments: SaveArguments) -> tuple[sidecar.Sidecar, list[str]]:
    from qcow2bm import rescue

    try:
        with rescue.connect(address, arguments.timeout) as monitor:
            saved, left_out = rescue.save_sidecar(monitor, arguments.node)
    except rescue.NodeChoiceError as error:
        raise CommandError(address, several_nodes(error.nodes)) from error
    return saved, [
        f"bitmap {quoted(bitmap.name)} is {reason}, and left out" for bitmap, reason in left_out
    ]


# Loading and showing


def _load(arguments: RestoringArguments) -> int:
    with about(files.name_of(arguments.file)):
        saved = sidecar.read(files.read_pieces(arguments.file))
    restore(arguments, saved.bitmaps, saved.header)
    return 0


def _dump(arguments: DumpArguments) -> int:
    name = files.name_of(arguments.file)
    with about(name):
        saved = sidecar.read(files.read_pieces(arguments.file))
    if arguments.output == "json":
        output.print_json(_document(name, saved))
        return 0
    output.print_facts(_facts(name, saved))
    for number, bitmap in enumerate(saved.bitmaps):
        print(f"\nbitmap {number}: {quoted(bitmap.name)}")
        output.print_facts(_bitmap_facts(bitmap), indent="  ")
    return 0


def _facts(name: str, saved: sidecar.Sidecar) -> Iterator[tuple[str, str]]:
    token = saved.generation
    has_sentinel = any(sidecar.is_sentinel(bitmap.name) for bitmap in saved.bitmaps)
    yield "sidecar", escape(name)
    yield "virtual size", size(saved.disk_size)
    yield "bitmaps", str(len(saved.bitmaps) or "none")
    yield "header", count(len(saved.header), "byte") if saved.header else "not known"
    yield "generation", token.hex() if token else "not recorded"
    yield "sentinel", "yes" if has_sentinel else "no (nothing can prove that the disk is unchanged)"


def _bitmap_facts(bitmap: sidecar.SavedBitmap) -> Iterator[tuple[str, str]]:
    dirty = bitmap.dirty_bytes
    yield "granularity", size(bitmap.granularity)
    yield "enabled", "yes" if bitmap.enabled else "no"
    yield "dirty", f"{size(dirty)}, {percent(dirty, bitmap.disk_size):.1f} % of the disk"
    yield "sha256", bitmap.sha256()


def _document(name: str, saved: sidecar.Sidecar) -> Document:
    token = saved.generation
    return {
        **output.head(name),
        "virtual-size": saved.disk_size,
        "generation": token.hex() if token else None,
        "bitmaps": [
            {
                "name": json_text(bitmap.name),
                "granularity": bitmap.granularity,
                "enabled": bitmap.enabled,
                "sentinel": sidecar.is_sentinel(bitmap.name),
                "dirty-bytes": bitmap.dirty_bytes,
                "sha256": bitmap.sha256(),
            }
            for bitmap in saved.bitmaps
        ],
    }


_RUN: dict[str, Callable[[Any], int]] = {"save": _save, "load": _load, "dump": _dump}
