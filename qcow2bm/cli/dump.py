"""The command ``dump``: everything about the bitmaps of an image, sound or broken.

*Spec*: spec/cli.md, "What a dump says at its end"; spec/json.md, "dump".
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence

from qcow2bm import Bitmap, Image, Problem, open
from qcow2bm import problems as structures
from qcow2bm.cli import output
from qcow2bm.cli.arguments import (
    NAME_NOTE,
    OutputArguments,
    ReadingArguments,
    add_image,
    add_output,
    add_reading,
)
from qcow2bm.cli.dump_bitmap import (
    Selection,
    bitmap_as_json,
    print_bitmap,
    write_extents_as_json,
)
from qcow2bm.cli.images import find
from qcow2bm.cli.messages import about
from qcow2bm.cli.output import Document, count, json_text_or_null, quoted, size
from qcow2bm.cli.parser import Parser
from qcow2bm.cli.terminal import paint, print_text
from qcow2bm.units import escape, format_size

_FEATURE_KINDS = ("incompatible", "compatible", "autoclear")
_REPAIRABLE = (
    structures.BITMAPS_EXTENSION,
    structures.DIRECTORY,
    structures.ENTRY,
    structures.TABLE,
)


class Arguments(OutputArguments, ReadingArguments):
    """The values of the arguments of ``dump``."""

    image: str
    extents: bool
    sha256: bool
    count: bool
    stale: bool
    bitmap: str | None


def define(parser: Parser) -> None:
    """Adds the arguments."""
    parser.namespace = Arguments
    parser.examples = (
        "qcow2bm dump vm.qcow2",
        "qcow2bm dump vm.qcow2 --bitmap daily --extents --json",
    )
    parser.notes = (NAME_NOTE,)
    add_image(parser)
    add_output(parser)
    add_reading(parser)
    parser.add_argument(
        "--extents",
        action="store_true",
        help="list the dirty extents of every valid bitmap, and show its digest",
    )
    parser.add_argument(
        "--sha256",
        action="store_true",
        help="show the digest that QEMU's x-debug-block-dirty-bitmap-sha256 gives",
    )
    parser.add_argument(
        "--no-count", dest="count", action="store_false", help="do not count dirty bytes"
    )
    parser.add_argument(
        "--stale",
        action="store_true",
        help="count the dirty bytes of inconsistent and stale bitmaps, too; writes are missing "
        "from them",
    )
    parser.add_argument("--bitmap", metavar="NAME", help="show only this bitmap")


def run(arguments: Arguments) -> int:
    """Prints the dump; returns the exit status."""
    sha256 = arguments.sha256 or arguments.extents
    selection = Selection(arguments.count, arguments.stale, arguments.extents, sha256)
    with (
        about(arguments.image),
        open(arguments.image, force_share=arguments.force_share) as image,
    ):
        problems = image.problems
        if arguments.bitmap is None:
            bitmaps = [image.bitmap(entry.index) for entry in image.directory]
        else:
            bitmaps = [find(image, arguments.bitmap)]
        if arguments.output == "json":
            _print_json(image, bitmaps, problems, selection)
        else:
            _print(image, bitmaps, problems, selection)
    return output.status_of(problems)


# For people


def _print(
    image: Image, bitmaps: Sequence[Bitmap], problems: Sequence[Problem], selection: Selection
) -> None:
    output.print_facts(_facts(image))
    for bitmap in bitmaps:
        print_bitmap(image, bitmap, selection)
    print()
    shown = {None, *(bitmap.index for bitmap in bitmaps)}
    _print_problems(image, [found for found in problems if found.bitmap_index in shown])
    others = sum(found.bitmap_index not in shown for found in problems)
    if others:
        print(f"{count(others, 'problem')} more in other bitmaps")
    _print_use(bitmaps)
    _print_advice(bitmaps, [found for found in problems if found.severity == "refused"])


def _facts(image: Image) -> Iterator[tuple[str, str]]:
    yield "image", escape(image.name)
    width = image.refcount_bits
    yield (
        "format",
        f"qcow2 version {image.version}, clusters of {format_size(image.cluster_size)}, "
        f"refcounts of {'unknown width' if width is None else count(width, 'bit')}",
    )
    yield "virtual size", size(image.virtual_size)
    yield "file size", size(image.file_size)
    if image.backing_file is not None:
        yield "backing file", f"{quoted(image.backing_file)} (not opened)"
    if image.data_file is not None:
        yield "data file", f"{quoted(image.data_file)} (not opened)"
    for kind in _FEATURE_KINDS:
        names = [f"{f.bit} ({escape(f.name or 'unknown')})" for f in image.features(kind)]
        if names:
            yield kind, f"bit {', '.join(names)}"
    extension = image.bitmaps_extension
    if not extension:
        yield "bitmaps", "none"
        return
    yield (
        "bitmap directory",
        f"{count(extension.nb_bitmaps, 'bitmap')} in "
        f"{count(extension.bitmap_directory_size, 'byte')} at "
        f"{extension.bitmap_directory_offset:#x}",
    )
    yield (
        "up to date",
        "yes (autoclear bit 0 is set)" if image.is_consistent else "NO (autoclear bit 0 is off)",
    )


def _print_problems(image: Image, problems: Sequence[Problem]) -> None:
    if not problems:
        print("no problems found (guest data and refcounts were not checked)")
        return
    print(f"{count(len(problems), 'problem')}:")
    for found in problems:
        name = output.owner_of(image, found)
        label = "" if name is None else f"{quoted(name)}: "
        severity = paint(found.severity, found.severity)
        padding = " " * (9 - len(found.severity))
        print_text(f"  {severity}:{padding}{label}{found.message}", 12)
        says = f', for which QEMU says "{found.qemu_message}"' if found.qemu_message else ""
        print_text(f"            ({found.id}{says})", 12)


def _print_use(bitmaps: Sequence[Bitmap]) -> None:
    """Prints what backups can use, if that is not everything."""
    sentinels = [bitmap for bitmap in bitmaps if bitmap.is_sentinel]
    if any(bitmap.status == "inconsistent" for bitmap in sentinels):
        print("a sentinel is inconsistent: a VM has the disk, or did not end properly")
    reasons = Counter(bitmap.backup_reason for bitmap in bitmaps if not bitmap.is_sentinel)
    others = ", ".join(f"{n} {reason}" for reason, n in reasons.items() if reason != "usable")
    if others:
        usable = f"{reasons['usable']} of {count(reasons.total(), 'bitmap')}"
        print(f"usable for a backup: {usable} ({others})")


def _print_advice(bitmaps: Sequence[Bitmap], refused: Sequence[Problem]) -> None:
    """Prints whether QEMU opens the image, and which command helps."""
    if not refused:
        if any(
            bitmap.status in ("inconsistent", "stale") and not bitmap.is_sentinel
            for bitmap in bitmaps
        ):
            print("to make one valid again, with no VM running:")
            output.print_command("qcow2bm salvage IMAGE NAME --all-dirty")
        return
    print(paint("QEMU will not open this image", "refused"))
    if all(found.kind.is_fittable for found in refused):
        print_text(
            "the bitmaps do not fit the disk, which was resized without them; to repair that:",
            hanging=0,
        )
        output.print_command("qcow2bm fit IMAGE --all")
    elif all(found.structure in _REPAIRABLE for found in refused):
        print_text(
            "to repair that, with no VM running; bitmaps that cannot be repaired are dropped:",
            hanging=0,
        )
        output.print_command("qcow2bm repair IMAGE --undo UNDO_FILE")


# For programs


def _print_json(
    image: Image, bitmaps: Sequence[Bitmap], problems: Sequence[Problem], selection: Selection
) -> None:
    """Writes one document.

    Everything but the extents is read before anything is written, so that a failure leaves no
    part of a document behind. Extents are written as they are read.
    """
    shown = [bitmap_as_json(bitmap, selection) for bitmap in bitmaps]
    out = sys.stdout
    for key, value in _document(image).items():
        out.write("{" if key == "schema" else ",\n ")
        out.write(f"{output.as_json(key)}: {output.as_json(value)}")
    out.write(',\n "bitmaps": [')
    for number, (bitmap, text) in enumerate(zip(bitmaps, shown, strict=True)):
        out.write(",\n  " if number else "\n  ")
        out.write(text)
        if selection.extents:
            write_extents_as_json(image, bitmap)
    out.write('],\n "problems": [')
    for number, found in enumerate(problems):
        out.write(",\n  " if number else "\n  ")
        out.write(output.as_json(output.problem_as_json(image, found)))
    out.write("]}\n")


def _document(image: Image) -> Document:
    """The document without bitmaps and problems."""
    extension = image.bitmaps_extension
    return {
        **output.head(image.name),
        "version": image.version,
        "virtual-size": image.virtual_size,
        "cluster-size": image.cluster_size,
        "file-size": image.file_size,
        "refcount-bits": image.refcount_bits,
        "features": {
            kind: [
                {"bit": feature.bit, "name": json_text_or_null(feature.name)}
                for feature in image.features(kind)
            ]
            for kind in _FEATURE_KINDS
        },
        "extensions": [
            {
                "type": found.type,
                "name": found.name,
                "offset": offset,
                "length": len(found.data),
            }
            for offset, found in image.extensions
        ],
        "bitmap-directory": extension
        and {
            "nb-bitmaps": extension.nb_bitmaps,
            "offset": extension.bitmap_directory_offset,
            "size": extension.bitmap_directory_size,
            "consistent": image.is_consistent,
        },
    }
