"""`Image.verdict` and `Bitmap.verdict`: whether the next incremental backup can use a bitmap."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from support.images import Built, Stored
from support.problem_images import IDS, broken
from support.verdict_images import BITS, CRASHED, DISABLED, ENABLED, SIZE, image_of

import qcow2bm
from qcow2bm.format.directory import FLAG_IN_USE

CRASHED_DISABLED = Stored(b"crashed and disabled", [BITS], flags=FLAG_IN_USE)


def verdict(image: Built, name: str) -> qcow2bm.BackupVerdict:
    with qcow2bm.open(image.data) as opened:
        return opened.verdict(name)


@pytest.mark.spec("STAT-5")
@pytest.mark.parametrize(
    ("name", "reason", "dirty_bytes"),
    [
        ("enabled", "usable", 2 << 16),
        ("disabled", "disabled", 2 << 16),
        ("crashed", "inconsistent", None),
        ("crashed and disabled", "inconsistent", None),
        ("never there", "missing", None),
    ],
)
def test_each_reason(name: str, reason: str, dirty_bytes: int | None) -> None:
    found = verdict(image_of(ENABLED, DISABLED, CRASHED, CRASHED_DISABLED), name)
    assert (found.reason, found.dirty_bytes) == (reason, dirty_bytes)
    assert found.usable == (reason == "usable")
    assert f'"{name}"' in found.message
    assert len(found.message.splitlines()) == 1


@pytest.mark.spec("STAT-5")
@pytest.mark.parametrize("stored", [ENABLED, DISABLED, CRASHED])
def test_stale_comes_before_all_else(stored: Stored) -> None:
    image = image_of(stored, autoclear=False)
    image.plant(9, "directory-entry", 0, "type")
    found = verdict(image, stored.name.decode())
    assert (found.usable, found.reason, found.dirty_bytes) == (False, "stale", None)


@pytest.mark.spec("STAT-5")
@pytest.mark.parametrize("stored", [ENABLED, DISABLED, CRASHED])
def test_broken_comes_before_inconsistent_and_disabled(stored: Stored) -> None:
    image = image_of(stored)
    image.plant(9, "directory-entry", 0, "type")
    found = verdict(image, stored.name.decode())
    assert (found.usable, found.reason, found.dirty_bytes) == (False, "broken", None)
    assert "type at" in found.message


@pytest.mark.spec("STAT-6")
@pytest.mark.parametrize("autoclear", [True, False])
def test_a_name_that_several_bitmaps_have_is_not_missing(autoclear: bool) -> None:
    found = verdict(image_of(ENABLED, ENABLED._replace(table=None), autoclear=autoclear), "enabled")
    assert found.reason == ("broken" if autoclear else "stale")
    assert not found.usable


@pytest.mark.spec("STAT-5")
def test_a_bitmap_that_a_repair_would_drop_is_broken_though_its_status_is_valid() -> None:
    fine = image_of(Stored(b"fine", granularity_bits=8))
    with qcow2bm.open(fine.data) as opened:
        bitmap = opened.bitmaps["fine"]
        assert bitmap.status == "valid"
        assert bitmap.backup_reason == bitmap.verdict().reason == "broken"


@pytest.mark.parametrize("id", IDS)
def test_no_bitmap_is_usable_that_a_repair_drops(id: str, tmp_path: Path) -> None:
    """Every problem that a reader knows: what is called usable is there after a repair."""
    path = tmp_path / "image"
    path.write_bytes(broken(id))
    with qcow2bm.open(path) as image:
        bitmaps = [image.bitmap(entry.index) for entry in image.directory]
        usable = {bitmap.name for bitmap in bitmaps if bitmap.verdict().usable}
        assert usable <= {bitmap.name for bitmap in bitmaps if bitmap.status == "valid"}
    try:
        lost = {lost.name for lost in qcow2bm.plan_repair(path).lost}
    except qcow2bm.UnsupportedError:
        assert not usable
    else:
        assert not usable & lost


@pytest.mark.spec("STAT-5")
@pytest.mark.parametrize("id", [id for id in IDS if id.startswith("header.")])
def test_no_bitmap_is_usable_in_an_image_that_qemu_cannot_open(id: str) -> None:
    with qcow2bm.open(broken(id)) as image:
        faults = [found for found in image.problems if found.severity in ("refused", "unusable")]
        for name in image.bitmaps:
            verdict = image.verdict(name)
            assert not (verdict.usable and faults), faults


def test_the_bits_are_read_by_the_verdict_and_not_by_its_reason() -> None:
    image = image_of(ENABLED)
    with qcow2bm.open(image.data) as opened:
        bitmap = opened.bitmaps["enabled"]
        assert bitmap.backup_reason == "usable"
        image.plant(0, "bitmap-table", 0, 0)  # another process changes it
        with pytest.raises(qcow2bm.ChangedWhileReadingError):
            bitmap.verdict()
        with pytest.raises(qcow2bm.ChangedWhileReadingError):
            opened.verdict("enabled")


def test_a_verdict_is_about_an_image_that_nothing_changes() -> None:
    with qcow2bm.open(image_of(ENABLED).data, "r+") as image:
        with image.edit(), pytest.raises(qcow2bm.StateError, match="being edited"):
            image.verdict("enabled")
        tracker = image.track()
        for name in ("enabled", "never there"):
            with pytest.raises(qcow2bm.StateError, match="being tracked"):
                image.verdict(name)
        tracker.stop()
        assert image.verdict("enabled").usable
    for name in ("enabled", "never there"):
        with pytest.raises(qcow2bm.StateError, match="closed"):
            image.verdict(name)


def test_a_verdict_follows_the_edits() -> None:
    with qcow2bm.open(image_of(ENABLED).data, "r+") as image:
        for operation, reason in (
            (qcow2bm.Edit.disable, "disabled"),
            (qcow2bm.Edit.enable, "usable"),
            (qcow2bm.Edit.invalidate, "inconsistent"),
            (qcow2bm.Edit.salvage, "usable"),
            (qcow2bm.Edit.remove, "missing"),
        ):
            with image.edit() as edit:
                operation(edit, "enabled")
            assert image.verdict("enabled").reason == reason


def test_a_verdict_is_a_frozen_value() -> None:
    found = verdict(image_of(ENABLED), "enabled")
    assert pickle.loads(pickle.dumps(found)) == found
    with pytest.raises(AttributeError):
        found.reason = "usable"  # type: ignore[misc]


def test_names_are_escaped_in_the_message() -> None:
    odd = Stored(b"a\x1b\nb\xff")
    for found in (verdict(image_of(odd), "a\x1b\nb\udcff"), verdict(image_of(), "a\x1b\nb\udcff")):
        assert found.message.isprintable()


# --- invalidate ---------------------------------------------------------------------------------


@pytest.mark.spec("EDIT-21")
def test_an_invalidated_bitmap_keeps_all_but_in_use() -> None:
    image = image_of(ENABLED, DISABLED)
    with qcow2bm.open(image.data, "r+") as opened:
        with opened.edit() as edit:
            edit.invalidate("disabled")
        disabled, enabled = opened.bitmaps["disabled"], opened.bitmaps["enabled"]
        assert (disabled.status, disabled.flags) == ("inconsistent", ("in-use",))
        assert disabled.stale_bits().tolist()[:2] == [5, 0]
        assert (enabled.status, enabled.count()) == ("valid", 2 << 16)
        with opened.edit() as edit:
            edit.invalidate("enabled")
        assert opened.bitmaps["enabled"].flags == ("in-use", "auto")
        assert opened.problems == ()


@pytest.mark.spec("EDIT-21")
@pytest.mark.parametrize("autoclear", [True, False])
def test_what_no_program_trusts_is_not_written_again(autoclear: bool) -> None:
    image = image_of(CRASHED, autoclear=autoclear)
    before = bytes(image.data)
    with qcow2bm.open(image.data, "r+") as opened, opened.edit() as edit:
        edit.invalidate("crashed")
        with pytest.raises(qcow2bm.BitmapNotFoundError, match="the image has"):
            edit.invalidate("never there")
        assert edit.plan().steps == ()
    assert image.data == before


@pytest.mark.spec("EDIT-7", "EDIT-21")
def test_the_rest_of_the_edit_takes_an_invalidated_bitmap_for_inconsistent() -> None:
    with qcow2bm.open(image_of(ENABLED).data, "r+") as opened:
        with opened.edit() as edit:
            edit.set("enabled", SIZE - 1, 1)
            edit.invalidate("enabled")
            for change in (edit.clear, edit.enable, edit.invert, edit.fit):
                with pytest.raises(qcow2bm.BitmapInconsistentError):
                    change("enabled")
            with pytest.raises(qcow2bm.BitmapExistsError):
                edit.add("enabled")
        assert opened.bitmaps["enabled"].stale_bits().tolist()[-1] == 128
        with opened.edit() as edit:
            edit.remove("enabled")
        assert list(opened.bitmaps) == []


@pytest.mark.parametrize("trust_stored", [True, False])
def test_a_bitmap_is_renamed_invalidated_and_salvaged_in_one_edit(trust_stored: bool) -> None:
    with qcow2bm.open(image_of(ENABLED, DISABLED).data, "r+") as opened:
        with opened.edit() as edit:
            edit.rename("enabled", "other")
            edit.rename("disabled", "enabled")
            edit.add("new")
            for name in ("other", "enabled", "new"):
                edit.invalidate(name)
                edit.salvage(name, trust_stored=trust_stored)
        counts = {name: bitmap.count() for name, bitmap in opened.bitmaps.items()}
        kept = {"other": 2 << 16, "enabled": 2 << 16, "new": 0}
        assert counts == (kept if trust_stored else dict.fromkeys(kept, SIZE))


def test_a_bitmap_whose_table_does_not_fit_can_be_invalidated() -> None:
    image = image_of(ENABLED)
    image.plant(2, "directory-entry", 0, "bitmap_table_size")
    with qcow2bm.open(image.data, "r+") as opened:
        assert opened.bitmaps["enabled"].status == "broken"
        with opened.edit() as edit:
            edit.invalidate("enabled")
        assert opened.bitmaps["enabled"].in_use
        assert not opened.verdict("enabled").usable
