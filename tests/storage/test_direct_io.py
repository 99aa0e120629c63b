"""Direct input and output on regular files; tests/oracle/test_direct_device.py tests devices."""

from __future__ import annotations

import errno
import os
import runpy
import sys
import tempfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcow2bm.storage import direct_io
from qcow2bm.storage.direct_io import DirectFile

if sys.platform != "linux":
    pytest.skip("unbuffered access is for Linux", allow_module_level=True)

BLOCK = 4096
SIZE = 8 * BLOCK
CONTENT = bytes(at * 7 + (at >> 8) & 255 for at in range(SIZE))
PIECE = 2 * BLOCK  # in the tests whose writes are to have several

Call = tuple[int, int]  # offset and length


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder on a file system with direct input and output, which a tmpfs may not have."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as other:
        for candidate in (tmp_path_factory.mktemp("direct"), Path(other)):
            try:
                (candidate / "probe").write_bytes(b"")
                DirectFile(str(candidate / "probe")).close()
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
            else:
                yield candidate
                return
    pytest.skip("no folder for temporary files is on a file system with unbuffered access")


@pytest.fixture
def path(folder: Path) -> Path:
    path = folder / "disk"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def file(path: Path) -> Iterator[DirectFile]:
    opened = DirectFile(str(path))
    yield opened
    opened.close()


@pytest.fixture(autouse=True)
def _no_descriptor_is_left_open() -> Iterator[None]:
    before = os.listdir("/proc/self/fd")
    yield
    assert os.listdir("/proc/self/fd") == before


def read(file: DirectFile, offset: int, length: int) -> bytes:
    """Reads, and checks that bytes behind the buffer are not changed."""
    data = bytearray(b"?" * (length + 1))
    count = file.read_into(offset, memoryview(data)[:length])
    assert data[count:] == b"?" * (length + 1 - count)
    return bytes(data[:count])


def overwritten(old: bytes, offset: int, new: bytes) -> bytes:
    return old[:offset] + new + old[offset + len(new) :]


def blocks_of(offset: int, length: int) -> set[int]:
    """The numbers of the blocks in which these bytes lie."""
    return {at // BLOCK for at in range(offset, offset + length)}


def failing(number: int) -> Callable[..., int]:
    def fail(*arguments: object) -> int:
        raise OSError(number, os.strerror(number))

    return fail


class LazySystem:
    """A system that reads and writes at most ``limit`` bytes at once, and records its calls.

    If it reports that a block was written in part, it has written nothing of that block.
    """

    def __init__(self, patch: pytest.MonkeyPatch, limit: int = sys.maxsize) -> None:
        self.limit = limit
        self.writes: list[Call] = []
        self.reads: list[Call] = []
        self._preadv, self._pwritev = os.preadv, os.pwritev
        patch.setattr(os, "preadv", self.preadv)
        patch.setattr(os, "pwritev", self.pwritev)

    def preadv(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        self.reads.append((offset, len(buffers[0])))
        return min(self._preadv(descriptor, buffers, offset), self.limit)

    def pwritev(self, descriptor: int, parts: Sequence[memoryview], offset: int) -> int:
        (part,) = parts
        self.writes.append((offset, len(part)))
        if len(part) <= self.limit:
            return self._pwritev(descriptor, parts, offset)
        whole = self.limit - self.limit % BLOCK
        assert self._pwritev(descriptor, [part[:whole]], offset) == whole
        return self.limit


def places(limit: int) -> st.SearchStrategy[int]:
    """Draws any offsets, many of them near the edges of blocks."""
    edges = st.builds(
        lambda number, away: min(max(number * BLOCK + away, 0), limit),
        st.integers(0, limit // BLOCK),
        st.integers(-3, 3),
    )
    return st.integers(0, limit) | edges


@st.composite
def writes(draw: st.DrawFn) -> tuple[int, list[bytes]]:
    """Draws an offset within the file, and bytes in any number of parts."""
    start, stop = sorted((draw(places(SIZE)), draw(places(SIZE))))
    data = (bytes([draw(st.integers(0, 255))]) + b"abcdefg") * (SIZE // 8)
    cuts = sorted(draw(st.lists(st.integers(0, stop - start), max_size=4)))
    edges = [0, *cuts, stop - start]
    return start, [data[a:b] for a, b in pairwise(edges)]


# --- as a file is -------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    calls=st.lists(writes(), max_size=4),
    look=st.tuples(places(SIZE + BLOCK), places(3 * BLOCK)),
    limit=st.integers(BLOCK, 4 * BLOCK),
    piece=st.sampled_from([BLOCK, PIECE, 1 << 20]),
)
def test_writes_and_reads_agree_with_bytes_in_memory(
    folder: Path,
    calls: list[tuple[int, list[bytes]]],
    look: tuple[int, int],
    limit: int,
    piece: int,
) -> None:
    path = folder / "model"
    path.write_bytes(CONTENT)
    model = bytearray(CONTENT)
    with closing(DirectFile(str(path))) as file, pytest.MonkeyPatch.context() as patch:
        patch.setattr(direct_io, "_PIECE", piece)
        system = LazySystem(patch, limit)
        for offset, parts in calls:
            data = b"".join(parts)
            model[offset : offset + len(data)] = data
            system.writes.clear()
            file.write(offset, parts)
            touched = [number for call in system.writes for number in blocks_of(*call)]
            assert set(touched) == blocks_of(offset, len(data))
        offset, length = look
        assert read(file, offset, length) == model[offset : offset + length]
        assert read(file, 0, SIZE) == model
    assert path.read_bytes() == model


@pytest.mark.parametrize(
    ("offset", "length"),
    [
        *((0, 0), (0, 1), (0, SIZE), (5, 17)),
        *((BLOCK - 1, 2), (BLOCK, BLOCK), (777, 3 * BLOCK)),
        *((SIZE - 24, 24), (SIZE - 24, 100), (SIZE - 24, 2 << 20)),
        *((SIZE, 1), (SIZE + 5, 1), (1 << 40, 8), ((1 << 40) + 3, 8)),
    ],
)
def test_reading_ends_where_the_file_does(file: DirectFile, offset: int, length: int) -> None:
    assert read(file, offset, length) == CONTENT[offset : offset + length]


def test_reading_a_file_that_ends_within_a_block(file: DirectFile, path: Path) -> None:
    os.truncate(path, 5000)
    assert read(file, 0, SIZE) == CONTENT[:5000]
    assert read(file, 4990, 100) == CONTENT[4990:5000]
    assert read(file, 5000, 100) == b""
    assert read(file, 6000, 100) == b""


def test_a_write_of_several_pieces_of_the_real_size(file: DirectFile, path: Path) -> None:
    data = bytes(range(251)) * 10000
    file.write(100, [data[:1000], data[1000:]])
    file.barrier()
    assert path.read_bytes()[: 100 + len(data)] == CONTENT[:100] + data
    assert read(file, 99, len(data) + 1) == CONTENT[99:100] + data


@pytest.mark.parametrize(
    "parts",
    [
        [b"a", bytearray(b"bcd"), memoryview(b"efgh")],
        [b"", b"abcd", b"", b"efgh", b""],
        [array("I", [0x64636261, 0x68676665])],
        [memoryview(b"abcdefgh").cast("Q")],
    ],
    ids=["several", "empty ones", "words", "a view of words"],
)
def test_parts_may_be_of_any_bytes_like_type(
    file: DirectFile, path: Path, parts: Sequence[bytes]
) -> None:
    file.write(BLOCK - 3, parts)
    assert path.read_bytes() == overwritten(CONTENT, BLOCK - 3, b"abcdefgh")


def test_a_regular_file_grows_by_whole_blocks(
    file: DirectFile, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct_io, "_PIECE", PIECE)
    file.write(SIZE - 2, [b"x" * (PIECE + 4)])
    expected = CONTENT[:-2] + b"x" * (PIECE + 4)
    assert path.read_bytes() == expected.ljust(SIZE + 3 * BLOCK, b"\0")


# --- what is written, and what is not -----------------------------------------------------------


@pytest.mark.parametrize(
    ("offset", "length", "read_before"),
    [
        (0, SIZE, []),
        (BLOCK, 2 * BLOCK, []),
        (BLOCK, 1, [1]),
        (BLOCK + 1, BLOCK - 1, [1]),
        (BLOCK + 100, 4, [1]),
        (BLOCK - 2, 4, [0, 1]),
        (100, 2 * BLOCK - 100, [0]),
        (BLOCK, 2 * BLOCK + 1, [3]),
        (1, 5 * BLOCK, [0, 5]),
    ],
)
def test_only_blocks_that_are_written_in_part_are_read_first(
    file: DirectFile,
    monkeypatch: pytest.MonkeyPatch,
    offset: int,
    length: int,
    read_before: list[int],
) -> None:
    system = LazySystem(monkeypatch)
    file.write(offset, [b"x" * length])
    assert sorted(system.reads) == [(number * BLOCK, BLOCK) for number in read_before]
    touched = blocks_of(offset, length)
    assert system.writes == [(min(touched) * BLOCK, len(touched) * BLOCK)]


@pytest.mark.parametrize("parts", [[], [b""], [b"", b""]])
def test_an_empty_write_writes_nothing(
    file: DirectFile, monkeypatch: pytest.MonkeyPatch, parts: list[bytes]
) -> None:
    system = LazySystem(monkeypatch)
    file.write(100, parts)
    assert not system.reads
    assert not system.writes


def test_no_call_moves_more_than_a_piece(file: DirectFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct_io, "_PIECE", PIECE)
    system = LazySystem(monkeypatch)
    file.write(BLOCK + 5, [b"x" * (5 * BLOCK)])
    assert [length for _, length in system.writes] == [PIECE] * 3
    assert read(file, BLOCK + 5, 5 * BLOCK) == b"x" * (5 * BLOCK)
    assert max(length for _, length in system.reads) == PIECE


# --- what fails ---------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("call", ["preadv", "pwritev", "fdatasync"])
def test_an_error_of_the_system_passes_through(
    file: DirectFile, path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    uses: dict[str, list[Callable[[], object]]] = {
        "preadv": [lambda: read(file, 5, 10), lambda: file.write(5, [b"x"])],
        "pwritev": [lambda: file.write(5, [b"x"])],
        "fdatasync": [file.barrier],
    }
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing(number))
        for use in uses[call]:
            with pytest.raises(OSError, match=os.strerror(number)) as caught:
                use()
            assert type(caught.value) is OSError
            assert caught.value.errno == number
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize("count", [0, 1, BLOCK - 1])
def test_a_write_that_makes_no_progress_fails(
    file: DirectFile, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    answers = iter([BLOCK, count])  # and no third one
    monkeypatch.setattr(os, "pwritev", lambda *arguments: next(answers))
    with pytest.raises(OSError, match="nothing could be written") as caught:
        file.write(0, [b"x" * SIZE])
    assert caught.value.errno == errno.EIO


def test_a_closed_file_cannot_be_used(file: DirectFile) -> None:
    file.close()
    file.close()
    uses: list[Callable[[], object]] = [
        lambda: read(file, 0, 1),
        lambda: file.write(0, [b"x"]),
        file.barrier,
    ]
    for use in uses:
        with pytest.raises(ValueError, match="closed"):
            use()


def test_a_file_is_not_opened_if_its_block_size_is_unknown(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(direct_io, "_block_size", failing(errno.ENOTTY))
        with pytest.raises(OSError, match=os.strerror(errno.ENOTTY)):
            DirectFile(str(path))


def test_a_missing_file_is_not_created(folder: Path) -> None:
    with pytest.raises(FileNotFoundError):
        DirectFile(str(folder / "missing"))
    assert not (folder / "missing").exists()


# --- the descriptor -----------------------------------------------------------------------------


def test_all_calls_use_one_descriptor(
    path: Path, file: DirectFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system reports an error only to the descriptor that wrote."""
    used: list[int] = []

    def move(descriptor: int, *arguments: object) -> int:
        used.append(descriptor)
        return BLOCK

    monkeypatch.setattr(os, "preadv", move)
    monkeypatch.setattr(os, "pwritev", move)
    monkeypatch.setattr(os, "fdatasync", used.append)
    file.write(5, [b"x"])
    file.barrier()
    (descriptor,) = set(used)
    assert len(used) == 3
    assert os.path.samestat(os.fstat(descriptor), path.stat())
    assert not os.get_inheritable(descriptor)


@pytest.mark.parametrize("platform", ["darwin", "win32", "freebsd14"])
def test_the_module_can_be_imported_on_every_system(
    monkeypatch: pytest.MonkeyPatch, platform: str
) -> None:
    source = direct_io.__file__
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", platform)
        patch.setitem(sys.modules, "fcntl", None)
        patch.delattr(os, "O_DIRECT")
        assert "DirectFile" in runpy.run_path(source)
