"""What is refused before any program of QEMU is started, and what a plan leaves alone."""

from __future__ import annotations

from pathlib import Path

import pytest

import qcow2bm
from qcow2bm import backup
from qcow2bm.backup.daemon import storage_daemon


@pytest.fixture
def base(image: Path) -> str:
    """The path of a backup."""
    path = image.with_name("base.qcow2")
    path.write_bytes(image.read_bytes())
    return str(path)


@pytest.fixture
def target(image: Path) -> str:
    return str(image.with_name("target.qcow2"))


def test_a_plan_writes_nothing(image: Path, base: str, target: str) -> None:
    before = image.read_bytes()
    with qcow2bm.open(image) as opened:
        dirty = opened.bitmaps["daily"].count()
        some = backup.plan_backup(opened, "daily", target, base=base)
        whole = backup.plan_backup(opened, "daily", target)
        kept = backup.plan_backup(opened, "daily", target, then="keep")
        size = opened.virtual_size
    assert (some.total_bytes, whole.total_bytes) == (dirty, size)
    assert some.edit.steps
    assert not kept.edit.steps
    assert image.read_bytes() == before
    assert {path.name for path in image.parent.iterdir()} == {image.name, "base.qcow2"}


def test_an_image_open_for_reading_is_not_backed_up(image: Path, target: str) -> None:
    with qcow2bm.open(image) as opened, pytest.raises(qcow2bm.ReadOnlyImageError):
        backup.back_up(backup.plan_backup(opened, "daily", target))
    assert list(image.parent.iterdir()) == [image]


def test_an_edit_outdates_a_plan(image: Path, base: str, target: str) -> None:
    with qcow2bm.open(image, "r+") as opened:
        planned = backup.plan_backup(opened, "daily", target, base=base)
        with opened.edit() as edit:
            edit.disable("daily")
        with pytest.raises(qcow2bm.StateError):
            backup.back_up(planned)
    assert not Path(target).exists()


@pytest.mark.parametrize("then", ["clear", "keep", "rotate"])
def test_a_new_bitmap_goes_together_with_a_rotation(
    image: Path, target: str, then: backup.Then
) -> None:
    new = None if then == "rotate" else "new"
    with qcow2bm.open(image) as opened, pytest.raises(ValueError, match="rotate"):
        backup.plan_backup(opened, "daily", target, then=then, new=new)


@pytest.mark.spec("BACKUP-6")
def test_what_is_left_of_a_killed_command_is_named(image: Path, target: str) -> None:
    left = Path(f"{target}.incomplete")
    left.write_bytes(b"left")
    with qcow2bm.open(image) as opened:
        with pytest.raises(qcow2bm.StorageError, match=r"qcow2\.incomplete: is being") as e:
            backup.plan_backup(opened, "daily", target)
        assert e.value.path == str(left)
        left.unlink()
        Path(target).symlink_to("nowhere")
        with pytest.raises(qcow2bm.StorageError, match=r"target\.qcow2: exists already"):
            backup.plan_backup(opened, "daily", target)


def test_the_disk_is_no_backup_of_itself(image: Path, target: str) -> None:
    link = image.with_name("link")
    link.symlink_to(image)
    with qcow2bm.open(image) as opened:
        with pytest.raises(qcow2bm.StorageError, match="is the disk itself"):
            backup.plan_backup(opened, "daily", target, base=str(link))
        with pytest.raises(qcow2bm.StorageError, match="No such file"):
            backup.plan_backup(opened, "daily", target, base=f"{target}.missing")
    with (
        qcow2bm.open(image.read_bytes()) as in_memory,
        pytest.raises(qcow2bm.StorageError, match=f"{in_memory.name}: No such file"),
    ):
        backup.plan_backup(in_memory, "daily", target, base=str(image))


def test_a_missing_daemon_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    message = "a backup without qemu-storage-daemon .Debian: qemu-system-common"
    with pytest.raises(qcow2bm.UnsupportedError, match=message), storage_daemon():
        raise AssertionError("this must not be reached")


def test_a_daemon_that_does_not_start_is_quoted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "qemu-storage-daemon"
    program.write_text("#!/bin/sh\necho something is missing >&2\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    message = "qemu-storage-daemon ended with status 3 .something is missing"
    with pytest.raises(qcow2bm.QmpError, match=message), storage_daemon():
        raise AssertionError("this must not be reached")
