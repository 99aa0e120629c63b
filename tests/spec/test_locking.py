"""The requirements of spec/locking.md."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.spec_image import TABLES, WEEKLY, Patch, image, in_header, in_table, patched
from support.specreader import page

import qcow2bm
from qcow2bm.errors import ChangedWhileReadingError, ImageLockedError
from qcow2bm.storage.memory import MemoryStorage

linux = pytest.mark.skipif(sys.platform != "linux", reason="the locks are Linux's")

_FLOCK = struct.Struct("@hhqqi0q")
BYTES = range(100, 210)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "image.qcow2"
    path.write_bytes(image())
    return path


@contextmanager
def another(path: Path) -> Iterator[int]:
    """An open file description of the image that is not the reader's."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def lock(descriptor: int, *places: int) -> None:
    import fcntl

    for byte in places:
        request = _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0)
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, request)


def held(descriptor: int) -> list[int]:
    """The lock bytes others hold."""
    import fcntl

    found = []
    for byte in BYTES:
        request = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
        answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, request)
        if _FLOCK.unpack(answer)[0] != fcntl.F_UNLCK:
            found.append(byte)
    return found


@linux
@pytest.mark.spec("LOCK-1")
@pytest.mark.parametrize("byte", [101, 103, 200])
def test_a_reader_is_refused_by_every_lock_that_excludes_it(path: Path, byte: int) -> None:
    with another(path) as other:
        lock(other, byte)
        with pytest.raises(ImageLockedError, match=f"lock byte {byte}"):
            qcow2bm.open(path)
        assert held(other) == []


@linux
@pytest.mark.spec("LOCK-1")
def test_a_reader_takes_its_locks_before_it_probes(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qcow2bm.storage import locks

    real = locks._is_held_by_others
    with another(path) as other:
        seen = []

        def probe(descriptor: int, name: str, byte: int, role: locks.Role) -> bool:
            seen.append(held(other))
            return real(descriptor, name, byte, role)

        monkeypatch.setattr(locks, "_is_held_by_others", probe)
        qcow2bm.open(path).close()
    assert seen
    assert all(locked == [100, 201, 203] for locked in seen)


@linux
@pytest.mark.spec("LOCK-2")
def test_an_open_image_holds_no_locks(path: Path) -> None:
    with another(path) as other, qcow2bm.open(path) as first, qcow2bm.open(path) as second:
        lock(other, 100, 201, 203)  # as another reader does
        assert first.bitmaps["daily"].count() == second.bitmaps["daily"].count()
        extents = first.bitmaps["weekly"].extents()
        next(extents)
        assert held(other) == []


@linux
@pytest.mark.spec("LOCK-3")
def test_a_forced_reader_neither_locks_nor_probes(path: Path) -> None:
    with another(path) as other:
        lock(other, 100, 101, 103, 201, 203)
        with qcow2bm.open(path, force_share=True) as opened:
            assert opened.bitmaps["daily"].count() == 261632


CHANGES: dict[str, list[Patch]] = {
    "header": in_header(nb_snapshots=1),
    "bitmap directory": [(0xC18, b"other")],
    "bitmap table": [in_table(WEEKLY, 0)],
}


@pytest.mark.spec("LOCK-4")
@pytest.mark.parametrize("force_share", [False, True])
@pytest.mark.parametrize("changed", CHANGES)
def test_a_change_between_two_reads_is_noticed(path: Path, changed: str, force_share: bool) -> None:
    with qcow2bm.open(path, force_share=force_share) as opened:
        bitmap = opened.bitmaps["daily" if changed == "bitmap directory" else "weekly"]
        assert bitmap.status == "valid"
        path.write_bytes(patched(image(), *CHANGES[changed]))
        said = changed if force_share else "image"  # the file's times say it without reading
        with pytest.raises(ChangedWhileReadingError, match=said):
            bitmap.count()


@pytest.mark.spec("LOCK-4")
def test_a_change_during_a_read_is_noticed() -> None:
    data = bytearray(image())

    class Changing(MemoryStorage):
        """Rewrites the table as soon as bitmap data are read."""

        def read_into(self, offset: int, buffer: memoryview) -> int:
            count = super().read_into(offset, buffer)
            if offset == 0x1400:
                data[TABLES[WEEKLY] : TABLES[WEEKLY] + 8] = bytes(8)
            return count

    with qcow2bm.open(Changing(data)) as opened:
        bitmap = opened.bitmaps["weekly"]
        with pytest.raises(ChangedWhileReadingError, match="bitmap table"):
            bitmap.count()


@pytest.mark.spec("LOCK-6")
@pytest.mark.parametrize("changed", ["time", "length", "time put back"])
def test_a_write_that_leads_back_to_the_same_metadata_is_noticed(path: Path, changed: str) -> None:
    with qcow2bm.open(path) as opened, qcow2bm.open(path, force_share=True) as forced:
        bitmap = opened.bitmaps["daily"]
        assert bitmap.status == "valid"
        before = path.stat()
        if changed == "length":
            path.write_bytes(image() + bytes(1))
        later = before.st_mtime_ns + 1_000_000_000 * (changed == "time")
        os.utime(path, ns=(before.st_atime_ns, later))
        while path.stat().st_ctime_ns == before.st_ctime_ns:  # within one tick of the clock
            path.write_bytes(path.read_bytes())
            os.utime(path, ns=(before.st_atime_ns, later))
        with pytest.raises(ChangedWhileReadingError, match="image"):
            bitmap.count()
        assert forced.bitmaps["daily"].count() == 261632


@pytest.mark.spec("LOCK-5")
def test_memory_and_file_objects_are_not_locked(path: Path) -> None:
    if sys.platform != "linux":
        qcow2bm.open(path).close()
        return
    with another(path) as other, path.open("rb") as stream:
        lock(other, 101)
        for source in (path.read_bytes(), stream):
            with qcow2bm.open(source) as opened:
                assert opened.bitmaps["daily"].count() == 261632


@linux
@pytest.mark.spec("LOCK-5")
def test_nothing_is_locked_where_the_system_is_not_linux(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with another(path) as other:
        lock(other, 101)
        monkeypatch.setattr(sys, "platform", "darwin")
        qcow2bm.open(path).close()


@linux
@pytest.mark.parametrize("byte", [101, 103, 200, 201, 203])
@pytest.mark.spec("LOCK-7")
def test_a_writer_is_refused_by_every_other_user_of_the_image(path: Path, byte: int) -> None:
    with another(path) as other:
        lock(other, byte)
        with pytest.raises(ImageLockedError, match=f"lock byte {byte}.*lock_timeout"):
            qcow2bm.open(path, "r+")
        assert held(other) == []


@linux
@pytest.mark.spec("LOCK-7")
def test_a_writer_holds_its_locks_until_it_closes(path: Path) -> None:
    with another(path) as other:
        with qcow2bm.open(path, "r+") as opened:
            opened.bitmaps["daily"].count()
            assert held(other) == [100, 101, 103, 201, 203]
            with pytest.raises(ImageLockedError):
                qcow2bm.open(path, "r+")
            with pytest.raises(ImageLockedError):
                qcow2bm.open(path)
        assert held(other) == []


@linux
@pytest.mark.spec("LOCK-7")
def test_a_writer_that_waits_tries_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []
    with another(path) as other:
        lock(other, 201)

        def sleep(seconds: float) -> None:
            assert held(other) == []  # a waiting writer excludes no other program
            tries.append(seconds)
            if len(tries) == 3:
                unlock(other, 201)

        monkeypatch.setattr(time, "sleep", sleep)
        qcow2bm.open(path, "r+", lock_timeout=3600).close()
    assert len(tries) == 3
    assert len(set(tries)) > 1


def unlock(descriptor: int, byte: int) -> None:
    import fcntl

    request = _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, byte, 1, 0)
    fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, request)


@linux
@pytest.mark.spec("LOCK-8")
def test_without_locks_an_image_is_edited_only_on_demand(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno
    import fcntl

    def no_locks(*arguments: object) -> bytes:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "fcntl", no_locks)
    with pytest.raises(qcow2bm.StorageError, match="locking=False"):
        qcow2bm.open(path, "r+")
    with qcow2bm.open(path, "r+", locking=False) as opened, opened.edit() as edit:
        edit.disable("daily")


@pytest.mark.spec("LOCK-8")
def test_nothing_is_edited_where_the_system_is_not_linux(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(qcow2bm.UnsupportedError, match="Linux"):
        qcow2bm.open(path, "r+")


@linux
@pytest.mark.spec("LOCK-9")
def test_a_change_before_the_lock_was_taken_is_seen(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with another(path) as other:
        lock(other, 201)

        def sleep(seconds: float) -> None:
            os.pwrite(other, image()[:100] + b"\0\0\0\6", 0)
            unlock(other, 201)

        monkeypatch.setattr(time, "sleep", sleep)
        with qcow2bm.open(path, "r+", lock_timeout=3600) as opened:
            assert opened.header.header_length == 6


@linux
@pytest.mark.spec("LOCK-9")
def test_a_file_that_was_replaced_is_not_edited(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with another(path) as other:
        lock(other, 201)

        def sleep(seconds: float) -> None:
            new = path.with_suffix(".new")
            new.write_bytes(image())
            new.replace(path)
            unlock(other, 201)

        monkeypatch.setattr(time, "sleep", sleep)
        with pytest.raises(qcow2bm.StorageError, match="replaced by another file"):
            qcow2bm.open(path, "r+", lock_timeout=3600)


@linux
@pytest.mark.spec("LOCK-10")
def test_a_write_in_spite_of_the_locks_is_noticed(path: Path) -> None:
    with qcow2bm.open(path, "r+") as opened:
        before = path.read_bytes()

        def change() -> None:
            with opened.edit() as edit:
                edit.disable("daily")
                path.write_bytes(before)

        with pytest.raises(ChangedWhileReadingError):
            change()
        assert path.read_bytes() == before


@pytest.mark.qemu
@pytest.mark.parametrize("row", page("locking.md").table("What QEMU holds").rows, ids=str)
def test_qemu_holds_what_is_stated(row: dict[str, str], path: Path) -> None:
    options = {"for writing": [], "read-only": ["-r"], "read-only with -U": ["-r", "-U"]}
    expected = [int(byte) for byte in row["bytes held"].split()]
    command = ["qemu-io", *options[row["opened"]], "-f", "qcow2", str(path)]
    with (
        another(path) as other,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as process,
    ):
        deadline = time.monotonic() + 30
        while held(other) != expected and time.monotonic() < deadline:
            time.sleep(0.01)
        assert held(other) == expected
        process.communicate(b"quit\n", timeout=30)
