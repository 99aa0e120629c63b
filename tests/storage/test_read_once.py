"""A storage that is read once: whatever it remembers is what the storage has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from random import Random
from typing import TYPE_CHECKING

import pytest

from qcow2bm.errors import StorageError
from qcow2bm.storage.interface import WritableStorage, read_bytes
from qcow2bm.storage.memory import MemoryStorage
from qcow2bm.storage.read_once import ReadOnceStorage

if TYPE_CHECKING:
    from typing_extensions import Buffer

SIZE = 1 << 12


class Watched(MemoryStorage):
    """A storage that lists its reads, and can fail in the middle of a write."""

    def __init__(self, data: bytearray) -> None:
        super().__init__(data, "<watched>")
        self.data = data
        self.reads: list[tuple[int, int]] = []
        self.fails = False

    def read_into(self, offset: int, buffer: memoryview) -> int:
        self.reads.append((offset, len(buffer)))
        return super().read_into(offset, buffer)

    def write(self, offset: int, parts: Sequence[Buffer]) -> None:
        if self.fails:
            super().write(offset, parts[:1])
            raise StorageError(self.name, offset, 0, "broken")
        super().write(offset, parts)


@pytest.fixture
def watched() -> Watched:
    return Watched(bytearray(Random(1).randbytes(SIZE)))


def test_it_is_a_storage(watched: Watched) -> None:
    assert isinstance(ReadOnceStorage(watched), WritableStorage)


def test_nothing_is_remembered_unless_it_is_asked_for(watched: Watched) -> None:
    once = ReadOnceStorage(watched)
    for _ in range(2):
        assert read_bytes(once, 512, 512) == watched.data[512:1024]
    assert watched.reads == [(512, 512)] * 2


def test_what_was_read_is_not_read_again(watched: Watched) -> None:
    once = ReadOnceStorage(watched)
    with once.remembering():
        read_bytes(once, 512, 512)
    for length in (512, 100, 1):
        assert read_bytes(once, 512, length) == watched.data[512 : 512 + length]
    assert watched.reads == [(512, 512)]
    assert read_bytes(once, 512, 513) == watched.data[512:1025]
    assert len(watched.reads) == 2
    once.forget()
    read_bytes(once, 512, 512)
    assert len(watched.reads) == 3


def test_what_is_written_while_remembering_is_not_read(watched: Watched) -> None:
    once = ReadOnceStorage(watched)
    with once.remembering():
        once.write(1000, [b"abc", b"", b"defg"])
    assert (read_bytes(once, 1000, 3), read_bytes(once, 1003, 4)) == (b"abc", b"defg")
    assert watched.reads == []


@pytest.mark.parametrize("is_remembering", [False, True])
@pytest.mark.parametrize("start", [500, 512, 600, 1000, 1020])
def test_a_write_changes_what_is_remembered(
    watched: Watched, start: int, is_remembering: bool
) -> None:
    once = ReadOnceStorage(watched)
    with once.remembering():
        read_bytes(once, 512, 512)
        read_bytes(once, 520, 16)
    if is_remembering:
        with once.remembering():
            once.write(start, [b"x" * 20, b"y" * 20])
    else:
        once.write(start, [b"x" * 20, b"y" * 20])
    watched.reads.clear()
    assert read_bytes(once, 512, 512) == watched.data[512:1024]
    assert read_bytes(once, 520, 16) == watched.data[520:536]
    assert watched.reads == []


def test_after_a_write_that_failed_nothing_is_believed(watched: Watched) -> None:
    once = ReadOnceStorage(watched)
    with once.remembering():
        read_bytes(once, 0, SIZE)
        watched.fails = True
        with pytest.raises(StorageError):
            once.write(100, [b"x" * 50, b"y" * 50])
    assert read_bytes(once, 0, SIZE) == watched.data


@pytest.mark.parametrize(
    "work", [lambda once: once.truncate(SIZE // 2), lambda once: once.refresh()]
)
def test_what_else_may_change_bytes_makes_it_forget(
    watched: Watched, work: Callable[[ReadOnceStorage], object]
) -> None:
    once = ReadOnceStorage(watched)
    with once.remembering():
        read_bytes(once, 0, 512)
        work(once)
    watched.reads.clear()
    read_bytes(once, 0, 512)
    assert watched.reads == [(0, 512)]


@pytest.mark.parametrize("seed", range(40))
def test_any_reads_and_writes(seed: int) -> None:
    """Every read must return what the storage has, in any order and at any place."""
    random = Random(seed)
    watched = Watched(bytearray(random.randbytes(SIZE)))
    once = ReadOnceStorage(watched)
    places = [random.randrange(SIZE - 600) for _ in range(6)]
    for step in range(300):
        start, length = random.choice(places), random.choice((0, 1, 8, 64, 512))
        start += random.choice((0, 0, 0, 7))
        match random.randrange(20):
            case 0:
                once.forget()
            case 1:
                once.forget()
                once = deepcopy(once)
                watched = once._storage  # type: ignore[assignment]
            case number if number < 8:
                parts = [random.randbytes(length), bytes(random.choice((0, 5)))]
                if number % 2:
                    with once.remembering():
                        once.write(start, parts)
                else:
                    once.write(start, parts)
            case number if number < 14:
                with once.remembering():
                    assert read_bytes(once, start, length) == watched.data[start : start + length]
            case _:
                found = read_bytes(once, start, length)
                assert found == watched.data[start : start + length], step
