"""What ``sidecar dump`` prints: for people, or as one JSON document.

*Spec*: spec/json.md, "sidecar dump".
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from qcow2bm.cli.facts import count, json_text, print_facts, size
from qcow2bm.migration.sentinel import is_sentinel
from qcow2bm.migration.sidecar import SavedBitmap, Sidecar
from qcow2bm.units import escape

SCHEMA = 1


def print_dump(name: str, sidecar: Sidecar, output: str) -> None:
    """Writes the dump of a sidecar to standard output; ``output`` is human or json."""
    if output == "json":
        print(json.dumps(_document(name, sidecar), indent=1))
        return
    print_facts(_facts(name, sidecar), indent="")
    for number, bitmap in enumerate(sidecar.bitmaps):
        print(f'\nbitmap {number}: "{escape(bitmap.name)}"')
        print_facts(_bitmap_facts(bitmap), indent="  ")


def _facts(name: str, sidecar: Sidecar) -> Iterator[tuple[str, str]]:
    token = sidecar.generation
    sentinels = [bitmap for bitmap in sidecar.bitmaps if is_sentinel(bitmap.name)]
    yield "sidecar", escape(name)
    yield "virtual size", size(sidecar.disk_size)
    yield "bitmaps", str(len(sidecar.bitmaps) or "none")
    yield "header", count(len(sidecar.header), "byte") if sidecar.header else "not known"
    yield "generation", token.hex() if token else "not recorded"
    yield "sentinel", "yes" if sentinels else "no (nothing will tell if the disk is unchanged)"


def _bitmap_facts(bitmap: SavedBitmap) -> Iterator[tuple[str, str]]:
    dirty = bitmap.dirty_bytes
    yield "granularity", size(bitmap.granularity)
    yield "enabled", "yes" if bitmap.enabled else "no"
    yield "dirty", f"{size(dirty)}, {100 * dirty / bitmap.disk_size:.1f} % of the disk"
    yield "sha256", bitmap.sha256()


def _document(name: str, sidecar: Sidecar) -> dict[str, Any]:
    token = sidecar.generation
    return {
        "schema": SCHEMA,
        "filename": json_text(name),
        "virtual-size": sidecar.disk_size,
        "generation": token.hex() if token else None,
        "bitmaps": [
            {
                "name": json_text(bitmap.name),
                "granularity": bitmap.granularity,
                "enabled": bitmap.enabled,
                "sentinel": is_sentinel(bitmap.name),
                "dirty-bytes": bitmap.dirty_bytes,
                "sha256": bitmap.sha256(),
            }
            for bitmap in sidecar.bitmaps
        ],
    }
