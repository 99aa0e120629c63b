"""Two hosts with one disk between them: two loop devices of one file, each with its own cache.

What one writes through its cache reaches the file with fsync, and the other does not notice: a
page it has once read stays as it was while any process has that device open.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from support.hosts import Host, host

from qcow2bm.storage.direct_io import DirectFile

PAGE = 4096
SIZE = 64 * PAGE
OLD = bytes(at * 7 + (at >> 8) & 255 for at in range(SIZE))
HERE = 8 * PAGE + 1000  # what this host writes, and what the other one, both in one page
THERE = 8 * PAGE + 3000


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """The content that both hosts have."""
    path = tmp_path / "disk"
    path.write_bytes(OLD)
    return path


@pytest.fixture(params=[512, 4096])
def sector(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def hosts(disk: Path, sector: int) -> Iterator[tuple[Host, Host]]:
    """Two hosts: this one has read all of the disk, and the other has written since."""
    with ExitStack() as stack:
        here, there = (stack.enter_context(host(disk, sector)) for _ in range(2))
        assert here.read(0, SIZE) == OLD
        there.write(THERE, b"there")
        yield here, there


@pytest.fixture
def file(hosts: tuple[Host, Host]) -> Iterator[DirectFile]:
    opened = DirectFile(str(hosts[0].path))
    yield opened
    opened.close()


def read(file: DirectFile, offset: int, length: int) -> bytes:
    data = bytearray(length)
    return bytes(data[: file.read_into(offset, memoryview(data))])


def changed(*changes: tuple[int, bytes]) -> bytes:
    data = bytearray(OLD)
    for offset, new in changes:
        data[offset : offset + len(new)] = new
    return bytes(data)


def test_a_buffered_write_destroys_what_the_other_host_wrote(
    hosts: tuple[Host, Host], disk: Path
) -> None:
    """The hazard itself: without it nothing below would prove anything."""
    here, _ = hosts
    assert here.read(0, SIZE) == OLD
    assert disk.read_bytes() == changed((THERE, b"there"))
    here.write(HERE, b"here")
    assert disk.read_bytes() == changed((HERE, b"here"))


def test_a_direct_read_sees_what_the_other_host_wrote(
    hosts: tuple[Host, Host], file: DirectFile
) -> None:
    here, _ = hosts
    assert read(file, 0, SIZE) == changed((THERE, b"there"))
    assert read(file, THERE - 1, 7) == OLD[THERE - 1 : THERE] + b"there" + OLD[THERE + 5 :][:1]
    assert here.read(0, SIZE) == OLD, "the cache still has the old page"


@pytest.mark.parametrize("offset", [HERE, THERE - 4, THERE + 5], ids=["page", "before", "behind"])
def test_a_direct_write_keeps_what_the_other_host_wrote(
    hosts: tuple[Host, Host], file: DirectFile, disk: Path, offset: int
) -> None:
    """A direct write must keep the bytes of another host, even in the same sector."""
    here, _ = hosts
    file.write(offset, [b"he", b"re"])
    file.barrier()
    expected = changed((THERE, b"there"), (offset, b"here"))
    assert disk.read_bytes() == expected
    assert read(file, 0, SIZE) == expected
    assert here.read(8 * PAGE, PAGE) == expected[8 * PAGE :][:PAGE], "it left the cache"


def test_to_and_fro(hosts: tuple[Host, Host], file: DirectFile, disk: Path) -> None:
    """Both hosts in turn, each past its cache: 4 bytes each, side by side."""
    with ExitStack() as stack:
        second = DirectFile(str(hosts[1].path))
        stack.callback(second.close)
        expected = bytearray(changed((THERE, b"there")))
        for turn in range(40):
            mine, other = (file, second) if turn % 2 else (second, file)
            offset = HERE + turn * 4
            mine.write(offset, [turn.to_bytes(4, "big")])
            mine.barrier()
            expected[offset : offset + 4] = turn.to_bytes(4, "big")
            assert read(other, 0, SIZE) == expected
    assert disk.read_bytes() == expected


@pytest.mark.parametrize("length", [1, 4, 511, 512, 513, 4095, 4096, 4097, 9000])
def test_no_sector_is_written_but_those_the_bytes_lie_in(
    file: DirectFile, disk: Path, sector: int, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, int]] = []
    real = os.pwritev

    def pwritev(descriptor: int, parts: list[memoryview], offset: int) -> int:
        calls.append((offset, sum(map(len, parts))))
        return real(descriptor, parts, offset)

    monkeypatch.setattr(os, "pwritev", pwritev)
    expected = bytearray(changed((THERE, b"there")))
    for offset in (0, 1, 511, 512, 513, 4095, 4096, 4097, SIZE - length - 1, SIZE - length):
        calls.clear()
        file.write(offset, [b"x" * length])
        expected[offset : offset + length] = b"x" * length
        first = offset - offset % sector
        last = (offset + length - 1) - (offset + length - 1) % sector
        assert calls == [(first, last + sector - first)]
        assert read(file, offset, length) == b"x" * length
    assert disk.read_bytes() == expected


def test_the_device_ends(file: DirectFile, disk: Path) -> None:
    assert read(file, SIZE - 10, 100) == OLD[-10:]
    assert read(file, SIZE, 100) == b""
    assert read(file, SIZE + 5, 100) == b""
    for offset in (SIZE - 2, SIZE, SIZE + 5):
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            file.write(offset, [b"x" * 4])
    assert disk.read_bytes() == changed((THERE, b"there"), (SIZE - 2, b"xx"))


def test_when_a_host_forgets_what_it_cached(hosts: tuple[Host, Host]) -> None:
    """The cache is dropped once no process has the device open any more, and not before."""
    here, _ = hosts
    again = os.open(here.path, os.O_RDONLY)
    try:
        assert os.pread(again, SIZE, 0) == OLD
    finally:
        os.close(again)
    here.reopen()
    assert here.read(0, SIZE) == changed((THERE, b"there"))
