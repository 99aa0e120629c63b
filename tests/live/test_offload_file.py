"""Offload files: what was appended is read again, and a damaged file is never taken for whole."""

from __future__ import annotations

from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qcow2bm
from qcow2bm.format import offload_file as schema
from qcow2bm.format.offload_file import OffloadPlan, PlannedBitmap, PlannedNode
from qcow2bm.live.offload_file import OffloadFile
from qcow2bm.migration.sidecar import SavedBitmap

MiB = 1 << 20
PLAN = OffloadPlan(
    4 * MiB,
    (
        PlannedNode(
            UUID(int=1),
            "disk",
            64 * MiB,
            (PlannedBitmap("daily", 65536, True), PlannedBitmap("größe", 512, False)),
            512,
        ),
        PlannedNode(UUID(int=2), "data", MiB, (PlannedBitmap("daily", 65536, True),)),
    ),
)


def saved(number: int, octet: int = 0x5A) -> SavedBitmap:
    node, planned = PLAN.bitmaps[number]
    length = -(-node.disk_size // planned.granularity // 8)
    return SavedBitmap(*planned, node.disk_size, bytes([octet]) * length)


def copies(path: Path) -> dict[int, bytes]:
    """The bits of each bitmap that a file has."""
    file = OffloadFile.read(str(path))
    assert file.plan == PLAN
    return {
        number: bytes(file.read_copy(number, PLAN.bitmaps[number][0].disk_size).octets)
        for number in range(len(PLAN.bitmaps))
        if file.has_copy(number)
    }


@pytest.mark.spec("LIVE-13")
def test_what_is_appended_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "file"
    file = OffloadFile.create(str(path), PLAN)
    assert copies(path) == {}
    for number in (1, 0, 2):
        file.append_copy(number, saved(number, number))
    assert copies(path) == {number: saved(number, number).octets for number in range(3)}
    again = OffloadFile.read(str(path))
    again.append_copy(0, saved(0, 9))  # the last one counts
    assert copies(path)[0] == saved(0, 9).octets
    assert not again.is_restored
    for number in (1, 0):
        again.append_restored(number)
        assert OffloadFile.read(str(path)).was_restored(number)
    assert OffloadFile.read(str(path)).is_restored


@pytest.mark.spec("LIVE-20")
def test_former_tails_and_recorders_are_read_again(tmp_path: Path) -> None:
    path = str(tmp_path / "file")
    file = OffloadFile.create(path, PLAN)
    former = []
    for octet in (1, 2, 4):
        tail = file.tail(1)
        former.append(SavedBitmap(tail.name, tail.granularity, True, MiB, bytes([octet & 1])))
        file.append_rolled(1, former[-1])
    assert not file.has_collected(0)
    recorder = SavedBitmap(file.tail(0).recorder_name, 512, True, 64 * MiB, bytes(1 << 14))
    file.append_collected(0, recorder)
    again = OffloadFile.read(path)
    assert (again.tail(0).number, again.tail(1).number) == (0, 3)
    assert again.read_former_tails(0, 64 * MiB) is None
    together = again.read_former_tails(1, MiB)
    assert together
    assert (*together[:4], bytes(together.octets)) == (*former[0][:4], b"\1")
    assert again.read_collected(0, 64 * MiB).sha256() == recorder.sha256()


@pytest.mark.spec("LIVE-19")
def test_what_was_collected_counts_for_the_migration_that_was_recorded_last(
    tmp_path: Path,
) -> None:
    path = str(tmp_path / "file")
    file = OffloadFile.create(path, PLAN)
    name = file.tail(0).recorder_name
    first, second = (
        SavedBitmap(name, 512, True, 64 * MiB, bytes([octet]) + bytes((1 << 14) - 1))
        for octet in (1, 2)
    )
    assert file.arrival_name(0) == ""
    file.append_collected(0, first)
    file.append_recorded(0, b"12345678")
    again = OffloadFile.read(path)
    assert not again.has_collected(0)
    assert again.arrival_name(0).endswith("-3132333435363738")
    for one in (second, first):  # the recorder of one may have travelled from the other
        again.append_collected(0, one)
        assert OffloadFile.read(path).read_collected(0, 64 * MiB).octets[0] & 2
    assert OffloadFile.read(path).read_collected(0, 64 * MiB).octets[0] == 3
    assert not again.has_collected(1)


def test_a_token_of_another_length_is_refused(tmp_path: Path) -> None:
    file = OffloadFile.create(str(tmp_path / "file"), PLAN)
    file.append_recorded(0, b"1234567")
    with pytest.raises(qcow2bm.FormatError, match="has 7 bytes, must have 8"):
        file.arrival_name(0)


@pytest.mark.spec("LIVE-20")
def test_a_tail_that_is_not_the_one_that_was_to_follow_is_refused(tmp_path: Path) -> None:
    file = OffloadFile.create(str(tmp_path / "file"), PLAN)
    tail = file.tail(0).next
    file.append_rolled(0, SavedBitmap(tail.name, tail.granularity, True, 64 * MiB, bytes(2)))
    with pytest.raises(qcow2bm.FormatError, match="that was planned"):
        OffloadFile.read(str(tmp_path / "file")).read_former_tails(0, 64 * MiB)


def test_a_file_that_exists_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"something")
    with pytest.raises(qcow2bm.StorageError, match="exists already"):
        OffloadFile.create(str(path), PLAN)
    assert path.read_bytes() == b"something"


@pytest.mark.spec("LIVE-13")
def test_a_record_that_is_cut_off_counts_as_missing_and_is_written_over(tmp_path: Path) -> None:
    path = tmp_path / "file"
    file = OffloadFile.create(str(path), PLAN)
    file.append_copy(0, saved(0))
    whole = path.read_bytes()
    file.append_copy(1, saved(1))
    longer = path.read_bytes()
    for length in range(len(whole), len(longer)):
        for rest in (b"", bytes(len(longer) - length)):  # a file system may leave zeros
            path.write_bytes(longer[:length] + rest)
            found = OffloadFile.read(str(path))
            assert found.has_copy(0)
            assert not found.has_copy(1)
    found.append_copy(1, saved(1))
    assert path.read_bytes() == longer


@pytest.mark.spec("LIVE-13")
def test_damage_anywhere_is_found(tmp_path: Path) -> None:
    """Whatever byte is wrong: the file is refused, or the last record counts as missing."""
    path = tmp_path / "file"
    file = OffloadFile.create(str(path), PLAN)
    file.append_copy(0, saved(0))
    kept = len(path.read_bytes())
    file.append_copy(1, saved(1))
    data = path.read_bytes()
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x41]) + data[place + 1 :])
        try:
            found = copies(path)
        except (qcow2bm.FormatError, qcow2bm.UnsupportedError):
            continue
        assert found == {0: saved(0).octets}, place
        assert place >= kept, place


@given(data=st.binary(max_size=300), place=st.integers(0, 120))
@settings(max_examples=300, deadline=None)
def test_hostile_bytes(tmp_path_factory: pytest.TempPathFactory, data: bytes, place: int) -> None:
    path = tmp_path_factory.mktemp("hostile") / "file"
    OffloadFile.create(str(path), PLAN)
    whole = path.read_bytes()
    for content in (data, whole[:place] + data, schema.build_head() + data):
        path.write_bytes(content)
        try:
            OffloadFile.read(str(path))
        except (qcow2bm.FormatError, qcow2bm.UnsupportedError):
            continue
        assert content.startswith(whole)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (saved(0)._replace(name="other"), 'is not that of the bitmap "daily" that was planned'),
        (saved(0)._replace(enabled=False), 'is not that of the bitmap "daily" that was planned'),
        (saved(2), 'is not that of the bitmap "daily" that was planned'),
    ],
)
def test_a_copy_of_another_bitmap_is_refused(
    tmp_path: Path, changed: SavedBitmap, message: str
) -> None:
    file = OffloadFile.create(str(tmp_path / "file"), PLAN)
    file.append_copy(0, changed)
    with pytest.raises(qcow2bm.FormatError, match=message):
        OffloadFile.read(str(tmp_path / "file")).read_copy(0, 64 * MiB)


names = st.text(min_size=1, max_size=20)
bitmaps = st.builds(
    PlannedBitmap, names, st.integers(9, 31).map(lambda bits: 1 << bits), st.booleans()
)
nodes = st.builds(
    PlannedNode,
    st.uuids(),
    names,
    st.integers(1, 1 << 50).map(lambda sectors: 512 * sectors),
    st.lists(bitmaps, max_size=5).map(tuple),
    st.just(0) | st.integers(9, 31).map(lambda bits: 1 << bits),
)
plans = st.builds(
    OffloadPlan, st.integers(9, 27).map(lambda bits: 1 << bits), st.lists(nodes).map(tuple)
)


@given(plan=plans)
def test_a_plan_is_parsed_as_it_was_built(plan: OffloadPlan) -> None:
    assert schema.parse_plan(schema.build_plan(plan), 0) == plan


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({0: 8}, "plan: tail_bits at 0x0 is 8, must be 9 to 31"),
        ({4: 200}, "plan"),
        ({28: 1}, "node 0 of the plan: disk_size"),
    ],
)
def test_a_plan_that_breaks_a_rule_is_refused(changes: dict[int, int], message: str) -> None:
    data = bytearray(schema.build_plan(PLAN))
    for place, octet in changes.items():
        data[place] = octet
    with pytest.raises(qcow2bm.FormatError, match=message):
        schema.parse_plan(bytes(data), 0)
