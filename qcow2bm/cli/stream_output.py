"""The output of ``stream dump``: for people, and for programs.

*Spec*: spec/json.md, "stream dump".
"""

from __future__ import annotations

from collections.abc import Iterator

from qcow2bm import FormatError, stream
from qcow2bm.cli.output import (
    SCHEMA,
    Document,
    count,
    json_text,
    percent,
    print_facts,
    quoted,
    size,
)
from qcow2bm.units import escape


def print_stream(name: str, bitmaps: stream.StreamBitmaps) -> None:
    """Prints the bitmaps of a stream for people."""
    print_facts(_facts(name, bitmaps))
    for number, bitmap in enumerate(bitmaps.all):
        print(f"\nbitmap {number}: {quoted(bitmap.bitmap_alias)}")
        print_facts(_bitmap_facts(bitmap), indent="  ")
    print()
    if bitmaps.fault:
        print(f"1 problem:\n  {bitmaps.fault}")
        print(f"complete: {len(bitmaps.complete)} of {count(len(bitmaps.all), 'bitmap')}")
    else:
        print("no problems found (memory and devices of the VM were not checked)")


def _facts(name: str, bitmaps: stream.StreamBitmaps) -> Iterator[tuple[str, str]]:
    yield "stream", escape(name)
    yield "bitmaps", str(len(bitmaps.all) or "none")
    yield "complete", "yes" if bitmaps.is_complete else "NO (see the problem below)"


def _bitmap_facts(bitmap: stream.StreamBitmap) -> Iterator[tuple[str, str]]:
    is_complete = bitmap.is_complete
    yield "node", quoted(bitmap.node_alias)
    yield "status", "complete" if is_complete else "incomplete (bits are missing from it)"
    yield "granularity", size(bitmap.granularity)
    yield "enabled", "yes" if bitmap.enabled else "no"
    yield "persistent", "yes" if bitmap.persistent else "no"
    yield "disk" if is_complete else "came", size(bitmap.disk_size)
    part = percent(bitmap.dirty_bytes, bitmap.disk_size)
    label = "dirty" if is_complete else "dirty at least"
    yield label, f"{size(bitmap.dirty_bytes)}, {part:.1f} % of that"
    if is_complete:
        yield "sha256", bitmap.sha256()


def stream_as_json(bitmaps: stream.StreamBitmaps) -> Document:
    """The document that ``stream dump`` prints."""
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


def _problem(fault: FormatError) -> Document:
    return {
        "structure": fault.structure,
        "field": fault.field or None,
        "offset": fault.offset,
        "message": str(fault),
    }
