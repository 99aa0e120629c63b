"""The command ``dump``: everything about the bitmaps of an image, sound or broken.

*Spec*: spec/cli.md, "What a dump says at its end"; spec/json.md, "dump".
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from qcow2bm import Bitmap, FormatError, Image, LimitError, Problem, Snapshot, open
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
    space_as_json,
    write_lists_as_json,
)
from qcow2bm.cli.images import find, needs_help
from qcow2bm.cli.messages import about
from qcow2bm.cli.next_command import Advice, print_advice
from qcow2bm.cli.output import Document, count, json_text, json_text_or_null, quoted, size
from qcow2bm.cli.parser import Parser
from qcow2bm.cli.terminal import paint, print_text
from qcow2bm.units import escape, format_size

_COMPRESSION_TYPES = {0: "zlib", 1: "zstd"}
_ENCRYPTION_METHODS = {0: "none", 1: "aes", 2: "luks"}
_USES = {
    "writer": "by another process, which writes to the image: what follows may be outdated",
    "reader": "by another process, which reads the image",
}
_MOST_SNAPSHOTS = 5
_FEATURE_KINDS = ("incompatible", "compatible", "autoclear")


class Arguments(OutputArguments, ReadingArguments):
    """The values of the arguments of ``dump``."""

    image: str
    entries: bool
    extents: bool
    sha256: bool
    count: bool
    stale: bool
    space: bool
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
        "--entries", action="store_true", help="list the entries of every bitmap table"
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
    parser.add_argument(
        "--space",
        action="store_true",
        help="count the free clusters in the image file, for which all refcounts are read",
    )
    parser.add_argument("--bitmap", metavar="NAME", help="show only this bitmap")


def run(arguments: Arguments) -> int:
    """Prints the dump; returns the exit status."""
    sha256 = arguments.sha256 or arguments.extents
    selection = Selection(
        arguments.count, arguments.stale, arguments.extents, sha256, arguments.entries
    )
    with (
        about(arguments.image),
        open(arguments.image, force_share=arguments.force_share) as image,
    ):
        problems = image.problems
        if arguments.bitmap is None:
            bitmaps = [image.bitmap(entry.index) for entry in image.directory]
        else:
            bitmaps = [find(image, arguments.bitmap)]
        advice = Advice()
        if needs_help(image, problems):
            from qcow2bm.cli.advice import advise  # which takes time to load

            advice = advise(image, arguments.image, problems)
        show = _print_json if arguments.output == "json" else _print
        show(image, bitmaps, problems, advice, selection, has_free=arguments.space)
    return output.status_of(problems)


# For people


def _print(
    image: Image,
    bitmaps: Sequence[Bitmap],
    problems: Sequence[Problem],
    advice: Advice,
    selection: Selection,
    *,
    has_free: bool,
) -> None:
    output.print_facts(_facts(image, has_free=has_free))
    for bitmap in bitmaps:
        print_bitmap(image, bitmap, selection)
    print()
    shown = {None, *(bitmap.index for bitmap in bitmaps)}
    _print_problems(image, [found for found in problems if found.bitmap_index in shown])
    others = sum(found.bitmap_index not in shown for found in problems)
    if others:
        print(f"{count(others, 'problem')} more in other bitmaps")
    _print_use(bitmaps)
    output.print_refusal(problems)
    print_advice(advice)


def _facts(image: Image, *, has_free: bool) -> Iterator[tuple[str, str]]:
    yield "image", escape(image.name)
    use = _USES.get(image.use_by_another_process() or "no")
    if use:
        yield "in use", use
    width = image.refcount_bits
    yield (
        "format",
        f"qcow2 version {image.version}, clusters of {format_size(image.cluster_size)}, "
        f"refcounts of {'unknown width' if width is None else count(width, 'bit')}",
    )
    yield "virtual size", size(image.virtual_size)
    yield "file size", size(image.file_size)
    yield from _space_facts(image, has_free=has_free)
    if image.header.compression_type:
        yield "compression", _name_of(_COMPRESSION_TYPES, image.header.compression_type)
    if image.header.crypt_method:
        yield "encryption", _name_of(_ENCRYPTION_METHODS, image.header.crypt_method)
    if image.backing_file is not None:
        form = "" if image.backing_format is None else f"format {escape(image.backing_format)}, "
        yield "backing file", f"{quoted(image.backing_file)} ({form}not opened)"
    if image.data_file is not None:
        form = "raw, " if image.has_raw_data_file else ""
        yield "data file", f"{quoted(image.data_file)} ({form}not opened)"
    if image.header.nb_snapshots:
        yield "snapshots", _listed(_snapshots(image))
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


def _space_facts(image: Image, *, has_free: bool) -> Iterator[tuple[str, str]]:
    space, all_bitmaps = image.file_space(count_free=has_free), image.bitmap_space
    yield "image end", "not known" if space.end is None else size(space.end)
    if has_free:
        free = "not known" if space.free is None else size(space.free)
        yield "free", f"{free}, before the image end"
    if all_bitmaps and all_bitmaps.total:
        yield (
            "bitmap space",
            f"{format_size(all_bitmaps.total)}: directory {format_size(all_bitmaps.directory)}, "
            f"tables {format_size(all_bitmaps.tables)}, data {format_size(all_bitmaps.data)}",
        )


def _name_of(names: Mapping[int, str], number: int) -> str:
    return names.get(number, f"{number} (unknown)")


def _listed(snapshots: Sequence[Snapshot] | None) -> str:
    if snapshots is None:
        return "not known: the snapshot table is damaged"
    names = ", ".join(quoted(snapshot.name) for snapshot in snapshots[:_MOST_SNAPSHOTS])
    more = ", ..." if len(snapshots) > _MOST_SNAPSHOTS else ""
    return f"{len(snapshots)} ({names}{more})"


def _snapshots(image: Image) -> tuple[Snapshot, ...] | None:
    """The snapshots; None if their table is damaged."""
    try:
        return image.snapshots()
    except (FormatError, LimitError):
        return None


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
    reasons = Counter(bitmap.backup_reason for bitmap in bitmaps if not bitmap.is_auxiliary)
    others = ", ".join(f"{n} {reason}" for reason, n in reasons.items() if reason != "usable")
    if others:
        usable = f"{reasons['usable']} of {count(reasons.total(), 'bitmap')}"
        print(f"usable for a backup: {usable} ({others})")


# For programs


def _print_json(
    image: Image,
    bitmaps: Sequence[Bitmap],
    problems: Sequence[Problem],
    advice: Advice,
    selection: Selection,
    *,
    has_free: bool,
) -> None:
    """Writes one document.

    Everything but entries and extents is read before anything is written, so that a failure leaves
    no part of a document behind. Entries and extents are written as they are read.
    """
    document = _document(image, has_free=has_free)
    shown = [bitmap_as_json(bitmap, selection) for bitmap in bitmaps]
    out = sys.stdout
    for key, value in document.items():
        out.write("{" if key == "schema" else ",\n ")
        out.write(f"{output.as_json(key)}: {output.as_json(value)}")
    out.write(',\n "bitmaps": [')
    for number, (bitmap, text) in enumerate(zip(bitmaps, shown, strict=True)):
        out.write(",\n  " if number else "\n  ")
        out.write(text)
        write_lists_as_json(image, bitmap, selection)
    out.write('],\n "problems": [')
    for number, found in enumerate(problems):
        out.write(",\n  " if number else "\n  ")
        out.write(output.as_json(output.problem_as_json(image, found)))
    out.write(f'],\n "next": {output.as_json(advice.as_json)}}}\n')


def _document(image: Image, *, has_free: bool) -> Document:
    """The document without bitmaps and problems."""
    extension, header = image.bitmaps_extension, image.header
    space, all_bitmaps = image.file_space(count_free=has_free), image.bitmap_space
    compression_type = header.compression_type or 0
    snapshots = _snapshots(image)
    return {
        **output.head(image.name),
        "version": image.version,
        "virtual-size": image.virtual_size,
        "cluster-size": image.cluster_size,
        "file-size": image.file_size,
        "image-end-offset": space.end,
        **({"free-bytes": space.free} if has_free else {}),
        "bitmap-space": all_bitmaps and space_as_json(all_bitmaps),
        "in-use-by-another-process": image.use_by_another_process(),
        "header-length": header.header_length,
        "refcount-bits": image.refcount_bits,
        "compression-type": _COMPRESSION_TYPES.get(compression_type, compression_type),
        "encryption-method": _ENCRYPTION_METHODS.get(header.crypt_method, header.crypt_method),
        "backing-file": json_text_or_null(image.backing_file),
        "backing-format": json_text_or_null(image.backing_format),
        "data-file": json_text_or_null(image.data_file),
        "data-file-raw": image.has_raw_data_file,
        "l1-table": {"offset": header.l1_table_offset, "entries": header.l1_size},
        "refcount-table": {
            "offset": header.refcount_table_offset,
            "clusters": header.refcount_table_clusters,
        },
        "snapshots": None if snapshots is None else [_snapshot_as_json(s) for s in snapshots],
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


def _snapshot_as_json(snapshot: Snapshot) -> Document:
    return {
        "id": json_text(snapshot.id),
        "name": json_text(snapshot.name),
        "offset": snapshot.offset,
        "size": snapshot.size,
        "l1-table": {"offset": snapshot.l1_table_offset, "entries": snapshot.l1_size},
        "date-sec": snapshot.date_sec,
        "date-nsec": snapshot.date_nsec,
        "vm-clock-nsec": snapshot.vm_clock_nsec,
        "vm-state-size": snapshot.vm_state_size,
        "virtual-size": snapshot.disk_size,
        "icount": snapshot.icount,
    }
