"""If QEMU refuses an image, this library must say so in advance, and why; otherwise it must not.

Every field of header, extensions, directory entries and tables takes edge values in images that
QEMU made; then some faults that need several changes; then random ones.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from random import Random

import pytest
from support.lab import AGREED, BASES, CLUSTER, FIELDS, Change, Disagreement, Finding, Lab
from support.qemu import StorageDaemon

EDGES: dict[str, Change] = {
    "0": 0,
    "1": 1,
    "2": 2,
    "less": lambda old: old - 1,
    "more": lambda old: old + 1,
    "8-more": lambda old: old + 8,
    "half": lambda old: old // 2,
    "double": lambda old: old * 2,
    "all-ones": -1,
}
WIDE_EDGES: dict[str, Change] = {
    "512-more": lambda old: old + 512,
    "cluster-more": lambda old: old + CLUSTER,
    "1024": 1024,
    "65535": 65535,
}
WORD_EDGES: dict[str, Change] = {"65536": 65536, "sign": 1 << 31}
LONG_EDGES: dict[str, Change] = {
    "65536": 65536,
    "past-eof": 1 << 40,
    "sign": 1 << 63,
    "last-cluster": -CLUSTER,
}
EDGES_BY_WIDTH = {
    "B": EDGES,
    "H": EDGES | WIDE_EDGES,
    "I": EDGES | WIDE_EDGES | WORD_EDGES,
    "Q": EDGES | WIDE_EDGES | LONG_EDGES,
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with StorageDaemon() as daemon:
        folder = tmp_path_factory.mktemp("faults")
        # The path of the data file is in the image. Its length must not be a multiple of 8, or the
        # header extension that holds the path would have no padding to be taken for more of it.
        padding = "p" if len(os.fsencode(folder / "p" / "data-file" / "data")) % 8 else "pp"
        (folder / padding).mkdir()
        yield Lab(folder / padding, daemon)


def judge(lab: Lab, base: str, changes: Mapping[str, Change]) -> Finding:
    owners = [int(field[5]) for field in changes if field.startswith(("entry", "table"))]
    data = lab.image(base).patched(changes)
    return lab.judge(base, data, owners[0] if owners else None)


_NAME = "only what it is called is in doubt: the bits are those of its table"

DIFFERENCES: dict[str, tuple[Disagreement, str]] = {
    "plain: entry1.name_size 0": (Disagreement.VALID, _NAME),
    "plain: entry1.name_size 8-more": (Disagreement.VALID, _NAME),
    "plain: entry1.name_size double": (Disagreement.VALID, _NAME),
    "plain: entry2.name_size 0": (Disagreement.VALID, _NAME),
}
"""The faults about which this library is to disagree with QEMU, in what, and why."""


@pytest.mark.parametrize(
    ("base", "field", "edge"),
    [
        (name, field, edge)
        for name, base in BASES.items()
        for field, (_, width) in base.fields.items()
        for edge in EDGES_BY_WIDTH[width]
    ],
)
def test_edges(lab: Lab, base: str, field: str, edge: str) -> None:
    finding = judge(lab, base, {field: EDGES_BY_WIDTH[FIELDS[field][1]][edge]})
    expected, _ = DIFFERENCES.get(f"{base}: {field} {edge}", (Disagreement.NONE, ""))
    assert finding.kind == expected, finding


IN_USE, AUTO = 1, 2


def flip(bit: int) -> Change:
    return lambda old: old ^ 1 << bit


COMBINATIONS: dict[str, tuple[str, dict[str, Change]]] = {
    "backing name too long": (
        "plain",
        {"header.backing_file_offset": 600, "header.backing_file_size": 1024},
    ),
    "zstd without its bit": ("zstd", {"header.incompatible_features": 0}),
    "zlib with the zstd bit": ("zstd", {"header.compression_type": 0}),
    "raw data file without data file": ("data-file", {"header.incompatible_features": 0}),
    "cluster of 512 bytes": ("plain", {"header.cluster_bits": 9}),
    "empty name": (
        "plain",
        {
            "entry2.name_size": 0,
            "entry2.name": bytes(5),
            "extension.bitmap_directory_size": lambda old: old - 8,
        },
    ),
    "duplicate name": ("plain", {"entry2.name": b"daily"}),
    "duplicate name of one in use": ("plain", {"entry2.name": b"crash"}),
    "name with a NUL byte": ("plain", {"entry1.name": b"da\0ly"}),
    "duplicate name up to a NUL byte": (
        "plain",
        {"entry1.name": b"da\0ly", "entry2.name": b"da\0xx"},
    ),
    "name not UTF-8": ("plain", {"entry1.name": b"d\xffil\xfe"}),
    "in use, wrong table size": (
        "plain",
        {"entry1.flags": AUTO | IN_USE, "entry1.bitmap_table_size": 2},
    ),
    "in use, no table": ("plain", {"entry1.flags": AUTO | IN_USE, "entry1.bitmap_table_size": 0}),
    "in use, broken table": ("plain", {"entry2.flags": IN_USE, "table2.0": 3}),
    "extra data that is compatible": (
        "plain",
        {"entry1.flags": AUTO | 4, "entry1.name_size": 0, "entry1.extra_data_size": 5},
    ),
    "one bitmap less": (
        "plain",
        {"extension.nb_bitmaps": 2, "extension.bitmap_directory_size": lambda old: old - 32},
    ),
    "a zero entry more": (
        "plain",
        {"extension.nb_bitmaps": 4, "extension.bitmap_directory_size": lambda old: old + 24},
    ),
    "zeros for an entry": ("plain", {"extension.bitmap_directory_size": lambda old: old + 24}),
    "zeros for entries": ("plain", {"extension.bitmap_directory_size": lambda old: old + 96}),
    "directory of the largest size": (
        "plain",
        {"extension.bitmap_directory_size": 1024 * 65535},
    ),
    "directory too large": ("plain", {"extension.bitmap_directory_size": 1024 * 65535 + 1}),
    "stale, all else broken": (
        "plain",
        {
            "header.autoclear_features": 0,
            "extension.nb_bitmaps": 0,
            "extension.reserved": 1,
            "extension.bitmap_directory_offset": 1,
        },
    ),
    "stale, of another length": (
        "plain",
        {"header.autoclear_features": 0, "extension.length": 16},
    ),
    "all ones": ("plain", {f"table2.{index}": 1 for index in range(4)}),
    **{
        f"granularity {bits}": ("plain", {"entry1.granularity_bits": bits})
        for bits in (8, 9, 15, 17, 31, 32, 63, 64)
    },
    **{f"refcount order {n}": ("plain", {"header.refcount_order": n}) for n in (3, 6, 7)},
    **{
        f"header length {n}": ("plain", {"header.header_length": n})
        for n in (96, 103, 104, 105, 107, 112, 144, 4089, 4095, 4096, 4097)
    },
    **{
        f"{kind} feature {bit}": (
            "plain",
            {f"header.{kind}_features": flip(bit)},
        )
        for kind in ("incompatible", "compatible", "autoclear")
        for bit in range(64)
    },
    **{f"table entry bit {bit}": ("plain", {"table2.3": flip(bit)}) for bit in range(64)},
}


@pytest.mark.parametrize("name", COMBINATIONS)
def test_combinations(lab: Lab, name: str) -> None:
    finding = judge(lab, *COMBINATIONS[name])
    assert finding == AGREED, finding


def mutants(lab: Lab, count: int) -> Iterator[tuple[int, Finding]]:
    image = lab.image("plain")
    places = image.metadata()
    for seed in range(count):
        random = Random(seed)
        data = bytearray(image.data)
        for _ in range(random.choice((1, 1, 2, 4))):
            place = random.choice(places)
            values = (0, 1, 0xFF, random.randrange(256), data[place] ^ 1 << random.randrange(8))
            data[place] = random.choice(values)
        yield seed, lab.judge("plain", bytes(data))


@pytest.mark.parametrize("count", [200, pytest.param(1500, marks=pytest.mark.deep)])
def test_mutants(lab: Lab, count: int) -> None:
    """Both must refuse the same images; if there are several faults, QEMU may name any of them."""
    agreed = {Disagreement.NONE, Disagreement.REASON}
    found = [(seed, finding) for seed, finding in mutants(lab, count) if finding.kind not in agreed]
    assert not found, found
