"""The dump as one JSON document, written as it is read.

*Spec*: spec/json.md, "dump".
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from qcow2bm.api import Bitmap, Image
from qcow2bm.bitmaps.entries import GRANULARITY_BITS_LIMIT
from qcow2bm.bitmaps.status import VALID
from qcow2bm.cli import report
from qcow2bm.cli.dump import Options, totals
from qcow2bm.cli.facts import json_text
from qcow2bm.format.directory import FLAG_NAMES, TYPE_DIRTY_TRACKING
from qcow2bm.format.features import KINDS
from qcow2bm.problems import Problem

SCHEMA = 1


def print_dump(
    image: Image, bitmaps: Sequence[Bitmap], problems: Sequence[Problem], options: Options
) -> None:
    """Writes the document to standard output.

    All but the extents is read before anything is written, so that a failure leaves no part
    of a document behind; extents are written as they are read.
    """
    shown = [_bitmap(bitmap, options) for bitmap in bitmaps]
    out = sys.stdout
    for key, value in _facts(image).items():
        out.write("{" if key == "schema" else ",\n ")
        out.write(f"{json.dumps(key)}: {json.dumps(value)}")
    out.write(',\n "bitmaps": [')
    for number, (bitmap, facts) in enumerate(zip(bitmaps, shown, strict=True)):
        out.write(",\n  " if number else "\n  ")
        out.write(facts)
        if options.extents:
            out.write(',\n   "extents": ')
            _print_extents(image, bitmap)
            out.write("}")
    out.write('],\n "problems": [')
    for number, found in enumerate(problems):
        out.write(",\n  " if number else "\n  ")
        out.write(json.dumps(problem(image, found)))
    out.write("]}\n")


def _text(text: str | None) -> str | None:
    return None if text is None else json_text(text)


def _facts(image: Image) -> dict[str, Any]:
    extension = image.bitmaps_extension
    return {
        "schema": SCHEMA,
        "filename": _text(image.name),
        "version": image.version,
        "virtual-size": image.virtual_size,
        "cluster-size": image.cluster_size,
        "file-size": image.file_size,
        "refcount-bits": image.refcount_bits,
        "features": {
            kind: [{"bit": f.bit, "name": _text(f.name)} for f in image.features(kind)]
            for kind in KINDS
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


def _print_extents(image: Image, bitmap: Bitmap) -> None:
    if bitmap.status != VALID:
        sys.stdout.write("null")
        return
    from qcow2bm.cli.rows import RowPrinter

    printer = RowPrinter(b',\n   {"start": ', b', "length": ', (b"}",), image.virtual_size)
    rows = ((extents[:, 0], extents[:, 1], 0) for extents in bitmap.extents())
    report.write_rows(b"[", printer, rows, b"]")


def _bitmap(bitmap: Bitmap, options: Options) -> str:
    """One bitmap as a JSON object, without its closing brace if extents are to follow."""
    entry, status = bitmap.entry, bitmap.status
    counted = totals(bitmap, status, options)
    clusters = bitmap.clusters
    facts: dict[str, Any] = {"index": entry.index, "name": _text(entry.name)}
    if entry.name_bytes is not None and facts["name"] != entry.name:
        facts["name-hex"] = entry.name_bytes.hex()
    facts |= {
        "granularity": bitmap.granularity
        if entry.granularity_bits < GRANULARITY_BITS_LIMIT
        else None,
        "flags": [name for bit, name in FLAG_NAMES.items() if entry.flags & bit],
        "type": "dirty-tracking" if entry.type == TYPE_DIRTY_TRACKING else entry.type,
        "status": status,
        "bitmap-table-offset": entry.bitmap_table_offset,
        "bitmap-table-size": entry.bitmap_table_size,
        "clusters": clusters
        and {
            "all-zeroes": clusters.all_zeroes,
            "all-ones": clusters.all_ones,
            "allocated": clusters.allocated,
        },
        "dirty-bytes": counted and counted.dirty_bytes,
    }
    if options.sha256:
        facts["sha256"] = bitmap.sha256() if status == VALID else None
    return json.dumps(facts).removesuffix("}" if options.extents else "")


def problem(image: Image, found: Problem) -> dict[str, Any]:
    """A problem, for programs."""
    index = found.bitmap_index
    return {
        "id": found.id,
        "severity": found.severity,
        "structure": found.structure,
        "field": found.field or None,
        "offset": found.offset,
        "message": _text(found.message),
        "bitmap": None if index is None else _text(image.directory[index].name),
        "bitmap-index": index,
    }
