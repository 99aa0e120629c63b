"""What an edit says for which there is no room."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import pytest
from support.device import Device
from support.images import Stored, build_image
from support.layouts import append, filled, set_refcount

import qcow2bm
from qcow2bm import Edit
from qcow2bm.clusters import allocator
from qcow2bm.storage.interface import read_bytes
from qcow2bm.storage.memory import MemoryStorage

if TYPE_CHECKING:
    from typing_extensions import Buffer

CLUSTER = 512
COVERED = 8 * CLUSTER << 16  # bytes of the disk, by a cluster of bits
SMALL, LARGE = ("small", 2 * CLUSTER), ("large", 3 * CLUSTER)


class FullDisk(MemoryStorage):
    """A file on a file system that is full."""

    def write(self, offset: int, parts: Sequence[Buffer]) -> None:
        raise qcow2bm.StorageError(self.name, offset, 0, "full", errno.ENOSPC, "writing")


def image() -> bytearray:
    """Two bitmaps, of one and of two clusters of data; no cluster is free."""
    return build_image(
        Stored(b"small", [b"\x01", 0, 0, 0]), Stored(b"large", [b"\x01", b"\x02", 0, 0]),
        size=4 * COVERED,
    ).data  # fmt: skip


def add_dirty(edit: Edit) -> None:
    """Needs four clusters of data, one of a table, and one of a directory."""
    edit.add("new", 65536)
    edit.set_many("new", [(number * COVERED, 512) for number in range(4)])


def refusal(
    storage: MemoryStorage, change: Callable[[Edit], None] = add_dirty
) -> qcow2bm.NoRoomError:
    """What an edit is refused with, for which nothing is written."""
    before = read_bytes(storage, 0, storage.size())
    with (
        qcow2bm.open(storage, "r+") as opened,
        pytest.raises(qcow2bm.NoRoomError) as raised,
        opened.edit() as edit,
    ):
        change(edit)
    assert read_bytes(storage, 0, storage.size()) == before
    return raised.value


@pytest.mark.spec("EDIT-22")
@pytest.mark.parametrize("spare", [1, 2, 5])
def test_a_refusal_says_how_much_is_missing_and_what_gives_it_back(spare: int) -> None:
    data = image()
    end = len(data) + spare * CLUSTER
    error = refusal(Device(data, spare))
    assert (error.needed, error.missing) == (6 * CLUSTER, (6 - spare) * CLUSTER)
    assert (error.limit, error.errno, error.is_full) == (end, errno.ENOSPC, True)
    assert (error.bitmaps, error.hint) == ((LARGE, SMALL), "remove-bitmap")
    assert 'free: "large" 1.5 KiB, "small" 1 KiB; make room with Edit.remove' in str(error)


@pytest.mark.spec("EDIT-22")
def test_what_the_refusal_names_is_enough_if_it_says_so() -> None:
    storage = Device(image(), 1)
    error = refusal(storage)
    assert sum(size for _, size in error.bitmaps) == error.missing
    with qcow2bm.open(storage, "r+") as opened:
        for name, size in error.bitmaps:
            before = opened.file_space().free
            with opened.edit() as edit:
                edit.remove(name)
            assert size > 0
            assert before is not None
        with opened.edit() as edit:
            add_dirty(edit)
        assert list(opened.bitmaps) == ["new"]


@pytest.mark.spec("EDIT-22")
def test_bitmaps_that_the_edit_changes_or_reads_are_not_named() -> None:
    def change(edit: Edit) -> None:
        edit.remove("small")
        edit.copy("large", "copy")

    error = refusal(Device(image(), 1), change)
    assert (error.needed, error.missing) == (4 * CLUSTER, 3 * CLUSTER)
    assert (error.bitmaps, error.hint) == ((), None)


@pytest.mark.spec("EDIT-22")
def test_where_no_directory_fits_only_all_bitmaps_can_be_removed() -> None:
    storage = Device(image(), 0)
    error = refusal(storage)
    assert (error.missing, error.bitmaps, error.hint) == (6 * CLUSTER, (), "remove-all")
    assert refusal(storage, lambda edit: edit.remove("small")).hint == "remove-all"
    with qcow2bm.open(storage, "r+") as opened, opened.edit() as edit:
        edit.remove_all()


@pytest.mark.spec("EDIT-22")
def test_an_image_without_bitmaps_has_nothing_to_give_back() -> None:
    data = build_image(size=4 * COVERED).data
    error = refusal(Device(data, 1))
    assert (error.bitmaps, error.hint) == ((), None)


@pytest.mark.spec("EDIT-22")
@pytest.mark.parametrize("free", [0, 1])
def test_a_refcount_table_of_the_largest_size_is_no_other_case(
    free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = bytearray(filled(9, 3, 6, 64))
    for cluster in range(free):
        set_refcount(data, len(data) // CLUSTER - 8 - cluster, 0)
    monkeypatch.setattr(allocator, "MAX_REFCOUNT_TABLE_BYTES", CLUSTER)
    with (
        qcow2bm.open(data, "r+") as opened,
        pytest.raises(qcow2bm.LimitError) as raised,
        opened.edit() as edit,
    ):
        edit.add("new")
    error = raised.value
    assert (error.value, error.limit) == (65, 64)
    # A table and a directory of one cluster each; a new refcount block cannot be made.
    assert error.missing is not None
    assert error.missing // CLUSTER >= 2 - free
    names = [name for name, _ in error.bitmaps]
    assert (names != [], error.hint) == ((free > 0), "remove-bitmap" if free else "remove-all")


def test_another_limit_has_nothing_to_do_with_room() -> None:
    data = build_image(size=1 << 42, cluster_bits=16).data
    with qcow2bm.open(data, "r+") as opened, opened.edit() as edit:
        with pytest.raises(qcow2bm.LimitError) as raised:
            edit.add("fine", 512)
        assert (raised.value.missing, raised.value.bitmaps) == (None, ())


@pytest.mark.spec("EDIT-23")
@pytest.mark.parametrize("free", [0, 1, 2])
def test_a_full_file_system_is_told_with_what_the_file_would_have_grown(free: int) -> None:
    data = image()
    for _ in range(free):
        append(data, b"free", 0)
    append(data, b"in use, behind what is free")
    end = len(data)
    with (
        qcow2bm.open(FullDisk(data), "r+") as opened,
        pytest.raises(qcow2bm.CommitError) as raised,
        opened.edit() as edit,
    ):
        edit.set("small", 0, 1 << 20)
    error = raised.value
    assert (error.outcome, error.growth) == ("old", (3 - free) * CLUSTER)
    assert len(data) == end
    named = ((LARGE,), "remove-bitmap") if free else ((), "remove-all")
    assert (error.bitmaps, error.hint) == named
    size = ("1.5 KiB", "1 KiB", "512 bytes")[free]
    assert f"all bitmaps are as before; the file would have grown by {size}" in str(error)


@pytest.mark.spec("EDIT-23")
def test_where_free_clusters_are_left_to_qemu_no_bitmap_is_named() -> None:
    data = build_image(Stored(b"small"), Stored(b"large"), size=5 << 30).data
    append(data, b"free", 0)
    append(data, b"in use, behind what is free")
    with (
        qcow2bm.open(FullDisk(data), "r+") as opened,
        pytest.raises(qcow2bm.CommitError) as raised,
        opened.edit() as edit,
    ):
        edit.set("small", 0, 1 << 20)
    assert raised.value.growth
    assert (raised.value.bitmaps, raised.value.hint) == ((), None)


def test_a_write_that_fails_for_another_reason_says_nothing_of_room() -> None:
    class Broken(MemoryStorage):
        def write(self, offset: int, parts: Sequence[Buffer]) -> None:
            raise qcow2bm.StorageError(self.name, offset, 0, "broken", errno.EIO, "writing")

    with (
        qcow2bm.open(Broken(image()), "r+") as opened,
        pytest.raises(qcow2bm.CommitError) as raised,
        opened.edit() as edit,
    ):
        edit.set("small", 0, 1 << 20)
    assert (raised.value.growth, raised.value.bitmaps, raised.value.hint) == (None, (), None)
