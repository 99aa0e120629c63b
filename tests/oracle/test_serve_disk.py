"""A disk that is served, in this process: what is durable when, and what a failure leaves."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Event
from typing import Any, NoReturn

import pytest
from support.nbdkit import RawDisk

import qcow2bm
from qcow2bm.serve.disk import Disk, check
from qcow2bm.serve.signals import EndSignals

MiB = 1 << 20
SIZE = 4 * MiB


@pytest.fixture
def raw(tmp_path: Path) -> RawDisk:
    raw = RawDisk.create(tmp_path, SIZE)
    raw.image.add("daily", 65536)
    return raw


def serve(raw: RawDisk, **options: Any) -> Disk:
    return Disk(raw.image.path, raw.data, **options)


def flags(raw: RawDisk) -> list[str]:
    (listed,) = raw.image.listed()
    return list(listed["flags"])


def test_reads_give_what_was_written(raw: RawDisk) -> None:
    with serve(raw) as disk:
        assert disk.size == SIZE
        disk.write(1000, b"\1" * 3000)
        disk.zero(2000, 100)
        buffer = bytearray(3002)
        disk.read_into(999, memoryview(buffer))
        assert buffer == b"\0" + b"\1" * 1000 + bytes(100) + b"\1" * 1900 + b"\0"
    assert raw.image.extents("daily") == [(0, 65536)]


@pytest.mark.spec("TRACK-20")
@pytest.mark.parametrize(
    "write",
    [
        lambda disk, fua: disk.write(MiB, b"\1" * 512, fua=fua),
        lambda disk, fua: disk.zero(MiB, 512, fua=fua),
        lambda disk, fua: disk.zero(MiB, 512, may_trim=True, is_fast=True, fua=fua),
        lambda disk, fua: disk.trim(MiB, 512, fua=fua),
    ],
)
def test_a_write_is_marked_before_and_with_fua_durable_after(
    raw: RawDisk, monkeypatch: pytest.MonkeyPatch, write: Callable[[Disk, bool], None]
) -> None:
    with serve(raw) as disk:
        calls: list[str] = []
        mark, data = disk._tracker.writing, disk._data
        inner, barrier, allocate = data.write, data.barrier, data._allocate

        def log(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
            def logged(*arguments: Any) -> Any:
                calls.append(name)
                return call(*arguments)

            return logged

        monkeypatch.setattr(disk._tracker, "writing", log("mark", mark))
        monkeypatch.setattr(data, "write", log("write", inner))
        monkeypatch.setattr(data, "_allocate", log("write", allocate))
        monkeypatch.setattr(data, "barrier", log("barrier", barrier))
        write(disk, False)
        write(disk, True)
        disk.flush()
        assert calls == ["mark", "write", "mark", "write", "barrier", "barrier"]
    assert raw.image.extents("daily") == [(MiB, 65536)]


@pytest.mark.parametrize(("start", "length"), [(SIZE, 1), (SIZE - 1, 2), (-1, 1)])
def test_nothing_is_written_beyond_the_disk(raw: RawDisk, start: int, length: int) -> None:
    before = raw.data.read_bytes()
    with serve(raw) as disk:
        with pytest.raises(ValueError, match="does not lie on the disk"):
            disk.write(start, bytes(length))
        with pytest.raises(ValueError, match="does not lie on the disk"):
            disk.zero(start, length)
        with pytest.raises(ValueError, match="does not lie on the disk"):
            disk.trim(start, length)
    assert raw.data.read_bytes() == before
    assert raw.image.extents("daily") == []


def test_an_exception_leaves_the_bitmaps_in_use(raw: RawDisk) -> None:
    disk = serve(raw)
    disk.write(0, b"\1")
    disk.__exit__(KeyError, KeyError(), None)
    assert flags(raw) == ["in-use", "auto"]


def test_after_a_stop_it_can_be_read_and_no_more_written(raw: RawDisk) -> None:
    with serve(raw, flush_interval=60) as disk:
        disk.write(0, b"\1")
        disk.stop()
        disk.read_into(0, memoryview(bytearray(1)))
        disk.flush()
        with pytest.raises(qcow2bm.StateError):
            disk.write(MiB, b"\1")
        with pytest.raises(qcow2bm.ImageLockedError):
            qcow2bm.open(raw.image.path, "r+")
    assert flags(raw) == ["auto"]
    assert raw.image.extents("daily") == [(0, 65536)]


def fail(*_: object) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def write_for_ever(disk: Disk) -> NoReturn:
    while True:
        disk.write(MiB, b"\2")


def test_where_the_bitmaps_cannot_be_stored_writes_fail_and_say_why(
    raw: RawDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = serve(raw, flush_interval=0.01)
    has_failed = Event()
    storage = disk._tracker._session.storage

    def full(offset: int, parts: Sequence[object]) -> None:
        has_failed.set()
        raise qcow2bm.StorageError(storage.name, offset, 0, "No space left", errno.ENOSPC)

    monkeypatch.setattr(storage, "write", full)
    disk.write(0, b"\1")
    assert has_failed.wait(60)
    with pytest.raises(qcow2bm.StateError) as raised:
        write_for_ever(disk)  # until the flusher has said so
    assert "No space left" in str(raised.value.__cause__)
    with pytest.raises(qcow2bm.StateError):
        disk.close()
    assert flags(raw) == ["in-use", "auto"]


def test_data_that_is_not_durable_does_not_cost_the_bitmaps(
    raw: RawDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = serve(raw)
    disk.write(0, b"\1")
    with monkeypatch.context() as patched:
        patched.setattr(os, "fdatasync", fail)
        with pytest.raises(qcow2bm.StorageError):
            disk.flush()
    with pytest.raises(qcow2bm.StorageError, match="could not be made durable"):
        disk.close()
    assert flags(raw) == ["auto"]
    assert raw.image.extents("daily") == [(0, 65536)]


@pytest.mark.spec("TRACK-19")
def test_a_check_leaves_everything_as_it_is(raw: RawDisk) -> None:
    before = raw.image.path.read_bytes(), raw.data.read_bytes()
    check(raw.image.path, raw.data)
    check(raw.image.path, raw.data, ["daily"])
    with pytest.raises(qcow2bm.BitmapNotFoundError):
        check(raw.image.path, raw.data, ["weekly"])
    assert before == (raw.image.path.read_bytes(), raw.data.read_bytes())
    with serve(raw), pytest.raises(qcow2bm.ImageLockedError):
        check(raw.image.path, raw.data)


def test_a_signal_is_heard_while_the_main_thread_waits() -> None:
    heard = Event()
    watch = EndSignals(heard.set)
    try:
        signal.raise_signal(signal.SIGTERM)
        assert heard.wait(60)
    finally:
        watch.close()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_without_a_signal_nothing_is_called() -> None:
    heard = Event()
    EndSignals(heard.set).close()
    assert not heard.is_set()
