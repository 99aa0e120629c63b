"""One bitmap in a dump: for people, and for programs.

*Spec*: spec/json.md, "Bitmap".
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

from qcow2bm import Bitmap, BitmapSpace, Image, TableRun, Totals
from qcow2bm.cli.output import (
    Document,
    as_json,
    count,
    json_text_or_null,
    percent,
    print_facts,
    quoted,
    size,
    write_rows,
)
from qcow2bm.cli.terminal import paint, print_text
from qcow2bm.units import format_size

_BLOCK_ROWS = 4096  # table entries printed at a time

_MEANING_OF_STATUS = {
    "valid": "valid",
    "inconsistent": "inconsistent (in use, or left so by a crash: writes may be missing from it)",
    "stale": "stale (a program without bitmap support modified the image)",
    "broken": "broken (see the problems below)",
}


class Selection(NamedTuple):
    """The bits to read, and the purpose.

    Attributes:
        totals: how many bytes are dirty, of bitmaps that are valid.
        stale: the same, of bitmaps that are inconsistent or stale.
        extents: all extents, of bitmaps that are valid.
        sha256: the digest, of bitmaps that are valid.
        entries: the entries of all tables that can be read.
    """

    totals: bool
    stale: bool
    extents: bool
    sha256: bool
    entries: bool

    @property
    def has_lists(self) -> bool:
        """Whether there are lists, which are written as they are read."""
        return self.entries or self.extents

    def totals_of(self, bitmap: Bitmap) -> Totals | None:
        """The dirty bytes and extents of a bitmap, if they are selected and there are bits."""
        status = bitmap.status
        if status == "valid" and self.totals:
            return bitmap.totals()
        if status in ("inconsistent", "stale") and self.stale and bitmap.has_stale_bits:
            return bitmap.stale_totals()
        return None


def print_bitmap(image: Image, bitmap: Bitmap, selection: Selection) -> None:
    """Prints a bitmap for people."""
    name = bitmap.entry.name
    title = "(its name cannot be read)" if name is None else quoted(name)
    print()
    print_text(f"bitmap {bitmap.index}: {title}")
    print_facts(_facts(image, bitmap, selection), indent="  ")
    if selection.entries and bitmap.has_stale_bits:
        print("  table entries (first, number, kind, host offset or stored word):")
        rows = map(_line_of, bitmap.table())
        while block := list(islice(rows, _BLOCK_ROWS)):
            sys.stdout.write("".join(block))
    if selection.extents and bitmap.status == "valid":
        print("  extents (start, length in bytes):")
        for extents in bitmap.extents():
            lines = (f"{start:16d}  {length:14d}\n" for start, length in extents.tolist())
            sys.stdout.write("".join(lines))


def _line_of(run: TableRun) -> str:
    where = "" if run.offset is None else f"  {run.offset:#x}"
    stored = "" if run.word is None else f"  {run.word:#x}"
    return f"{run.first:16d}  {run.entries:14d}  {run.kind}{where}{stored}\n"


def _facts(image: Image, bitmap: Bitmap, selection: Selection) -> Iterator[tuple[str, str]]:
    entry, status = bitmap.entry, bitmap.status
    yield "status", _MEANING_OF_STATUS[status].replace(status, paint(status, status), 1)
    if bitmap.has_legal_granularity:
        yield "granularity", size(bitmap.granularity)
    unknown = [f"{bitmap.unknown_flags:#x}"] if bitmap.unknown_flags else []
    yield "flags", ", ".join([*bitmap.flags, *unknown]) or "none (disabled)"
    if not bitmap.is_dirty_tracking:
        yield "type", f"{entry.type} (unknown)"
    totals = selection.totals_of(bitmap)
    if totals:
        part = percent(totals.dirty_bytes, image.virtual_size)
        yield (
            "dirty" if status == "valid" else "dirty at least",
            f"{size(totals.dirty_bytes)}, {part:.1f} % of the disk, "
            f"in {count(totals.extents, 'extent')}",
        )
    if selection.sha256 and status == "valid":
        yield "sha256", bitmap.sha256()
    entries = count(entry.bitmap_table_size, "entry", "entries")
    yield "table", f"{entries} at {entry.bitmap_table_offset:#x}"
    clusters = bitmap.clusters
    if clusters:
        yield (
            "clusters",
            f"{clusters.allocated} allocated, {clusters.all_zeroes} all-zeroes, "
            f"{clusters.all_ones} all-ones",
        )
    space = bitmap.space
    if space:
        both = format_size(space.tables + space.data)
        table, data = format_size(space.tables), format_size(space.data)
        listed = count(space.directory, "byte")
        yield "space", f"{both}: table {table}, data {data}, and {listed} in the directory"
    if entry.extra_data:
        yield "extra data", f"{entry.extra_data_size} bytes"


def bitmap_as_json(bitmap: Bitmap, selection: Selection) -> str:
    """A bitmap as a JSON object, without its end if `write_lists_as_json` follows."""
    entry, status = bitmap.entry, bitmap.status
    totals = selection.totals_of(bitmap)
    clusters, space = bitmap.clusters, bitmap.space
    found: Document = {"index": entry.index, "name": json_text_or_null(entry.name)}
    if entry.name_bytes is not None and found["name"] != entry.name:
        found["name-hex"] = entry.name_bytes.hex()
    found |= {
        "granularity": bitmap.granularity if bitmap.has_legal_granularity else None,
        "flags": bitmap.flags,
        "type": "dirty-tracking" if bitmap.is_dirty_tracking else entry.type,
        "status": status,
        "bitmap-table-offset": entry.bitmap_table_offset,
        "bitmap-table-size": entry.bitmap_table_size,
        "clusters": clusters
        and {
            "all-zeroes": clusters.all_zeroes,
            "all-ones": clusters.all_ones,
            "allocated": clusters.allocated,
        },
        "space": space and space_as_json(space),
        "dirty-bytes": totals and totals.dirty_bytes,
    }
    if selection.sha256:
        found["sha256"] = bitmap.sha256() if status == "valid" else None
    return as_json(found).removesuffix("}" if selection.has_lists else "")


def space_as_json(space: BitmapSpace) -> Document:
    """The space of one bitmap or of all, as "Space" in spec/json.md."""
    return {
        "directory": space.directory,
        "tables": space.tables,
        "data": space.data,
        "total": space.total,
    }


def write_lists_as_json(image: Image, bitmap: Bitmap, selection: Selection) -> None:
    """Writes the lists, and with them the end of the object that `bitmap_as_json` began."""
    out = sys.stdout
    if selection.entries:
        out.write(',\n   "entries": ')
        _write_entries(bitmap)
    if selection.extents:
        out.write(',\n   "extents": ')
        _write_extents(image, bitmap)
    if selection.has_lists:
        out.write("}")


def _write_entries(bitmap: Bitmap) -> None:
    if not bitmap.has_stale_bits:
        sys.stdout.write("null")
        return
    rows = map(_row_of, bitmap.table())
    separator = "["
    while block := list(islice(rows, _BLOCK_ROWS)):
        sys.stdout.write(separator + ",".join(block))
        separator = ","
    sys.stdout.write("]")


def _row_of(run: TableRun) -> str:
    offset = "null" if run.offset is None else run.offset
    word = "null" if run.word is None else f'"{run.word:#018x}"'
    return (
        f'\n   {{"first": {run.first}, "entries": {run.entries}, "kind": "{run.kind}", '
        f'"offset": {offset}, "word": {word}}}'
    )


def _write_extents(image: Image, bitmap: Bitmap) -> None:
    if bitmap.status != "valid":
        sys.stdout.write("null")
        return
    from qcow2bm.cli.rows import RowPrinter  # which needs numpy

    printer = RowPrinter(b',\n   {"start": ', b', "length": ', (b"}",), image.virtual_size)
    rows = ((extents[:, 0], extents[:, 1], 0) for extents in bitmap.extents())
    write_rows(b"[", printer, rows, b"]")
