"""Identities of files show writes, without opening the file."""

from __future__ import annotations

import io
import os
import pickle
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from qcow2bm.errors import StorageError
from qcow2bm.storage.file_identity import FileIdentity, identify

CONTENT = b"what was there"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(CONTENT)
    return path


def identity(path: str | Path) -> FileIdentity:
    """The identity of a regular file."""
    found = identify(path)
    assert found is not None
    return found


def later(path: Path, change: Callable[[], object]) -> FileIdentity:
    """The identity after a change, made when the file system's clock has advanced."""
    before = identity(path)
    for _ in range(500):
        change()
        if identify(path) != before:
            break
        time.sleep(0.002)
    return identity(path)


def test_an_identity_has_the_facts_of_the_system(path: Path) -> None:
    now = path.stat()
    assert identify(path) == (
        now.st_dev,
        now.st_ino,
        len(CONTENT),
        now.st_mtime_ns,
        now.st_ctime_ns,
    )


@pytest.mark.parametrize("kind", [str, Path, os.fspath])
def test_any_kind_of_path(path: Path, kind: Callable[[Path], str | Path]) -> None:
    assert identify(kind(path)) == identify(path)


def test_reading_changes_nothing(path: Path) -> None:
    before = identity(path)
    for _ in range(3):
        assert path.read_bytes() == CONTENT
        assert identify(path) == before


def test_a_write_changes_the_identity(path: Path) -> None:
    before = identity(path)
    now = later(path, lambda: path.write_bytes(CONTENT))
    assert now != before
    assert now[:3] == before[:3]


def test_another_length_changes_the_identity(path: Path) -> None:
    before = identity(path)
    os.truncate(path, 3)
    assert identity(path).size == 3
    assert identify(path) != before


@pytest.mark.skipif(os.name != "posix", reason="elsewhere there is no time of the last change")
def test_setting_back_the_time_of_the_last_write_changes_the_identity(path: Path) -> None:
    before = identity(path)

    def change() -> None:
        path.write_bytes(CONTENT)
        os.utime(path, ns=(before.modified_ns, before.modified_ns))

    now = later(path, change)
    assert now[:4] == before[:4]
    assert now.changed_ns > before.changed_ns


def test_a_replaced_file_has_another_identity(path: Path) -> None:
    before = identity(path)
    other = path.with_name("other")
    other.write_bytes(CONTENT)
    os.utime(other, ns=(before.modified_ns, before.modified_ns))
    other.replace(path)
    assert identity(path).inode != before.inode


def test_a_link_is_followed(path: Path) -> None:
    link = path.with_name("link")
    link.symlink_to(path)
    assert identify(link) == identify(path)


def test_the_file_is_never_opened(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller may have no permission to open the file."""

    def refuse(*arguments: object, **more: object) -> None:
        raise AssertionError("was opened")

    path.chmod(0)
    for module, name in ((os, "open"), (io, "open"), (io, "FileIO")):
        monkeypatch.setattr(module, name, refuse)
    assert identity(path).size == len(CONTENT)


def require_refused(path: Path) -> None:
    with pytest.raises(StorageError, match="neither a regular file nor a block device") as raised:
        identify(path)
    assert raised.value.path == str(path)


def test_a_directory_has_no_identity(tmp_path: Path) -> None:
    require_refused(tmp_path)
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    require_refused(link)


@pytest.mark.skipif(sys.platform == "win32", reason="there are no FIFOs")
def test_a_fifo_has_no_identity(tmp_path: Path) -> None:
    """Opening a FIFO would wait for a writer for ever."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    require_refused(fifo)


@pytest.mark.skipif(sys.platform == "win32", reason="there are no devices")
def test_a_character_device_has_no_identity() -> None:
    require_refused(Path(os.devnull))


def with_mode(path: Path, kind: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the system report another kind of file for the path."""
    real = path.stat()
    told = os.stat_result((kind | 0o600, *real[1:]))
    monkeypatch.setattr(os, "stat", lambda path: told)


def test_a_block_device_has_no_identity(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block device must have no identity: its times and size show no writes of other hosts."""
    with_mode(path, stat.S_IFBLK, monkeypatch)
    assert identify(path) is None


@pytest.mark.parametrize("kind", [stat.S_IFCHR, stat.S_IFDIR, stat.S_IFIFO, stat.S_IFSOCK, 0])
def test_only_regular_files_and_block_devices_are_accepted(
    path: Path, kind: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_mode(path, kind, monkeypatch)
    require_refused(path)


@pytest.mark.parametrize("name", ["none", "none/deeper", "a\0b", "x" * 5000])
def test_a_path_that_cannot_be_examined_raises(tmp_path: Path, name: str) -> None:
    with pytest.raises(StorageError) as raised:
        identify(tmp_path / name)
    assert raised.value.path == str(tmp_path / name)
    assert str(raised.value).isprintable()
    assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)
