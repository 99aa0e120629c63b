"""The structures that the header leads to; a bitmap that lies in one of them is broken."""

from __future__ import annotations

import struct

import pytest
from support.problem_images import snapshot_table
from support.spec_image import (
    BEHIND,
    CLUSTER,
    DAILY,
    PAST_EOF,
    TABLES,
    Patch,
    crypto,
    image,
    in_entry,
    in_header,
    in_table,
    patched,
)

import qcow2bm
from qcow2bm.clusters.file import ClusterFile
from qcow2bm.clusters.layout import Part, fixed_parts
from qcow2bm.clusters.problems import header_problems
from qcow2bm.storage.memory import MemoryStorage

DATA = BEHIND + 4 * CLUSTER
ROOM: Patch = (DATA, bytes(CLUSTER))
SECOND_BLOCK: list[Patch] = [(0x208, struct.pack(">Q", DATA)), ROOM]
SNAPSHOTS = [*snapshot_table(16, 0), ROOM]
LUKS: list[Patch] = [*in_header(crypt_method=2), crypto(DATA), ROOM]


def parts(*patches: Patch) -> list[Part]:
    file = ClusterFile(MemoryStorage(patched(image(), *patches)), force_share=False)
    return list(fixed_parts(file, header_problems(file)))


PLAIN = [
    Part("header", 0, 512),
    Part("L1 table", 0x600, 1280),
    Part("refcount table", 0x200, 512),
    Part("refcount blocks", 0x400, 512),
]


def test_the_structures_of_every_image() -> None:
    assert parts() == PLAIN


def test_the_structures_that_only_some_images_have() -> None:
    assert parts(*SECOND_BLOCK) == [*PLAIN, Part("refcount blocks", DATA, 512)]
    assert parts(*SNAPSHOTS) == [*PLAIN, Part("snapshot table", BEHIND, 56 + 40)]
    assert parts(*LUKS) == [*PLAIN, Part("encryption header", DATA, CLUSTER)]


NONSENSE: dict[str, list[Patch]] = {
    "refcount block unaligned": [(0x208, struct.pack(">Q", TABLES[DAILY] + 8))],
    "refcount block past the end": [(0x208, struct.pack(">Q", PAST_EOF))],
    "snapshots unaligned": in_header(nb_snapshots=1, snapshots_offset=TABLES[DAILY] + 8),
    "snapshots nowhere": in_header(nb_snapshots=1),
    "no snapshots": in_header(snapshots_offset=TABLES[DAILY]),
    "encryption header of no length": [*in_header(crypt_method=2), crypto(TABLES[DAILY], 8)],
    "encryption header unaligned": [*in_header(crypt_method=2), crypto(TABLES[DAILY] + 8)],
    "encryption header without encryption": [crypto(TABLES[DAILY])],
}


@pytest.mark.parametrize("case", NONSENSE)
def test_a_structure_with_a_wrong_offset_is_left_out(case: str) -> None:
    found = [part for part in parts(*NONSENSE[case]) if part.length]
    assert found == PLAIN


WRONG_SIZE: dict[str, list[Patch]] = {
    "too many snapshots": in_header(nb_snapshots=65537, snapshots_offset=TABLES[DAILY]),
    "snapshots past the end": in_header(nb_snapshots=100, snapshots_offset=TABLES[DAILY]),
    "snapshot with names that leave the file": [
        *in_header(nb_snapshots=2, snapshots_offset=TABLES[DAILY]),
        (TABLES[DAILY] + 12, b"\xff" * 4),  # their lengths, behind the table's only entry
    ],
}


@pytest.mark.parametrize("case", WRONG_SIZE)
def test_a_structure_with_a_wrong_size_is_its_first_cluster(case: str) -> None:
    found = [part for part in parts(*WRONG_SIZE[case]) if part.length]
    assert found == [*PLAIN, Part("snapshot table", TABLES[DAILY], CLUSTER)]


TAKEN: dict[str, tuple[list[Patch], int, str]] = {
    "header": ([], 0, "header"),
    "first refcount block": ([], 0x400, "refcount blocks"),
    "second refcount block": (SECOND_BLOCK, DATA, "refcount blocks"),
    "snapshot table": (SNAPSHOTS, BEHIND, "snapshot table"),
    "encryption header": (LUKS, DATA, "encryption header"),
}


@pytest.mark.spec("TAB-2")
@pytest.mark.parametrize("case", [case for case in TAKEN if TAKEN[case][1]])
def test_bitmap_data_in_another_structure_break_the_bitmap(case: str) -> None:
    patches, offset, name = TAKEN[case]
    with qcow2bm.open(patched(image(), *patches, in_table(DAILY, offset))) as opened:
        statuses = [bitmap.status for bitmap in opened.bitmaps.values()]
        assert statuses == ["broken", "valid", "inconsistent"]
        (found,) = opened.bitmaps["daily"].problems
        assert found.id == "bitmap-data.overlap"
        assert found.message.endswith(f"is also used by the {name}")


@pytest.mark.spec("TAB-2")
@pytest.mark.parametrize("case", [case for case in TAKEN if TAKEN[case][1]])
def test_a_bitmap_table_in_another_structure_breaks_the_bitmap(case: str) -> None:
    patches, offset, name = TAKEN[case]
    with qcow2bm.open(
        patched(image(), *patches, *in_entry(DAILY, bitmap_table_offset=offset))
    ) as opened:
        assert opened.bitmaps["daily"].status == "broken"
        assert opened.bitmaps["weekly"].status == "valid"
        found = [p.message for p in opened.problems if p.id == "bitmap-table.overlap"]
        assert len(found) == 1
        assert found[0].endswith(f"is also used by the {name}")


@pytest.mark.spec("TAB-2")
@pytest.mark.parametrize("case", NONSENSE)
def test_a_header_field_without_sense_breaks_no_bitmap(case: str) -> None:
    with qcow2bm.open(patched(image(), *NONSENSE[case])) as opened:
        statuses = [bitmap.status for bitmap in opened.bitmaps.values()]
        assert statuses == ["valid", "valid", "inconsistent"]
