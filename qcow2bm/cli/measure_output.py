"""What ``measure`` prints: for people, and for programs.

*Spec*: spec/json.md, "measure".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from qcow2bm import Addition, Bitmap, BitmapSpace, GranularityTotals, Growth, Image
from qcow2bm.cli import output
from qcow2bm.cli.dump_bitmap import space_as_json
from qcow2bm.cli.output import Document, json_text_or_null, percent, print_facts, quoted
from qcow2bm.units import escape, format_size


class Space(NamedTuple):
    """The space of one bitmap, or of all: now, after the disk is resized, and at most."""

    now: BitmapSpace | None
    resized: BitmapSpace | None
    full: BitmapSpace | None


class Measured(NamedTuple):
    """One bitmap; ``coarser`` is empty if what is dirty is not known, or was not asked for."""

    bitmap: Bitmap
    status: str
    space: Space
    coarser: tuple[GranularityTotals, ...]


class Subject(NamedTuple):
    """What is measured: an image, or a new one.

    Attributes:
        image: the image.
        is_new: whether the image is new, and there is no file.
        resized: the size that the disk is to get; None if the disk keeps its size.
    """

    image: Image
    is_new: bool
    resized: int | None

    @property
    def virtual_size(self) -> int:
        """The size of the disk that is measured for."""
        return self.image.virtual_size if self.resized is None else self.resized


# For people


def print_bitmaps(subject: Subject, together: Space, bitmaps: Iterable[Measured]) -> None:
    """Prints the bitmaps that are there."""
    print_facts(_facts(subject, together))
    for found in bitmaps:
        name = found.bitmap.entry.name
        label = "a name that cannot be read" if name is None else quoted(name)
        print(f"\nbitmap {found.bitmap.index}: {label}")
        print_facts(_bitmap_facts(found), indent="  ")


def print_addition(subject: Subject, addition: Addition, count: int) -> None:
    """Prints what it takes to add ``count`` bitmaps."""
    print_facts(_addition_facts(subject, addition, count))


def _image_facts(subject: Subject) -> Iterator[tuple[str, str]]:
    yield "image", "new, without data" if subject.is_new else escape(subject.image.name)
    yield "virtual size", output.size(subject.image.virtual_size)
    if subject.resized is not None:
        yield "resized to", output.size(subject.resized)


def _facts(subject: Subject, space: Space) -> Iterator[tuple[str, str]]:
    yield from _image_facts(subject)
    yield "bitmap space", _parts(space.now)
    if subject.resized is not None:
        yield "after resize", _parts(space.resized)
    yield "at most", _parts(space.full)


def _parts(space: BitmapSpace | None) -> str:
    if not space:
        return "not known"
    return (
        f"{format_size(space.total)}: directory {format_size(space.directory)}, "
        f"tables {format_size(space.tables)}, data {format_size(space.data)}"
    )


def _bitmap_facts(found: Measured) -> Iterator[tuple[str, str]]:
    bitmap, space = found.bitmap, found.space
    yield "status", f"{found.status}{'' if bitmap.auto else ', disabled'}"
    if bitmap.has_legal_granularity:
        yield "granularity", output.size(bitmap.granularity)
    yield "space", _of_one(space.now)
    if space.resized:
        yield "after resize", _of_one(space.resized)
    yield "at most", _of_one(space.full)
    if not found.coarser:
        return
    own, *coarser = found.coarser
    yield "next backup", _cost(own, bitmap.disk_size)
    for totals in coarser:
        yield f"at {format_size(totals.granularity)}", _cost(totals, bitmap.disk_size)
    yield "finer", "not known: a bit does not say which part of its granule is dirty"


def _of_one(space: BitmapSpace | None) -> str:
    if not space:
        return "not known"
    both = format_size(space.tables + space.data)
    return f"{both}: table {format_size(space.tables)}, data {format_size(space.data)}"


def _cost(totals: GranularityTotals, disk_size: int) -> str:
    share = percent(totals.dirty_bytes, disk_size)
    extents = output.count(totals.extents, "extent")
    return f"{output.size(totals.dirty_bytes)}, {share:.1f} % of the disk, in {extents}"


def _addition_facts(subject: Subject, addition: Addition, count: int) -> Iterator[tuple[str, str]]:
    yield from _image_facts(subject)
    yield "cluster size", output.size(subject.image.cluster_size)
    granularity = format_size(addition.granularity)
    yield "to be added", f"{output.count(count, 'bitmap')} of granularity {granularity}"
    yield "while clean", _growth(addition.empty)
    yield "at most", _growth(addition.full)


def _growth(growth: Growth) -> str:
    return (
        f"{output.size(growth.total)}: directory {format_size(growth.directory)}, "
        f"tables {format_size(growth.tables)}, data {format_size(growth.data)}, "
        f"refcounts {format_size(growth.refcounts)}; the file grows by {output.size(growth.file)}"
    )


# For programs


def print_bitmaps_as_json(
    document: Document, subject: Subject, together: Space, bitmaps: Iterable[Measured]
) -> None:
    """Prints the document with the bitmaps that are there; ``document`` has the first keys."""
    parts = {
        "together": _space_document(together),
        "bitmaps": [_bitmap_document(found) for found in bitmaps],
        "addition": None,
    }
    output.print_json({**document, **_subject_document(subject), **parts})


def print_addition_as_json(
    document: Document, subject: Subject, addition: Addition, count: int
) -> None:
    """Prints the document with what it takes to add ``count`` bitmaps."""
    parts: Document = {
        "together": None,
        "bitmaps": [],
        "addition": {
            "count": count,
            "granularity": addition.granularity,
            "empty": _growth_document(addition.empty),
            "full": _growth_document(addition.full),
        },
    }
    output.print_json({**document, **_subject_document(subject), **parts})


def _subject_document(subject: Subject) -> Document:
    return {
        "virtual-size": subject.image.virtual_size,
        "resized-virtual-size": subject.resized,
        "cluster-size": subject.image.cluster_size,
    }


def _space_document(space: Space) -> Document:
    return {
        "now": space.now and space_as_json(space.now),
        "resized": space.resized and space_as_json(space.resized),
        "full": space.full and space_as_json(space.full),
    }


def _bitmap_document(found: Measured) -> Document:
    bitmap = found.bitmap
    backup = None
    if found.coarser:
        own, *coarser = map(_totals_document, found.coarser)
        backup = {**own, "coarser": coarser}
    return {
        "index": bitmap.index,
        "name": json_text_or_null(bitmap.entry.name),
        "granularity": bitmap.granularity if bitmap.has_legal_granularity else None,
        "status": found.status,
        "enabled": bitmap.auto,
        "space": _space_document(found.space),
        "next-backup": backup,
    }


def _totals_document(totals: GranularityTotals) -> Document:
    return {
        "granularity": totals.granularity,
        "dirty-bytes": totals.dirty_bytes,
        "extents": totals.extents,
    }


def _growth_document(growth: Growth) -> Document:
    return {
        "directory": growth.directory,
        "tables": growth.tables,
        "data": growth.data,
        "refcounts": growth.refcounts,
        "total": growth.total,
        "file": growth.file,
    }
