"""The structures that the header leads to; a bitmap that lies in one of them is broken."""

from __future__ import annotations

import struct

import pytest
from support.images import build_image
from support.layouts import append
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
from qcow2bm.clusters.layout import Part, Snapshot, fixed_parts, read_snapshots
from qcow2bm.clusters.problems import header_problems
from qcow2bm.errors import FormatError, LimitError
from qcow2bm.format import snapshots
from qcow2bm.format.snapshots import SnapshotHeader, build_snapshot_table
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


def with_snapshots(*snapshots: SnapshotHeader, whole: bool = True) -> ClusterFile:
    """An image with these snapshots, whose table is the last structure of the file."""
    data = build_image().data
    table = build_snapshot_table(snapshots)
    offset = append(data, table)
    struct.pack_into(">IQ", data, 60, len(snapshots), offset)
    if not whole:
        del data[offset + len(table) :]
    return ClusterFile(MemoryStorage(data), force_share=False)


PLAIN_SNAPSHOT = SnapshotHeader(0x600, 4, 1_600_000_000, 5, 7, 9, b"", b"1", b"n\xff", bytes(5))
STATE, SIZE, ICOUNT = (number.to_bytes(8, "big") for number in (1 << 40, 1 << 20, 11))


@pytest.mark.parametrize(
    ("extra", "state", "size", "icount"),
    [
        (b"", 9, None, None),
        (STATE, 1 << 40, None, None),
        (STATE + SIZE, 1 << 40, 1 << 20, None),
        (STATE + SIZE + ICOUNT, 1 << 40, 1 << 20, 11),
        (STATE + SIZE + b"\xff" * 8, 1 << 40, 1 << 20, None),
    ],
)
def test_a_snapshot_has_what_its_entry_and_its_extra_data_say(
    extra: bytes, state: int, size: int | None, icount: int | None
) -> None:
    file = with_snapshots(PLAIN_SNAPSHOT, PLAIN_SNAPSHOT._replace(extra_data=extra, id_str=b"2"))
    first, second = read_snapshots(file)
    place = file.header.snapshots_offset
    assert first == Snapshot(
        *(place, 48, "1", "n\udcff", 0x600, 4, 1_600_000_000, 5, 7, 9, None, None)
    )
    assert second == first._replace(
        offset=place + 48,
        size=48 + len(extra),
        id="2",
        vm_state_size=state,
        disk_size=size,
        icount=icount,
    )


def test_a_file_may_end_before_the_padding_of_the_last_entry() -> None:
    file = with_snapshots(PLAIN_SNAPSHOT, whole=False)
    place = file.header.snapshots_offset
    data = file.read(0, file.file_size)
    for length, is_whole in ((48, True), (43, True), (42, False), (8, False), (0, False)):
        cut = ClusterFile(MemoryStorage(data[: place + length]), force_share=False)
        if is_whole:
            assert read_snapshots(cut) == read_snapshots(file)
        else:
            with pytest.raises(FormatError):
                read_snapshots(cut)


def test_a_snapshot_table_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    file = with_snapshots(PLAIN_SNAPSHOT, PLAIN_SNAPSHOT)
    monkeypatch.setattr(snapshots, "MAX_TABLE_SIZE", 95)
    with pytest.raises(LimitError, match="size of the snapshot table is 96"):
        read_snapshots(file)


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
