from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.hostile_bytes import U32, U64, hostile, padding

from qcow2bm.errors import FormatError
from qcow2bm.format.snapshots import (
    HEAD_LENGTH,
    SnapshotHeader,
    SnapshotMeasure,
    build_snapshot_table,
    measure_entry,
    parse_snapshot_table,
)

SAMPLE = bytes.fromhex(
    "0000000000070000 00000002 0001 0004"
    "5f5e1000 00000001 0000000000000002 00000003 00000010"
    "0000000000000004 0000000000100000"
    "31"
    "62617365"
    "a1a2a3"
)


@st.composite
def snapshots(draw: st.DrawFn) -> SnapshotHeader:
    extra, id_str, name = (draw(st.binary(max_size=20)) for _ in range(3))
    return SnapshotHeader(
        l1_table_offset=draw(U64),
        l1_size=draw(U32),
        date_sec=draw(U32),
        date_nsec=draw(U32),
        vm_clock_nsec=draw(U64),
        vm_state_size=draw(U32),
        extra_data=extra,
        id_str=id_str,
        name=name,
        padding=draw(padding(len(extra + id_str + name))),
    )


tables = st.lists(snapshots(), max_size=4).map(tuple)


@given(tables, st.binary(max_size=50))
def test_a_table_survives_being_built_and_parsed(
    table: tuple[SnapshotHeader, ...], following: bytes
) -> None:
    built = build_snapshot_table(table)
    assert len(built) == sum(snapshot.size for snapshot in table)
    assert parse_snapshot_table(built + following, len(table), 0) == table


@given(snapshots())
def test_an_entry_is_measured_by_its_head(snapshot: SnapshotHeader) -> None:
    head = build_snapshot_table((snapshot,))[:HEAD_LENGTH]
    assert measure_entry(head) == SnapshotMeasure(
        snapshot.size,
        len(snapshot.padding),
        len(snapshot.extra_data),
        snapshot.l1_table_offset,
        snapshot.l1_size,
    )


@given(hostile(tables.map(build_snapshot_table)), st.integers(0, 5))
def test_what_is_parsed_is_built_again_byte_for_byte(data: bytes, nb_snapshots: int) -> None:
    try:
        table = parse_snapshot_table(data, nb_snapshots, 0)
    except FormatError:
        return
    assert len(table) == nb_snapshots
    assert data.startswith(build_snapshot_table(table))


def test_a_sample_entry_means_what_it_says() -> None:
    (snapshot,) = parse_snapshot_table(SAMPLE, 1, 0)
    assert (snapshot.l1_table_offset, snapshot.l1_size) == (0x70000, 2)
    assert (snapshot.date_sec, snapshot.date_nsec) == (1_600_000_000, 1)
    assert (snapshot.vm_clock_nsec, snapshot.vm_state_size) == (2, 3)
    assert (snapshot.id_str, snapshot.name) == (b"1", b"base")
    assert snapshot.extra_data == bytes.fromhex("0000000000000004 0000000000100000")
    assert (snapshot.padding, snapshot.size) == (b"\xa1\xa2\xa3", 64)


@pytest.mark.parametrize("length", range(33))
def test_extra_data_have_as_many_fields_as_fit(length: int) -> None:
    (snapshot,) = parse_snapshot_table(SAMPLE, 1, 0)
    words = b"".join(number.to_bytes(8, "big") for number in (1, 2, 3, 4))
    names = ("vm_state_size", "disk_size", "icount")[: length // 8]
    fields = snapshot._replace(extra_data=words[:length]).extra_fields
    assert fields == {name: number for number, name in enumerate(names, 1)}


@pytest.mark.parametrize("end", range(64))
def test_a_table_cut_off_names_the_entry(end: int) -> None:
    with pytest.raises(FormatError, match=r"is cut off$") as caught:
        parse_snapshot_table(SAMPLE + SAMPLE[:end], 2, 0x30000)
    assert caught.value.structure == "snapshot table entry 1"
    assert 0x30040 <= caught.value.offset <= 0x30040 + end


def test_too_much_extra_data_is_refused() -> None:
    (snapshot,) = parse_snapshot_table(SAMPLE, 1, 0)
    allowed = snapshot._replace(extra_data=bytes(1024))
    assert parse_snapshot_table(build_snapshot_table((allowed,)), 1, 0) == (allowed,)
    table = build_snapshot_table((snapshot, snapshot._replace(extra_data=bytes(1032))))
    with pytest.raises(FormatError, match=r"entry 1: extra_data_size at 0x30064 is more than 1024"):
        parse_snapshot_table(table, 2, 0x30000)


def test_the_longest_entry_is_read() -> None:
    (snapshot,) = parse_snapshot_table(SAMPLE, 1, 0)
    longest = snapshot._replace(
        extra_data=bytes(1024), id_str=b"i" * 65535, name=b"n" * 65535, padding=b"\1\2"
    )
    assert parse_snapshot_table(build_snapshot_table((longest,) * 2), 2, 0) == (longest,) * 2


def test_what_does_not_fit_its_field_is_named() -> None:
    (snapshot,) = parse_snapshot_table(SAMPLE, 1, 0)
    with pytest.raises(FormatError, match="l1_size"):
        build_snapshot_table((snapshot._replace(l1_size=1 << 32),))
    with pytest.raises(FormatError, match="name_size"):
        build_snapshot_table((snapshot._replace(name=bytes(1 << 16)),))
