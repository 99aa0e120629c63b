"""What ``stream dump`` prints: for people, or as one JSON document.

*Spec*: spec/json.md, "stream dump".
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from qcow2bm.cli.facts import count, json_text, print_facts, size
from qcow2bm.errors import FormatError
from qcow2bm.migration.stream_bitmaps import StreamBitmap, StreamBitmaps
from qcow2bm.units import escape

SCHEMA = 1


def print_dump(name: str, bitmaps: StreamBitmaps, output: str) -> None:
    """Writes the dump of a stream to standard output; ``output`` is human or json."""
    if output == "json":
        print(json.dumps(_document(bitmaps), indent=1))
        return
    print_facts(_stream_facts(name, bitmaps), indent="")
    for number, bitmap in enumerate(bitmaps.all):
        print(f'\nbitmap {number}: "{escape(bitmap.bitmap_alias)}"')
        print_facts(_bitmap_facts(bitmap), indent="  ")
    print()
    if bitmaps.fault:
        print(f"1 problem:\n  {bitmaps.fault}")
        complete = f"{len(bitmaps.complete)} of {count(len(bitmaps.all), 'bitmap')}"
        print(f"complete: {complete}")
    else:
        print("no problems found (memory and devices of the machine are not looked at)")


def _stream_facts(name: str, bitmaps: StreamBitmaps) -> Iterator[tuple[str, str]]:
    yield "stream", escape(name)
    yield "bitmaps", str(len(bitmaps.all) or "none")
    yield "complete", "yes" if bitmaps.is_complete else "NO (see the problem below)"


def _bitmap_facts(bitmap: StreamBitmap) -> Iterator[tuple[str, str]]:
    is_complete = bitmap.is_complete
    yield "node", f'"{escape(bitmap.node_alias)}"'
    yield "status", "complete" if is_complete else "incomplete (bits are missing from it)"
    yield "granularity", size(bitmap.granularity)
    yield "enabled", "yes" if bitmap.enabled else "no"
    yield "persistent", "yes" if bitmap.persistent else "no"
    yield "disk" if is_complete else "came", size(bitmap.disk_size)
    dirty, percent = bitmap.dirty_bytes, 0.0
    if bitmap.disk_size:
        percent = 100 * dirty / bitmap.disk_size
    yield "dirty" if is_complete else "dirty at least", f"{size(dirty)}, {percent:.1f} % of that"
    if is_complete:
        yield "sha256", bitmap.sha256()


def _document(bitmaps: StreamBitmaps) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "complete": bitmaps.is_complete,
        "bitmaps": [
            {
                "node-alias": json_text(bitmap.node_alias),
                "bitmap-alias": json_text(bitmap.bitmap_alias),
                "granularity": bitmap.granularity,
                "enabled": bitmap.enabled,
                "persistent": bitmap.persistent,
                "complete": bitmap.is_complete,
                "dirty-bytes": bitmap.dirty_bytes,
                "sha256": bitmap.sha256() if bitmap.is_complete else None,
            }
            for bitmap in bitmaps.all
        ],
        "problems": [_problem(fault) for fault in (bitmaps.fault,) if fault],
    }


def _problem(fault: FormatError) -> dict[str, Any]:
    return {
        "structure": fault.structure,
        "field": fault.field or None,
        "offset": fault.offset,
        "message": str(fault),
    }
