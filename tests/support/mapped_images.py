"""Images whose L1 and L2 tables a test writes entry by entry.

    data = mapped_image({0: {3: COPIED | 0x200}}, size=1 << 20)

leads from entry 0 of the L1 table to an L2 table that has one entry, number 3. Only the tables are
sound: the refcounts do not count what is added.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from support.images import Built, Stored, build_image, extension

from qcow2bm.format.extensions import DATA_FILE
from qcow2bm.format.features import INCOMPATIBLE_DATA_FILE, INCOMPATIBLE_EXTENDED_L2
from qcow2bm.units import ceil_div

COPIED = 1 << 63
COMPRESSED = 1 << 62
ZERO = 1

EXTENDED: dict[str, Any] = {"header": {"incompatible_features": INCOMPATIBLE_EXTENDED_L2}}
WITH_DATA_FILE: dict[str, Any] = {
    "header": {"incompatible_features": INCOMPATIBLE_DATA_FILE},
    "extensions": [extension(DATA_FILE, b"disk.raw")],
}

Entry = int | tuple[int, int]
"""An L2 table entry; with extended entries, the entry and its bitmap of subclusters."""


def mapped_image(
    tables: Mapping[int, Mapping[int, Entry]], *bitmaps: Stored, **options: Any
) -> Built:
    """Returns an image of `build_image`, with L2 tables behind its other clusters.

    ``tables`` has the entries that are not 0 of each L2 table, by the number of the L1 entry that
    leads to the table.
    """
    header = dict(options.pop("header", {}))
    if header.get("incompatible_features", 0) & INCOMPATIBLE_EXTENDED_L2:  # longer entries
        covered = 1 << 2 * options["cluster_bits"] - 4
        header.setdefault("l1_size", ceil_div(options["size"], covered))
    image = build_image(*bitmaps, header=header, **options)
    for number, entries in tables.items():
        offset = len(image.data)
        image.data.extend(bytes(image.cluster_size))
        image.plant(COPIED | offset, "l1-table", 0, number)
        for place, entry in entries.items():
            words = entry if isinstance(entry, tuple) else (entry,)
            data = b"".join(word.to_bytes(8, "big") for word in words)
            start = offset + len(data) * place
            image.data[start : start + len(data)] = data
    return image
