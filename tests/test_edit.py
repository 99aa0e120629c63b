"""The front of editing: modes, blocks, dry runs, and what becomes of Image and Bitmap."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from support.audit import Audit
from support.images import ONES, ZEROES, Built, Stored, build_image
from support.plans import edit as commit
from support.scripted_storage import ScriptedStorage

import qcow2bm
from qcow2bm.clusters.plan import execute
from qcow2bm.format.directory import FLAG_AUTO, FLAG_IN_USE
from qcow2bm.storage.memory import MemoryStorage

if TYPE_CHECKING:
    from typing_extensions import Buffer

SIZE = 2 * 8 * 512 << 16
GRANULE = 1 << 16
DAILY = Stored(b"daily", [b"\x01", ONES])
WEEKLY = Stored(b"weekly", [ZEROES, b"\x02"])


def image_of(*bitmaps: Stored, **options: Any) -> Built:
    return build_image(*(bitmaps or (DAILY, WEEKLY)), size=SIZE, **options)


def image_for_all_uses() -> bytearray:
    return image_of(DAILY, WEEKLY, Stored(b"crashed", flags=FLAG_AUTO | FLAG_IN_USE)).data


class Problematic(MemoryStorage):
    """Fails at one of the writes and barriers, and counts the bytes that are written."""

    def __init__(self, data: bytearray, fails_at: int | None = None) -> None:
        super().__init__(data, "<problematic>")
        self.calls = self.written = 0
        self.fails_at = fails_at

    def _call(self) -> None:
        self.calls += 1
        if self.calls - 1 == self.fails_at:
            raise qcow2bm.StorageError(self.name, 0, 0, "Input/output error", action="writing")

    def write(self, offset: int, parts: Sequence[Buffer]) -> None:
        self._call()
        self.written += sum(memoryview(part).nbytes for part in parts)
        super().write(offset, parts)

    def barrier(self) -> None:
        self._call()
        super().barrier()


# --- which images can be edited ---------------------------------------------------------------


def test_a_path_a_bytearray_and_a_storage_are_edited_alike(image: Path) -> None:
    in_memory, behind = (bytearray(image.read_bytes()) for _ in range(2))
    for source in (str(image), in_memory, MemoryStorage(behind)):
        with qcow2bm.open(source, "r+") as opened, opened.edit() as edit:
            edit.invert("daily")
    assert image.read_bytes() == bytes(in_memory) == bytes(behind)
    audit = Audit(in_memory)
    audit.check()
    assert audit.dirty(audit.bitmaps[0]) == set(range(1, 4096))


@pytest.mark.parametrize(
    "source",
    [b"", io.BytesIO(), ScriptedStorage(b""), memoryview(b"")],
    ids=["bytes", "file", "storage", "view"],
)
def test_what_can_only_be_read_cannot_be_edited(source: Any) -> None:
    with pytest.raises(qcow2bm.UnsupportedError, match="editing"):
        qcow2bm.open(source, "r+")


def test_of_what_cannot_be_opened_at_all_it_is_said_so() -> None:
    nothing: Any = 7
    with pytest.raises(TypeError, match="cannot open int"):
        qcow2bm.open(nothing, "r+")


@pytest.mark.parametrize(
    "arguments",
    [
        {"mode": "r+", "force_share": True},
        {"mode": "r", "locking": False},
    ],
)
def test_arguments_for_the_other_mode_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"for reading|for mode 'r"):
        qcow2bm.open(image_of().data, **arguments)


def test_an_image_open_for_reading_is_not_edited() -> None:
    image = image_of()
    before = bytes(image.data)
    with qcow2bm.open(image.data) as opened:
        with pytest.raises(qcow2bm.ReadOnlyImageError, match=r'mode "r\+"'):
            opened.edit()
        assert opened.bitmaps["daily"].count() > 0
    assert image.data == before


def test_opening_for_editing_writes_nothing(image: Path) -> None:
    before = image.read_bytes()
    with qcow2bm.open(image, "r+") as opened:
        assert opened.bitmaps["daily"].count() > 0
        assert opened.problems == ()
    assert image.read_bytes() == before


def test_strict_refuses_what_is_broken_before_an_edit() -> None:
    image = image_of(Stored(b"daily", type=9))
    with pytest.raises(qcow2bm.FormatError):
        qcow2bm.open(image.data, "r+", strict=True)
    image.data.append(0)  # nothing holds on to it


# --- the block --------------------------------------------------------------------------------


@pytest.mark.spec("EDIT-1")
@pytest.mark.spec("EDIT-2")
@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt, qcow2bm.LimitError, ValueError])
def test_an_exception_in_the_block_leaves_everything_as_it_was(kind: type[BaseException]) -> None:
    image = image_of()
    storage = Problematic(image.data)
    before = bytes(image.data)
    error = kind("x", 2, 1) if kind is qcow2bm.LimitError else kind()
    with qcow2bm.open(storage, "r+") as opened:
        daily = opened.bitmaps["daily"]
        with pytest.raises(kind), opened.edit() as edit:  # noqa: PT012
            edit.invert("daily")
            edit.add("new")
            edit.remove("weekly")
            raise error
        assert image.data == before
        assert storage.calls == 0
        assert list(opened.bitmaps) == ["daily", "weekly"]
        assert daily.count() > 0  # nothing was committed, so it is not outdated
        with opened.edit() as edit:
            edit.clear("daily")
        assert opened.bitmaps["daily"].count() == 0


@pytest.mark.spec("EDIT-2")
def test_an_operation_that_fails_and_is_caught_does_not_spoil_the_others() -> None:
    image = image_of()
    with qcow2bm.open(image.data, "r+") as opened, opened.edit() as edit:
        edit.clear("daily")
        with pytest.raises(qcow2bm.BitmapNotFoundError):
            edit.clear("nobody")
        with pytest.raises(ValueError, match="does not lie on the disk"):
            edit.set_many("daily", [(0, 1), (SIZE, 1)])
        edit.set("daily", 3 * GRANULE, 1)
    audit = Audit(image.data)
    assert audit.dirty(audit.bitmaps[0]) == {3}


def test_each_operation_sees_those_before_it() -> None:
    image = image_of()
    with qcow2bm.open(image.data, "r+") as opened, opened.edit() as edit:
        edit.copy("daily", "copy")
        edit.clear("daily")
        edit.merge("copy", "weekly", "or")
        edit.rename("copy", "daily2")
        edit.remove("weekly")
        edit.merge("daily", "daily2", "xor")
        assert edit.names == ["daily", "daily2"]
        assert list(opened.bitmaps) == ["daily", "weekly"]  # still what is stored
    audit = Audit(image.data)
    expected = {0, *range(4096, 8192)}
    assert [audit.dirty(bitmap) for bitmap in audit.bitmaps] == [expected, expected]


@pytest.mark.parametrize("dry_run", [False, True])
def test_there_is_one_edit_at_a_time(dry_run: bool) -> None:
    with qcow2bm.open(image_of().data, "r+") as image:
        with image.edit(dry_run=dry_run):
            for other in (False, True):
                with pytest.raises(qcow2bm.StateError, match="being edited"):
                    image.edit(dry_run=other)
        with image.edit():
            pass


def test_a_failed_beginning_is_no_edit() -> None:
    image = image_of()
    image.plant(1, "header", 0, "incompatible_features")
    with qcow2bm.open(image.data, "r+") as opened:
        for _ in range(2):
            with pytest.raises(qcow2bm.FormatError, match="dirty bit"):
                opened.edit()


USES: dict[str, Callable[[qcow2bm.Edit], object]] = {
    "names": lambda edit: edit.names,
    "plan": lambda edit: edit.plan(),
    "add": lambda edit: edit.add("new"),
    "remove": lambda edit: edit.remove("daily"),
    "remove_all": lambda edit: edit.remove_all(),
    "clear": lambda edit: edit.clear("daily"),
    "enable": lambda edit: edit.enable("daily"),
    "disable": lambda edit: edit.disable("daily"),
    "invalidate": lambda edit: edit.invalidate("daily"),
    "rename": lambda edit: edit.rename("daily", "x"),
    "copy": lambda edit: edit.copy("daily", "x"),
    "set": lambda edit: edit.set("daily", 0, 1),
    "reset": lambda edit: edit.reset("daily", 0, 1),
    "set_many": lambda edit: edit.set_many("daily", []),
    "reset_many": lambda edit: edit.reset_many("daily", []),
    "invert": lambda edit: edit.invert("daily"),
    "merge": lambda edit: edit.merge("daily", "weekly"),
    "load": lambda edit: edit.load("new", 2 << 30, np.zeros(1, np.uint8)),
    "fit": lambda edit: edit.fit("daily"),
    "salvage": lambda edit: edit.salvage("crashed"),
}


def test_bits_that_were_saved_are_loaded() -> None:
    source = build_image(Stored(b"daily", (b"\x05",)), size=64 << 20).data
    with qcow2bm.open(source) as opened:
        saved = opened.bitmaps["daily"].packed()
        digest = opened.bitmaps["daily"].sha256()
    data = build_image(Stored(b"daily", flags=3), Stored(b"other"), size=64 << 20).data
    with qcow2bm.open(data, "r+") as opened:
        with opened.edit() as edit:
            edit.load("daily", 65536, saved, enabled=False)  # in place of one that is in_use
        assert opened.bitmaps["daily"].sha256() == digest
        assert not opened.bitmaps["daily"].auto
        with opened.edit() as edit:
            with pytest.raises(qcow2bm.BitmapExistsError):
                edit.load("other", 65536, saved)
            with pytest.raises(ValueError, match="has 127 bytes of bits, must have 128"):
                edit.load("third", 65536, saved[1:])
            for granularity in (100 << 10, 0, -1, 1 << 40):
                with pytest.raises(ValueError, match="granularity"):
                    edit.load("third", granularity, saved[:82])
            for wrong in (saved.astype("uint16"), saved.astype("int64"), np.ones((128, 2))[:, 0]):
                with pytest.raises((ValueError, BufferError)):
                    edit.load("third", 65536, wrong)  # type: ignore[arg-type]
            assert edit.names == ["other", "daily"]
            edit.load("third", 65536, bytes(saved))
        assert opened.bitmaps["third"].sha256() == digest


def test_every_public_method_is_among_the_uses() -> None:
    assert set(USES) == {name for name in vars(qcow2bm.Edit) if not name.startswith("_")}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("end", ["committed", "failed", "dry run"])
def test_after_the_block_an_edit_is_finished(use: str, end: str) -> None:
    with qcow2bm.open(image_for_all_uses(), "r+") as image:
        try:
            with image.edit(dry_run=end == "dry run") as edit:
                edit.clear("daily")
                if end == "failed":
                    raise RuntimeError
        except RuntimeError:
            pass
        with pytest.raises(qcow2bm.StateError, match="the edit is finished"):
            USES[use](edit)
        with image.edit() as another:
            USES[use](another)


@pytest.mark.parametrize("use", USES)
def test_before_the_block_an_edit_is_not_begun(use: str) -> None:
    with qcow2bm.open(image_for_all_uses(), "r+") as image:
        edit = image.edit()
        with pytest.raises(qcow2bm.StateError, match="the edit is not begun"):
            USES[use](edit)
        with edit:
            USES[use](edit)


def test_an_edit_never_entered_hinders_nothing() -> None:
    with qcow2bm.open(image_of().data, "r+") as image:
        forgotten, late = image.edit(), image.edit()
        with image.edit() as edit:
            edit.clear("daily")
            with pytest.raises(qcow2bm.StateError), forgotten:
                pass
        # It began with what was stored before the commit.
        with pytest.raises(qcow2bm.StateError, match="edited since"), late:
            pass
        assert image.bitmaps["daily"].count() == 0


@pytest.mark.parametrize("dry_run", [False, True])
def test_an_edit_is_entered_once(dry_run: bool) -> None:
    data = image_of().data
    before = bytes(data)
    with qcow2bm.open(data, "r+") as image:
        edit = image.edit(dry_run=dry_run)
        with suppress(RuntimeError), edit:
            edit.clear("daily")
            with pytest.raises(qcow2bm.StateError), edit:
                pass
            raise RuntimeError
        with pytest.raises(qcow2bm.StateError), edit:
            pass
    assert data == before


@pytest.mark.parametrize("use", USES)
def test_a_closed_image_is_not_edited(use: str) -> None:
    data = image_for_all_uses()
    before = bytes(data)
    image = qcow2bm.open(data, "r+")
    with pytest.raises(qcow2bm.StateError, match="closed"), image.edit() as edit:  # noqa: PT012
        edit.clear("weekly")
        image.close()
        with pytest.raises(qcow2bm.StateError, match="closed"):
            USES[use](edit)
    assert data == before
    for dry_run in (False, True):
        with pytest.raises(qcow2bm.StateError, match="closed"):
            image.edit(dry_run=dry_run)


def test_image_edit_and_plan_and_pickle() -> None:
    with qcow2bm.open(image_of().data, "r+") as image, image.edit() as edit:
        edit.clear("daily")
        plan = edit.plan()
        assert pickle.loads(pickle.dumps(plan)) == plan
        with pytest.raises(TypeError):
            pickle.dumps(edit)
        with pytest.raises(TypeError):
            copy.copy(image)


# --- plans and dry runs -----------------------------------------------------------------------


def change(edit: qcow2bm.Edit) -> None:
    edit.invert("daily")
    edit.add("new", 4096)
    edit.set("new", 12345, 67890)
    edit.remove("weekly")


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_a_dry_run_writes_nothing(mode: str) -> None:
    image = image_of()
    storage = Problematic(image.data)
    before = bytes(image.data)
    with qcow2bm.open(storage, mode) as opened:
        daily = opened.bitmaps["daily"]
        with opened.edit(dry_run=True) as edit:
            change(edit)
            assert edit.plan().steps
            assert edit.names == ["daily", "new"]
        assert list(opened.bitmaps) == ["daily", "weekly"]
        assert daily.count() > 0
    assert image.data == before
    assert storage.calls == 0


def test_a_dry_run_needs_no_storage_that_can_be_written() -> None:
    data = bytes(image_of().data)
    plans = []
    sources: list[Any] = [data, bytearray(data), io.BytesIO(data), ScriptedStorage(data)]
    for source in sources:
        with qcow2bm.open(source) as image, image.edit(dry_run=True) as edit:
            change(edit)
            plans.append(edit.plan())
    assert all(plan == plans[0] for plan in plans)


def test_a_plan_is_the_same_twice_and_is_what_is_done() -> None:
    image = image_of()
    by_hand = bytearray(image.data)
    storage = Problematic(image.data)
    with qcow2bm.open(storage, "r+") as opened, opened.edit() as edit:
        change(edit)
        first = edit.plan()
        assert edit.plan() == first
        assert storage.calls == 0
    execute(first, MemoryStorage(by_hand), len(by_hand))
    assert image.data == by_hand
    assert storage.calls == len(first.steps)
    assert storage.written == first.length


def test_a_plan_may_be_looked_at_between_operations() -> None:
    one, other = image_of(), image_of()
    with qcow2bm.open(one.data, "r+") as opened, opened.edit() as edit:
        change(edit)
        edit.set("daily", 0, SIZE)
    with qcow2bm.open(other.data, "r+") as opened, opened.edit() as edit:
        assert edit.plan() == qcow2bm.Plan()
        change(edit)
        edit.plan()
        edit.set("daily", 0, SIZE)
        edit.plan()
    assert one.data == other.data


def test_another_writer_is_noticed_before_anything_is_written() -> None:
    image = image_of()
    with qcow2bm.open(image.data, "r+") as opened:
        with pytest.raises(qcow2bm.ChangedWhileReadingError), opened.edit() as edit:  # noqa: PT012
            edit.clear("daily")
            image.plant(7, "directory-entry", 0, "flags")
            before = bytes(image.data)
        assert image.data == before


# --- after a commit ---------------------------------------------------------------------------


BITMAP_USES: dict[str, Callable[[qcow2bm.Bitmap], object]] = {
    "entry": lambda bitmap: bitmap.entry,
    "index": lambda bitmap: bitmap.index,
    "name": lambda bitmap: bitmap.name,
    "granularity": lambda bitmap: bitmap.granularity,
    "auto": lambda bitmap: bitmap.auto,
    "in_use": lambda bitmap: bitmap.in_use,
    "disk_size": lambda bitmap: bitmap.disk_size,
    "flags": lambda bitmap: bitmap.flags,
    "unknown_flags": lambda bitmap: bitmap.unknown_flags,
    "is_dirty_tracking": lambda bitmap: bitmap.is_dirty_tracking,
    "has_legal_granularity": lambda bitmap: bitmap.has_legal_granularity,
    "is_sentinel": lambda bitmap: bitmap.is_sentinel,
    "is_auxiliary": lambda bitmap: bitmap.is_auxiliary,
    "require_valid": lambda bitmap: bitmap.require_valid(),
    "problems": lambda bitmap: bitmap.problems,
    "status": lambda bitmap: bitmap.status,
    "backup_reason": lambda bitmap: bitmap.backup_reason,
    "verdict": lambda bitmap: bitmap.verdict(),
    "clusters": lambda bitmap: bitmap.clusters,
    "count": lambda bitmap: bitmap.count(),
    "totals": lambda bitmap: bitmap.totals(),
    "extents": lambda bitmap: list(bitmap.extents()),
    "data_extents": lambda bitmap: list(bitmap.data_extents()),
    "data_totals": lambda bitmap: bitmap.data_totals(),
    "packed": lambda bitmap: bitmap.packed(),
    "sha256": lambda bitmap: bitmap.sha256(),
    "stale_bits": lambda bitmap: bitmap.stale_bits(),
    "stale_totals": lambda bitmap: bitmap.stale_totals(),
    "stale_extents": lambda bitmap: list(bitmap.stale_extents()),
    "has_stale_bits": lambda bitmap: bitmap.has_stale_bits,
    "space": lambda bitmap: bitmap.space,
    "full_space": lambda bitmap: bitmap.full_space(),
    "space_after_resize": lambda bitmap: bitmap.space_after_resize(bitmap.disk_size),
    "coarser_totals": lambda bitmap: bitmap.coarser_totals(),
    "table": lambda bitmap: list(bitmap.table()),
}


def test_every_public_property_is_among_the_uses() -> None:
    assert set(BITMAP_USES) == {name for name in vars(qcow2bm.Bitmap) if not name.startswith("_")}


@pytest.mark.spec("EDIT-18")
@pytest.mark.parametrize("use", BITMAP_USES)
@pytest.mark.parametrize("looked_at", [False, True])
def test_a_bitmap_from_before_a_commit_is_outdated(use: str, looked_at: bool) -> None:
    with qcow2bm.open(image_for_all_uses(), "r+") as image:
        bitmaps = image.bitmaps
        daily, weekly = bitmaps["daily"], image.bitmap(1)
        if looked_at:
            for look in BITMAP_USES.values():
                look(daily)
        with image.edit() as edit:
            edit.clear("weekly")  # daily stays as it is, and is outdated all the same
        for bitmap in (daily, weekly, bitmaps["daily"]):
            with pytest.raises(qcow2bm.StateError, match="outdated by a commit") as raised:
                BITMAP_USES[use](bitmap)
            assert f'the Bitmap "{"weekly" if bitmap is weekly else "daily"}"' in str(raised.value)
        BITMAP_USES[use](image.bitmaps["daily"])
        repr(daily)  # does not raise


@pytest.mark.spec("EDIT-18")
def test_extents_being_read_end_with_the_commit() -> None:
    with qcow2bm.open(image_of().data, "r+") as image:
        extents = image.bitmaps["daily"].extents()
        with image.edit() as edit:
            edit.clear("daily")
        with pytest.raises(qcow2bm.StateError):
            list(extents)
        assert list(image.bitmaps["daily"].extents()) == []


@pytest.mark.spec("EDIT-18")
def test_an_image_shows_what_was_committed() -> None:
    with qcow2bm.open(image_of().data, "r+") as image:
        size = image.file_size
        with image.edit() as edit:
            change(edit)
        assert list(image.bitmaps) == ["daily", "new"]
        assert image.bitmaps["new"].count() == (80235 // 4096 + 1 - 3) * 4096
        assert image.bitmaps["daily"].count() == 4095 * GRANULE
        assert [entry.name for entry in image.directory] == ["daily", "new"]
        assert image.file_size > size
        assert image.problems == ()
        assert image.is_consistent
        with image.edit() as edit:
            edit.remove_all()
        assert len(image.bitmaps) == 0
        assert image.bitmaps_extension is None
        assert not image.is_consistent
        with image.edit() as edit:
            edit.add("again")
        assert image.bitmaps["again"].status == "valid"


def test_an_edit_without_effect_outdates_nothing() -> None:
    image = image_of()
    storage = Problematic(image.data)
    with qcow2bm.open(storage, "r+") as opened:
        daily = opened.bitmaps["daily"]
        with opened.edit() as edit:
            edit.enable("daily")
            edit.set("daily", 0, 1)
        assert daily.count() > 0
        assert opened.bitmaps["daily"].count() == daily.count()
    assert storage.calls == 0


def test_a_bitmap_can_be_a_source_until_it_is_outdated() -> None:
    data = image_of().data
    with qcow2bm.open(data, "r+") as image:
        weekly = image.bitmaps["weekly"]
        with image.edit() as edit:
            edit.clear("weekly")
            edit.merge("daily", weekly)  # as it is stored
        audit = Audit(data)
        assert audit.dirty(audit.bitmaps[0]) == {0, *range(4096, 8192)}
        with pytest.raises(qcow2bm.StateError, match="outdated"), image.edit() as edit:
            edit.merge("daily", weekly)


# --- failures ---------------------------------------------------------------------------------


def steps_of_change() -> int:
    with qcow2bm.open(image_of().data) as image, image.edit(dry_run=True) as edit:
        change(edit)
        return len(edit.plan().steps)


@pytest.mark.spec("EDIT-1")
@pytest.mark.spec("EDIT-17")
@pytest.mark.parametrize("number", range(steps_of_change()))
def test_after_a_failed_commit_the_image_is_in_doubt(number: int) -> None:
    image, wanted = image_of(), image_of()
    commit(wanted.data, change)
    storage = Problematic(image.data, number)
    opened = qcow2bm.open(storage, "r+")
    daily = opened.bitmaps["daily"]
    with pytest.raises(qcow2bm.CommitError) as raised, opened.edit() as edit:
        change(edit)
    assert storage.calls == number + 1  # nothing is tried again
    for use in (
        lambda: opened.problems,
        lambda: opened.header,
        lambda: opened.bitmap(0),
        lambda: daily.count(),
        lambda: opened.edit(),
        lambda: opened.edit(dry_run=True),
    ):
        with pytest.raises(qcow2bm.StateError, match="in doubt after a failed commit"):
            use()
    opened.close()
    audit = Audit(image.data)
    names = [bitmap.name for bitmap in audit.bitmaps]
    old, new = [b"daily", b"weekly"], [b"daily", b"new"]
    allowed = {"old": [old], "new": [new], "unknown": [old, new]}[raised.value.outcome]
    assert names in allowed
    assert all(count >= references for count, references in audit.miscounted.values())


def test_another_image_object_goes_on_where_that_failed() -> None:
    image = image_of()
    storage = Problematic(image.data, 2)
    with (
        pytest.raises(qcow2bm.CommitError),
        qcow2bm.open(storage, "r+") as opened,
        opened.edit() as edit,
    ):
        change(edit)
    with qcow2bm.open(storage, "r+") as opened:
        with opened.edit() as edit:
            change(edit)
        assert list(opened.bitmaps) == ["daily", "new"]
